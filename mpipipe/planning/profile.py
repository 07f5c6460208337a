"""A *profile*: measured times of a model's parts on one device, kept in a file for later plans.

`mpipipe plan --measure` writes it (`bench/profile.py`); `profile_times` interpolates it. A profile
holds for one `ProfileKey`: another model shape, device or version has a file of its own. A stage's
step is cut into parts that add up: per layer, the LM head with the sampler, the embedding, and what
a step costs beside these. Seconds and bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpipipe._version import __version__
from mpipipe.checkpoint.spec import ModelSpec
from mpipipe.demo.model import cache_folder
from mpipipe.errors import OutputError
from mpipipe.plain_values import from_json, to_json
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.resources import RankResources
from mpipipe.topology.packages import package_versions

__all__ = [
    "HopPoint",
    "Profile",
    "ProfileKey",
    "RowPoint",
    "StepPart",
    "TokenPoint",
    "merged_profile",
    "profile_folder",
    "profile_path",
    "read_profile",
    "unused_profile",
    "with_known_hops",
    "write_profile",
]

_FORMAT = 2  # of the file; another number is another file name, so that old files are not read


_KEY_WORDS = {
    "dtype": "model.dtype",
    "quantize": "model.quantize",
    "device": "device",
    "attention": "pipeline.attention",
    "cuda_graphs": "memory.cuda_graphs",
    "threads_per_rank": "pipeline.threads_per_rank",
    "num_lanes": "pipeline.tensor_parallel",
    "ranks_per_host": "ranks a host",
    "sampling": "sampling",
    "mpipipe": "mpipipe",
    "torch": "torch",
}


@functools.cache
def _torch_version() -> str:
    """It is read from a file, and a plan asks for it with every split that it tries."""
    return package_versions(["torch"])["torch"] or ""


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """All that the times of a profile depend on, and that does not vary from step to step."""

    shape: str  # of a layer, the embedding and the head (`shape_of`); not the number of layers
    dtype: str
    quantize: str
    device: str  # name of the GPU, or of the processor
    attention: str
    cuda_graphs: bool
    threads_per_rank: int  # that compute; 1 on GPUs
    num_lanes: int  # ranks that share a stage
    ranks_per_host: int  # that compute side by side on a host's cores; 1 on GPUs
    sampling: str  # operations of the sampler, e.g. "NOTHING" for greedy
    mpipipe: str
    torch: str

    @staticmethod
    def shape_of(spec: ModelSpec) -> str:
        """The sizes that decide what a layer, the embedding and the head cost."""
        sizes = (
            spec.hidden_size, spec.intermediate_size, spec.num_heads, spec.num_kv_heads,
            spec.head_dim, spec.vocab_size, spec.num_experts,
        )  # fmt: skip
        tied = ", tied" if spec.tied_embeddings else ""
        return f"{spec.model_type} {'x'.join(map(str, sizes))}{tied}"

    @staticmethod
    def of(
        plan: PipelinePlan, shape: str, resources: Sequence[RankResources], rank: int
    ) -> ProfileKey:
        """Of what `rank` computes under `plan`; `resources` by rank, `shape` by `shape_of`."""
        own = resources[rank]
        on_gpu = plan.device == "cuda"
        sharing = 1 if on_gpu else [other.host for other in resources].count(own.host)
        return ProfileKey(
            shape=shape,
            dtype=plan.dtype,
            quantize=plan.quantize,
            device=own.gpu.name if on_gpu else own.processor,
            attention=plan.attention,
            cuda_graphs=plan.cuda_graphs,
            threads_per_rank=1 if on_gpu else plan.threads_per_rank,
            num_lanes=plan.tensor_parallel,
            ranks_per_host=sharing,
            sampling=plan.sampling.needs.name or "NOTHING",
            mpipipe=__version__,
            torch=_torch_version(),
        )

    @property
    def digest(self) -> str:
        """Sixteen hex digits."""
        return hashlib.sha256(to_json(self).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class TokenPoint:
    """Seconds of one layer for `tokens` rows that see `context_tokens` keys each, on average."""

    tokens: int
    context_tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RowPoint:
    """Seconds of a part that depends on the number of rows alone."""

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepPart:
    """The times of one kind of step, decode or prefill, by its parts."""

    layer: tuple[TokenPoint, ...]
    step: tuple[RowPoint, ...]  # beside layers, head and embedding: launching, laying out
    head: tuple[RowPoint, ...]  # LM head and sampler
    embedding: tuple[RowPoint, ...]


@dataclass(frozen=True, slots=True)
class HopPoint:
    """Seconds of a tensor from one stage to the next, from `send` until it is there."""

    num_bytes: int
    seconds: float
    crosses_hosts: bool


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of one device."""

    key: ProfileKey
    measured: str  # date and time, UTC, ISO 8601
    decode: StepPart
    prefill: StepPart
    hops: tuple[HopPoint, ...] = ()  # empty: one rank measured alone
    host_to_device_bytes_per_s: float = 0.0  # from pinned memory; 0: not a GPU
    load_bytes_per_s: float = 0.0  # of weights: built, read and converted
    # Beside that: warm-up and graphs. Forecasts on GPUs do not use it: a run takes longer, whose
    # process has not loaded and captured other slices before (`startup.py`).
    load_fixed_s: float = 0.0
    start_s: float = 0.0  # start of the process until it could load: imports, MPI, tokenizer


def profile_folder() -> Path:
    """Where profiles are: beside the demo model (`MPIPIPE_CACHE`, else the XDG cache)."""
    return cache_folder() / "profiles"


def profile_path(key: ProfileKey, folder: Path | None = None) -> Path:
    """The file of a key; it need not exist."""
    return (folder or profile_folder()) / f"profile-v{_FORMAT}-{key.digest}.json"


def read_profile(key: ProfileKey, folder: Path | None = None) -> Profile | None:
    """The profile of `key`; None: there is none that can be read.

    A file that is damaged, or was made by hand for another key, is as good as none: planning goes
    on with rates.
    """
    try:
        profile = from_json(Profile, profile_path(key, folder).read_bytes())
    except (OSError, ValueError):
        return None
    return profile if profile.key == key else None


def unused_profile(key: ProfileKey, folder: Path | None = None) -> str:
    """Why the nearest profile of the same model is not one of `key`; empty: there is none."""
    wanted = dataclasses.asdict(key)
    nearest: tuple[str, dict[str, object]] | None = None
    for path in sorted((folder or profile_folder()).glob(f"profile-v{_FORMAT}-*.json")):
        try:
            record = json.loads(path.read_bytes())
            there, day = record["key"], record["measured"][:10]
            unlike = {name: there[name] for name in wanted if there[name] != wanted[name]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if unlike and "shape" not in unlike and (nearest is None or len(unlike) < len(nearest[1])):
            nearest = (day, unlike)
    if nearest is None:
        return ""
    day, unlike = nearest
    told = ", ".join(f"{_KEY_WORDS[name]} {unlike[name]}, here {wanted[name]}" for name in unlike)
    how = ", the prompts' sampling set in [generation]," if "sampling" in unlike else ""
    remedy = f"`mpipipe plan --measure`{how} measures this"
    return f"not as measured {day}: that was with {told} ({remedy})"


def write_profile(profile: Profile, folder: Path | None = None) -> Path:
    """Put `profile` in the place of an older one; readers see the one or the other, whole.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = profile_path(profile.key, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(dir=path.parent, prefix=".profile-")
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(to_json(profile, indent=1))
        Path(name).chmod(0o644)  # a cache folder may be shared
        Path(name).replace(path)
    except OSError as error:
        raise OutputError(
            f"the profile cannot be written to {path.parent} ({error.strerror}): free some space "
            "there, or set MPIPIPE_CACHE to a folder that can be written"
        ) from error
    return path


def with_known_hops(profile: Profile, folder: Path | None = None) -> Profile:
    """`profile` with the hops of the one that it replaces, where one rank has measured it."""
    older = read_profile(profile.key, folder)
    if profile.hops or older is None:
        return profile
    return dataclasses.replace(profile, hops=older.hops)


def merged_profile(profiles: list[Profile]) -> Profile:
    """One of several that ranks of equal keys measured at once: the mean of each time.

    Stages wait for each other, but which rank is slowest changes from step to step.
    """
    first = profiles[0]
    assert all(other.key == first.key for other in profiles), "of one key"

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def part(name: str) -> StepPart:
        parts: list[StepPart] = [getattr(profile, name) for profile in profiles]
        merged = {}
        for field in dataclasses.fields(StepPart):
            columns = zip(*(getattr(each, field.name) for each in parts), strict=True)
            merged[field.name] = tuple(
                dataclasses.replace(points[0], seconds=mean([point.seconds for point in points]))
                for points in columns
            )
        return StepPart(**merged)

    return dataclasses.replace(
        first,
        decode=part("decode"),
        prefill=part("prefill"),
        hops=tuple(hop for profile in profiles for hop in profile.hops),
        host_to_device_bytes_per_s=mean([p.host_to_device_bytes_per_s for p in profiles]),
        load_bytes_per_s=mean([p.load_bytes_per_s for p in profiles]),
        load_fixed_s=mean([p.load_fixed_s for p in profiles]),
        start_s=mean([p.start_s for p in profiles]),
    )
