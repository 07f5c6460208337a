from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpipipe.config.load import load_config
from mpipipe.errors import ConfigError, OutputError
from mpipipe.run_folder.files import prepare_run_folder
from mpipipe.run_folder.journal import merge
from mpipipe.run_folder.resume import (
    Earlier,
    check_fingerprint,
    earlier_fingerprint,
    read_earlier,
    wants_resume,
)
from mpipipe.topology.slurm import SlurmJob

FINGERPRINT: dict[str, object] = {"model.weights": "", "generation.max_new_tokens": 8}


def line(prompt_id: str, **more: object) -> bytes:
    return json.dumps({"id": prompt_id, "text": "…"} | more, ensure_ascii=False).encode() + b"\n"


def read(folder: Path, *prompt_ids: str, **differs: object) -> Earlier:
    """What is in `folder` of a run with these prompts."""
    return read_earlier(folder, FINGERPRINT | differs, prompt_ids or ("a", "b", "c", "z"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    manifest = {"basis": FINGERPRINT, "attempts": [{"num_kept": 0}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "label", "restarts", "wanted"),
    [
        ("auto", "", 0, False),
        ("auto", "7", 0, False),
        ("auto", "7", 2, True),
        ("auto", "8", 2, False),  # of another job
        (True, "", 0, True),
        (False, "7", 2, False),
    ],
)
def test_auto_resumes_the_run_of_a_job_that_slurm_has_requeued(
    setting: bool | str, label: str, restarts: int, wanted: bool, tmp_path: Path
) -> None:
    job = SlurmJob(label, restarts, None) if label else None
    attempts = [{"job": "8"}, {"job": "7"}]
    (tmp_path / "manifest.json").write_text(
        json.dumps({"basis": FINGERPRINT, "attempts": attempts})
    )
    assert wants_resume(setting, tmp_path, job) is wanted


def test_nothing_is_left_by_a_run_that_ended_while_it_booted(tmp_path: Path) -> None:
    (tmp_path / "rank_0.log").touch()
    assert read(tmp_path) == Earlier()


def test_records_are_kept_whether_completed_or_failed(folder: Path) -> None:
    (folder / "completions_rank_0.jsonl").write_bytes(line("a") + line("b", error={"kind": "x"}))
    (folder / "completions_rank_1.jsonl").write_bytes(line("c"))
    earlier = read(folder)
    assert earlier.kept_ids == {"a", "b", "c"}
    assert (earlier.records.num_failed, earlier.records.num_damaged) == (1, 0)
    assert earlier.fingerprint == FINGERPRINT
    assert earlier.attempts == ({"num_kept": 0},)


@pytest.mark.parametrize(
    "torn",
    [
        line("z")[:-1],  # whole but for its newline: it may have been longer
        line("z")[:9],
        b"\0" * 20,
        b"\0" * 20 + b"\n",
        '{"id": "z", "text": "…'.encode()[:-1],
        b"3\n",
        b'{"text": "no id"}\n',
    ],
)
def test_a_torn_line_is_set_aside_and_its_prompt_is_run_again(folder: Path, torn: bytes) -> None:
    path = folder / "completions_rank_0.jsonl"
    path.write_bytes(line("a") + line("b") + torn)
    earlier = read(folder)
    assert earlier.kept_ids == {"a", "b"}
    assert earlier.records.num_damaged == 1
    assert path.read_bytes() == line("a") + line("b")
    assert (folder / "damaged_rank_0.jsonl").read_bytes() == torn.removesuffix(b"\n") + b"\n"


def test_a_prompt_keeps_one_record(folder: Path) -> None:
    path = folder / "completions_rank_0.jsonl"
    path.write_bytes(line("a", text="1") + line("b") + line("a", text="2"))
    read(folder)
    assert path.read_bytes() == line("a", text="1") + line("b")


def test_what_is_kept_and_what_is_new_are_merged_in_the_order_of_the_input(folder: Path) -> None:
    (folder / "completions_rank_0.jsonl").write_bytes(line("c") + line("a") + line("b"))
    merged = merge(folder, {"a": 0, "b": 1, "c": 2, "never reached": 3})
    assert merged.read_bytes() == line("a") + line("b") + line("c")


def test_of_a_prompt_that_two_attempts_have_completed_one_line_is_merged(folder: Path) -> None:
    """The earlier one on a node that Slurm has lost and the file server has not."""
    path = folder / "completions_rank_0.jsonl"
    path.write_bytes(line("b") + line("a", text="1") + line("a", text="2"))
    assert merge(folder, {"a": 0, "b": 1}).read_bytes() == line("a", text="1") + line("b")


def test_completions_of_an_unknown_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "completions_rank_0.jsonl").write_bytes(line("a"))
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be resumed"):
        read(tmp_path)


def test_what_differs_is_named() -> None:
    check_fingerprint(FINGERPRINT, dict(FINGERPRINT), Path("run"))
    with pytest.raises(OutputError, match="max_new_tokens was 8 and is 9 now"):
        check_fingerprint(FINGERPRINT, FINGERPRINT | {"generation.max_new_tokens": 9}, Path("run"))
    weights = "the model's weights"
    before = {weights: {"1.bin": "1:a", "2.bin": "1:b"}}
    with pytest.raises(OutputError, match=r"weights are others now \(2\.bin differ\)"):
        check_fingerprint(before, {weights: {"1.bin": "1:a", "2.bin": "1:c"}}, Path("run"))


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"the model's weights": {}}, "does not tell the model's weights"),
        ({"model.path": "/models/a"}, {}, r"tells what no longer counts, model\.path"),
    ],
)
def test_a_manifest_that_does_not_tell_all_is_refused(
    before: dict[str, object], after: dict[str, object], told: str
) -> None:
    with pytest.raises(OutputError, match=told):
        check_fingerprint(FINGERPRINT | before, FINGERPRINT | after, Path("run"))


# ---- manifests of odd content --------------------------------------------------------------------

DEEP = "[" * 100_000
NESTED = "[" * 400 + "]" * 400
NO_BASIS = [
    b"", b"{", b"null", b"1", b"[]", b'"x"', b"\0" * 40, b"\xff\xfe", DEEP.encode(),
    b'{"basis": null}', b'{"basis": 1}', b'{"basis": []}', b'{"basis": {}}', b'{"basis": "x"}',
    b"{}", b'{"attempts": []}', b'{"basis": ' + b"9" * 5000 + b"}",
]  # fmt: skip


@pytest.mark.parametrize("content", NO_BASIS, ids=repr)
def test_a_manifest_whose_basis_cannot_be_read_refuses_the_resume(
    content: bytes, folder: Path
) -> None:
    (folder / "manifest.json").write_bytes(content)
    job = SlurmJob("7", 1, None)
    assert read(folder) == Earlier()  # nothing is complete: nothing to mix up
    assert wants_resume("auto", folder, job) is False
    (folder / "completions_rank_0.jsonl").write_bytes(line("a"))
    for attempt in (
        lambda: read(folder),
        lambda: wants_resume("auto", folder, job),
        lambda: earlier_fingerprint(folder),
    ):
        with pytest.raises(OutputError, match="cannot be resumed"):
            attempt()
    assert (folder / "completions_rank_0.jsonl").read_bytes() == line("a")


def test_what_stands_in_the_place_of_a_file_is_told(folder: Path) -> None:
    (folder / "completions_rank_0.jsonl").write_bytes(line("a"))
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(OutputError, match=r"manifest\.json cannot be read: Is a directory"):
        read(folder)
    (folder / "manifest.json").rmdir()
    (folder / "manifest.json").write_text(json.dumps({"basis": FINGERPRINT}))
    (folder / "completions_rank_1.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"completions_rank_1\.jsonl could not be read"):
        read(folder)


@pytest.mark.parametrize(
    "attempts",
    ["1", "null", '"x"', "{}", "[1, null, []]", '[{"job": ["7", {}]}]', f'[{{"job": {NESTED}}}]'],
)
def test_attempts_of_odd_content_are_forgotten_and_decide_nothing(
    attempts: str, folder: Path
) -> None:
    (folder / "manifest.json").write_text(
        f'{{"basis": {json.dumps(FINGERPRINT)}, "attempts": {attempts}}}'
    )
    (folder / "completions_rank_0.jsonl").write_bytes(line("a"))
    earlier = read(folder)
    assert (earlier.kept_ids, earlier.attempts) == ({"a"}, ())
    assert wants_resume("auto", folder, SlurmJob("7", 1, None)) is False


@pytest.mark.parametrize("value", [NESTED, "9" * 4000, '"\\ud800"', "[[]]", "NaN"])
def test_a_basis_of_odd_values_differs(value: str, folder: Path) -> None:
    fingerprint = json.dumps(FINGERPRINT)[:-1] + f', "generation.seed": {value}}}'
    (folder / "manifest.json").write_text(f'{{"basis": {fingerprint}}}')
    (folder / "completions_rank_0.jsonl").write_bytes(line("a"))
    with pytest.raises(OutputError, match=r"generation\.seed was") as raised:
        read(folder, **{"generation.seed": 0})
    assert len(str(raised.value)) < 1000


def test_nothing_is_set_aside_before_the_run_is_known_to_be_the_same(folder: Path) -> None:
    path = folder / "completions_rank_0.jsonl"
    path.write_bytes(line("a") + line("of other prompts"))
    with pytest.raises(OutputError, match="max_new_tokens was 8 and is 9"):
        read(folder, **{"generation.max_new_tokens": 9})
    assert path.read_bytes() == line("a") + line("of other prompts")


def test_preparing_leaves_what_is_resumed_and_replaces_what_is_not(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    prepare_run_folder(folder, overwrite=True, resume=True)
    assert {path.name for path in folder.iterdir()} == names
    with pytest.raises(OutputError, match=r"output\.resume=true"):
        prepare_run_folder(folder, overwrite=False)
    prepare_run_folder(folder, overwrite=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("value", ["true", "false", "auto"])
def test_resume_takes_a_truth_or_auto(value: str) -> None:
    config = load_config(None, [f"output.resume={value}"]).config
    assert config.output.resume == {"true": True, "false": False}.get(value, "auto")


@pytest.mark.parametrize("words", [["output.resume=sometimes"], ["output.resume=1"],
                                   ["output.resume=true", "output.overwrite=true"]])  # fmt: skip
def test_resume_refuses_anything_else(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"output\.resume"):
        load_config(None, words)


@pytest.mark.parametrize("name", ["x" * 5000, "\\ud800", "a\\u0000b"])
def test_a_basis_of_odd_names_is_refused_in_a_sentence(name: str, folder: Path) -> None:
    fingerprint = json.dumps(FINGERPRINT)[:-1] + f', "{name}": 1}}'
    (folder / "manifest.json").write_text(f'{{"basis": {fingerprint}}}')
    (folder / "completions_rank_0.jsonl").write_bytes(line("a"))
    with pytest.raises(OutputError, match="cannot be resumed, as its manifest") as raised:
        read(folder)
    assert len(str(raised.value).encode()) < 1000
