"""Which cases an experiment has, in which order they are launched, and what may not change. Pure.

* strong, two arms over the numbers of stages, with the same prompts: `memory-filling` (every stage
  keeps its batch, so N stages have N times as many prompts in flight), and `fixed-total` (as many
  prompts in flight on any number of stages).
* weak: prompts and batch grow with the stages.
* batch: the same prompts and stages, more and more prompts in flight.
* arrangements: the same prompts on the same ranks, as replicas, stages and lanes in every way.

The others may have several replicas, and several lanes a stage: as many in all cases. A batch is
spread over the replicas, and there over as many slots as there are stages, equally: a slot with
fewer sequences than the others would be a bubble that the experiment has made itself.
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
    "Place",
    "differences",
    "launch_order",
    "make_cases",
    "num_prompts_needed",
]

# What the cases set themselves.
VARIED = (
    "pipeline.replicas",
    "pipeline.num_stages",
    "pipeline.tensor_parallel",
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
    stages: tuple[int, ...]  # of a replica
    nodes: tuple[int, ...]  # by number of stages
    batches: tuple[int, ...] = ()  # empty: the experiment's default
    num_prompts: int = 0  # weak: for each stage; 0: all
    prompt_tokens: int = 0  # 0: the configuration's own prompts
    repeat: int = 5
    seed: int = 0
    timeout_s: float = 600.0
    replicas: int = 1
    lanes: int = 1  # ranks of each stage
    # arrangements: replicas, stages and lanes of each case, in the place of all the others
    arrangements: tuple[tuple[int, int, int], ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the cases run, in order.

        Raises:
            ConfigError: there is not one number of nodes for each, or a node would have no rank.
        """
        cuts = self.arrangements or tuple((self.replicas, n, self.lanes) for n in self.stages)
        if len(self.nodes) != len(cuts):
            raise ConfigError(
                f"--nodes has {len(self.nodes)} numbers and --stages {len(cuts)}: give one for "
                "each number of stages, or a single one for all"
            )
        places = tuple(Place(*cut, nodes) for cut, nodes in zip(cuts, self.nodes, strict=True))
        for place in places:
            if place.nodes > place.ranks:
                raise ConfigError(
                    f"{place.words} cannot be spread over {place.nodes} nodes: every node needs "
                    "a stage"
                )
        return places


@dataclass(frozen=True, slots=True)
class Place:
    """What a case runs on."""

    replicas: int
    stages: int  # of a replica
    lanes: int
    nodes: int

    @property
    def ranks(self) -> int:
        """Of all replicas."""
        return self.replicas * self.stages * self.lanes

    @property
    def words(self) -> str:
        """E.g. "2 replicas of 4 stages of 2 lanes"."""
        words = f"{self.stages} stages"
        if self.replicas > 1:
            words = f"{self.replicas} replicas of {words}"
        return words if self.lanes == 1 else f"{words} of {self.lanes} lanes"


def num_prompts_needed(options: ExperimentOptions) -> int:
    """How many prompts `--prompts` comes to in the largest case."""
    grows = options.replicas * max(options.stages) if options.experiment == "weak" else 1
    return options.num_prompts * grows


def make_cases(
    options: ExperimentOptions, num_available: int, words: Sequence[str] = ()
) -> tuple[Case, ...]:
    """The cases of an experiment over `num_available` prompts; `words` are added to each.

    Raises:
        ConfigError: they cannot be made from these prompts, batches and stages.
    """
    places = options.places
    needed = num_prompts_needed(options)
    if needed > num_available:
        raise ConfigError(
            f"the experiment needs {needed} prompts, and there are {num_available}: give a longer "
            "prompt file, lower --prompts, or let it make prompts with --prompt-tokens"
        )
    build = {
        "strong": _strong, "weak": _weak, "batch": _batch, "arrangements": _arrangements
    }[options.experiment]  # fmt: skip
    cases = [
        dataclasses.replace(case, name=_name(case, options), words=(*words, *case.words))
        for case in build(options, places, num_available)
    ]
    twice = [name for name, number in Counter(case.name for case in cases).items() if number > 1]
    if twice:
        raise ConfigError(f"the case {twice[0]} is asked for twice: give each number once")
    return tuple(cases)


def _name(case: Case, options: ExperimentOptions) -> str:
    if case.arm == "batch":
        return f"batch_{case.batch}"
    if case.arm == "arrangements":
        return f"r{case.num_replicas}_n{case.num_stages}_t{case.num_lanes}"
    nodes = f"_on{case.num_nodes}" if len(set(options.stages)) < len(options.stages) else ""
    return f"{case.arm}_n{case.num_stages}{nodes}"


def _strong(options: ExperimentOptions, places: Sequence[Place], num_available: int) -> list[Case]:
    num_prompts = options.num_prompts or num_available
    asked = _one_batch(options)
    total = asked or min(num_prompts, _MOST_BY_DEFAULT)
    filling = [
        _case("memory-filling", place, asked and _per_stage(place, asked), num_prompts)
        for place in places
    ]
    return filling + [_case("fixed-total", place, total, num_prompts) for place in places]


def _weak(options: ExperimentOptions, places: Sequence[Place], num_available: int) -> list[Case]:
    most = max(_per_stage(place, 1) for place in places)
    per_stage = options.num_prompts or num_available // most
    if not per_stage:
        raise ConfigError(
            f"{num_available} prompts are too few for {most} stages: each stage needs one at least"
        )
    batch = _one_batch(options) or min(per_stage, _MOST_BY_DEFAULT)
    return [
        _case("weak", place, _per_stage(place, batch), _per_stage(place, per_stage))
        for place in places
    ]


def _per_stage(place: Place, number: int) -> int:
    """So many for each stage of each replica."""
    return place.replicas * place.stages * number


def _arrangements(
    options: ExperimentOptions, places: Sequence[Place], num_available: int
) -> list[Case]:
    batch, num_prompts = _one_batch(options), options.num_prompts or num_available
    return [_case("arrangements", place, batch, num_prompts) for place in places]


def _batch(options: ExperimentOptions, places: Sequence[Place], num_available: int) -> list[Case]:
    if len(options.stages) != 1:
        raise ConfigError(
            f"--stages {','.join(map(str, options.stages))}: the batch experiment keeps the number "
            "of stages; run it once for each"
        )
    num_prompts = options.num_prompts or num_available
    batches = options.batches or tuple(
        1 << power for power in range(7) if 1 << power <= num_prompts
    )
    return [_case("batch", places[0], batch, num_prompts) for batch in sorted(batches)]


def _one_batch(options: ExperimentOptions) -> int | None:
    if len(options.batches) > 1:
        raise ConfigError(
            f"--batch {','.join(map(str, options.batches))}: the {options.experiment} experiment "
            "takes one batch; the batch experiment varies it"
        )
    return options.batches[0] if options.batches else None


def _case(arm: Arm, place: Place, batch: int | None, num_prompts: int) -> Case:
    slots: int | str = "auto"
    per_slot: int | str = "auto"
    if batch is not None:
        slots, per_slot = _slots(batch, place, num_prompts)
    return Case(
        name="",
        arm=arm,
        num_stages=place.stages,
        num_nodes=place.nodes,
        num_replicas=place.replicas,
        num_lanes=place.lanes,
        batch=batch,
        num_prompts=num_prompts,
        words=(
            f"prompts.limit={num_prompts}",
            f"pipeline.replicas={place.replicas}",
            f"pipeline.num_stages={place.stages}",
            f"pipeline.tensor_parallel={place.lanes}",
            f"pipeline.num_slots={slots}",
            f"pipeline.max_sequences_per_slot={per_slot}",
        ),
    )


def _slots(batch: int, place: Place, num_prompts: int) -> tuple[int, int]:
    """Slots of a replica, and sequences in each: `batch` in all replicas together."""
    replicas, stages = place.replicas, place.stages
    if batch > num_prompts:
        raise ConfigError(
            f"a batch of {batch} needs as many prompts, and there are {num_prompts}: lower --batch "
            "(strong and weak: it counts for each stage), or give more prompts (--prompts)"
        )
    slots = min(stages, max(1, batch // replicas))
    if batch % (replicas * slots) and batch < num_prompts:
        whose = f"{stages} stages" if replicas == 1 else place.words
        raise ConfigError(
            f"a batch of {batch} does not fill {replicas * slots} slots equally, one for each of "
            f"{whose}: choose a multiple of {replicas * slots}"
        )
    return slots, -(-batch // (replicas * slots))


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
        "replicas, stages and lanes": ", ".join(case.arrangement for case in matrix.cases),
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
