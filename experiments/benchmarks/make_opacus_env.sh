#!/usr/bin/env bash
# Makes the environment that the comparison with Opacus runs in, apart from the project's own:
# Opacus needs PyTorch, which the project does not.
#
#     experiments/benchmarks/make_opacus_env.sh [FOLDER]
#
# FOLDER defaults to fedjax_llm_opacus in the system's temporary folder, where privacy.py looks for
# it (or where FEDJAX_LLM_OPACUS points). About 1.3 GB; a folder that is complete is left as it is.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

folder="${1:-${TMPDIR:-/tmp}/fedjax_llm_opacus}"
# For CPython 3.11 this version of PyTorch comes as a build for CPUs; others bring gigabytes of CUDA.
make_environment "$folder" "opacus, safetensors, torch" \
    "torch==2.13.0" "opacus==1.6.0" "safetensors>=0.6" "numpy>=2.0"
echo "$folder"
