# shellcheck shell=bash
# Sourced by demo.sh and test.sh: a virtual environment in .venv, found or made.
# No logic here that belongs in Python.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
venv=${MPIPIPE_VENV:-$root/.venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1

# The first Python of version 3.11 or newer.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "mpipipe needs Python 3.11 or newer, and none was found: install one, or set PYTHON to it." >&2
    return 1
}

# A path with a space as a URL: pip reads the variable as a list with spaces between.
default_constraint() {
    local path=$root/launch/constraints.txt python
    if [[ $path = *[[:space:]]* ]]; then
        python=$(find_python) || return
        "$python" -c 'import pathlib, sys; print(pathlib.Path(sys.argv[1]).as_uri())' "$path"
    else
        echo "$path"
    fi
}

PIP_CONSTRAINT=${PIP_CONSTRAINT:-$(default_constraint)} || exit 1
export PIP_CONSTRAINT

make_venv() {
    local python
    [ -x "$venv/bin/python" ] && return
    python=$(find_python)
    echo "Making a virtual environment in $venv with $("$python" --version) …"
    "$python" -m venv "$venv"
}

# The wheel that brings an MPI: none where the site has one that Python can load, mpich elsewhere.
mpi_wheel() {
    if [ -n "${MPIPIPE_MPI:-}" ]; then
        [ "$MPIPIPE_MPI" = site ] || echo "$MPIPIPE_MPI"
    elif ! "$venv/bin/python" -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI' >/dev/null 2>&1; then
        echo mpich
    fi
}

# The launcher that belongs to that MPI: the wheel's, or the site's.
find_mpiexec() {
    if [ -x "$venv/bin/mpiexec" ]; then
        echo "$venv/bin/mpiexec"
    elif command -v mpirun >/dev/null 2>&1; then
        echo mpirun
    else
        echo mpiexec
    fi
}
