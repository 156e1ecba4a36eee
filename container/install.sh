#!/bin/sh
# Make the environment of a GPU host: install.sh PYTHON VENV LIST, for example
#     sh container/install.sh python3.12 .venv-gpu requirements/gpu.txt
# PIP_OPTIONS goes to every pip call: "--no-index --find-links wheels" where wheels were carried.
# CUDA_HOME is the toolkit with nvcc, by default /usr/local/cuda. Transformer Engine's part for
# PyTorch is compiled here, against the torch of the list: minutes on many cores, 1.6 GB a job.
set -eu
python=$1 venv=$2 list=$3
te=$(sed -n 's/^transformer-engine==//p' "$list")
"$python" -m venv "$venv"
# shellcheck disable=SC2086 # options are words
"$venv/bin/pip" install ${PIP_OPTIONS:-} --no-deps -r "$list"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" NVTE_FRAMEWORK=pytorch
# Headers of cuDNN and NCCL, and of libraries that a small toolkit lacks, come with torch's wheels.
export CUDNN_PATH="$site/nvidia/cudnn"
headers="$site/nvidia/cudnn/include:$site/nvidia/nccl/include:$site/nvidia/cu13/include"
export CPATH="$headers${CPATH:+:$CPATH}"
export PATH="$(cd "$venv" && pwd)/bin:$PATH" MAX_JOBS="${MAX_JOBS:-8}"
# shellcheck disable=SC2086
"$venv/bin/pip" install ${PIP_OPTIONS:-} --no-deps --no-build-isolation \
  --no-binary transformer-engine-torch "transformer-engine-torch==$te"
