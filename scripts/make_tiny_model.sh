#!/usr/bin/env bash
# Makes the tiny language model of the tests: ./scripts/make_tiny_model.sh FOLDER
# FOLDER is a folder of models (MODEL_CACHE_DIR); the model is FOLDER/tiny. Needs the image gpu-server/vllm-cpu:dev.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -ne 1 ]]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
exec docker run --rm --network none --user "$(id -u):$(id -g)" --env HOME=/tmp \
    --volume "$PWD/scripts:/scripts:ro" --volume "$folder:/out" \
    gpu-server/vllm-cpu:dev /venv/bin/python /scripts/make_tiny_model.py /out/tiny
