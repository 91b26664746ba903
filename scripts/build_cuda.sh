#!/usr/bin/env bash
# Builds the programs with CUDA on a machine that has NVIDIA's driver and no toolkit: compiler and
# libraries come from PyPI (about 600 MB, once) into target/cuda-toolkit.
#
# usage: scripts/build_cuda.sh [CAPABILITY]   such as 90 for an H100, 80 for an A100; default: this GPU's
# needs: python3 with pip, unzip, gcc
set -euo pipefail
cd "$(dirname "$0")/.."

toolkit="$PWD/target/cuda-toolkit"
capability="${1:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}"
driver="$(ldconfig -p | awk '/libcuda\.so\.1 / { print $NF; exit }')"
if [ -z "$driver" ]; then
    echo "error: libcuda.so.1 is missing: build where NVIDIA's driver is installed" >&2
    exit 1
fi

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
    ln -sf "$driver" "$toolkit/lib/libcuda.so"
    touch "$toolkit/ready"
fi

export CUDA_HOME="$toolkit" CUDA_PATH="$toolkit" PATH="$toolkit/bin:$PATH"
export CUDA_COMPUTE_CAP="$capability"
export RUSTFLAGS="${RUSTFLAGS:-} -C link-arg=-Wl,-rpath,$toolkit/lib"
cargo build --release --features cuda --target-dir target/cuda
