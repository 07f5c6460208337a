#!/usr/bin/env bash
# All GPU benchmarks and tests on this machine; prints one table. The last measured, on two H200: the
# benchmarks 250 s, the tests 238 s, each in a call of its own.
#
#   ./launch/bench_gpu.sh
#   ./launch/bench_gpu.sh --only pipeline,tests --out /tmp/results
#
# Runs from the source tree with PYTHON (python3): torch, transformers, mpi4py, msgpack, structlog,
# rich and typer must be importable there, and an mpirun on PATH. As root, Open MPI wants
# OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 where its own flag is not enough.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" launch/bench_gpu.py "$@"
