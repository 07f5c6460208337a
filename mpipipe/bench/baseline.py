"""The same prompts through `transformers.generate` in one process: the oracle and the rival.

Greedy, in batches with left padding, as a transformers user would write it. Its completions have
the same form as ours, so that two runs can be compared line by line.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mpipipe.bench.baseline_model import BaselinePlace, open_baseline
from mpipipe.errors import ConfigError
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mpipipe.types import Request

__all__ = ["BaselineResult", "generate_with_transformers", "time_with_transformers"]


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """What `transformers.generate` made of the requests, and how long it took."""

    completions: tuple[Completion, ...]
    load_s: float
    generate_s: float

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all completions, padding after the end not counted."""
        return sum(completion.num_output_tokens for completion in self.completions)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the time in `generate`."""
        return self.num_output_tokens / self.generate_s


def generate_with_transformers(
    folder: Path,
    requests: Sequence[Request],
    *,
    dtype: str,
    batch_size: int,
    num_threads: int = 1,
    decode: Callable[[Sequence[int]], str],
    place: BaselinePlace | None = None,
    random: bool = False,
) -> BaselineResult:
    """Complete `requests` greedily in batches of `batch_size`.

    A batch runs as long as its longest request asks for; shorter ones are cut afterwards.

    Args:
        folder: the model folder.
        requests: prompts as token ids.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: prompts per call of `generate`; 1 avoids padding altogether.
        num_threads: compute threads of torch, where `place` is not given.
        decode: token ids to text.
        place: device and threads; None: the CPU.
        random: draw the weights instead of reading them.
    """
    if any(request.sampling.needs & SamplingNeeds.COUNTS for request in requests):
        raise ConfigError(
            "some of these prompts have a frequency or presence penalty, and transformers has "
            "neither: remove them"
        )
    started_s = time.perf_counter()
    where = place or BaselinePlace(num_threads=num_threads)
    model = open_baseline(folder, dtype, where, random=random)
    loaded_s = time.perf_counter()
    completions: list[Completion] = []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        completions.extend(_generate_batch(model, batch, decode))
    done_s = time.perf_counter()
    return BaselineResult(tuple(completions), loaded_s - started_s, done_s - loaded_s)


def time_with_transformers(
    model: Any, requests: Sequence[Request], *, batch_size: int
) -> dict[str, Any]:
    """Time `requests`, which ignore end-of-sequence tokens; a short call before warms up.

    Returns:
        `tokens_per_s` of output tokens with prefill; `elapsed_s`; `prefill_s`, the time of the same
        prompts with one token each, measured by itself; `ms_per_token`, the rest over the tokens
        after the first; or `error` where the GPU's memory did not do.
    """
    shorter = [
        (request.prompt_ids, request.sampling.replace(max_new_tokens=1)) for request in requests
    ]
    try:
        prefill_s = min(_timed(model, shorter, batch_size)[0] for _ in range(2))
        whole = [(request.prompt_ids, request.sampling) for request in requests]
        elapsed_s, num_tokens = _timed(model, whole, batch_size)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"error": "out of GPU memory"}
    longest = max(request.sampling.max_new_tokens for request in requests)
    num_batches = -(-len(requests) // batch_size)
    decode_s = elapsed_s - prefill_s
    return {
        "tokens_per_s": num_tokens / elapsed_s,
        "elapsed_s": elapsed_s,
        "prefill_s": prefill_s,
        "ms_per_token": decode_s / num_batches / (longest - 1) * 1e3 if longest > 1 else None,
    }


def _timed(model: Any, jobs: Sequence[tuple[Any, Any]], batch_size: int) -> tuple[float, int]:
    """Seconds of `generate` over all batches, and the tokens asked for, each of which was made."""
    started_s = time.perf_counter()
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        longest = max(sampling.max_new_tokens for _, sampling in batch)
        rows = _generate_rows(model, [ids for ids, _ in batch], longest, ignore_eos=True)
        assert all(len(row) == longest for row in rows), "generate stopped early"
    num_tokens = sum(sampling.max_new_tokens for _, sampling in jobs)
    return time.perf_counter() - started_s, num_tokens


def _generate_batch(
    model: Any, batch: Sequence[Request], decode: Callable[[Sequence[int]], str]
) -> list[Completion]:
    started_s = time.perf_counter()
    eos = _eos_ids(model)
    ignore_eos = batch[0].sampling.ignore_eos
    longest = max(request.sampling.max_new_tokens for request in batch)
    prompts = [request.prompt_ids for request in batch]
    penalties = {request.sampling.repetition_penalty for request in batch}
    if len(penalties) > 1:
        raise ConfigError(
            f"these prompts have {len(penalties)} repetition penalties, and a batch of "
            "transformers has one for all: set --batch-size 1"
        )
    (penalty,) = penalties
    rows = _generate_rows(model, prompts, longest, ignore_eos=ignore_eos, penalty=penalty)
    elapsed_s = time.perf_counter() - started_s
    return [
        _completion(request, row, () if ignore_eos else eos, decode, elapsed_s)
        for request, row in zip(batch, rows, strict=True)
    ]


def _generate_rows(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    *,
    ignore_eos: bool,
    penalty: float = 1.0,
) -> list[list[int]]:
    """New token ids per prompt, padded with 0 after an end-of-sequence token."""
    width = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt_ids in enumerate(prompts):
        input_ids[row, width - len(prompt_ids) :] = torch.tensor(prompt_ids)
        mask[row, width - len(prompt_ids) :] = 1
    eos = _eos_ids(model)
    with torch.inference_mode():
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None if ignore_eos else (list(eos) or None),
            pad_token_id=0,
        )
    rows: list[list[int]] = output[:, width:].tolist()
    return rows


def _eos_ids(model: Any) -> tuple[int, ...]:
    value = model.generation_config.eos_token_id
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _completion(
    request: Request,
    row: list[int],
    eos: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
    elapsed_s: float,
) -> Completion:
    row = row[: request.sampling.max_new_tokens]
    end = next((i for i, token_id in enumerate(row) if token_id in eos), None)
    token_ids = row if end is None else row[: end + 1]
    return Completion(
        request_id=request.request_id,
        index=request.index,
        text=decode(token_ids if end is None else token_ids[:-1]),
        token_ids=tuple(token_ids),
        finish_reason=FinishReason.LENGTH if end is None else FinishReason.STOP,
        num_prompt_tokens=len(request.prompt_ids),
        queue_s=0.0,
        ttft_s=elapsed_s,
        latency_s=elapsed_s,
    )
