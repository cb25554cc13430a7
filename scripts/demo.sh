#!/usr/bin/env bash
# Starts the service on this machine and shows it at work: ./scripts/demo.sh [--once]
# Workers are containers where Docker is there, else plain processes; RUNTIME=docker|process decides it by hand.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/lib/setup.sh
source scripts/lib/setup.sh
# shellcheck source=scripts/lib/docker.sh
source scripts/lib/docker.sh
setup

obstacle=
if [[ ${RUNTIME:-} != process ]]; then
    if ! docker_available; then
        obstacle="no Docker engine answers"
    elif ! .venv/bin/python scripts/build_images.py echo || ! .venv/bin/python scripts/build_images.py enclave ||
        { [[ -e /dev/nvidiactl ]] && ! .venv/bin/python scripts/build_images.py carwash; }; then
        obstacle="the images could not be built (see above)"
    else
        export RUNTIME=docker
    fi
fi
if [[ -n $obstacle && ${RUNTIME:-} == docker ]]; then
    echo "demo: RUNTIME=docker was asked for, but $obstacle." >&2
    exit 1
elif [[ -n $obstacle ]]; then
    echo "demo: WARNING: $obstacle: workers run as plain processes, not isolated from this machine." >&2
    export RUNTIME=process
fi
exec .venv/bin/python scripts/demo.py "$@"
