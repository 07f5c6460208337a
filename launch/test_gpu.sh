#!/usr/bin/env bash
# The tests that need an NVIDIA GPU, in about four minutes; `tox -e gpu` does just this.
#
#   ./launch/test_gpu.sh                      all
#   ./launch/test_gpu.sh -k engine -x         words for pytest: only tests/gpu, and only those
#
# 1. tests/gpu, and of tests/contract what runs on the GPU where there is one (kernels, sampler,
#    engine), in parallel with pytest-xdist where that is installed (PYTEST_WORKERS; by default one
#    for two cores, at most 16).
# 2. tensors between two ranks (tests/gpu/test_tensor_channel_gpu.py) and sums over the lanes of a
#    stage (tests/gpu/test_lanes_gpu.py) under mpirun; over NCCL where two GPUs are in sight, and
#    tensors in any case staged over MPI.
#
# Runs from the source tree with PYTHON (python3), installs nothing: torch for the GPU, transformers,
# mpi4py, msgpack, structlog, rich, typer and pytest must be importable there, and an mpirun or
# mpiexec on PATH for whatever needs ranks. pytest-timeout and pytest-xdist are used if they are
# there. Two GPUs are enough for everything; what one GPU cannot run is skipped and listed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
# Under tox, python3 would be that of tox's own empty environment.
[ -z "${TOX_ENV_DIR:-}" ] || PATH=${PATH//"$TOX_ENV_DIR/bin:"/}
# A whole path: Open MPI's mpirun may put other folders first in PATH.
python=$(command -v "${PYTHON:-python3}")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No GPU that $python's torch can use: run this where nvidia-smi shows one, or set PYTHON." >&2
    exit 5
fi

has() {
    "$python" -c "import sys, importlib.util as u; sys.exit(u.find_spec('$1') is None)"
}

# Only the plugins that are meant: others that happen to be here warn, and a warning is an error.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
options=(-q)
if has pytest_timeout; then
    options+=(-p pytest_timeout)
else # tox.ini speaks to it
    options+=(-o addopts= -W ignore::pytest.PytestConfigWarning)
fi
parallel=()
# nproc takes OMP_NUM_THREADS for the number of cores.
workers=${PYTEST_WORKERS:-$((($(env -u OMP_NUM_THREADS nproc) + 1) / 2))}
[ "$workers" -le 16 ] || workers=16
if has xdist; then parallel=(-p xdist -n "$workers" --dist worksteal); fi

failed=0
part() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    "$@" || failed=1
    echo "== $name: $((SECONDS - started)) s"
}

if [ $# -eq 0 ]; then
    # In one go: the workers' imports are a good part of the time.
    part "one process each" "$python" -m pytest "${options[@]}" "${parallel[@]}" tests/gpu \
        tests/contract/test_kernels.py tests/contract/test_common_attention.py \
        tests/contract/test_quantized_kernels.py \
        tests/contract/test_device_sampler.py tests/contract/test_stage_engine.py \
        tests/contract/test_stage_worker.py
else
    part "tests/gpu" "$python" -m pytest "${options[@]}" "${parallel[@]}" tests/gpu -m gpu "$@"
fi
if [ $# -eq 0 ]; then
    launcher=$(command -v mpirun || command -v mpiexec || true)
    if [ -z "$launcher" ]; then
        echo "No mpirun on PATH: tensors between two ranks are not tested." >&2
        failed=1
    else
        ranks=("$launcher" -n 2)
        if "$launcher" --version 2>&1 | grep -q -e "Open MPI" -e OpenRTE; then
            ranks+=(--oversubscribe --bind-to none)
            [ "$(id -u)" -ne 0 ] || ranks+=(--allow-run-as-root)
        fi
        mpi=()
        if has pytest_mpi; then mpi=(-p pytest_mpi --with-mpi); fi
        part "two ranks" timeout --kill-after=10 120 "${ranks[@]}" "$python" -m mpi4py -m pytest \
            "${options[@]}" "${mpi[@]}" tests/gpu/test_tensor_channel_gpu.py tests/gpu/test_lanes_gpu.py
    fi
fi
exit "$failed"
