"""Frozen values that every layer speaks: sampling settings, requests, completions.

No torch, no MPI, no I/O. Words are those of ARCHITECTURE.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

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
    "Request",
    "SamplingParams",
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


class FinishReason(str, enum.Enum):
    """Why a completion ended. `LENGTH`: max_new_tokens or the context was reached."""

    STOP = "stop"  # end-of-sequence token, stop id or stop string
    LENGTH = "length"
    ERROR = "error"  # no completion; see Completion.error_kind


# Below this, dividing float32 logits of magnitude 8 or more (spacing 1e-6) separates neighbours by
# a factor e or more: the draw is greedy, and the division could only overflow.
_GREEDY_BELOW_TEMPERATURE = 1e-6
# Tables of the stages hold counts in 32 bits.
_MAX_COUNT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Defaults are greedy decoding.

    Order of application (as in transformers): repetition penalty, temperature, top-k, top-p, min-p.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 = greedy: the most likely token, ties to the lowest id
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off; in (0, 1]
    min_p: float = 0.0  # 0 = off; in [0, 1)
    repetition_penalty: float = 1.0  # 1 = off; > 0
    seed: int = 0  # with the position decides each draw; independent of batching and stages
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int = -1  # -1 = none; k >= 0: of the chosen token and of the k best

    def __post_init__(self) -> None:
        """Raise ValueError naming the field, its value and the allowed range."""
        _require(
            1 <= self.max_new_tokens <= _MAX_COUNT,
            "max_new_tokens",
            self.max_new_tokens,
            f"from 1 to {_MAX_COUNT}",
        )
        _require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        _require(
            0 <= self.top_k <= _MAX_COUNT, "top_k", self.top_k, f"from 0 (off) to {_MAX_COUNT}"
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(0 <= self.min_p < 1, "min_p", self.min_p, "0 (off) or more, and below 1")
        _require(
            self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0"
        )
        _require(
            -1 <= self.num_logprobs <= _MAX_COUNT,
            "num_logprobs",
            self.num_logprobs,
            f"from -1 (none) to {_MAX_COUNT}",
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, with no draw."""
        return self.temperature < _GREEDY_BELOW_TEMPERATURE

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with `changes` applied and checked."""
        # Not dataclasses.replace, which takes twice as long: a file has many prompts.
        values = {name: getattr(self, name) for name in self.__slots__}
        return SamplingParams(**(values | changes))


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r} is out of range: it must be {allowed}")


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
    def refused(
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
