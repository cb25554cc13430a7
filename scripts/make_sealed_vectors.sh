#!/usr/bin/env bash
# Writes the test vectors of the sealed protocol: ./scripts/make_sealed_vectors.sh [FOLDER]
# FOLDER is docs/sealed-vectors if it is not named. The same files come out each time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/lib/setup.sh
source scripts/lib/setup.sh
setup
exec .venv/bin/python -m scripts.make_sealed_vectors "$@"
