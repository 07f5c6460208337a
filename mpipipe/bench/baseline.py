"""The same prompts through `transformers.generate` in one process: the oracle and the rival.

Greedy, in batches with left padding, as a transformers user would write it. Its completions have
the same form as ours, so that two runs can be compared line by line.

The model is opened as its users would: on one device, or its layers spread over all GPUs
(`device_map = "auto"` is accelerate's: every GPU holds some layers and they compute one after the
other). Random weights are drawn on the device and never touch a disk. torch and transformers are
imported when a model is opened.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpipipe.errors import ConfigError, EnvironmentSetupError
from mpipipe.sampling_options import SamplingNeeds
from mpipipe.types import Completion, FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mpipipe.types import Request

__all__ = [
    "BaselinePlace",
    "BaselineResult",
    "generate_rows",
    "generate_with_transformers",
    "open_baseline",
    "time_with_transformers",
]

_DEVICES = ("cpu", "cuda")
_DEVICE_MAPS = ("none", "auto")


@dataclass(frozen=True, slots=True)
class BaselinePlace:
    """Where the model runs."""

    device: str = "cpu"
    device_map: str = "none"  # "auto": layers over all visible GPUs
    num_threads: int = 1

    def check(self) -> None:
        """Raises ConfigError unless the words are known and fit together."""
        for option, value, allowed in (
            ("--device", self.device, _DEVICES),
            ("--device-map", self.device_map, _DEVICE_MAPS),
        ):
            if value not in allowed:
                raise ConfigError(f"{option} {value} is not known: use {' or '.join(allowed)}")
        if self.device_map == "auto" and self.device != "cuda":
            raise ConfigError("--device-map auto spreads layers over GPUs: add --device cuda")

    @property
    def text(self) -> str:
        """For people."""
        if self.device_map == "auto":
            return "device_map over all GPUs"
        if self.device == "cuda":
            return "one GPU"
        return f"CPU, {self.num_threads} thread{'s' * (self.num_threads > 1)}"


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
    decode: Callable[[Sequence[int]], str],
    place: BaselinePlace,
    random: bool = False,
) -> BaselineResult:
    """Complete `requests` greedily in batches of `batch_size`.

    A batch runs as long as its longest request asks for; shorter ones are cut afterwards.

    Args:
        folder: the model folder.
        requests: prompts as token ids.
        dtype: "float32", "bfloat16" or "float16".
        batch_size: prompts per call of `generate`; 1 avoids padding altogether.
        decode: token ids to text.
        place: device and threads.
        random: draw the weights instead of reading them.
    """
    if any(request.sampling.needs & SamplingNeeds.COUNTS for request in requests):
        raise ConfigError(
            "some of these prompts have a frequency or presence penalty, and transformers has "
            "neither: remove them"
        )
    started_s = time.perf_counter()
    model = open_baseline(folder, dtype, place, random=random)
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
    import torch

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
        rows = generate_rows(model, [ids for ids, _ in batch], longest, ignore_eos=True)
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
    rows = generate_rows(model, prompts, longest, ignore_eos=ignore_eos, penalty=penalty)
    elapsed_s = time.perf_counter() - started_s
    return [
        _completion(request, row, () if ignore_eos else eos, decode, elapsed_s)
        for request, row in zip(batch, rows, strict=True)
    ]


def generate_rows(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    *,
    ignore_eos: bool,
    penalty: float = 1.0,
) -> list[list[int]]:
    """New token ids per prompt, padded with 0 after an end-of-sequence token."""
    import torch

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


# ---- the model -----------------------------------------------------------------------------------


def open_baseline(folder: Path, dtype: str, place: BaselinePlace, *, random: bool) -> Any:
    """The model in `folder`, ready to generate.

    Args:
        folder: the model folder; with `random` a `config.json` is enough.
        dtype: "float32", "bfloat16" or "float16".
        place: where it runs.
        random: draw the weights instead of reading them.

    Raises:
        ConfigError: `place` makes no sense.
        EnvironmentSetupError: no GPU, or accelerate is needed and not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place.check()
    torch.set_num_threads(place.num_threads)
    if place.device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentSetupError(
            "--device cuda: torch sees no GPU here; start on a machine with one, or leave it out"
        )
    kind = getattr(torch, dtype)
    if random:
        return _random_model(folder, kind, place)
    if place.device_map == "auto":
        _require_accelerate()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, local_files_only=True, device_map="auto"
        )
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
    return model.to(place.device).eval()


def _random_model(folder: Path, dtype: Any, place: BaselinePlace) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(0)
    with torch.device(place.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if place.device_map == "none":
        return model
    # As from_pretrained(device_map="auto") decides, for a model that is there already.
    _require_accelerate()
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = model._no_split_modules  # what transformers itself passes on
    names = sorted(whole) if whole else None
    memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=names)
    spread = infer_auto_device_map(
        model, max_memory=memory, dtype=dtype, no_split_module_classes=names
    )
    return dispatch_model(model, device_map=spread)


def _require_accelerate() -> None:
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise EnvironmentSetupError(
            "--device-map auto needs the package accelerate, which is not installed: "
            "`pip install accelerate`"
        )
