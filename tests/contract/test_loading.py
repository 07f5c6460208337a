from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mpipipe.checkpoint.index import read_index
from mpipipe.errors import CheckpointError
from mpipipe.weights import sources
from mpipipe.weights.loader import LoadReport, load_stage
from mpipipe.weights.random import fill_random
from mpipipe.weights.readers import Extent, FileReaders
from tests.contract.checkpoint_cases import (
    CONFIGS,
    FORMS,
    NUM_LAYERS,
    Stage,
    make_model,
    make_stage,
    rewrite_bin,
    save_bin,
    save_safetensors,
    save_sharded_bin,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(folder: Path, stage: Stage, dtype: torch.dtype = torch.float32) -> LoadReport:
    return load_stage(
        stage.module,
        stage.wanted,
        read_index(folder),
        all_names=stage.all_names,
        tied=stage.tied,
        dtype=dtype,
        device=CPU,
    )


def whole(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Stage:
    return make_stage(config, 0, NUM_LAYERS, dtype)


def state_of(stage: Stage) -> dict[str, torch.Tensor]:
    """What was loaded, under the full model's names."""
    state = stage.module.state_dict(keep_vars=True)
    return {canonical: state[name] for name, canonical in stage.wanted.items()}


def assert_equal(stage: Stage, expected: dict[str, torch.Tensor]) -> None:
    for canonical, tensor in state_of(stage).items():
        assert torch.equal(tensor, expected[canonical]), canonical


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_whole_model_equals_what_transformers_loads(
    tmp_path: Path, family: str, form: str
) -> None:
    model = make_model(family)
    FORMS[form](model, tmp_path)
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_equal(stage, reference.state_dict())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_stage_holds_its_layers_and_reads_nothing_else(
    tmp_path: Path, family: str, form: str
) -> None:
    model = make_model(family)
    FORMS[form](model, tmp_path)
    expected = model.state_dict()
    seen: set[str] = set()
    for first in range(NUM_LAYERS):
        stage = make_stage(model.config, first, first + 1)
        report = load(tmp_path, stage)
        assert_equal(stage, expected)
        held = {name: tensor.nbytes for name, tensor in state_of(stage).items()}
        assert report.bytes_read == report.parameter_bytes == sum(held.values())
        assert not any(f"layers.{other}." in n for n in held for other in {0, 1, 2} - {first})
        assert not any(t.is_meta for t in stage.module.state_dict(keep_vars=True).values())
        seen |= held.keys()
    assert seen == stage.all_names


@pytest.mark.parametrize("run", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_every_type_is_converted_while_loading(
    tmp_path: Path, form: str, stored: torch.dtype, run: torch.dtype
) -> None:
    model = make_model("llama", stored)
    FORMS[form](model, tmp_path)
    stage = whole(model.config, run)
    report = load(tmp_path, stage, run)
    assert_equal(stage, {name: tensor.to(run) for name, tensor in model.state_dict().items()})
    assert report.bytes_read == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (report.convert_s > 0) == (stored != run)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_weight_beyond_float16_is_refused_not_made_infinite(tmp_path: Path, form: str) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = 70000.0
    FORMS[form](model, tmp_path)
    stage = whole(model.config, torch.float16)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds values beyond float16"):
        load(tmp_path, stage, torch.float16)


def test_a_place_that_is_kept_in_float32_stays_so(tmp_path: Path) -> None:
    model = make_model("llama")
    save_safetensors(model, tmp_path)
    stage = whole(model.config, torch.bfloat16)
    stage.module.model.norm.float()
    load(tmp_path, stage, torch.bfloat16)
    assert stage.module.model.norm.weight.dtype == torch.float32
    assert torch.equal(stage.module.model.norm.weight, model.model.norm.weight)


# --- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prefix"), [("llama", "model."), ("opt", "model."), ("gpt_neox", "gpt_neox.")]
)
def test_names_without_the_prefix_of_the_base_model(
    tmp_path: Path, family: str, prefix: str
) -> None:
    model = make_model(family)
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {k.removeprefix(prefix): v for k, v in state.items()})
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_with_the_prefix_of_a_wrapper(tmp_path: Path, prefix: str) -> None:
    model = make_model("llama")
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {prefix + k: v for k, v in state.items()})
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())


def test_a_tied_model_saved_from_its_base_model(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    model.base_model.save_pretrained(tmp_path)
    stage = whole(AutoConfig.from_pretrained(tmp_path))
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_the_head_of_gpt_neox_under_both_its_names(tmp_path: Path, name: str) -> None:
    model = make_model("gpt_neox")
    save_bin(model, tmp_path)
    heads = ("embed_out.weight", "lm_head.weight")
    rewrite_bin(tmp_path, lambda state: {name if k in heads else k: v for k, v in state.items()})
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())


@pytest.mark.parametrize(
    ("family", "extras"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
                "gpt_neox.layers.1.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
            ],
        ),
    ],
)
def test_what_older_libraries_stored_besides_is_ignored(
    tmp_path: Path, family: str, extras: list[str]
) -> None:
    model = make_model(family)
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {**state, **{name: torch.ones(3) for name in extras}})
    stage = whole(model.config)
    report = load(tmp_path, stage)
    assert_equal(stage, model.state_dict())
    assert report.bytes_read == sum(tensor.nbytes for tensor in model.state_dict().values())


# --- tied embeddings -------------------------------------------------------------------------


def test_one_rank_shares_a_tied_matrix_and_reads_it_once(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    save_safetensors(model, tmp_path)
    stage = whole(model.config)
    report = load(tmp_path, stage)
    assert stage.module.lm_head.weight is stage.module.model.embed_tokens.weight
    assert report.bytes_read == report.parameter_bytes
    assert report.bytes_read == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("left_out", [EMBEDDING, HEAD])
def test_either_name_of_a_tied_matrix_will_do(tmp_path: Path, left_out: str) -> None:
    model = make_model("llama-tied")
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {k: v for k, v in state.items() if k != left_out})
    for first, last in ((0, 1), (2, 3), (0, 3)):
        stage = make_stage(model.config, first, last)
        load(tmp_path, stage)
        assert_equal(stage, model.state_dict())


def test_a_tied_matrix_stored_twice_is_held_once(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {**state, HEAD: state[HEAD].clone()})
    stage = whole(model.config)
    report = load(tmp_path, stage)
    assert stage.module.lm_head.weight is stage.module.model.embed_tokens.weight
    assert report.parameter_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_a_head_that_differs_from_the_embedding_wins_over_the_configuration(
    tmp_path: Path,
) -> None:
    model = make_model("llama-tied")
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {**state, HEAD: state[HEAD] + 1})
    stage = whole(model.config)
    load(tmp_path, stage)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_equal(stage, reference.state_dict())
    assert not torch.equal(stage.module.lm_head.weight, stage.module.model.embed_tokens.weight)


def test_a_head_that_was_not_asked_for_follows_the_embedding(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    save_safetensors(model, tmp_path)
    stage = whole(model.config)
    del stage.wanted[HEAD]
    stage.module.lm_head.weight = torch.nn.Parameter(stage.module.lm_head.weight.clone())
    load(tmp_path, stage)
    assert stage.module.lm_head.weight is stage.module.model.embed_tokens.weight


# --- nothing is read before everything is accounted for -----------------------------------------


@pytest.fixture
def _reading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: object, extent: Extent, into: memoryview) -> NoReturn:
        raise AssertionError(f"{extent} was read before all names were accounted for")

    monkeypatch.setattr(FileReaders, "read", read)


def change_checkpoint(model: PreTrainedModel, folder: Path, form: str, kind: str) -> None:
    """Leave out, add and reshape tensors of stage 0."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind in ("missing", "all"):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            del state[f"model.layers.0.self_attn.{name}.weight"]
    if kind in ("unexpected", "all"):
        state["model.layers.3.mlp.up_proj.weight"] = torch.ones(2)
    if kind == "shape":
        state["model.layers.0.mlp.up_proj.weight"] = torch.ones(5, 16)
    if kind == "type":
        state["model.layers.0.mlp.up_proj.weight"] = torch.ones(24, 16, dtype=torch.int8)
    model.config.save_pretrained(folder)
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.usefixtures("_reading_fails")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", r"4 missing \(model.layers.0.self_attn.k_proj.weight, .*, …\); the files"),
        ("unexpected", r"1 not part of the model \(model.layers.3.mlp.up_proj.weight\); the files"),
        ("all", "4 missing .*; 1 not part of the model"),
        ("shape", r"1 of another shape \(model.layers.0.mlp.up_proj.weight is \[5, 16\], expected"),
        ("type", r"1 of a type that cannot be run .*up_proj.weight is int8"),
    ],
)
def test_names_shapes_and_types_are_checked_before_a_byte_is_read(
    tmp_path: Path, form: str, kind: str, words: str
) -> None:
    model = make_model("llama")
    change_checkpoint(model, tmp_path, form, kind)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, make_stage(model.config, 0, 1))


@pytest.mark.usefixtures("_reading_fails")
@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_a_fault_in_one_stage_stops_them_all(tmp_path: Path, kind: str) -> None:
    model = make_model("llama")
    change_checkpoint(model, tmp_path, "safetensors", kind)
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        load(tmp_path, make_stage(model.config, 1, 2))


@pytest.mark.usefixtures("_reading_fails")
def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    model = make_model("mixtral")
    save_safetensors(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = [name for name in state if ".experts.3." in name and "layers.1." in name]
    assert gone, "transformers stores experts one by one"
    save_file({n: t for n, t in state.items() if n not in gone}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has 3 experts, expected 4"):
        load(tmp_path, make_stage(model.config, 1, 2))


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_no_file_stays_open_or_mapped(tmp_path: Path, form: str) -> None:
    model = make_model("llama")
    FORMS[form](model, tmp_path)
    stage = whole(model.config)
    load(tmp_path, stage)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    assert not any(str(tmp_path) in os.readlink(link) for link in links if os.path.islink(link))


def transposed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same matrices, each stored column by column: their bytes are not those of the tensor."""
    return {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in state.items()
    }


def test_a_bin_file_of_tensors_that_are_not_contiguous_is_mapped_anew_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, transposed)
    mapped: list[Path] = []
    original = sources._load_torch_file

    def spy(path: Path, device: str) -> dict[str, torch.Tensor]:
        mapped.extend([path] if device == "cpu" else [])
        return original(path, device)

    monkeypatch.setattr(sources, "_load_torch_file", spy)
    monkeypatch.setattr(sources, "REMAP_BYTES", 4000)
    stage = whole(model.config)
    report = load(tmp_path, stage)
    assert_equal(stage, model.state_dict())
    assert report.bytes_read == report.parameter_bytes
    assert 3 <= len(mapped) <= report.bytes_read // 4000 + 1


@pytest.mark.parametrize("part_of_a_storage", [True, False])
def test_a_bin_file_is_read_by_plain_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_of_a_storage: bool
) -> None:
    model = make_model("llama")
    save_bin(model, tmp_path)

    def views(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
        parts = torch.split(flat, [tensor.numel() for tensor in state.values()])
        return {n: part.view(t.shape) for (n, t), part in zip(state.items(), parts, strict=True)}

    if part_of_a_storage:
        rewrite_bin(tmp_path, views)

    def unpickled(self: object, name: str) -> NoReturn:
        raise AssertionError(f"{name} was mapped")

    monkeypatch.setattr(sources.TorchSource, "unpickled", unpickled)
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())


def test_a_bin_file_that_was_packed_anew_is_not_read_where_torch_would_have_packed_it(
    tmp_path: Path,
) -> None:
    model = make_model("llama")
    save_bin(model, tmp_path)
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(records, reverse=True):
            archive.writestr(name, records[name])
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())


def test_a_bin_file_in_the_format_of_torch_before_1_6(tmp_path: Path) -> None:
    model = make_model("llama")
    save_bin(model, tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    stage = whole(model.config)
    load(tmp_path, stage)
    assert_equal(stage, model.state_dict())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin (cannot be read|is not read)"):
        load(tmp_path, whole(model.config))


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["MPIPIPE_TEST_BOMB"],)


def test_a_bin_file_with_code_in_it_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPIPIPE_TEST_BOMB", str(tmp_path / "exploded"))
    model = make_model("llama")
    save_bin(model, tmp_path)
    rewrite_bin(tmp_path, lambda state: {**state, "bomb": _Bomb()})
    with pytest.raises(CheckpointError, match="could run code"):
        load(tmp_path, whole(model.config))
    assert not (tmp_path / "exploded").exists()


def test_a_bin_file_without_tensors(tmp_path: Path) -> None:
    model = make_model("llama")
    save_bin(model, tmp_path)
    torch.save({"epoch": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        load(tmp_path, whole(model.config))


def test_a_bin_index_that_places_a_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    model = make_model("llama")
    save_sharded_bin(model, tmp_path)
    listing = tmp_path / "pytorch_model.bin.index.json"
    content = json.loads(listing.read_text())
    shards = sorted(set(content["weight_map"].values()))
    others = [shard for shard in shards if shard != content["weight_map"][EMBEDDING]]
    content["weight_map"][EMBEDDING] = others[0]
    listing.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"places {EMBEDDING} in {others[0]}"):
        load(tmp_path, make_stage(model.config, 0, 1))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    model = make_model("llama")
    save_safetensors(model, tmp_path)
    index = read_index(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    stage = whole(model.config)
    with pytest.raises(CheckpointError, match="was shortened while it was read"):
        load_stage(
            stage.module,
            stage.wanted,
            index,
            all_names=stage.all_names,
            tied=stage.tied,
            dtype=torch.float32,
            device=CPU,
        )


# ---- random weights ------------------------------------------------------------------------------


def fill_randomly(stage: Stage, dtype: torch.dtype, *, tied: bool = False, seed: int = 0) -> int:
    names = {HEAD: EMBEDDING} if tied else {}
    report = fill_random(stage.module, stage.wanted, tied=names, dtype=dtype, device=CPU, seed=seed)
    assert report.bytes_read == 0
    return report.parameter_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_weights_are_the_same_however_the_model_is_split(dtype: torch.dtype) -> None:
    config = make_model("llama").config
    full = whole(config, dtype)
    fill_randomly(full, dtype)
    expected = state_of(full)
    for first, last in ((0, 1), (1, NUM_LAYERS)):
        part = make_stage(config, first, last, dtype)
        fill_randomly(part, dtype)
        state = state_of(part)
        assert state
        for canonical, tensor in state.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[canonical]), canonical


def test_random_weights_differ_between_parameters_and_seeds() -> None:
    config = make_model("llama").config
    stage, other = whole(config), whole(config)
    fill_randomly(stage, torch.float32)
    fill_randomly(other, torch.float32, seed=1)
    state = state_of(stage)
    name = "model.layers.0.mlp.{}_proj.weight"
    assert not torch.equal(state[name.format("gate")], state[name.format("up")])
    assert not torch.equal(state[EMBEDDING], state_of(other)[EMBEDDING])
    assert 0.015 < float(state[EMBEDDING].std()) < 0.025
    assert bool((state["model.norm.weight"] == 1).all())


def test_tied_random_weights_are_one_parameter() -> None:
    config = make_model("llama").config
    untied, tied = whole(config), whole(config)
    bytes_untied = fill_randomly(untied, torch.float32)
    bytes_tied = fill_randomly(tied, torch.float32, tied=True)
    state = state_of(tied)
    assert state[HEAD] is state[EMBEDDING]
    assert bytes_untied - bytes_tied == state[HEAD].nbytes
    last = make_stage(config, 1, NUM_LAYERS, torch.float32)
    fill_randomly(last, torch.float32, tied=True)
    assert torch.equal(state_of(last)[HEAD], state[EMBEDDING])
