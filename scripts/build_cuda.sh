#!/usr/bin/env bash
# Builds with CUDA on a machine that has no toolkit: compiler and libraries come from PyPI (about
# 700 MB, once) into target/cuda-toolkit. Without NVIDIA's driver the program is only linked against
# the names in it, and runs where the driver is.
#
# usage: scripts/build_cuda.sh [CAPABILITY [CARGO COMMAND]]
#   CAPABILITY: such as 90 for an H100 or H200, 80 for an A100; default: this machine's GPU
#   CARGO COMMAND: default: build --release; or say: test --release --test reference --test cuda
# needs: python3 with pip, unzip, gcc
set -euo pipefail
cd "$(dirname "$0")/.."

toolkit="$PWD/target/cuda-toolkit"
capability="${1:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}"
shift || true

if [ ! -e "$toolkit/ready" ]; then
    wheels="$(mktemp -d)"
    trap 'rm -rf "$wheels"' EXIT
    python3 -m pip download --no-deps --dest "$wheels" \
        nvidia-cuda-nvcc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
        nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-nvrtc==13.0.88 \
        nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35
    for wheel in "$wheels"/*.whl; do unzip -qo "$wheel" 'nvidia/*' -d "$wheels/all"; done
    rm -rf "$toolkit"
    mkdir -p "$(dirname "$toolkit")"
    mv "$wheels/all/nvidia/cu13" "$toolkit"
    chmod +x "$toolkit"/bin/* "$toolkit"/nvvm/bin/*
    # the linker looks for lib*.so, the wheels have lib*.so.N
    for library in "$toolkit"/lib/lib*.so.*; do
        ln -sf "$(basename "$library")" "${library%%.so.*}.so"
    done
    touch "$toolkit/ready"
fi

driver="$(ldconfig -p | awk '/libcuda\.so\.1 / { print $NF; exit }')"
if [ -n "$driver" ]; then
    ln -sf "$driver" "$toolkit/lib/libcuda.so"
else
    cargo fetch --quiet
    sources=("${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-*/src/driver/sys/mod.rs)
    grep -ohE 'fn cu[A-Z][A-Za-z0-9_]*' "${sources[@]}" | sort -u \
        | sed 's/fn \(.*\)/void \1(void) {}/' > "$toolkit/driver_names.c"
    gcc -shared -Wl,-soname,libcuda.so.1 -o "$toolkit/lib/libcuda.so" "$toolkit/driver_names.c"
fi

export CUDA_HOME="$toolkit" CUDA_PATH="$toolkit" PATH="$toolkit/bin:$PATH"
export CUDA_COMPUTE_CAP="$capability"
export RUSTFLAGS="${RUSTFLAGS:-} -C link-arg=-Wl,-rpath,$toolkit/lib"
[ $# -gt 0 ] || set -- build --release
cargo "$@" --features cuda --target-dir target/cuda
