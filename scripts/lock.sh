#!/usr/bin/env bash
# Remakes the lock files from pyproject.toml. Keeps the pins it can; arguments go to uv:
#   ./scripts/lock.sh                        after a change of pyproject.toml
#   ./scripts/lock.sh --upgrade              move everything to its newest version
#   ./scripts/lock.sh --upgrade-package NAME move one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv=$(command -v uv || true)
if [[ -z $uv ]]; then
    # shellcheck source=scripts/lib/setup.sh
    source scripts/lib/setup.sh
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    "$(find_python)" -m venv "$scratch"
    "$scratch/bin/pip" install -qq uv
    uv=$scratch/bin/uv
fi

# One set of pins for every platform, with hashes, and no index named: whoever installs chooses where from.
compile() {
    "$uv" pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-emit-find-links --custom-compile-command ./scripts/lock.sh "$@"
}
compile --output-file requirements/runtime.lock "$@"
compile --output-file requirements/dev.lock --extra dev --constraints requirements/runtime.lock "$@"
echo "lock: $(grep -c == requirements/runtime.lock) packages in runtime.lock, $(grep -c == requirements/dev.lock) in dev.lock"
