"""Checks a job before it runs: model, output folder, prompts, plan against memory. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpipipe.config.prompts import PromptLine
from mpipipe.doctor.finding import Finding, fatal, ok, split_advice, warning
from mpipipe.doctor.probes.folders import FolderFacts
from mpipipe.errors import EXIT_CONFIG
from mpipipe.planning.memory import gib
from mpipipe.planning.plan import PipelinePlan

__all__ = [
    "HostDemand",
    "check_folders",
    "check_memory",
    "check_plan",
    "check_prompts",
]

_GB = 1e9
_LONG_LOAD_S = 300.0
_LITTLE_SPACE = 2**30
_NO_SPACE = 16 * 2**20
_SLOW_WRITE = 1e6  # completions are small; below this the disk or its server is in trouble
_EPHEMERAL = frozenset({"overlay", "fuse.overlayfs", "fuse-overlayfs", "tmpfs", "ramfs"})
_CLOSE = 0.9  # of the limit: one busy moment more and the kernel ends the job

_FREE_SPACE = "free space there, or choose another output.dir"


# ---- folders -------------------------------------------------------------------------------------


def check_folders(
    folders: Sequence[FolderFacts],
    *,
    container: str = "",
    largest_stage_bytes: int = 0,
    demo: bool = False,
) -> list[Finding]:
    """Model and output folder as each host sees them, the head's host first.

    Args:
        folders: one per host.
        container: `apptainer`, `docker` or empty.
        largest_stage_bytes: what one rank reads of the model at least; 0: not known.
        demo: the model comes from a package.
    """
    findings = []
    for host in folders:
        some_have_it = any(not other.model_problem for other in folders)
        model = _model(host, some_have_it and not demo, largest_stage_bytes)
        findings += [model.at(host.host), _output(host, container).at(host.host)]
    return findings


def _model(facts: FolderFacts, elsewhere: bool, largest_stage_bytes: int) -> Finding:
    if facts.model_problem:
        what, remedy = split_advice(facts.model_problem)
        cause = "the path is wrong, or the folder was copied in part"
        if elsewhere:
            cause = "the folder is not on a file system that this host sees, though others do"
            remedy = (
                "copy it to a file system that all hosts share, or bind it into the container "
                "(MPIPIPE_BINDS in launch/site.env)"
            )
        remedy = remedy or "copy the model to a folder that all hosts see"
        return fatal("job.model", what, cause, remedy, facts.model_exit_code)
    system = f" on {facts.model_system}" if facts.model_system else ""
    what = f"complete, {gib(facts.model_bytes)}{system}" if facts.model_bytes else "config.json"
    speed = facts.read_bytes_per_s
    if not speed:
        return ok("job.model", what, model_bytes=facts.model_bytes)
    seconds = largest_stage_bytes / speed
    what += f", read at {speed / _GB:.2f} GB/s"
    values = {"read_bytes_per_s": speed, "model_bytes": facts.model_bytes}
    if seconds < _LONG_LOAD_S:
        return ok("job.model", what, **values)
    return warning(
        "job.model",
        f"{what}: loading takes {seconds / 60:.0f} minutes at least",
        "a slow or busy file system",
        "copy the model to the nodes' local disk or to scratch first",
        **values,
    )


def _output(facts: FolderFacts, container: str) -> Finding:
    where = f"{facts.output} ({facts.output_system or 'unknown file system'})"
    free_bytes = facts.output_free_bytes
    unfit = None
    if facts.output_problem:
        unfit = (
            f"{where} cannot be written: {facts.output_problem}",
            "a read-only mount or bind, a full quota, or no permission",
            "choose an output.dir on scratch that all hosts can write to",
        )
    elif not facts.output_shared:
        unfit = (
            f"{where} is another folder here than on the head's host",
            "the folder is local to each host (/tmp), or not bound into the container",
            "choose an output.dir on a file system that all hosts share",
        )
    elif free_bytes is not None and free_bytes < _NO_SPACE:
        what, remedy = f"{where} has {gib(free_bytes)} of space left", _FREE_SPACE
        unfit = (what, "the disk is full", remedy)
    if unfit is not None:
        return fatal("job.output", *unfit, EXIT_CONFIG)
    what = f"{where}, {'free space unknown' if free_bytes is None else gib(free_bytes) + ' free'}"
    known = {} if free_bytes is None else {"free_bytes": free_bytes}
    values = {"write_bytes_per_s": facts.write_bytes_per_s, **known}
    if facts.write_bytes_per_s:
        what += f", written at {facts.write_bytes_per_s / 1e6:.0f} MB/s"
    if container and facts.output_system in _EPHEMERAL:
        cause = "the folder is the container's own, and gone when it ends"
        remedy = "bind a folder of the host and write there (apptainer --bind)"
    elif free_bytes is not None and free_bytes < _LITTLE_SPACE:
        cause, remedy = "the disk is nearly full", _FREE_SPACE
    elif 0 < facts.write_bytes_per_s < _SLOW_WRITE:
        cause = "a slow or busy file system: every completion waits for it"
        remedy = "choose an output.dir on scratch"
    else:
        return ok("job.output", what, **values)
    return warning("job.output", what, cause, remedy, **values)


# ---- prompts, plan, memory -----------------------------------------------------------------------


def check_prompts(lines: Sequence[PromptLine]) -> Finding:
    """How many of the prompts can be completed."""
    wrong = [line for line in lines if line.error is not None]
    if not wrong:
        return ok("job.prompts", f"{len(lines)} prompts", num_prompts=len(lines))
    return warning(
        "job.prompts",
        f"{len(wrong)} of {len(lines)} prompts are unusable, first: {wrong[0].error}",
        "the lines are not as the README describes them",
        "mend them, or leave it: they become error records and the others are completed",
        num_prompts=len(lines),
        num_unusable=len(wrong),
    )


def check_plan(plan: PipelinePlan) -> Finding:
    """What would run where; of several replicas, whose plan is the first one's."""
    replicas = f"{plan.num_replicas} replicas, the first of " if plan.num_replicas > 1 else ""
    lanes = f" on {plan.tensor_parallel} ranks each" if plan.tensor_parallel > 1 else ""
    split = " + ".join(str(stage.num_layers) for stage in plan.stages)
    stages = f"{plan.num_stages} stage{'s' * (plan.num_stages > 1)}"
    tensors = f", tensors over {plan.transport}" if plan.num_stages > 1 else ""
    return ok(
        "job.plan",
        f"{replicas}{stages} of {split} layers{lanes} in {plan.dtype} on {plan.device}{tensors}, "
        f"{plan.num_kv_pages} KV pages (mpipipe plan shows all)",
        num_stages=plan.num_stages,
    )


@dataclass(frozen=True, slots=True)
class HostDemand:
    """Memory of one host: what the plan puts there, what the libraries take, what there is."""

    host: str
    weight_bytes: int
    kv_bytes: int
    library_bytes: int  # once for the host what its ranks share
    available_bytes: int
    limit_bytes: int | None = None  # of the cgroup

    @property
    def needed_bytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.library_bytes

    @property
    def cannot_fit(self) -> bool:
        """Certainly too little: the KV cache fills slowly and perhaps never, weights do at once.

        Where the weights are on GPUs, the libraries' share is no more than a guess.
        """
        least_bytes = self.weight_bytes + self.library_bytes
        return bool(self.weight_bytes) and least_bytes > self.available_bytes


def check_memory(demand: HostDemand) -> Finding:
    """Whether the plan fits what the cgroup leaves, before the kernel ends the job."""
    parts = [f"{gib(demand.library_bytes)} of libraries"]
    if demand.weight_bytes:
        parts += [f"{gib(demand.weight_bytes)} of weights", f"{gib(demand.kv_bytes)} of KV cache"]
    limit = demand.limit_bytes
    within = "" if limit is None else f" (the cgroup's limit is {gib(limit)})"
    what = (
        f"about {gib(demand.needed_bytes)} needed ({', '.join(parts)}), "
        f"{gib(demand.available_bytes)} available{within}"
    )
    values = {"needed_bytes": demand.needed_bytes, "available_bytes": demand.available_bytes}
    if demand.needed_bytes <= _CLOSE * demand.available_bytes:
        finding = ok("job.memory", what, **values)
    else:
        level = fatal if demand.cannot_fit else warning
        ask = -(-demand.needed_bytes * 5 // 4) // 2**30 + 1
        finding = level(
            "job.memory",
            what,
            "the job asked for too little memory: the kernel kills it when it is used up (exit 137)"
            if limit is not None
            else "the host has too little memory for the plan",
            f"sbatch --mem={ask}G, more hosts, or lower memory.kv_cache_bytes",
            **values,
        )
    return finding.at(demand.host)
