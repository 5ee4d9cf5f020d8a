#!/usr/bin/env bash
# Make the environment of one peer: make_env.sh PEER FOLDER, PEER being a requirements-PEER.txt beside this file.
# Each peer pins torch and transformers of its own, so none of them is in the workspace's lock; expect 5 to 7 GB each, less where the index offers torch for
# CPUs. onnxruntime and ggml (built from source, some minutes) are small; FOLDER/lib/python3.11/site-packages of those is for `kernels.py --peers`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ $# -ne 2 ] || [ ! -f "$here/requirements-$1.txt" ]; then
  echo "usage: make_env.sh PEER FOLDER; peers: $(cd "$here" && ls requirements-*.txt | sed 's/requirements-//; s/.txt//' | tr '\n' ' ')" >&2
  exit 2
fi
uv venv --quiet --python 3.11 "$2"
export VIRTUAL_ENV=$2
if [ "$1" = gptqmodel ]; then
  # its setup.py imports torch, so torch comes first and the build sees the environment
  uv pip install --quiet setuptools wheel packaging ninja $(grep '^torch==' "$here/requirements-$1.txt")
  uv pip install --quiet --no-build-isolation -r "$here/requirements-$1.txt"
else
  uv pip install --quiet -r "$here/requirements-$1.txt"
fi
uv pip freeze | grep -iE '^(torch|transformers|llmcompressor|compressed-tensors|gptqmodel|auto-round|hqq|torchao|onnxruntime|llama-cpp-python)==' || true
