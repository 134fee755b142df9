#!/usr/bin/env bash
# Makes the environment of one peer, apart from the project's own.
#
#     experiments/benchmarks/peers/make_env.sh plain|plain-cuda|flower|pfl|fedjax FOLDER
#
# An environment with PyTorch takes about 1.2 GB. A folder that is complete is left as it is.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# For CPython 3.11 this version of PyTorch comes as a build for CPUs; others bring gigabytes of CUDA.
torch=("torch==2.13.0" "transformers==5.24.0" "peft==0.21.2" "safetensors>=0.6" "numpy>=2.0")
case "${1:-}" in
    plain)
        packages=("${torch[@]}")
        modules="torch, transformers, peft"
        ;;
    plain-cuda)
        # For CPython 3.12 (or what PYTHON312 names) the build has CUDA, several gigabytes of it.
        PYTHON311="${PYTHON312:-$(command -v python3.12 || true)}"
        packages=("${torch[@]}")
        modules="torch, transformers, peft"
        ;;
    flower)
        packages=("${torch[@]}" "flwr[simulation]==1.42.0")
        modules="torch, transformers, peft, flwr, ray"
        ;;
    pfl)
        packages=("${torch[@]}" "pfl==0.6.0")
        modules="torch, transformers, peft, pfl"
        ;;
    fedjax)
        # Its last release, of 2023, calls functions that JAX has dropped since. Of the versions that
        # run it (0.4.30, 0.5.3, and 0.10.2 with the functions put back) the first was the fastest.
        packages=("fedjax==0.0.17" "jax==0.4.30" "jaxlib==0.4.30" "dm-haiku==0.0.12" "optax==0.2.3"
            "numpy<2")
        modules="fedjax, haiku, jax, optax"
        ;;
    *)
        echo "usage: $0 plain|plain-cuda|flower|pfl|fedjax FOLDER" >&2
        exit 2
        ;;
esac
folder="${2:?give the folder}"

make_environment "$folder" "$modules" "${packages[@]}"
