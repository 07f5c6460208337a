from __future__ import annotations

import pytest

from mpipipe.config.schema import Auto
from mpipipe.errors import ConfigError
from mpipipe.planning.attention_choice import AttentionFacts, choose_attention
from mpipipe.types import AttentionName

EVERYTHING = ("triton", "varlen", "flashinfer", "sdpa", "reference")


def choose(
    asked: Auto | AttentionName = "auto",
    *,
    device: str = "cuda",
    capability: int = 90,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    available: tuple[str, ...] = EVERYTHING,
) -> str:
    facts = AttentionFacts(device, capability, head_dim, dtype, available)
    name, reason = choose_attention(asked, facts)
    assert reason
    return name


def test_a_cpu_gets_sdpa() -> None:
    assert choose(device="cpu", capability=0, available=("sdpa", "reference")) == "sdpa"


@pytest.mark.parametrize("head_dim", [64, 100, 128, 256])
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_a_gpu_gets_our_kernels_for_every_head_dimension(capability: int, head_dim: int) -> None:
    assert choose(capability=capability, head_dim=head_dim) == "triton"


def test_without_triton_a_new_enough_torch_takes_over() -> None:
    without = ("varlen", "flashinfer", "sdpa", "reference")
    assert choose(available=without) == "varlen"
    assert choose(available=without, head_dim=100) == "sdpa"
    assert choose(available=without, capability=75, dtype="float16") == "sdpa"
    assert choose(available=("sdpa", "reference")) == "sdpa"


def test_the_reason_says_what_was_missing() -> None:
    facts = AttentionFacts("cuda", 90, 128, "bfloat16", ("varlen", "sdpa", "reference"))
    _, reason = choose_attention("auto", facts)
    assert "C compiler" in reason


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_can_run_is_given_when_asked_for(name: AttentionName) -> None:
    assert choose(name) == name


@pytest.mark.parametrize(
    ("asked", "settings", "named"),
    [
        ("triton", {"device": "cpu", "capability": 0}, "on the CPU"),
        ("triton", {"available": ("sdpa", "reference")}, "C compiler"),
        ("triton", {"capability": 70}, "7.5"),
        ("triton", {"head_dim": 512}, "512"),
        ("flashinfer", {"head_dim": 100}, "64, 128, 256"),
        ("flashinfer", {"capability": 75}, "8.0"),
        ("flashinfer", {"available": ("triton", "sdpa")}, r"mpipipe\[cuda\]"),
        ("flashinfer", {"dtype": "float32"}, "float32"),
        ("varlen", {"available": ("triton", "sdpa")}, "2.13"),
        ("varlen", {"head_dim": 100}, "multiples of 8"),
    ],
)
def test_what_cannot_run_is_refused_with_cause_and_remedy(
    asked: Auto | AttentionName, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        choose(asked, **settings)  # type: ignore[arg-type]
    assert "use" in str(caught.value)
