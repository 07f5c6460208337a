"""What weights of 8 bits cost in exactness: one text through one stage, in several forms.

Every form of the model (`model.quantize`) is loaded as a run loads it, as a single stage, and reads
the same tokens in steps of at most `rows_per_step`: the products of a step are those that a run
makes of a step of so many rows. From the logits follow the perplexity of the text, and, at some of
the places, how far they are from those of the form that is named first.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from mpipipe.clock import MonotonicClock
from mpipipe.config.load import load_config
from mpipipe.config.prompts import configured_prompts
from mpipipe.data_plane.device import read_gpu
from mpipipe.errors import ConfigError
from mpipipe.kv_cache.layout import SequenceLens, build_layout, to_device
from mpipipe.metrics.boot import BootTimeline
from mpipipe.planning.model_facts import read_model
from mpipipe.planning.resolve import make_plan
from mpipipe.planning.resources import RankResources, read_rank_resources
from mpipipe.planning.workload import Workload
from mpipipe.runtime.loading import load_parts
from mpipipe.runtime.requests import tokenize
from mpipipe.topology.gpu import GpuFacts
from mpipipe.topology.launcher import Launcher
from mpipipe.topology.packages import installed_attention_backends

if TYPE_CHECKING:
    from mpipipe.models.adapter import StageModel
    from mpipipe.planning.plan import PipelinePlan

__all__ = ["FormRecord", "TextOptions", "measure_forms"]

_MAX_COMPARED = 512  # places whose logits are kept: 300 MB of a vocabulary of 150,000


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Which part of a file of prompts is read, and how."""

    num_tokens: int = 2048  # in total, at most
    tokens_per_text: int = 512  # of each prompt, from its beginning
    rows_per_step: int = 512


@dataclass(frozen=True, slots=True)
class FormRecord:
    """What one form of the model made of the text."""

    quantize: str
    num_tokens: int  # that were predicted
    perplexity: float
    # Against the first form; None: it is the first.
    logits_error: float | None  # norm of the difference over the norm
    same_choice: float | None  # share of places with the same most probable token
    weight_bytes: int
    load_s: float
    read_s: float


def measure_forms(
    config_path: Path,
    overrides: Sequence[str],
    forms: Sequence[str],
    options: TextOptions,
    *,
    planned: Callable[[PipelinePlan], object] = lambda _plan: None,
) -> Iterator[FormRecord]:
    """One record after the other: what each of `forms` makes of the prompts of the configuration.

    One form is in memory at a time. `planned` is told the plan of each.

    Raises:
        MpipipeError: what `mpipipe run` would refuse, or no prompt of two tokens.
    """
    texts: list[tuple[int, ...]] | None = None
    reference: torch.Tensor | None = None
    for form in forms:
        words = (*overrides, *_single_stage(options))
        model = read_model(load_config(config_path, (*words, f"model.quantize={form}")))
        if texts is None:
            requests = tokenize(model, configured_prompts(model.loaded)).prompts.requests
            texts = _cut([request.prompt_ids for request in requests], options)
        rank = _this_rank(model.loaded.config.pipeline.device)
        if form == "fp8" and not rank.has_gpu:
            # No run computes it on a CPU, where it is slow; here it tells what a GPU would compute.
            model = read_model(load_config(config_path, (*words, "model.quantize=none")))
        workload = Workload(num_requests=1, longest_request_tokens=options.tokens_per_text)
        plan = make_plan(model.loaded.config, model.spec, [rank], str(model.folder), workload)
        plan = replace(plan, quantize="fp8") if form == "fp8" else plan
        planned(plan)
        record, compared_SV = _read(plan, rank, model.loaded.config.model.trust_remote_code, texts)
        yield record.of(form, compared_SV, reference)
        if reference is None:
            reference = compared_SV
        gc.collect()  # a stage's parts know each other
        if plan.device == "cuda":
            torch.cuda.empty_cache()


def _single_stage(options: TextOptions) -> tuple[str, ...]:
    """Settings of one sequence at a time in one stage."""
    return (
        "pipeline.num_stages=1",
        "pipeline.num_slots=1",
        "pipeline.max_sequences_per_slot=1",
        f"pipeline.max_tokens_per_step={options.rows_per_step}",
        f"memory.max_context_tokens={options.tokens_per_text + 1}",
    )


def _this_rank(device: str) -> RankResources:
    """What this process has, with its GPU unless `device` is the CPU."""
    gpu = GpuFacts() if device == "cpu" else read_gpu(0)
    return read_rank_resources(
        0,
        launcher=Launcher.NONE.value,
        gpu=gpu,
        attention_backends=installed_attention_backends() if gpu.index >= 0 else (),
    )


def _cut(prompts: Sequence[tuple[int, ...]], options: TextOptions) -> list[tuple[int, ...]]:
    """The beginnings of the prompts, of two tokens at least, until there are enough."""
    texts: list[tuple[int, ...]] = []
    left = options.num_tokens
    for prompt in prompts:
        text = prompt[: min(left, options.tokens_per_text)]
        if len(text) >= 2:
            texts.append(text)
            left -= len(text)
    if not texts:
        raise ConfigError(
            "there is no prompt of two tokens or more, so nothing can be predicted: give a file of "
            "longer prompts, or more --tokens"
        )
    return texts


@dataclass
class _Reading:
    """The sums over a text."""

    weight_bytes: int
    load_s: float
    read_s: float = 0.0
    num_tokens: int = 0
    loss: float = 0.0
    compared: list[torch.Tensor] = field(default_factory=list)

    def of(
        self, form: str, compared_SV: torch.Tensor, reference_SV: torch.Tensor | None
    ) -> FormRecord:
        """The record of `form`."""
        error = same = None
        if reference_SV is not None:
            error = float((compared_SV - reference_SV).norm() / reference_SV.norm())
            chosen_S = compared_SV.argmax(dim=1) == reference_SV.argmax(dim=1)
            same = float(chosen_S.float().mean())
        return FormRecord(
            quantize=form,
            num_tokens=self.num_tokens,
            perplexity=math.exp(min(self.loss / self.num_tokens, 700.0)),
            logits_error=error,
            same_choice=same,
            weight_bytes=self.weight_bytes,
            load_s=self.load_s,
            read_s=self.read_s,
        )


def _read(
    plan: PipelinePlan,
    rank: RankResources,
    trust_remote_code: bool,
    texts: Sequence[tuple[int, ...]],
) -> tuple[_Reading, torch.Tensor]:
    """Load the plan's one stage and read the texts; the logits of evenly spread places [S, V]."""
    device = torch.device(plan.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank.gpu.index)
    torch.set_num_threads(plan.threads_per_rank)
    started_s = time.perf_counter()
    boot = BootTimeline(MonotonicClock())
    with closing(load_parts(plan, plan.stages[0], trust_remote_code, device, boot)) as parts:
        loaded_s = time.perf_counter()
        reading = _Reading(parts.weight_bytes, loaded_s - started_s)
        spacing = -(-sum(map(len, texts)) // _MAX_COMPARED)
        for text in texts:
            for first in range(0, len(text), plan.max_tokens_per_step):
                chunk = text[first : first + plan.max_tokens_per_step]
                logits_TV = _step(parts.model, plan, text, first, len(chunk))
                targets = text[first + 1 : first + 1 + len(chunk)]  # the last token has none
                targets_T = torch.tensor(targets, dtype=torch.int64, device=device)
                losses = cross_entropy(logits_TV[: len(targets)], targets_T, reduction="sum")
                reading.loss += float(losses)
                reading.num_tokens += len(targets)
                reading.compared.append(logits_TV[-first % spacing :: spacing].cpu())
        reading.read_s = time.perf_counter() - loaded_s
    return reading, torch.cat(reading.compared)


def _step(
    model: StageModel, plan: PipelinePlan, text: tuple[int, ...], first: int, num_rows: int
) -> torch.Tensor:
    """Logits [T, V] of `num_rows` tokens of `text` from `first` on; those before are cached."""
    pages = range(-(-(first + num_rows) // plan.page_size_tokens))
    lens = SequenceLens(0, 0, num_rows, first + num_rows, rotary_len=len(text))
    layout = build_layout(
        [(lens, pages)], plan.page_size_tokens, rotary_by_length=model.rotary_by_length
    )
    if model.device.type == "cuda":
        layout = to_device(layout, lambda tensor: tensor.to(model.device))
    ids_T = torch.tensor(text[first : first + num_rows], dtype=torch.int64, device=model.device)
    return model.forward(ids_T, layout, torch.arange(num_rows, device=model.device))
