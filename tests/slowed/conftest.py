"""A small model, and runs of it that something holds up, asked for their culprit as by a user."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import demo_model, execute, mpiexec, mpipipe, save_random_llama
from tests.e2e.warm_server import warm_python

__all__ = ["Job", "demo_model"]

NUM_PROMPTS = 8
# Two ranks on two cores, and whatever else runs there: a rank that waits for a core is not lost.
PATIENT = "pipeline.heartbeat_timeout_s=60"


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts for two ranks, each of them one place in each of two slots."""

    config: Path
    folder: Path

    def words(self, *words: str, warm: bool = True) -> list[str]:
        """The command of one rank. Not `warm`: where it is to run in another namespace."""
        python = warm_python() if warm else (sys.executable,)
        command = [*python, "-m", "tests.slowed.slowed_rank", "run", str(self.config)]
        return [*command, f"output.dir={self.folder}", PATIENT, *words]

    def run(
        self, *words: str, slowed: str = "", before: Sequence[str] = (), **environment: str
    ) -> None:
        """Complete the prompts; `before`: words in front of each rank's command."""
        self.execute([*mpiexec(2), *before, *self.words(*words)], slowed=slowed, **environment)

    def execute(self, command: list[str], *, slowed: str, **environment: str) -> None:
        """Run a whole launch to its end."""
        outcome = execute(command, self.folder, SLOWED=slowed, **environment)
        assert outcome.exit_code == 0, outcome.stderr

    def culprit(self) -> Mapping[str, Any]:
        """What `mpipipe logs summary` names."""
        words = ["logs", "summary", str(self.folder), "--json"]
        outcome = execute(mpipipe(0, *words), self.folder)
        assert outcome.exit_code == 0, outcome.stderr
        culprit: Mapping[str, Any] = json.loads(outcome.stdout)["culprit"]
        return culprit


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers whose hidden states are of a size that a link can feel."""
    return save_random_llama(
        tmp_path_factory.mktemp("model"),
        vocab_size=300,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=299,
    )


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Job:
    """Prompts of one length, each with as many tokens."""
    return make_job(tmp_path, model, [48] * NUM_PROMPTS)


def make_job(folder: Path, model: Path, lengths: Sequence[int]) -> Job:
    """A prompt for each of `lengths`, which is the number of its output tokens and of its steps.

    Without drafts, which save as many steps as the machine's speed makes worth while.
    """
    lines = [
        {"id": f"p{number}", "prompt": f"prompt {number}", "max_new_tokens": length}
        for number, length in enumerate(lengths)
    ]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder / "slowed.toml"
    config.write_text(
        f'model.path = "{model}"\nprompts.path = "{prompts}"\ngeneration.ignore_eos = true\n'
        "memory.num_kv_pages = 128\npipeline.num_slots = 2\nlog.sample_interval_s = 0.5\n"
        "pipeline.num_speculative_tokens = 0\n"
    )
    return Job(config, folder / "run")


def core_of(number: int) -> int:
    """One of the cores that this process may use."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[number % len(cores)]
