"""Frozen values that every layer speaks: sampling settings, requests, completions.

No torch, no MPI, no I/O. Words are those of ARCHITECTURE.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mpipipe.sampling_options import OPTION_NAMES, OPTIONS, SamplingNeeds, SamplingOptions

if TYPE_CHECKING:
    from mpipipe.errors import PromptError

__all__ = [
    "AttentionName",
    "CacheKind",
    "Completion",
    "DeviceName",
    "DtypeName",
    "FinishReason",
    "PrefillMode",
    "ProfilerName",
    "QuantizeName",
    "Request",
    "SamplingParams",
    "Shard",
    "Tier",
    "TokenLogprobs",
    "TransportName",
    "WeightsSource",
]

# What a plan can say of a run; a configuration can ask for these or leave them at "auto".
DtypeName = Literal["float32", "bfloat16", "float16"]
WeightsSource = Literal["checkpoint", "random"]
TransportName = Literal["nccl", "mpi", "loopback"]
DeviceName = Literal["cpu", "cuda"]
AttentionName = Literal["triton", "flashinfer", "varlen", "sdpa", "reference"]
PrefillMode = Literal["phases", "mixed"]
CacheKind = Literal["paged", "contiguous"]
ProfilerName = Literal["none", "nsys", "torch", "perf"]
QuantizeName = Literal["none", "int8", "fp8"]
Tier = Literal["device", "host", "disk"]  # where weights stand between their uses


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` equal parts of a tensor along `dim`: what a lane of a stage holds of it."""

    dim: int  # 0: rows, 1: columns
    index: int
    count: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor whose part has `shape`."""
        return tuple(
            size * self.count if dim == self.dim else size for dim, size in enumerate(shape)
        )

    def bounds(self, size: int) -> tuple[int, int]:
        """The first entry along `dim` of a tensor that has `size` of them, and how many."""
        assert size % self.count == 0, f"{size} is not divisible by {self.count}"
        length = size // self.count
        return self.index * length, length


class FinishReason(str, enum.Enum):
    """Why a completion ended. `LENGTH`: max_new_tokens or the context was reached."""

    STOP = "stop"  # end-of-sequence token, stop id or stop string
    LENGTH = "length"
    ERROR = "error"  # no completion; see Completion.error_kind


# Below this, dividing float32 logits of magnitude 8 or more (spacing 1e-6) separates neighbours by
# a factor e or more: the draw is greedy, and the division could only overflow.
_GREEDY_BELOW_TEMPERATURE = 1e-6
# Enum operations are slow, and a scheduler asks of every request.
_OPTIONS_WITH_NEEDS = {name: option for name, option in OPTIONS.items() if option.needs}


@dataclass(frozen=True, slots=True)
class SamplingParams(SamplingOptions):
    """The options of one request, in their ranges.

    Order of application: repetition penalty, frequency and presence penalty (as in vLLM),
    temperature, top-k, top-p, min-p (as in transformers).
    """

    def __post_init__(self) -> None:
        """Raise ValueError naming the field, its value and the allowed range."""
        for name, option in OPTIONS.items():
            value = getattr(self, name)
            if not option.allows(value):
                raise ValueError(f"{name} = {value!r} is out of range: it must be {option.allowed}")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, with no draw."""
        return self.temperature < _GREEDY_BELOW_TEMPERATURE

    @property
    def needs(self) -> SamplingNeeds:
        """The operations that choose its tokens. Filters of a greedy one change nothing."""
        needs = SamplingNeeds.NOTHING
        for name, option in _OPTIONS_WITH_NEEDS.items():
            if getattr(self, name) != option.default:
                needs |= option.needs
        return needs & SamplingNeeds.HISTORY if self.is_greedy else needs

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes` applied and checked."""
        # Not dataclasses.replace, which takes twice as long: a file has many prompts.
        values = {name: getattr(self, name) for name in OPTION_NAMES}
        return SamplingParams(**(values | changes))

    def with_seed(self, seed: int) -> SamplingParams:
        """A copy with another seed, from 0 on; not checked again: a third of the time."""
        copy = object.__new__(SamplingParams)
        for name in OPTION_NAMES:
            object.__setattr__(copy, name, getattr(self, name))
        object.__setattr__(copy, "seed", seed)
        return copy


@dataclass(frozen=True, slots=True)
class Request:
    """One tokenised prompt with everything needed to complete it."""

    request_id: str  # the user's id, unique in the run
    index: int  # position in the input: the order of completions.jsonl
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities of one position, of the model's raw distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of one request: text and tokens, or an error."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    queue_s: float  # from submission to the first scheduled step
    ttft_s: float  # from submission to the first token on the head
    latency_s: float  # from submission to the last token
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error_kind: str | None = None
    error_message: str | None = None

    @staticmethod
    def rejected(
        request_id: str, index: int, error: PromptError, num_prompt_tokens: int = 0
    ) -> Completion:
        """The error record of a prompt that was not run."""
        return Completion(
            request_id=request_id,
            index=index,
            text="",
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            num_prompt_tokens=num_prompt_tokens,
            queue_s=0.0,
            ttft_s=0.0,
            latency_s=0.0,
            error_kind=error.kind,
            error_message=str(error),
        )

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, the end-of-sequence token included."""
        return len(self.token_ids)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the request's latency; 0 for an error."""
        return self.num_output_tokens / self.latency_s if self.latency_s > 0 else 0.0
