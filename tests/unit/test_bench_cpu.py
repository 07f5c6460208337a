"""launch/bench_cpu.py: what is counted, and which engines are left out."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/bench_cpu.py"


@pytest.fixture(scope="module")
def bench_cpu() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("bench_cpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Remembers:
    """An engine with a cache: prompts that it has seen cost nothing."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def seconds(self, num_prompts: int, length: int, num_tokens: int, seed: int) -> float:
        """1 ms for a prompt token, 10 ms for a round of the others."""
        prompt_s = 0.0 if seed in self.seen else num_prompts * length * 1e-3
        self.seen.add(seed)
        return prompt_s + (num_tokens - 1) * 1e-2


def test_prefill_counts_prompt_tokens_and_decode_what_comes_behind_them(bench_cpu: Any) -> None:
    engine = Remembers()
    for seed in range(3):
        prefill = bench_cpu.rate_of(engine, ("prefill", 2, 512), 16, seed)
        assert prefill == pytest.approx(1000)
    engine = Remembers()
    for seed in range(3):
        decode = bench_cpu.rate_of(engine, ("decode", 4, 32), 16, seed)
        assert decode == pytest.approx(4 / 1e-2)


def test_engines_that_are_not_installed_are_left_out_and_named(
    bench_cpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cpu, "find_spec", lambda name: None if name == "llama_cpp" else name)
    names = "mpipipe,transformers,openvino-f32,llama.cpp"
    options = argparse.Namespace(engines=names, gguf="model.gguf")
    assert bench_cpu.usable(options) == ["mpipipe", "transformers", "openvino-f32"]
    assert "llama.cpp: not timed, it needs the package llama_cpp" in capsys.readouterr().out
    options.gguf = ""
    assert bench_cpu.usable(options) == ["mpipipe", "transformers"]
