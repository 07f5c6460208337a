"""Which cases an experiment has, in which order they are launched, and what may not change. Pure.

* strong, two arms over the numbers of stages, with the same prompts: `memory-filling` (every stage
  keeps its batch, so N stages have N times as many prompts in flight), and `fixed-total` (as many
  prompts in flight on any number of stages).
* weak: prompts and batch grow with the stages.
* batch: the same prompts and stages, more and more prompts in flight.

A batch is spread over as many slots as there are stages, equally: a slot with fewer sequences than
the others would be a bubble that the experiment has made itself.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpipipe.errors import ConfigError
from mpipipe.experiments.record import Arm, Case, ExperimentName, Matrix, RunSlot

__all__ = [
    "VARIED",
    "ExperimentOptions",
    "differences",
    "launch_order",
    "make_cases",
    "num_prompts_needed",
]

# What the cases set themselves.
VARIED = (
    "pipeline.replicas",
    "pipeline.num_stages",
    "pipeline.num_slots",
    "pipeline.max_sequences_per_slot",
    "prompts.limit",
    "output.dir",
    "output.overwrite",
    "output.resume",
)
_MOST_BY_DEFAULT = 32  # prompts in flight, as `auto` takes for a slot on a CPU


@dataclass(frozen=True, slots=True)
class ExperimentOptions:
    """What was asked for on the command line, checked by `make_cases`."""

    experiment: ExperimentName
    stages: tuple[int, ...]
    nodes: tuple[int, ...]  # by number of stages
    batches: tuple[int, ...] = ()  # empty: the experiment's default
    num_prompts: int = 0  # weak: for each stage; 0: all
    prompt_tokens: int = 0  # 0: the configuration's own prompts
    repeat: int = 5
    seed: int = 0
    timeout_s: float = 600.0


def num_prompts_needed(options: ExperimentOptions) -> int:
    """How many prompts `--prompts` comes to in the largest case."""
    grows = max(options.stages) if options.experiment == "weak" else 1
    return options.num_prompts * grows


def make_cases(
    options: ExperimentOptions, num_available: int, words: Sequence[str] = ()
) -> tuple[Case, ...]:
    """The cases of an experiment over `num_available` prompts; `words` are added to each.

    Raises:
        ConfigError: they cannot be made from these prompts, batches and stages.
    """
    if len(options.nodes) != len(options.stages):
        raise ConfigError(
            f"--nodes has {len(options.nodes)} numbers and --stages {len(options.stages)}: give "
            "one for each number of stages, or a single one for all"
        )
    for stages, nodes in zip(options.stages, options.nodes, strict=True):
        if nodes > stages:
            raise ConfigError(
                f"{stages} stages cannot be spread over {nodes} nodes: every node needs a stage"
            )
    needed = num_prompts_needed(options)
    if needed > num_available:
        raise ConfigError(
            f"the experiment needs {needed} prompts, and there are {num_available}: give a longer "
            "prompt file, lower --prompts, or let it make prompts with --prompt-tokens"
        )
    build = {"strong": _strong, "weak": _weak, "batch": _batch}[options.experiment]
    cases = [
        dataclasses.replace(case, name=_name(case, options), words=(*words, *case.words))
        for case in build(options, num_available)
    ]
    twice = [name for name, number in Counter(case.name for case in cases).items() if number > 1]
    if twice:
        raise ConfigError(f"the case {twice[0]} is asked for twice: give each number once")
    return tuple(cases)


def _name(case: Case, options: ExperimentOptions) -> str:
    if case.arm == "batch":
        return f"batch_{case.batch}"
    nodes = f"_on{case.num_nodes}" if len(set(options.stages)) < len(options.stages) else ""
    return f"{case.arm}_n{case.num_stages}{nodes}"


def _strong(options: ExperimentOptions, num_available: int) -> list[Case]:
    num_prompts = options.num_prompts or num_available
    asked = _one_batch(options)
    total = asked or min(num_prompts, _MOST_BY_DEFAULT)
    places = list(zip(options.stages, options.nodes, strict=True))
    filling = [
        _case("memory-filling", place, asked and place[0] * asked, num_prompts) for place in places
    ]
    return filling + [_case("fixed-total", place, total, num_prompts) for place in places]


def _weak(options: ExperimentOptions, num_available: int) -> list[Case]:
    per_stage = options.num_prompts or num_available // max(options.stages)
    if not per_stage:
        raise ConfigError(
            f"{num_available} prompts are too few for {max(options.stages)} stages: each stage "
            "needs one at least"
        )
    batch = _one_batch(options) or min(per_stage, _MOST_BY_DEFAULT)
    return [
        _case("weak", place, place[0] * batch, place[0] * per_stage)
        for place in zip(options.stages, options.nodes, strict=True)
    ]


def _batch(options: ExperimentOptions, num_available: int) -> list[Case]:
    if len(options.stages) != 1:
        raise ConfigError(
            f"--stages {','.join(map(str, options.stages))}: the batch experiment keeps the number "
            "of stages; run it once for each"
        )
    num_prompts = options.num_prompts or num_available
    batches = options.batches or tuple(
        1 << power for power in range(7) if 1 << power <= num_prompts
    )
    place = (options.stages[0], options.nodes[0])
    return [_case("batch", place, batch, num_prompts) for batch in sorted(batches)]


def _one_batch(options: ExperimentOptions) -> int | None:
    if len(options.batches) > 1:
        raise ConfigError(
            f"--batch {','.join(map(str, options.batches))}: the {options.experiment} experiment "
            "takes one batch; the batch experiment varies it"
        )
    return options.batches[0] if options.batches else None


def _case(arm: Arm, place: tuple[int, int], batch: int | None, num_prompts: int) -> Case:
    stages, nodes = place
    slots: int | str = "auto"
    per_slot: int | str = "auto"
    if batch is not None:
        slots, per_slot = _slots(batch, stages, num_prompts)
    return Case(
        name="",
        arm=arm,
        num_stages=stages,
        num_nodes=nodes,
        num_replicas=1,
        batch=batch,
        num_prompts=num_prompts,
        words=(
            f"prompts.limit={num_prompts}",
            "pipeline.replicas=1",
            f"pipeline.num_stages={stages}",
            f"pipeline.num_slots={slots}",
            f"pipeline.max_sequences_per_slot={per_slot}",
        ),
    )


def _slots(batch: int, stages: int, num_prompts: int) -> tuple[int, int]:
    """Slots, and sequences in each: `batch` in all."""
    if batch > num_prompts:
        raise ConfigError(
            f"a batch of {batch} needs as many prompts, and there are {num_prompts}: lower --batch "
            "(strong and weak: it counts for each stage), or give more prompts (--prompts)"
        )
    slots = min(stages, batch)
    if batch % slots and batch < num_prompts:
        raise ConfigError(
            f"a batch of {batch} does not fill {slots} slots equally, one for each of {stages} "
            f"stages: choose a multiple of {slots}"
        )
    return slots, -(-batch // slots)


def launch_order(cases: Sequence[Case], repeat: int, seed: int) -> tuple[RunSlot, ...]:
    """Every case once in a random order, then again in another, `repeat` times.

    So a machine that slows down or is used by others for a while hits all cases alike.
    """
    draw = random.Random(f"launch order {seed}")
    order: list[RunSlot] = []
    for number in range(1, repeat + 1):
        block = [RunSlot(case.name, number) for case in cases]
        draw.shuffle(block)
        order += block
    return tuple(order)


def differences(old: Matrix, new: Matrix) -> list[str]:
    """What has changed between two matrices, a phrase each; empty: they are the same."""
    found = [
        f"{name}: {short_before} → {short_after}"
        for name, short_before, short_after in _changed(_plain(old), _plain(new))
    ]
    found += [
        f"{key}: {before} → {after}" for key, before, after in _changed(old.settings, new.settings)
    ]
    if not found and old.cases != new.cases:
        changed = _changed(
            {case.name: case for case in old.cases}, {case.name: case for case in new.cases}
        )
        found = [f"the case {name}" for name, _, _ in changed]
    return found


def _plain(matrix: Matrix) -> Mapping[str, object]:
    return {
        "experiment": matrix.experiment,
        "cases": ", ".join(case.name for case in matrix.cases),
        "batches": ", ".join(str(case.batch or "auto") for case in matrix.cases),
        "prompts": ", ".join(str(case.num_prompts) for case in matrix.cases),
        "nodes": ", ".join(str(case.num_nodes) for case in matrix.cases),
        "repeats": matrix.repeat,
        "seed": matrix.seed,
        "time limit in s": matrix.timeout_s,
        "content of the prompts": matrix.prompts_hash[:12],
        "version of mpipipe": matrix.version,
    }


def _changed(
    old: Mapping[str, object], new: Mapping[str, object]
) -> list[tuple[str, object, object]]:
    names = dict.fromkeys((*old, *new))
    return [
        (name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)
    ]
