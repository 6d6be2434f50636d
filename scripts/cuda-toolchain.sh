#!/usr/bin/env bash
# nvcc 13.0 for a machine that has neither a GPU nor a CUDA toolkit, from the wheels that
# scripts/cuda-toolchain.txt pins by version and digest (about 100 MB to download, 270 MB on disk).
#
#   eval "$(scripts/cuda-toolchain.sh)"
#   cargo build --release --features cuda
#
# Prints the exports of NVCC, CUDA_HOME and PATH; everything else goes to standard error. The program
# links to nothing of CUDA, so a compiler and headers are all that a build needs.
#
#   CUDA_TOOLCHAIN_DIR   where it is kept; default ${XDG_CACHE_HOME:-~/.cache}/lora-hbm/cuda
#   PYTHON               the Python whose pip downloads; default python3
set -euo pipefail

# Under `eval "$(…)"` the status of this script is lost; what it prints is not.
fail() {
  printf 'cuda-toolchain: %s\n' "$1" >&2
  echo false
  exit 1
}

pins="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/cuda-toolchain.txt"
[ -r "$pins" ] || fail "$pins cannot be read: it stands beside this script and says what to install"
python="${PYTHON:-python3}"

case "$(uname -s) $(uname -m)" in
  "Linux x86_64" | "Linux aarch64") ;;
  *) fail "no CUDA compiler is published as a wheel for $(uname -sm), only for Linux on x86_64 and aarch64: build on one of these" ;;
esac

store="${CUDA_TOOLCHAIN_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/lora-hbm/cuda}"
mkdir -p "$store" || fail "$store cannot be made: set CUDA_TOOLCHAIN_DIR to a folder that can"
store="$(cd "$store" && pwd)"
case "$store" in
  *["'\$\`\"\\:"]*) fail "the folder '$store' has a character that a PATH or a shell would misread: set CUDA_TOOLCHAIN_DIR to another" ;;
esac

# Named after what is in it, so that other pins get another folder; and it appears under that name in
# one rename, when it is finished and has compiled something.
digest="$(sha256sum <"$pins")"
home="$store/${digest:0:16}"

if [ ! -d "$home" ]; then
  "$python" -m pip --version >/dev/null 2>&1 \
    || fail "'$python -m pip' does not run: install Python 3 with pip (or set PYTHON), or install CUDA 13.0 and set CUDA_HOME"
  partial="$(mktemp -d "$store/partial.XXXXXX")"
  trap 'rm -rf "$partial"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-input --root-user-action=ignore --no-deps --no-compile \
    --only-binary=:all: --require-hashes --target "$partial" --requirement "$pins" >&2 \
    || fail "pip could not install what $pins names (its message is above): is the package index reachable?"
  made="$partial/nvidia/cu13"
  echo '__global__ void nothing(int *p) { *p = 0; }' >"$partial/nothing.cu"
  "$made/bin/nvcc" --fatbin -gencode=arch=compute_80,code=compute_80 -gencode=arch=compute_90a,code=sm_90a \
    -o "$partial/nothing.fatbin" "$partial/nothing.cu" >&2 \
    || fail "nvcc was installed and cannot compile an empty kernel (its message is above): it needs a host compiler (g++)"
  chmod 755 "$made"
  # Two runs at once both get here; the second finds the first one's and drops its own.
  mv -T "$made" "$home" 2>/dev/null || [ -x "$home/bin/nvcc" ] \
    || fail "$home could not be made: is $store writable, and is the disk full?"
fi
[ -x "$home/bin/nvcc" ] || fail "$home has no bin/nvcc: something else made it or emptied it; remove it and run this again"

cat <<END
export CUDA_HOME="$home"
export NVCC="$home/bin/nvcc"
export PATH="$home/bin:\$PATH"
END
