"""Real ranks, real files: runs the `mpipipe` command as a user would, under a hard limit."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.e2e.warm_server import warm_python

ROOT = Path(__file__).parents[2]
LIMIT_S = 400  # of one launch, the longest of which takes 40 s on two cores
TEST_LIMIT_S = 1200  # of a test, which may have many
BESIDE = Path(sys.executable).parent
# Those that take minutes begin first, so that no worker ends long after the other.
LONGEST = ("test_tokens", "test_stop", "test_run", "test_lookahead", "test_replicas", "test_lanes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in `LONGEST` first; xdist hands them out in this order with --no-loadscope-reorder.

    A launch that hangs is ended by its own limit, whose error has its command.
    """
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(TEST_LIMIT_S))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str
    folder: Path

    def completions(self) -> list[dict[str, Any]]:
        """The lines of completions.jsonl."""
        return read_jsonl(self.folder / "completions.jsonl")

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder."""
        document: dict[str, Any] = json.loads((self.folder / name).read_text())
        return document


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_wall_clock(folder: Path, rank: int, wall_s: float) -> None:
    """What a rank has booked covers its steps, and ends before its log says that it has ended.

    By this rank's own clock, in the order of its own code: no other process can get in between.
    """
    steps = read_jsonl(folder / f"steps_rank_{rank}.jsonl")
    at_s = {line["event"]: line["t_s"] for line in read_jsonl(folder / f"rank_{rank}.log")}
    begun_s = steps[0]["start_s"]
    assert at_s["generating"] < steps[-1]["t_s"] <= at_s["generated"] + 1e-5
    assert steps[-1]["t_s"] - begun_s - 1e-5 <= wall_s <= at_s["generated"] - begun_s + 1e-5


def mpiexec(num_ranks: int) -> list[str]:
    """The launcher beside this Python, or the site's."""
    found = shutil.which("mpiexec", path=f"{BESIDE}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, "no mpiexec: install mpipipe[mpich]"
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    command = [found, "-n", str(num_ranks)]
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        command += ["--oversubscribe", "--allow-run-as-root"]
    return command


def execute(command: list[str], folder: Path, **environment: str) -> Outcome:
    """Run `command` in the project's root; fails the test when it hangs."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Outcome(result.returncode, result.stdout, result.stderr, folder)


@contextmanager
def launched(command: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`command` in the project's root while the block talks with it; no launch outlives the block.

    Popen alone would wait without a limit where the block raises. It is the launcher that is
    killed: MPICH's ranks end with it, also a stopped one.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        except BaseException as error:
            error.add_note(f"in the launch {shlex.join(command)}")
            raise
        finally:
            process.kill()  # of one that has ended and was waited for: nothing


def mpipipe(num_ranks: int, *words: str, warm: bool = True) -> list[str]:
    """The command `mpipipe WORDS…` on `num_ranks` ranks; 0: without a launcher.

    Not `warm`: each rank starts from nothing, as a user's does, which costs most of its time.
    """
    launch = mpiexec(num_ranks) if num_ranks else []
    return [*launch, *(warm_python() if warm else (sys.executable,)), "-m", "mpipipe", *words]


def run(
    num_ranks: int, config: Path | str, folder: Path, *words: str, warm: bool = True
) -> Outcome:
    """`mpipipe run CONFIG output.dir=FOLDER WORDS…` on `num_ranks` ranks; 0: without a launcher."""
    words = ("run", str(config), f"output.dir={folder}", *words)
    return execute(mpipipe(num_ranks, *words, warm=warm), folder)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model, fetched once per machine."""
    from mpipipe.demo.model import prepare_demo_model

    return prepare_demo_model()


def save_random_llama(folder: Path, *, seed: int = 0, **sizes: Any) -> Path:
    """A random Llama with a byte-level tokenizer, and with `sizes` in its configuration."""
    torch.manual_seed(seed)
    config = LlamaConfig(bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a byte-level tokenizer: loads in a second."""
    return save_random_llama(
        tmp_path_factory.mktemp("tiny"),
        vocab_size=300,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=299,
    )


@pytest.fixture(scope="session")
def tiny_config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of the tiny model with three prompts."""
    folder = tmp_path_factory.mktemp("tiny_config")
    prompts = folder / "prompts.jsonl"
    lines = [{"id": name, "prompt": f"{name} prompt"} for name in ("first", "second", "third")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder / "tiny.toml"
    config.write_text(
        f'model.path = "{tiny_model}"\nprompts.path = "{prompts}"\n'
        "generation.max_new_tokens = 8\nmemory.num_kv_pages = 64\n"
    )
    return config


@pytest.fixture(scope="session")
def tiny_alone(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run of `tiny_config` on one process without a launcher. Read its folder, or copy it."""
    outcome = run(0, tiny_config, tmp_path_factory.mktemp("alone") / "run")
    assert outcome.exit_code == 0, outcome.stderr
    return outcome
