"""Rotary embeddings that depend on the length, on a GPU: fused stack and plain modules, in graphs.

In float32, with weights whose logits lie far apart: the tokens are those of transformers on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version

from mpipipe.types import SamplingParams
from tests.contract.engine_pipeline import make_requests
from tests.contract.tiny_models import ORIGINAL, TinyModel
from tests.gpu.test_engine_gpu import MODES, on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("own_stream"),
]
FORMS = {
    "llama-longrope": "fast",
    "llama-dynamic": "fast",
    "qwen3-longrope": "fast",
    "phi3-longrope": "plain",
    "gemma3-longrope": "plain",
}
# Older `generate`s feed one token after Phi-3's cache was dropped, and Gemma 3 cannot go back from
# the long factors: nothing to compare with (seen with 5.17, right in 5.23).
IS_OLD = Version(transformers.__version__) < Version("5.23")
LENGTHS = (3, *range(ORIGINAL - 3, ORIGINAL + 4), 9, 23)
GREEDY = SamplingParams(max_new_tokens=9, ignore_eos=True)


@pytest.mark.parametrize("num_pages", [60, 10], ids=["roomy", "preempting"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_those_of_transformers_on_both_sides_of_the_original_context(
    name: str, mode: str, num_pages: int, tiny: Callable[[str], TinyModel]
) -> None:
    if IS_OLD and name in {"phi3-longrope", "gemma3-longrope"}:
        pytest.skip(f"transformers {transformers.__version__} computes {name} wrongly itself")
    model = tiny(name)
    requests = make_requests(LENGTHS, lambda _: GREEDY)
    wanted = [model.greedy_afresh(r.prompt_ids, r.sampling.max_new_tokens) for r in requests]
    for num_stages in (1, 2):
        pipeline = on_gpu(model, num_stages, mode, num_pages=num_pages)
        assert {stage.mode for stage in pipeline.models} == {FORMS[name]}
        assert (pipeline.engines[0].graph_runner.num_graphs > 0) == (mode == "graphs")
        found = pipeline.generate(requests, seed=num_stages)
        assert [list(outcome.token_ids) for outcome in found] == wanted
