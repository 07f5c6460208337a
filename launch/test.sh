#!/usr/bin/env bash
# Everything tox runs, from nothing: lint, types, unit, contract, MPI on 1, 2 and 4 ranks, end to end,
# kills and signals (chaos), runs slowed on purpose (as root), the report's page in Chromium and a
# Slurm cluster on this machine (both as root on Debian, as they install packages;
# MPIPIPE_PAGE_TESTS=off and MPIPIPE_SLURM_TESTS=off leave them out).
#
#   ./launch/test.sh                       all
#   ./launch/test.sh unit,mpi-2            some environments
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ $# -gt 1 ]; then
    echo "test.sh takes one list of environments with commas between: $(IFS=,; echo "$*")" >&2
    exit 2
fi
make_venv
[ -x "$venv/bin/tox" ] || "$venv/bin/python" -m pip install --quiet "tox>=4.11"
export PATH="$venv/bin:$PATH"
# A test that is skipped has not been passed: only GPU tests may be left out.
export MPIPIPE_NO_SKIPS=1
# Colours would hide the lines that tell_failures looks for.
unset FORCE_COLOR
export NO_COLOR=1
[ $# -eq 0 ] || exec tox run -e "$1"

# Lint and types keep one core busy and know no time limits; the jobs of the Slurm cluster wait most
# of their time, and their limits are wide. They run beside others, which know no time limits.
declare -A beside
said=$(mktemp -d) # what each run of tox has said

# Each run beside others is a group of processes: tox alone would leave what it runs. As by Ctrl-C,
# after which pytest closes its Slurm cluster.
# shellcheck disable=SC2329 # the trap calls it
leave() {
    local pid
    for pid in "${beside[@]}"; do
        kill -INT -- "-$pid" 2>/dev/null || true
    done
    for pid in "${beside[@]}"; do
        wait "$pid" 2>/dev/null || true
    done
    rm -rf "$said"
}
trap leave EXIT

begin_beside() {
    set -m # a group of its own
    tox run -e "$1" >"$said/$1" 2>&1 </dev/null &
    set +m
    beside[$1]=$!
}

end_beside() {
    local code=0
    wait "${beside[$1]}" || code=$?
    unset "beside[$1]"
    cat "$said/$1"
    return "$code"
}

run_now() {
    tox run -e "$1" 2>&1 | tee "$said/$1"
}

# What failed, within the last screen of a long log: environments, tests, and tests that hung, which
# are in the stacks that end their process. Whole lines of what has no tests.
tell_failures() {
    local name
    echo "================ what failed ================"
    for name in lint type; do
        ! grep -q "^  $name: FAIL" "$said/$name" ||
            tail -n 15 "$said/$name" | grep -v "^  $name: FAIL" || true
    done
    grep -hE '^  [a-z0-9-]+: FAIL' "$said"/* || true
    grep -hE '^(FAILED|ERROR) |, in test_\w+$| hung for [0-9]+ s ' "$said"/* |
        cut -c1-180 | awk '!seen[$0]++' | head -n 25 || true
}

begin_beside lint
tox run --notest -e full
export MPIPIPE_TEST_SETUP= # it is up to date for all that follow
begin_beside type
[ "${MPIPIPE_SLURM_TESTS:-on}" = off ] || begin_beside slurm
code=0
run_now unit,contract || code=$?
[ "${MPIPIPE_SLURM_TESTS:-on}" = off ] || end_beside slurm || code=$?
end_beside type || code=$?
# Ranks that wait for each other, limits, and cores that a run shall have for itself: alone from here.
rest=mpi-1,mpi-2,mpi-4,e2e,chaos,slowed
[ "${MPIPIPE_PAGE_TESTS:-on}" = off ] || rest+=,page
run_now "$rest" || code=$?
end_beside lint || code=$?
[ "$code" = 0 ] || tell_failures
exit "$code"
