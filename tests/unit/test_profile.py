"""Profiles: the file, its key, the points that are measured and what is made of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mpipipe.bench.profile_points import (
    Brief,
    DecodeShape,
    PromptShape,
    SliceTimes,
    Timed,
    decode_part,
    first_of_rows,
    prefill_part,
    slice_layers,
)
from mpipipe.config.schema import Config, ModelConfig
from mpipipe.errors import OutputError
from mpipipe.planning.plan import PipelinePlan
from mpipipe.planning.profile import (
    HopPoint,
    Profile,
    ProfileKey,
    RowPoint,
    StepPart,
    TokenPoint,
    merged_profile,
    profile_path,
    read_profile,
    with_known_hops,
    write_profile,
)
from mpipipe.planning.resolve import make_plan
from mpipipe.topology.gpu import GpuFacts
from tests.unit.model_specs import OPENLLAMA_3B, SMOL
from tests.unit.planned_rank import make_rank

RANKS = [make_rank(rank, processor="A CPU") for rank in range(2)]
LAYER_S, HEAD_S, STEP_S, KEY_S = 2e-3, 11e-3, 0.7e-3, 3e-8


def a_plan(num_layers: int = 2) -> PipelinePlan:
    spec = dataclasses.replace(SMOL, num_layers=num_layers)
    return make_plan(Config(model=ModelConfig(dtype="float32")), spec, RANKS, "/models/smol")


def a_profile(seconds: float = 1.0) -> Profile:
    points = (RowPoint(1, seconds), RowPoint(8, 2 * seconds))
    part = StepPart((TokenPoint(1, 64.0, seconds), TokenPoint(8, 64.0, seconds)), *[points] * 3)
    key = ProfileKey.of(a_plan(), ProfileKey.shape_of(SMOL), RANKS, 0)
    return Profile(key, "2026-11-27T12:00:00+00:00", part, part, load_bytes_per_s=seconds)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    profile = a_profile()
    path = write_profile(profile, tmp_path / "new")
    assert read_profile(profile.key, tmp_path / "new") == profile
    assert [path] == list((tmp_path / "new").iterdir())
    newer = dataclasses.replace(profile, start_s=3.0)
    assert write_profile(newer, tmp_path / "new") == path
    assert read_profile(profile.key, tmp_path / "new") == newer


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ProfileKey)])
def test_a_profile_of_another_key_is_not_found(name: str, tmp_path: Path) -> None:
    profile = a_profile()
    write_profile(profile, tmp_path)
    value = getattr(profile.key, name)
    changed: Any = f"{value}!" if isinstance(value, str) else 2 + value
    other = dataclasses.replace(profile.key, **{name: changed})
    assert read_profile(other, tmp_path) is None


def test_a_file_that_is_damaged_or_of_another_key_is_as_good_as_none(tmp_path: Path) -> None:
    profile = a_profile()
    path = write_profile(profile, tmp_path)
    text = path.read_text()
    path.write_text(text[:-20])
    assert read_profile(profile.key, tmp_path) is None
    path.write_text(text.replace('"A CPU"', '"Another CPU"'))
    assert read_profile(profile.key, tmp_path) is None


def test_a_folder_that_cannot_be_written_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="MPIPIPE_CACHE"):
        write_profile(a_profile(), tmp_path / "file")
    assert profile_path(a_profile().key, tmp_path).parent == tmp_path


def test_the_key_names_the_processor_and_how_many_ranks_share_it() -> None:
    key = a_profile().key
    assert (key.device, key.ranks_per_host, key.sampling) == ("A CPU", 2, "NOTHING")
    assert key.shape == "llama 576x1536x9x3x64x49152x1, tied"
    assert ProfileKey.shape_of(dataclasses.replace(SMOL, num_layers=99)) == key.shape


def test_ranks_with_one_key_are_merged_by_the_mean() -> None:
    merged = merged_profile([a_profile(1.0), a_profile(3.0)])
    assert merged.decode.layer == (TokenPoint(1, 64.0, 2.0), TokenPoint(8, 64.0, 2.0))
    assert merged.prefill.head == (RowPoint(1, 2.0), RowPoint(8, 4.0))
    assert merged.load_bytes_per_s == 2.0


def test_hops_stay_known_when_one_rank_measures_again(tmp_path: Path) -> None:
    hops = (HopPoint(2304, 1e-4, False),)
    write_profile(dataclasses.replace(a_profile(), hops=hops), tmp_path)
    alone = dataclasses.replace(a_profile(2.0), hops=())
    assert with_known_hops(alone, tmp_path) == dataclasses.replace(alone, hops=hops)
    others = (HopPoint(4608, 2e-4, True),)
    newer = dataclasses.replace(alone, hops=others)
    assert with_known_hops(newer, tmp_path) == newer
    assert with_known_hops(alone, tmp_path / "none") == alone


def test_threads_of_a_gpus_rank_do_not_matter() -> None:
    ranks = [make_rank(0, gpu=GpuFacts(index=0, name="Tesla T4", uuid="g"))]
    shape = ProfileKey.shape_of(SMOL)
    keys = {
        ProfileKey.of(
            dataclasses.replace(a_plan(), device="cuda", threads_per_rank=threads), shape, ranks, 0
        )
        for threads in (1, 8)
    }
    (key,) = keys
    assert (key.device, key.ranks_per_host) == ("Tesla T4", 1)


# ---- what is measured ----------------------------------------------------------------------------


def test_the_slices_are_too_large_for_a_cache_where_the_model_is() -> None:
    assert slice_layers(14 << 20, 30) == (7, 21)
    assert slice_layers(400 << 20, 32) == (1, 3)
    assert slice_layers(1 << 20, 6) == (2, 6)
    assert slice_layers(1 << 20, 1) == (1, 1)


def test_a_brief_stays_within_the_plan_the_model_and_the_memory() -> None:
    brief = Brief.of(SMOL, a_plan(), SMOL.num_layers)
    plan = brief.plan
    assert {shape.rows for shape in brief.decodes} == {1, 2, 4, 8, 16, 32}
    assert max(shape.tokens for shape in brief.prompts) == plan.max_tokens_per_step == 512
    assert all(shape.num_sequences <= plan.max_sequences_per_slot for shape in brief.prompts)
    # 32 sequences of 2,048 tokens over 21 layers take 2 GB: beyond what measuring may take.
    assert DecodeShape(4, 2048) in brief.decodes
    assert DecodeShape(32, 2048) not in brief.decodes
    assert plan.num_kv_pages * 16 * 1536 * 21 <= 512 << 20
    short = dataclasses.replace(OPENLLAMA_3B, max_context_tokens=256)
    brief = Brief.of(short, a_plan(), 26)
    assert max(shape.num_cached + shape.length for shape in brief.prompts) < 256
    assert max(shape.context_tokens for shape in brief.decodes) < 256
    # What a key costs in a large step follows from as many tokens in short prompts and in one.
    assert {(7, 32), (1, 224)} <= {(shape.num_sequences, shape.length) for shape in brief.prompts}


# ---- what is made of it --------------------------------------------------------------------------


def timed(num_layers: int, beside_s: float, brief: Brief, *, is_full: bool = False) -> Timed:
    """The seconds of a machine whose parts are known."""
    decodes = brief.decodes if is_full else first_of_rows(brief.decodes)

    def seconds(tokens: int, context: float) -> float:
        return num_layers * tokens * (LAYER_S + KEY_S * context) + STEP_S * tokens + beside_s

    return Timed(
        {shape: seconds(shape.rows, shape.context_tokens) for shape in decodes},
        {shape: seconds(shape.tokens, shape.context_tokens) for shape in brief.prompts},
    )


def test_the_parts_of_a_machine_are_found_again() -> None:
    brief = Brief.of(SMOL, a_plan(), SMOL.num_layers)
    times = SliceTimes(
        timed(7, 0.0, brief),
        timed(21, 0.0, brief, is_full=True),
        timed(7, 0.1e-3, brief),
        timed(7, HEAD_S, brief),
        num_layers=(7, 21),
    )
    decode, prefill = decode_part(times), prefill_part(times)
    assert {(point.tokens, point.context_tokens) for point in decode.layer} == {
        (shape.rows, shape.context_tokens) for shape in brief.decodes
    }
    for part in (decode, prefill):
        for point in part.layer:
            expected = point.tokens * (LAYER_S + KEY_S * point.context_tokens)
            assert point.seconds == pytest.approx(expected)
        assert [p.seconds for p in part.step] == pytest.approx([STEP_S * p.rows for p in part.step])
        assert [p.seconds for p in part.head] == pytest.approx([HEAD_S] * len(part.head))
        assert [p.seconds for p in part.embedding] == pytest.approx([1e-4] * len(part.embedding))


def test_one_slice_does_for_a_model_of_one_layer() -> None:
    shape, prompt = DecodeShape(1, 64), PromptShape(1, 16)
    one = Timed({shape: 2.0}, {prompt: 4.0})
    part = decode_part(SliceTimes(one, one, one, one, num_layers=(1, 1)))
    assert part.layer == (TokenPoint(1, 64.0, 2.0),)
    assert part.step == part.head == (RowPoint(1, 0.0),)


def test_the_median_of_all_passes_counts_for_each_shape() -> None:
    one, two, prompt = DecodeShape(1, 64), DecodeShape(2, 64), PromptShape(1, 16)
    passes = [
        Timed({one: 1.0, two: 5.0}, {prompt: 2.0}),
        Timed({one: 3.0, two: 4.0}, {prompt: 9.0}),
        Timed({one: 2.0, two: 4.5}, {prompt: 1.0}),
    ]
    assert Timed.of_passes(passes[:1]) == passes[0]
    assert Timed.of_passes(passes) == Timed({one: 2.0, two: 4.5}, {prompt: 2.0})


def test_noise_makes_no_part_negative() -> None:
    shape, prompt = DecodeShape(1, 64), PromptShape(1, 16)

    def of(seconds: float) -> Timed:
        return Timed({shape: seconds}, {prompt: seconds})

    part = decode_part(SliceTimes(of(2.0), of(1.0), of(1.5), of(1.9), num_layers=(1, 3)))
    assert min(part.layer[0].seconds, part.step[0].seconds, part.head[0].seconds) >= 0.0
