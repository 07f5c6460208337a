"""Shared prefixes on a GPU: our kernels, CUDA graphs and lookahead give each prompt its tokens.

Also where decode steps read common pages together, however few tokens that spares.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mpipipe.clock import MonotonicClock
from mpipipe.kv_cache import common_tables
from mpipipe.types import SamplingParams
from tests.contract.engine_pipeline import MAX_TOKENS, EnginePipeline, engine_plan
from tests.contract.test_shared_prefixes import check_shared_prefixes, sharers
from tests.contract.tiny_models import TinyModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("own_stream"),
]
MODES = {"graphs": "replayed", "eager": "tensors", "varlen": "varlen"}


@pytest.mark.parametrize("reads_once", [False, True])
@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("num_pages", [18, 80])
@pytest.mark.parametrize("family", ["llama", "llama-head_dim-100"])
def test_greedy_tokens_are_those_of_transformers(
    family: str,
    num_pages: int,
    name: str,
    reads_once: bool,
    tiny: Callable[[str], TinyModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common_tables, "MIN_SPARED_TOKENS_GPU", 1)
    model = tiny(family)
    requests = sharers(lambda _: SamplingParams(max_new_tokens=16, ignore_eos=True))
    wanted = [tuple(model.greedy(r.prompt_ids, r.sampling.max_new_tokens)) for r in requests]

    def make(num_pages: int, num_host_pages: int) -> EnginePipeline:
        plan = engine_plan(
            2,
            num_pages=num_pages,
            graphs=name == "graphs",
            hidden_size=model.reference.config.hidden_size,
            max_sequences=4,
            num_host_pages=num_host_pages,
            max_sharing_tokens=MAX_TOKENS,
            read_prefixes_once=reads_once and name != "varlen",
        )
        device = f"cuda:{torch.cuda.current_device()}"
        return EnginePipeline(model, plan, MODES[name], MonotonicClock(), device).prepare()

    check_shared_prefixes(requests, wanted, make, num_pages)
