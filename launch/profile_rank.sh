#!/usr/bin/env bash
# One rank under a profiler. run.sh starts it where the configuration says profile.tool; by hand:
#
#   mpirun -n 2 launch/profile_rank.sh perf runs/x mpipipe run configs/x.toml output.dir=runs/x profile.tool=perf
#
# Writes FOLDER/nsys_rank_<r>.nsys-rep, or FOLDER/perf_rank_<r>.txt beside the samples that it was made
# of (.data). Further flags: MPIPIPE_NSYS_FLAGS, MPIPIPE_PERF_FLAGS. Where the profiler is missing,
# or may not record, the command runs without it, and mpipipe says so. Exits with the command's code.
set -euo pipefail
[ $# -ge 3 ] || {
    echo "profile_rank.sh: give nsys or perf, a folder and a command" >&2
    exit 2
}
tool=$1 folder=$2
shift 2
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-${PMIX_RANK:-${SLURM_PROCID:-0}}}}

export MPIPIPE_PROFILER=$tool
if ! command -v "$tool" >/dev/null; then
    MPIPIPE_PROFILER=missing exec "$@"
fi
mkdir -p "$folder"
if [ "$tool" = nsys ]; then
    # shellcheck disable=SC2086  # a list of flags
    exec nsys profile --output="$folder/nsys_rank_$rank" --force-overwrite=true \
        ${MPIPIPE_NSYS_FLAGS:---trace=cuda,nvtx,osrt} "$@"
fi

# perf ends without having run the command where the kernel lets it record nothing.
if ! perf record --output=/dev/null true >/dev/null 2>&1; then
    MPIPIPE_PROFILER=refused exec "$@"
fi
file=$folder/perf_rank_$rank
# A stop is the command's to obey: what it ignores here, perf ignores too, and ends when the command has.
signals=USR1,USR2,HUP,INT,TERM
trap '' ${signals//,/ }
rm -f "$file.data" # perf would keep that of an earlier attempt
# perf that is told to end tells the command, and ends with a code of its own: what the command returns, in
# its own time, is told through descriptor 9, whose end is waited for.
# shellcheck disable=SC2016  # for the inner shell
run='trap "" TERM; code=0; "$@" 9>&- || code=$?; echo "$code" >&9; exit "$code"'
code=0
exec 8>&1
# shellcheck disable=SC2086  # a list of flags
told=$(PYTHONPERFSUPPORT=1 perf record --quiet --output="$file.data" ${MPIPIPE_PERF_FLAGS:---freq=199} -- \
    bash -c "$run" run env --default-signal="$signals" "$@" 9>&1 >&8 8>&-) || code=$?
code=${told:-$code}
# In a job that is told to stop a minute or two are left.
timeout 60 perf report --stdio --input="$file.data" --percent-limit=0.1 >"$file.txt" 2>/dev/null ||
    echo "profile_rank.sh: no text could be made of $file.data in time: perf report -i $file.data" >&2
exit "$code"
