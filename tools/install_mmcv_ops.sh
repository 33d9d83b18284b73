#!/usr/bin/env bash
# Build the compiled ops of mmcv against the installed torch, and install them: GenEval's Mask2Former needs
# them, and no package index has them. The first build takes minutes and is kept in ~/.cache/mmfgm for the next;
# where the ops work already, this ends at once.
#
#     bash tools/install_mmcv_ops.sh [PYTHON]
#
# PYTHON defaults to that of the active environment (venv or conda), else .venv/bin/python, else python. MAX_JOBS
# sets how many files are compiled at once. Where torch sees a GPU the ops are built for it, which needs the nvcc
# of torch's CUDA version.
set -euo pipefail
python="${1:-}"
for environment in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" .venv; do
  if [ -z "$python" ] && [ -n "$environment" ] && [ -x "$environment/bin/python" ]; then python="$environment/bin/python"; fi
done
python="${python:-python}"
# the build runs in another folder
python="$(cd "$(dirname "$(command -v "$python")")" && pwd)/$(basename "$python")"
echo "the interpreter is $python"
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
# a build without CUDA does not serve a torch that sees a GPU
works() {
  "$python" -c '
import sys, torch, mmcv.ops
print("the ops of mmcv work with torch", torch.__version__)
sys.exit(torch.cuda.is_available() and not mmcv.ops.get_compiling_cuda_version()[:1].isdigit())' 2> /dev/null
}
if works; then exit 0; fi
# version of mmcv, then what a build depends on
if ! read -r version key cuda < <("$python" -c '
import importlib.metadata, sys, torch
version = importlib.metadata.version("onedl-mmcv")
kinds = sorted({"sm{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
print(version, "-".join([f"mmcv{version}", f"torch{torch.__version__}", sys.implementation.cache_tag, *(kinds or ["cpu"])]),
      torch.version.cuda if kinds else "")'); then
  echo "error: $python has no torch or no onedl-mmcv; install them first: $python -m pip install 'mmfgm[geneval]'" >&2
  exit 2
fi
cache="${XDG_CACHE_HOME:-$HOME/.cache}/mmfgm/mmcv_ops/$key"
mkdir -p "$cache"
# a second one that starts meanwhile waits and finds the wheel
if command -v flock > /dev/null; then
  exec 9> "$cache/lock"
  flock 9
fi
if ! compgen -G "$cache/*.whl" > /dev/null; then
  for tool in "${CXX:-c++}" ${cuda:+nvcc}; do
    if ! command -v "$tool" > /dev/null; then
      echo "error: building mmcv's ops needs $tool${cuda:+, and the CUDA toolkit of version $cuda like torch}; install it" >&2
      exit 2
    fi
  done
  echo "Building the ops of mmcv $version into $cache (once; 6 minutes on 2 cores, more with CUDA) ..."
  # the wheel moves into place when it is whole, and is installed only from there
  building="$(mktemp -d "$cache/building.XXXXXX")"
  trap 'rm -rf "$building"' EXIT
  trap 'exit 130' INT TERM
  pip install --quiet 'setuptools>=80,<82' wheel ninja psutil packaging
  # mmcv asks for C++17, which the headers of newer versions of torch refuse: left out, torch chooses. Without
  # debug information and most of the optimizer a file takes a third of the time. pip's own cache would give the
  # wheel without ops.
  if ! (
    cd "$building" &&
      pip download --no-cache-dir --no-build-isolation --no-deps --no-binary onedl-mmcv "onedl-mmcv==$version" &&
      tar -xf onedl_mmcv-*.tar.gz && cd onedl_mmcv-*/ &&
      sed -i.orig "s/\['-std=c++17'\]/[]/" setup.py &&
      PATH="$(dirname "$python"):$PATH" CFLAGS="-g0 -O1" MAX_JOBS="${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
        FORCE_CUDA="${cuda:+1}" MMCV_WITH_OPS=1 \
        pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir "$building" .
  ) > "$building/log" 2>&1; then
    grep -m 5 -i 'error' "$building/log" >&2 || true
    tail -n 20 "$building/log" >&2
    echo "error: mmcv's ops could not be built; the first errors and the last lines of the build are above" >&2
    exit 1
  fi
  mv "$building"/*.whl "$cache/"
fi
pip install --quiet --no-deps --no-cache-dir --force-reinstall "$cache"/*.whl
if ! works; then
  echo "error: the ops in $cache do not work with this torch; delete that folder and run this again:" >&2
  "$python" -c 'import torch, mmcv.ops' >&2 || true
  exit 1
fi
