#!/usr/bin/env bash
# Builds the images that the demo and the tests run: ./scripts/build_images.sh [echo|hostile|enclave|vllm-cpu|vllm|all|full]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=scripts/lib/setup.sh
source scripts/lib/setup.sh
setup
exec .venv/bin/python scripts/build_images.py "$@"
