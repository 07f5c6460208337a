#!/usr/bin/env bash
# All GPU benchmarks and tests on this machine; prints one table. launch/bench_gpu.py says what the
# words mean, launch/README.md what the parts are.
#
#   ./launch/bench_gpu.sh
#   ./launch/bench_gpu.sh --only pipeline,tests --out /tmp/results --list
#   ./launch/bench_gpu.sh --only boot,file --out after
#   ./launch/bench_gpu.sh --compare before after
#
# Runs the source tree that it is in, with PYTHON (python3): torch, transformers, mpi4py, msgpack,
# structlog, rich and typer must be importable there, and an mpirun on PATH. As root, Open MPI wants
# OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 where its own flag is not enough.
set -euo pipefail
# No cd: --out, --tree and --compare are the caller's paths.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/launch/bench_gpu.py" "$@"
