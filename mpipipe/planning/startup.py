"""What a job's start takes, from the start of its processes to the first step, by parts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.planning.cost import dtype_bytes
from mpipipe.planning.links import DISK_BYTES_PER_S
from mpipipe.planning.plan import PipelinePlan

__all__ = ["Startup", "startup_by_rates", "startup_of_parts"]

# Processes, MPI, prompts, imports, tokenizer: until ranks could load. Measured on two H200, 16
# cores a GPU: 4.8 to 7.5 s in 12 starts, mean 6.0, on one GPU and on two alike. (The first
# process of a machine reads torch from its disk: 9.7 s.)
_GPU_PROCESSES_S = 6.0
# What a load takes on a GPU beside weights. Measured in one start on two H200 whose kernels were
# compiled before, 2.2 s of which 0.2 were weights: plan, NCCL, loading kernels, trial steps 1.1; of
# CUDA graphs in 12 starts 0.7 to 1.1, mean 0.9, with 13 layers as with 32.
_GPU_LOAD_S = 1.1
_GPU_GRAPHS_S = 0.9
# Further graphs for steps that read common pages once: 0.25 and 0.45 s in one start each.
_COMMON_GRAPHS_S = 0.35
# What ranks wait for their kernels beyond that. Measured in two starts of a plan that was new to
# Triton's cache, with 10 processes that compile: 3.8 and 3.8 s.
_COMPILE_S = 3.8
# Of all but the weights. Measured: SmolLM2 on CPUs 4.4 to 6.2 s.
_CPU_STARTUP_S = 5.0


@dataclass(frozen=True, slots=True)
class Startup:
    """Seconds from the start of the processes to the first step."""

    start_s: float
    load_s: float  # of `start_s`
    compile_s: float = 0.0  # of `load_s`: waiting for kernels that were not compiled before


def startup_by_rates(spec: ModelSpec, plan: PipelinePlan, *, is_compiled: bool = False) -> Startup:
    """Of a machine of which nothing was measured; `is_compiled`: its kernels are, for `plan`."""
    processes_s = _GPU_PROCESSES_S if plan.device == "cuda" else _CPU_STARTUP_S
    return startup_of_parts(plan, processes_s, _weights_s(spec, plan), is_compiled=is_compiled)


def startup_of_parts(
    plan: PipelinePlan, processes_s: float, weights_s: float, *, is_compiled: bool
) -> Startup:
    """Of processes that could load after `processes_s`, and need `weights_s` for weights."""
    if plan.device != "cuda":
        return Startup(processes_s + weights_s, weights_s)
    # Other attention's kernels are not known before they are launched.
    compile_s = 0.0 if is_compiled or plan.attention != "triton" else _COMPILE_S
    graphs_s = _GPU_GRAPHS_S + plan.read_prefixes_once * _COMMON_GRAPHS_S
    load_s = weights_s + _GPU_LOAD_S + plan.cuda_graphs * graphs_s + compile_s
    return Startup(processes_s + load_s, load_s, compile_s)


def _weights_s(spec: ModelSpec, plan: PipelinePlan) -> float:
    """Reading weights from a slow disk, which the ranks of a host share; random ones are made."""
    if plan.weights == "random":
        return 0.0
    share = dtype_bytes(spec.dtype) / dtype_bytes(plan.dtype)
    by_host: dict[str, float] = {}
    for stage in plan.stages:
        read = len(stage.ranks) * stage.weight_bytes * share
        by_host[stage.host] = by_host.get(stage.host, 0.0) + read
    return max(by_host.values()) / DISK_BYTES_PER_S
