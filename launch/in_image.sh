#!/usr/bin/env bash
# One rank inside the image: `srun … launch/in_image.sh mpipipe run x.toml`. Started by run.sh.
#
# The image sees a clean environment: no LD_LIBRARY_PATH, PYTHONPATH or user site of the host, whose
# libraries would take the place of its own. What ranks need is named below and passed one by one.
set -euo pipefail

command=${MPIPIPE_APPTAINER:-$(command -v apptainer || command -v singularity)} || {
    echo "in_image.sh: neither apptainer nor singularity is on $(hostname): load its module" \
        "(MPIPIPE_MODULES), or set MPIPIPE_APPTAINER." >&2
    exit 5
}

passed='^(MPIPIPE|SLURM|SLURMD|PMI|PMI2|PMIX|PRTE|OMPI|MPICH|MPIR|HYDRA|I_MPI|UCX|FI|PSM2|NCCL|CUDA|NVIDIA|OMP|MKL|OPENBLAS|HF|TRANSFORMERS|TOKENIZERS|TORCH|TRITON)_|^(GPU_DEVICE_ORDINAL|PYTHONNOUSERSITE|LANG|TZ|USER)$'
# Not where the host's MPI and CUDA are installed. (PMIX_DSTORE_…_PATH: where PMIx clients meet.)
dropped='^(PMIX|PRTE|OMPI|MPICH|MPIR|HYDRA|I_MPI|UCX|FI|PSM2|NCCL|CUDA|NVIDIA|OMP|MKL)_(.*_)?([Pp][Rr][Ee][Ff][Ii][Xx]|ROOT|HOME|PATH(_V[0-9_]+)?|[a-z_]*path|(BIN|LIB|DATA|INCLUDE)*DIR)$'
while IFS= read -r name; do
    [[ ! $name =~ $passed || ($name =~ $dropped && $name != PMIX_DSTORE_*) ]] || export "APPTAINERENV_$name=${!name}" "SINGULARITYENV_$name=${!name}"
done < <(compgen -e)

# --no-eval: a job name with a $ in it is a name, not a command. Apptainer 1.1 or newer.
flags=(--cleanenv --no-eval --pwd "$PWD")
if [ "${MPIPIPE_NV:-auto}" = on ] || { [ "${MPIPIPE_NV:-auto}" = auto ] && [ -e /dev/nvidiactl ]; }; then
    flags+=(--nv)
fi
# Where a PMIx library meets Slurm's PMIx server; the demo model and tokenizers; compiled kernels.
for path in "${MPIPIPE_CACHE:-}" "${TRITON_CACHE_DIR:-}"; do
    [ -z "$path" ] || mkdir -p "$path" || true # a folder that is not there cannot be bound
done
for path in "${PMIX_SERVER_TMPDIR:-}" "${MPIPIPE_CACHE:-}" "${TRITON_CACHE_DIR:-}"; do
    [ ! -d "$path" ] || flags+=(--bind "$path")
done
IFS=, read -ra binds <<<"${MPIPIPE_JOB_BINDS:-},${MPIPIPE_BINDS:-}"
for bind in ${binds[@]+"${binds[@]}"}; do
    [ -z "$bind" ] || flags+=(--bind "$bind")
done
# shellcheck disable=SC2086  # a list of flags
exec "$command" exec "${flags[@]}" ${MPIPIPE_APPTAINER_FLAGS:-} "$MPIPIPE_IMAGE" "$@"
