#!/usr/bin/env bash
# Inside a job (sbatch, salloc): one configuration over all tasks of the allocation.
#
#   ./launch/run.sh configs/openllama_3b.toml [section.key=value …]
#   ./launch/run.sh mpipipe-jobs/openllama_3b-4711        goes on with what that job left
#
# In order: the environment of site.env (modules; venv or image), a folder
# $MPIPIPE_SCRATCH/<config>-<job> with config/, prompts/ and outputs/, `mpipipe doctor` on all ranks,
# `mpipipe run` on all ranks, sacct. In a settings' value, %a is the number of the array task.
# Exits with the code of mpipipe: 0 done, 75 stopped in time and to be started again; and with 76
# where 75 came twice in a row without a new completion: starting it again would go on like that.
set -euo pipefail

child='' stopping='' cancelled='' interrupted=''
# shellcheck disable=SC2329  # by a trap
stop() { # the ranks are told; srun passes USR1 on to all of them
    stopping=1 interrupted=1
    [ -n "$child" ] || return 0
    # srun loses a signal of its first 0.03 s.
    [ $((SECONDS - started)) -ge 2 ] || sleep 1
    kill -USR1 "$child" 2>/dev/null || true
}
trap stop USR1 INT
trap 'cancelled=1 interrupted=1' TERM # scancel: Slurm ends the ranks; what it counted is still written

home=${MPIPIPE_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
# shellcheck source=launch/site.env
source "${MPIPIPE_SITE_ENV:-$home/launch/site.env}"

fail() { # with 75 where what failed was ended by a stop: Ctrl-C reaches all that runs
    echo "run.sh: $*" >&2
    [ -z "$stopping" ] || exit 75
    exit "${code:-2}"
}
[ $# -ge 1 ] || fail "give a configuration file: run.sh configs/x.toml [section.key=value …]"
[ -n "${SLURM_JOB_ID:-}" ] ||
    fail "this is no Slurm job: use sbatch launch/submit.sbatch; without Slurm: mpirun -n 2 mpipipe run $1"
config=$1
shift
words=("${@//%a/${SLURM_ARRAY_TASK_ID:-0}}")
# One task's name: SLURM_JOB_ID of the task that an array starts last is the id of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

# ---- environment ------------------------------------------------------------------------------
load_modules() { # the module command of a batch shell: inherited, or from the usual places
    local script
    for script in "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash" /etc/profile.d/{lmod,modules,z00_lmod}.sh; do
        if ! type module >/dev/null 2>&1 && [ -f "$script" ]; then
            # shellcheck source=/dev/null
            source "$script"
        fi
    done
    type module >/dev/null 2>&1 ||
        fail "MPIPIPE_MODULES=$MPIPIPE_MODULES, but there is no module command on $(hostname)"
    # shellcheck disable=SC2086  # a list of names
    module load $MPIPIPE_MODULES
}
if [ -n "$MPIPIPE_MODULES" ]; then
    set +eu # module scripts use variables that are not set
    load_modules
    set -eu
fi

# Nothing is fetched on a compute node, and a `pip install --user` of another torch stays out.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONNOUSERSITE=1
# After `sbatch --export=NONE` srun would give the ranks an empty environment; and since Slurm 22.05
# it does not take --cpus-per-task over from sbatch.
export SLURM_EXPORT_ENV=ALL
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# The ranks stop by themselves before the wall time. Older versions do not tell them when that is,
# and in an image there is no squeue to ask.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    ends=$(squeue --noheader --jobs="$job" --format=%e 2>/dev/null || true)
    SLURM_JOB_END_TIME=$(date -d "${ends:-unknown}" +%s 2>/dev/null || true)
    export SLURM_JOB_END_TIME
fi

bind_folder() { # a folder and the options of its bind; where its name leads through links, under both names
    local real
    real=$(readlink -f "$1" || true)
    [ -z "$real" ] || MPIPIPE_JOB_BINDS+=,$real:$real$2
    [ -z "$real" ] || [ "$real" = "$1" ] || MPIPIPE_JOB_BINDS+=,$real:$1$2
}
bind_model() { # it may be made of links, as Hugging Face's cache is: also what they point to
    local target
    bind_folder "$1" :ro
    while IFS= read -r target; do
        bind_folder "$target" :ro
    done < <(find -L "$1" -mindepth 1 -maxdepth 1 -exec readlink -f {} + 2>/dev/null |
        sed 's|/[^/]*$||' | sort -u | grep -vxF "$(readlink -f "$1")")
}

mkdir -p "$MPIPIPE_SCRATCH"
scratch=$(cd "$MPIPIPE_SCRATCH" && pwd -P)
inside=() # what a command is put behind to find mpipipe
if [ -n "$MPIPIPE_IMAGE" ]; then
    [ -e "$MPIPIPE_IMAGE" ] || fail "MPIPIPE_IMAGE=$MPIPIPE_IMAGE does not exist on $(hostname)"
    inside=("$home/launch/in_image.sh")
    config_folder=$(cd "$(dirname "$config")" && pwd)
    export MPIPIPE_JOB_BINDS=$scratch
    for path in "$PWD" "$config_folder"; do
        bind_folder "$path" ""
    done
    # The image's HOME may be another one, and XDG_CACHE_HOME is not passed on.
    [ -z "${XDG_CACHE_HOME:-}" ] || export MPIPIPE_CACHE="${MPIPIPE_CACHE:-$XDG_CACHE_HOME/mpipipe}"
elif [ -x "$MPIPIPE_VENV/bin/mpipipe" ]; then
    export PATH="$MPIPIPE_VENV/bin:$PATH"
fi
${inside[@]+"${inside[@]}"} mpipipe --version >/dev/null ||
    fail "mpipipe does not start on $(hostname): install it into MPIPIPE_VENV=$MPIPIPE_VENV," \
        "or set MPIPIPE_IMAGE (see $home/launch/README.md)"

# ---- workspace: copies of config and prompts, made once, so that a restart finds the same -------
resume=()
if [ -f "$config/job.env" ]; then # the folder of an earlier job
    folder=$(cd "$config" && pwd -P)
    [[ " ${words[*]-}" != *" output.dir="* ]] || fail "output.dir= contradicts the folder $config"
    resume=(output.resume=true ${words[@]+"${words[@]}"})
    [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$folder/strikes"
elif [ -d "$config" ]; then
    fail "$config is not the folder of an earlier job (no job.env): give that, or a configuration file"
else
    folder=$(${inside[@]+"${inside[@]}"} mpipipe slurm workspace "$config" \
        ${words[@]+"${words[@]}"} --scratch "$scratch") || {
        code=$?
        [ -z "$MPIPIPE_IMAGE" ] || echo "run.sh: the image sees MPIPIPE_SCRATCH, the folder of the" \
            "configuration, $PWD, and home: name others (of prompts, of files that the" \
            "configuration extends) in MPIPIPE_BINDS." >&2
        fail "the job's folder could not be made, see above"
    }
    folder=${folder%/job.env}
fi
words=() models=() profiler=none
# shellcheck source=/dev/null
source "$folder/job.env" # sets config, words, models and profiler
words+=(${resume[@]+"${resume[@]}"})
for word in ${words[@]+"${words[@]}"}; do # also one that is given only now
    [[ $word != profile.tool=* ]] || profiler=$(tr -d "\"'" <<<"${word#*=}")
done
watched=() # what a rank is put behind so that the profiler watches it
if [ "$profiler" = nsys ] || [ "$profiler" = perf ]; then
    watched=("$home/launch/profile_rank.sh" "$profiler" "$folder/outputs")
    [ -z "$MPIPIPE_IMAGE" ] || bind_folder "$home/launch" :ro
fi
# For `mpipipe status`, and for the command that goes on with this job: Slurm forgets it.
scontrol --oneliner show job "$job" >"$folder/scontrol.txt" 2>/dev/null || true
for path in ${models[@]+"${models[@]}"}; do
    # One that is missing is the doctor's to name.
    [ -z "$MPIPIPE_IMAGE" ] || [ ! -d "$path" ] || bind_model "$path"
done

# ---- steps --------------------------------------------------------------------------------------
mpi=$MPIPIPE_SRUN_MPI
if [ "$mpi" = auto ]; then
    mpi=$(${inside[@]+"${inside[@]}"} mpipipe slurm mpi-flag --available "$(srun --mpi=list 2>&1)") || {
        code=$?
        fail "a value for srun --mpi= could not be chosen, see above"
    }
fi

step() { # runs a command on all ranks, sets `code`
    code=75
    [ -z "$cancelled" ] || code=143
    [ -z "$stopping$cancelled" ] || return 0
    # shellcheck disable=SC2086  # a list of flags
    srun --mpi="$mpi" --kill-on-bad-exit=1 $MPIPIPE_SRUN_FLAGS ${inside[@]+"${inside[@]}"} "$@" &
    started=$SECONDS child=$!
    [ -z "$stopping" ] || stop # told between the lines above
    interrupted=1
    while [ -n "$interrupted" ]; do # a signal ends `wait` early, with a code that is not srun's
        interrupted=
        code=0
        wait "$child" || code=$?
    done
    child=
    # Told before it could hear: srun, or Python before it listens, is ended by the signal.
    [ -z "$stopping" ] || [ "$code" -le 128 ] || code=75
}

completed() { # the number of completions so far
    cat "$folder"/outputs/completions_rank_*.jsonl 2>/dev/null | wc -l || true
}

judge_progress() { # after a stop: an attempt without a new completion is a strike, and two are enough
    local strikes
    if [ "$(completed)" -gt "$before" ]; then
        rm -f "$folder/strikes"
        return
    fi
    strikes=$(($(cat "$folder/strikes" 2>/dev/null || echo 0) + 1))
    echo "$strikes" >"$folder/strikes"
    [ "$strikes" -ge 2 ] || return 0
    code=76
    echo "run.sh: two attempts in a row ended without a new completion, so the job is not started" \
        "again: give it more time (--time=), or shorter prompts (generation.max_new_tokens)." >&2
}

examined() { # what the doctor has found to be well: it need not look at the same again
    echo "${SLURM_JOB_NODELIST:-} $mpi $MPIPIPE_IMAGE $config ${words[*]-}"
}

choose_doctor() { # full, quick or off: the last minutes of a job are for its prompts
    local left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))
    if [ "$MPIPIPE_DOCTOR" = off ]; then
        echo off
    elif [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$(cat "$folder/examined" 2>/dev/null)" = "$(examined)" ]; then
        echo "run.sh: the doctor found these nodes well in an earlier attempt; not asked again" >&2
        echo off
    elif [ "$left" -lt 180 ]; then
        echo "run.sh: $left s are left, too few for the doctor" >&2
        echo off
    elif [ "$left" -lt 300 ]; then
        echo quick
    else
        echo "$MPIPIPE_DOCTOR"
    fi
}

account() { # what Slurm has counted of a job so far; fails without slurmdbd, when there is scontrol
    local file=$folder/outputs/sacct_$1.txt
    mkdir -p "$folder/outputs"
    if timeout 10 sacct --duplicates --parsable2 --jobs="$1" --format="$MPIPIPE_SACCT_FORMAT" >"$file.part" \
        2>/dev/null && [ "$(wc -l <"$file.part")" -gt 1 ]; then
        mv "$file.part" "$file"
    else # forgotten meanwhile: what is here stays
        rm -f "$file.part"
        [ -s "$file" ] || scontrol show job "$1" >"$file" 2>/dev/null || true
        return 1
    fi
}

account_earlier() { # of attempts that have ended since they wrote theirs; and a first file for this one
    local file earlier
    for file in "$folder"/outputs/sacct_*.txt; do
        earlier=${file##*/sacct_} earlier=${earlier%.txt}
        [ "$earlier" = "*" ] || [ "$earlier" = "$job" ] || ! grep -q '|RUNNING|' "$file" ||
            account "$earlier" || true
    done
    account "$job" || true
}

account_at_end() { # its steps have ended, but slurmdbd lags a few seconds
    local file=$folder/outputs/sacct_$job.txt _
    for _ in 1 2 3 4 5 6; do
        account "$job" || return 0
        grep -q '^[0-9_]*\.[0-9].*|RUNNING|' "$file" || [ "$(wc -l <"$file")" -lt 3 ] || return 0
        sleep 1
    done
}

echo "run.sh: job $job on ${SLURM_JOB_NODELIST:-?}, ${SLURM_NTASKS:-?} tasks," \
    "srun --mpi=$mpi, attempt $((${SLURM_RESTART_COUNT:-0} + 1))"
printf "run.sh: results in %q; progress: mpipipe status %q\n" "$folder/outputs" "$folder/outputs"
[ "${SLURM_NTASKS:-0}" -ge "${SLURM_JOB_NUM_NODES:-1}" ] || [ -z "${SLURM_NTASKS:-}" ] ||
    echo "run.sh: warning: $SLURM_NTASKS tasks on $SLURM_JOB_NUM_NODES nodes: a node without a task" \
        "does nothing; ask for fewer nodes (--nodes=), or for tasks on each (--ntasks-per-node=1)." >&2
account_earlier
code=0
before=$(completed)
doctor=$(choose_doctor)
if [ "$doctor" != off ]; then
    flags=()
    [ "$doctor" = full ] || flags=(--quick)
    step mpipipe doctor ${flags[@]+"${flags[@]}"} "$config" ${words[@]+"${words[@]}"}
    [ -z "$stopping" ] || code=75
    [ "$code" -ne 0 ] || examined >"$folder/examined"
fi
if [ "$code" -eq 0 ]; then
    step ${watched[@]+"${watched[@]}"} mpipipe run "$config" ${words[@]+"${words[@]}"}
elif [ "$code" -ne 75 ]; then
    echo "run.sh: the job ends here, before the model is loaded (doctor: $code); see above." >&2
fi
[ "$code" -ne 75 ] || judge_progress
account_at_end
exit "$code"
