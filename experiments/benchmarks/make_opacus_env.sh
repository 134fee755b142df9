#!/usr/bin/env bash
# Makes the environment that the comparison with Opacus runs in, apart from the project's own:
# Opacus needs PyTorch, which the project does not.
#
#     experiments/benchmarks/make_opacus_env.sh [FOLDER]
#
# FOLDER defaults to fedjax_llm_opacus in the system's temporary folder, where privacy.py looks for
# it (or where FEDJAX_LLM_OPACUS points). About 1.3 GB; a folder that is complete is left as it is.
set -euo pipefail

folder="${1:-${TMPDIR:-/tmp}/fedjax_llm_opacus}"
# For CPython 3.11 this version of PyTorch comes as a build for CPUs; others bring gigabytes of CUDA.
# The first interpreter that can make an environment: a version manager's shim may lead nowhere.
python="${PYTHON311:-}"
for candidate in $(type -ap python3.11); do
    [ -n "$python" ] && break
    "$candidate" -c "import ensurepip, venv" 2>/dev/null && python="$candidate"
done
if [ -z "$python" ]; then
    echo "needs CPython 3.11; give its path in PYTHON311" >&2
    exit 1
fi

if [ ! -f "$folder/complete" ]; then
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet \
        "torch==2.13.0" "opacus==1.6.0" "safetensors>=0.6" "numpy>=2.0"
    "$folder/bin/python" -c "import opacus, safetensors, torch"
    touch "$folder/complete"
fi
echo "$folder"
