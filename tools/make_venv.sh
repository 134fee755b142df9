#!/bin/sh
# Makes a virtual environment with CPython 3.12, the only version OpenFHE publishes a binary for.
# Looks at $PYTHON, python3.12, pyenv's installed versions and uv, in this order.
set -eu
venv=$1

works() {
    # A pyenv shim exists for versions that are not active, so only running it tells.
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12) or sys.implementation.name != "cpython")' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if ! works "$PYTHON"; then
        echo "PYTHON=$PYTHON is not a CPython 3.12 with venv; name one, or unset PYTHON to search" >&2
        exit 2
    fi
    "$PYTHON" -m venv "$venv"
    exit
fi

for candidate in python3.12 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
    "$HOME"/.local/share/uv/python/cpython-3.12*/bin/python3.12; do
    if works "$candidate"; then
        "$candidate" -m venv "$venv"
        exit
    fi
done

if command -v uv >/dev/null 2>&1; then
    uv venv --seed --python 3.12 "$venv"
    exit
fi

echo "no CPython 3.12 found; install one (for example: apt install python3.12-venv, pyenv install 3.12, or uv) or say make PYTHON=/path/to/python3.12" >&2
exit 2
