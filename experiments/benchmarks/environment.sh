# Makes the environment of a peer, apart from the project's own; to be sourced.
#
#     make_environment FOLDER MODULES PACKAGE...
#
# MODULES, as `import` takes them, are imported to see that all is there. A folder that is complete
# is left as it is; an environment that is not is made anew.

make_environment() {
    local folder="$1" modules="$2" python="${PYTHON311:-}" candidate
    shift 2
    if [ -f "$folder/complete" ]; then
        return
    fi
    # The first interpreter that can make an environment: a version manager's shim may lead nowhere.
    for candidate in $(type -ap python3.11); do
        [ -n "$python" ] && break
        "$candidate" -c "import ensurepip, venv" 2>/dev/null && python="$candidate"
    done
    if [ -z "$python" ]; then
        echo "needs CPython 3.11; give its path in PYTHON311" >&2
        return 1
    fi
    if [ -f "$folder/pyvenv.cfg" ]; then
        rm -rf "$folder"
    fi
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet "$@"
    "$folder/bin/python" -c "import $modules"
    touch "$folder/complete"
}
