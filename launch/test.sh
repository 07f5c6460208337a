#!/usr/bin/env bash
# Everything tox runs, from nothing: lint, types, unit, contract, MPI on 1, 2 and 4 ranks, end to end,
# kills and signals (chaos), runs slowed on purpose (as root), the report's page in Chromium and a Slurm cluster on this machine (both as root on Debian, as
# they install packages; MPIPIPE_PAGE_TESTS=off and MPIPIPE_SLURM_TESTS=off leave them out).
#
#   ./launch/test.sh                       all
#   ./launch/test.sh unit,mpi-2            some environments
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

make_venv
[ -x "$venv/bin/tox" ] || "$venv/bin/python" -m pip install --quiet "tox>=4.11"
export PATH="$venv/bin:$PATH"
# A test that is skipped has not been passed: only GPU tests may be left out.
export MPIPIPE_NO_SKIPS=1
all=lint,type,unit,contract,mpi-1,mpi-2,mpi-4,e2e,chaos,slowed
[ "${MPIPIPE_PAGE_TESTS:-on}" = off ] || all+=,page
[ "${MPIPIPE_SLURM_TESTS:-on}" = off ] || all+=,slurm
exec tox run -e "${1:-$all}"
