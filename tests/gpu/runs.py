"""`mpipipe run` on GPUs as a user would start it, and what transformers says of its tokens."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.e2e.conftest import Outcome, execute, mpiexec
from tests.gpu.sized_models import SIZED

LIMIT_S = 100
DEVICE = "cuda"
# As SIZED, but with layers that matter more than the embedding: else each token repeats.
_CHANGES = {"vocab_size": 320, "initializer_range": 0.06, "eos_token_id": 319, "bos_token_id": None}


@dataclass(frozen=True)
class RunModel:
    """A saved model with a tokenizer of bytes, and transformers' own in two dtypes."""

    folder: Path
    exact: transformers.PreTrainedModel  # float32
    rounded: transformers.PreTrainedModel  # bfloat16, as the weights are saved

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Behind each of `ids`, float32 [T, V]: exact, and rounded as the run rounds."""
        ids_1T = torch.tensor([list(ids)], device=DEVICE)
        return self.exact(ids_1T).logits[0].float(), self.rounded(ids_1T).logits[0].float()


def save_run_model(name: str, folder: Path) -> RunModel:
    """The model `name` of `SIZED`, the same every time."""
    config_class, settings = SIZED[name]
    settings = {**settings, **_CHANGES}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config_class)(**settings), dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    exact, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
        .eval()
        .to(DEVICE)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return RunModel(folder, exact, rounded)


def prompt_ids(text: str) -> list[int]:
    """What the tokenizer of bytes makes of ASCII text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet.index(char) for piece, _ in encoded for char in piece]


def gpu_run(
    model: RunModel,
    lines: Sequence[dict[str, Any]],
    folder: Path,
    num_ranks: int,
    *words: str,
    **environment: str,
) -> Outcome:
    """`mpipipe run` with the given prompts on `num_ranks` ranks (0: without a launcher)."""
    folder.mkdir(parents=True)
    prompts, config = folder / "prompts.jsonl", folder / "run.toml"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.write_text(f'model.path = "{model.folder}"\nprompts.path = "{prompts}"\n')
    command = ["-m", "mpipipe", "run", str(config), f"output.dir={folder / 'out'}"]
    words = (f"pipeline.device={DEVICE}", *words)
    return launch([*command, *words], folder / "out", num_ranks, **environment)


def launch(arguments: Sequence[str], folder: Path, num_ranks: int, **environment: str) -> Outcome:
    """Python with these arguments on `num_ranks` ranks; ended, ranks and all, after `LIMIT_S`."""
    launcher = mpiexec(num_ranks) if num_ranks else []
    if "--oversubscribe" in launcher:  # Open MPI, which else puts all ranks on one core
        launcher += ["--bind-to", "none"]
    limit = ["timeout", "--kill-after=10", str(LIMIT_S)] if shutil.which("timeout") else []
    return execute([*limit, *launcher, sys.executable, *arguments], folder, **environment)


# ---- what transformers says ----------------------------------------------------------------------


def check_greedy(model: RunModel, prompt: str, record: dict[str, Any]) -> None:
    """Each token is the exact model's best after those before it, or as near to the best as
    rounding moves logits there: with random weights the two best often are that close."""
    before, ours = prompt_ids(prompt), record["token_ids"]
    assert record["num_prompt_tokens"] == len(before)
    exact_TV, rounded_TV = model.logits([*before, *ours])
    for count, token in enumerate(ours):
        row = len(before) - 1 + count
        error = float((rounded_TV[row] - exact_TV[row]).abs().max())
        gap = float(exact_TV[row].max() - exact_TV[row, token])
        assert gap <= 2 * error, f"token {count}: {gap:.4f} below the best, rounding {error:.4f}"


def check_logprobs(model: RunModel, prompt: str, record: dict[str, Any]) -> None:
    """Log-probabilities are those of the exact model, up to what rounding does to logits."""
    before, ours = prompt_ids(prompt), record["token_ids"]
    exact_TV, rounded_TV = model.logits([*before, *ours])
    assert [entry["token_id"] for entry in record["logprobs"]] == ours
    for count, entry in enumerate(record["logprobs"]):
        row = len(before) - 1 + count
        error = float((rounded_TV[row] - exact_TV[row]).abs().max())
        exact_V = exact_TV[row].log_softmax(-1)
        found = {entry["token_id"]: entry["logprob"]}
        found |= {top["token_id"]: top["logprob"] for top in entry["top"]}
        for token_id, logprob in found.items():
            assert logprob == pytest.approx(float(exact_V[token_id]), abs=4 * error + 1e-3)
        values = [top["logprob"] for top in entry["top"]]
        assert values == sorted(values, reverse=True)
