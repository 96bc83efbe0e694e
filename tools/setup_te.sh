#!/usr/bin/env bash
# Put TransformerEngine 2.16.1 into a directory of its own, beside an environment that has torch 2.11.0 for CUDA 13.
#
#   tools/setup_te.sh PYTHON DIRECTORY [WHEEL]
#
# Needs a package index (200 MB), 600 MB of disk and a C compiler. WHEEL is transformer_engine_torch 2.16.1 for Python
# 3.12, which no index carries: without it the wheel is built here, which also takes a CUDA 13.0 toolkit with nvcc
# (CUDA_HOME) and a C++ compiler, minutes on 16 cores and an hour or more on 2. It is kept in DIRECTORY/wheels.
#
# Afterwards: export PYTHONPATH=DIRECTORY/site LD_PRELOAD=DIRECTORY/libte_cublas_shim.so
set -euo pipefail
python=$1 wheel=${3:-}
mkdir -p "$2/wheels"
directory=$(cd "$2" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
version=2.16.1

build_wheel() {
  local site
  command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" >/dev/null || {
    echo "error: no WHEEL given and no nvcc (CUDA_HOME=${CUDA_HOME:-unset}) to build transformer_engine_torch $version with" >&2
    return 1
  }
  site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  # Headers of the mathematical libraries are in the wheels that torch brought, the compiler's own in the toolkit.
  CPATH=$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include:${CUDA_HOME:-/usr/local/cuda}/include \
    NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_FRAMEWORK=pytorch NVTE_WITH_NCCL_EP=0 \
    MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation \
    --require-hashes -w "$directory/wheels" -r "$here/../requirements/gpu-source.lock"
}

if [ -z "$wheel" ]; then
  wheel=$(find "$directory/wheels" -name "transformer_engine_torch-$version-*.whl" | head -1)
  if [ -z "$wheel" ]; then
    build_wheel
    wheel=$(find "$directory/wheels" -name "transformer_engine_torch-$version-*.whl" | head -1)
  fi
fi
[ -f "$wheel" ] || { echo "error: $wheel: no such wheel of transformer_engine_torch $version" >&2; exit 1; }

rm -rf "$directory/site"
mkdir -p "$directory/locked"
"$python" -m pip download -qq --disable-pip-version-check --no-deps --require-hashes --only-binary :all: \
  -d "$directory/locked" -r "$here/../requirements/te.lock"
# In one call: pip does not merge the binding into a package that already lies there.
"$python" -m pip install -qq --disable-pip-version-check --no-deps --no-index --target "$directory/site" \
  "$directory"/locked/*.whl "$wheel"
rm -rf "$directory/locked"
cc -shared -fPIC -O1 -o "$directory/libte_cublas_shim.so" "$here/te_cublas_shim.c"
LD_PRELOAD=$directory/libte_cublas_shim.so PYTHONPATH=$directory/site "$python" -W ignore -c '
import importlib.metadata, transformer_engine.pytorch
print("TransformerEngine", importlib.metadata.version("transformer-engine"), "imports")'
