"""The same prompts through `transformers.generate` in one process: the oracle and the rival.

Greedy, in batches with left padding, as a transformers user would write it. Its completions have
the same form as ours, so that two runs can be compared line by line.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from mpipipe.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mpipipe.types import Request

__all__ = ["BaselineResult", "generate_with_transformers"]


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
    num_threads: int,
    decode: Callable[[Sequence[int]], str],
) -> BaselineResult:
    """Complete `requests` greedily in batches of `batch_size`.

    A batch runs as long as its longest request asks for; shorter ones are cut afterwards.

    Args:
        folder: the model folder.
        requests: prompts as token ids.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: prompts per call of `generate`; 1 avoids padding altogether.
        num_threads: compute threads of torch.
        decode: token ids to text.
    """
    torch.set_num_threads(num_threads)
    started_s = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    loaded_s = time.perf_counter()
    completions: list[Completion] = []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        completions.extend(_generate_batch(model, batch, decode))
    done_s = time.perf_counter()
    return BaselineResult(tuple(completions), loaded_s - started_s, done_s - loaded_s)


def _generate_batch(
    model: Any, batch: Sequence[Request], decode: Callable[[Sequence[int]], str]
) -> list[Completion]:
    started_s = time.perf_counter()
    width = max(len(request.prompt_ids) for request in batch)
    input_ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, request in enumerate(batch):
        input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[row, width - len(request.prompt_ids) :] = 1
    eos = _eos_ids(model)
    ignore_eos = batch[0].sampling.ignore_eos
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=max(request.sampling.max_new_tokens for request in batch),
            do_sample=False,
            eos_token_id=None if ignore_eos else (list(eos) or None),
            pad_token_id=0,
        )
    elapsed_s = time.perf_counter() - started_s
    rows = output[:, width:].tolist()
    return [
        _completion(request, row, () if ignore_eos else eos, decode, elapsed_s)
        for request, row in zip(batch, rows, strict=True)
    ]


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
