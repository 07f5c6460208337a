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

# Suites whose tests are runs of many processes. A machine may do to one of these what no test can rule
# out, so what failed there, if it is little, is tried once more with nothing beside it. It is named
# among what failed in any case; what fails twice, hangs or fails elsewhere, fails for good.
try_again() { # succeeds where all that failed passes now
    local suite suites
    suites=$(grep -hoE '^  [a-z0-9-]+: FAIL' "$said"/* | sed -E 's/^ +//; s/:.*//')
    [ -n "$suites" ] && [ -z "$untold" ] || return 1
    # Other codes than 1: pytest ended before it had run all tests.
    ! grep -hE '^  [a-z0-9-]+: FAIL' "$said"/* | grep -qv ': FAIL code 1 ' || return 1
    ! grep -qE "worker '.*' crashed| node down: |^\++ Timeout \++| hung for [0-9]+ s " "$said"/* || return 1
    for suite in $suites; do
        case $suite in e2e | chaos | slowed | page | slurm) ;; *) return 1 ;; esac
        case $(cat "$said"/* | grep -cE "^(FAILED|ERROR) tests/$suite/") in [123]) ;; *) return 1 ;; esac
    done
    for suite in $suites; do
        echo "================ once more: what failed in $suite ================"
        if ! tox run -e "$suite" -- --last-failed --last-failed-no-failures=none; then
            tell_failures # again: they are a suite's output above the end
            return 1
        fi
    done
    echo "what failed above has passed on the second try: $(echo "$suites" | xargs)"
}

# A failure that tox has not told of an environment, as where tox itself ends early.
untold=''
note_failure() { # the code, and what of
    code=$1
    grep -qE '^  [a-z0-9-]+: FAIL' "$said/$2" || untold=$2
}

rm -f .tox/*/.pytest_cache/v/cache/lastfailed # of an earlier run
begin_beside lint
tox run --notest -e full
export MPIPIPE_TEST_SETUP= # it is up to date for all that follow
begin_beside type
[ "${MPIPIPE_SLURM_TESTS:-on}" = off ] || begin_beside slurm
code=0
run_now unit,contract || note_failure $? unit,contract
[ "${MPIPIPE_SLURM_TESTS:-on}" = off ] || end_beside slurm || note_failure $? slurm
end_beside type || note_failure $? type
# Ranks that wait for each other, limits, and cores that a run shall have for itself: alone from here.
rest=mpi-1,mpi-2,mpi-4,e2e,chaos,slowed
[ "${MPIPIPE_PAGE_TESTS:-on}" = off ] || rest+=,page
run_now "$rest" || note_failure $? "$rest"
end_beside lint || note_failure $? lint
if [ "$code" != 0 ]; then
    tell_failures
    if try_again; then code=0; fi
fi
exit "$code"
