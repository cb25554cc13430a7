#!/usr/bin/env bash
# Every check there is: ./scripts/test.sh [--quick] [pytest arguments...]
# All of them run, even when an early one fails; the last line is pytest's summary.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/lib/setup.sh
source scripts/lib/setup.sh
# shellcheck source=scripts/lib/docker.sh
source scripts/lib/docker.sh

pytest_args=(--color=auto)
if [[ -t 1 ]]; then pytest_args=(--color=yes); fi
images=full
if [[ ${1:-} == --quick ]]; then
    pytest_args+=(-m "not slow")
    images=all
    shift
fi

failed=()
check() {
    local name=$1
    shift
    echo "--- $name"
    "$@" || failed+=("$name")
}

setup
export PATH="$ROOT/.venv/bin:$PATH"
check "docker engine" ensure_docker_for_ci
if docker_available; then
    check "images" python scripts/build_images.py "$images"
else
    echo "    no Docker engine answers: the tests marked docker cannot run (in CI they fail, elsewhere they skip)"
fi
check "ruff" ruff check .
check "format" ruff format --check .
check "mypy" mypy
check "imports" lint-imports

echo "--- pytest"
output=$(mktemp)
trap 'rm -f "$output"' EXIT
pytest "${pytest_args[@]}" "$@" </dev/null | tee "$output" || failed+=("pytest")

if [[ ${#failed[@]} -gt 0 ]]; then
    printf '\nFAILED: %s\n' "$(IFS=,; echo "${failed[*]}")"
    tail -n 1 "$output"
    exit 1
fi
