# shellcheck shell=bash
# Sourced by the scripts: `setup` makes .venv match the lock file, and does nothing when it already does.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# The first Python that is new enough; PYTHON=/path/to/python chooses another.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: Python 3.11 or newer is needed and none was found." >&2
    echo "       On Debian or Ubuntu: apt-get install python3 python3-venv; or set PYTHON to its path." >&2
    return 1
}

# Of what .venv is made from. The path is part of it, since a venv does not survive being copied elsewhere.
_fingerprint() {
    local digest=(sha256sum)
    command -v sha256sum >/dev/null || digest=(shasum -a 256)
    (cd "$ROOT" && pwd && cat "$@") | "${digest[@]}"
}
_lock_fingerprint() { _fingerprint requirements/dev.lock scripts/lib/setup.sh; }
_projects_fingerprint() { _fingerprint pyproject.toml worker_images/sdk/pyproject.toml; }

_stamp_is() { [[ -x $ROOT/.venv/bin/python && $(cat "$ROOT/.venv/$1" 2>/dev/null) == "$2" ]]; }

_is_current() { _stamp_is .lock-stamp "$(_lock_fingerprint)" && _stamp_is .projects-stamp "$(_projects_fingerprint)"; }

_pip() { "$ROOT/.venv/bin/python" -m pip --disable-pip-version-check install "$@"; }

# Runs a command quietly, and shows what it said only if it fails.
_logged() {
    local log=$ROOT/.cache/setup.log
    if ! "$@" >"$log" 2>&1 </dev/null; then
        grep -v '^WARNING' "$log" | tail -n 30 >&2
        echo "setup: failed; the whole log is $log" >&2
        return 1
    fi
}

_build_venv() {
    local python
    python=$(find_python) || return
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "setup: $python cannot make virtual environments (no venv or ensurepip)." >&2
        echo "       On Debian or Ubuntu: apt-get install" \
            "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2
        return 1
    fi
    echo "setup: installing requirements/dev.lock into .venv (about a minute, only when it changes)"
    rm -rf "$ROOT/.venv"
    _logged "$python" -m venv "$ROOT/.venv" || return
    _logged _pip --require-hashes -r "$ROOT/requirements/dev.lock" || return
    _lock_fingerprint >"$ROOT/.venv/.lock-stamp"
}

# From the lock alone, without a network: it holds the projects' build backend too.
_install_projects() {
    echo "setup: installing gpu_server and gpu_worker into .venv"
    _logged _pip --no-index --no-deps --no-build-isolation -e "$ROOT" -e "$ROOT/worker_images/sdk" || return
    _projects_fingerprint >"$ROOT/.venv/.projects-stamp"
}

setup() {
    if _is_current; then return; fi
    mkdir -p "$ROOT/.cache"
    (
        # Two runs at once: the second waits here, and then finds everything done.
        if command -v flock >/dev/null; then flock 9; fi
        _stamp_is .lock-stamp "$(_lock_fingerprint)" || _build_venv || exit
        _stamp_is .projects-stamp "$(_projects_fingerprint)" || _install_projects || exit
    ) 9>"$ROOT/.cache/setup.lock"
}
