"""What reads things that others wrote, without torch: each as a function of bytes.

A target only puts the bytes where the reader looks for them, calls what the program itself calls,
and checks what the reader promises of its result.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mpipipe.checkpoint.index import read_index
from mpipipe.checkpoint.spec import read_spec
from mpipipe.checkpoint.staged import MANIFEST_NAME, UNFINISHED_NAME, require_finished
from mpipipe.cli.status import status_command
from mpipipe.config.load import load_config
from mpipipe.config.prompts import read_prompts
from mpipipe.config.schema import GenerationConfig
from mpipipe.control_plane.codec import decode
from mpipipe.control_plane.messages import TAGS
from mpipipe.errors import CheckpointError
from mpipipe.job.acquire import acquire_folder
from mpipipe.logs.difference import find_differences
from mpipipe.logs.facts import read_facts
from mpipipe.logs.problems import find_problems
from mpipipe.logs.prompts import read_requests
from mpipipe.logs.rates import intervals
from mpipipe.logs.reading import RunFiles
from mpipipe.logs.step_report import report_steps
from mpipipe.logs.summary import summarise
from mpipipe.logs.tail import LogFollower, told_line
from mpipipe.logs.timeline import write_timeline
from mpipipe.run_folder.journal import merge
from mpipipe.scheduler.detokenize import StopWatch
from mpipipe.staging.expected import expected_hashes
from mpipipe.staging.record import read_record
from mpipipe.topology.slurm import SlurmJob
from tests.fuzz import seeds
from tests.fuzz.engine import Check, Target
from tests.fuzz.mutate import (
    mutate_bytes,
    mutate_framed_json,
    mutate_json,
    mutate_json_lines,
    mutate_msgpack,
    mutate_toml,
)

__all__ = ["TARGETS"]


# ---- what users write ----------------------------------------------------------------------------


def _prompts(name: str) -> Callable[[Path], Check]:
    def open_in(folder: Path) -> Check:
        def check(content: bytes) -> None:
            (folder / name).write_bytes(content)
            lines = read_prompts(folder / name, GenerationConfig())
            assert [line.index for line in lines] == list(range(len(lines)))
            assert len({line.prompt_id for line in lines}) == len(lines), "ids are unique"
            for line in lines:
                given = (line.text is not None) + (line.messages is not None)
                assert given == (line.error is None), "one of text and messages, or an error"
                assert (line.sampling is not None) == (line.error is None)
                line.prompt_id.encode()  # it goes into files

        return check

    return open_in


def _config(name: str) -> Callable[[Path], Check]:
    def open_in(folder: Path) -> Check:
        (folder / "base.toml").write_text('model.path = "m"\n')
        path = folder / name

        def check(content: bytes) -> None:
            path.write_bytes(content)
            load_config(path)

        return check

    return open_in


def _deepspeed(folder: Path) -> Check:
    (folder / "exp_config.json").write_bytes(seeds.LEGACY[0])

    def check(content: bytes) -> None:
        (folder / "ds_config.json").write_bytes(content)
        load_config(folder / "exp_config.json")

    return check


def _words(_: Path) -> Check:
    def check(content: bytes) -> None:
        # As a shell hands them over: any bytes but NUL.
        words = content.replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")
        is_setting = "=" in words[0]
        load_config(None if is_setting else Path(words[0]), words if is_setting else words[1:])

    return check


# ---- what ranks send -----------------------------------------------------------------------------


def _codec(_: Path) -> Check:
    def check(content: bytes) -> None:
        assert type(decode(content)) in TAGS.values()

    return check


# ---- what model folders hold ---------------------------------------------------------------------


def _model_file(name: str, read: Callable[[Path], object]) -> Callable[[Path], Check]:
    """A model folder that is in order but for one file."""

    def open_in(folder: Path) -> Check:
        for other, content in seeds.model_files(name).items():
            (folder / other).write_bytes(content)

        def check(content: bytes) -> None:
            (folder / name).write_bytes(content)
            read(folder)

        return check

    return open_in


def _read_index(folder: Path) -> None:
    index = read_index(folder)
    for entry in index.tensors.values():
        assert 0 <= entry.offset <= entry.offset + entry.num_bytes <= entry.file.stat().st_size
    assert index.file_bytes > 0


def _read_staged(folder: Path) -> None:
    record = read_record(folder)
    assert record is not None
    require_finished(folder)


def _read_unfinished(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not finished"):
        require_finished(folder)
    read_record(folder)


def _read_sums(folder: Path) -> None:
    for name, expected in expected_hashes(folder).items():
        assert (folder / name).is_file()
        assert len(expected.hexdigest) in {40, 64}


def _read_spec(folder: Path) -> None:
    spec = read_spec(folder)
    assert spec.layer_parameters >= 0
    assert spec.embedding_parameters > 0
    assert spec.kv_elements_per_token_layer > 0
    assert all(n >= 0 for n in spec.eos_token_ids)


# ---- what a run leaves ---------------------------------------------------------------------------


def _run_file(name: str, label: str | None, *words: str) -> Callable[[Path], Check]:
    """The folder of an earlier run with one file of odd content, acquired by the next attempt."""

    def open_in(folder: Path) -> Check:
        run, prompts = folder / "run", folder / "prompts.jsonl"
        run.mkdir()
        prompts.write_bytes(seeds.RUN_PROMPTS)
        loaded = load_config(
            None, [f"output.dir={run}", f"prompts.path={prompts}", "name=demo", *words]
        )
        lines = read_prompts(prompts, loaded.config.generation)
        job = None if label is None else SlurmJob(label, 1, None)

        def check(content: bytes) -> None:
            for path in run.iterdir():
                path.unlink()
            for other, usual in {**seeds.RUN_FILES, name: content}.items():
                (run / other).write_bytes(usual)
            _go_on_twice(loaded, lines, job)

        return check

    return open_in


def _go_on_twice(loaded: Any, lines: Sequence[Any], job: SlurmJob | None) -> None:
    """What the second attempt keeps is in the merged file once, and the third keeps the same."""
    known = {line.prompt_id for line in lines}
    kept: list[set[str]] = []
    for _ in range(2):
        acquired = acquire_folder(loaded, lines, seeds.FINGERPRINT, job)
        acquired.close()
        kept.append({*acquired.earlier.kept_ids} & known)
        left = {line.prompt_id for line in acquired.lines_left}
        assert left == known - kept[-1], "a prompt is kept, or run again"
        path = merge(acquired.folder, acquired.index_of)
        merged = [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]
        assert len(merged) == len(set(merged)), "no prompt is doubled"
        assert {*merged} == kept[-1], "all that is kept is merged"
        assert merged == sorted(merged, key=acquired.index_of.__getitem__), "in order"
    assert kept[0] == kept[1], "what was kept once is kept"


def _status(folder: Path) -> Check:
    run = folder / "demo-7"
    run.mkdir()
    nothing = subprocess.CompletedProcess[str]((), 1, "", "")

    def check(content: bytes) -> None:
        (run / "status.json").write_bytes(content)
        for as_json in (False, True):
            with redirect_stdout(StringIO()) as shown:
                status_command(str(run), as_json=as_json, run=lambda _, __: nothing)
            assert shown.getvalue().strip()

    return check


def _slurm(folder: Path) -> Check:
    run = folder / "demo-7"
    run.mkdir()
    (run / "status.json").write_bytes(seeds.STATUS[0])

    def check(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        said = subprocess.CompletedProcess[str]((), 0, text, "")
        for place in (str(run), "7"):
            with redirect_stdout(StringIO()):
                status_command(place, as_json=False, run=lambda _, __: said)

    return check


_LINE_FILES = ("steps_rank_0.jsonl", "samples_rank_0.jsonl", "requests.jsonl", "clock.jsonl")


def _run_lines(folder: Path) -> Check:
    files = RunFiles(folder)
    for name in _LINE_FILES:
        (folder / name).symlink_to("rank_0.log")

    def check(content: bytes) -> None:
        (folder / "rank_0.log").write_bytes(content)
        _ask_all(files)

    return check


def _run_documents(folder: Path) -> Check:
    files = RunFiles(folder)
    (folder / "rank_0.log").write_bytes(seeds.RUN_LINES[0])

    def check(content: bytes) -> None:
        for name in ("manifest.json", "metrics.json"):
            (folder / name).write_bytes(content)
        _ask_all(files)
        document = files.document("manifest.json")
        find_differences((document, {}), ({}, document))

    return check


def _ask_all(files: RunFiles) -> None:
    """What `mpipipe logs` asks."""
    facts = read_facts(files)
    found = summarise(facts, files.document("metrics.json"))
    assert all(seconds >= 0 for rank in found.ranks for seconds in rank.seconds.values())
    assert found.culprit.sentence
    report_steps(facts, 0.5)
    json.dumps(found.to_dict())
    json.dumps(read_requests(files.lines("requests.jsonl"), num_slowest=3).to_dict())
    find_problems(files, with_warnings=True)
    intervals(0, files.sample_lines(0), facts.clocks)
    write_timeline(files, Path(os.devnull), 1, 0)
    for line in LogFollower(files, 10).poll():
        told_line(line)


# ---- what models write ---------------------------------------------------------------------------


def _decode_words(ids: Sequence[int]) -> str:
    """Like a tokenizer of bytes: 0 to 255 are bytes, 256 a token without text, more: words."""
    return b"".join(
        bytes([number]) if number < 256 else seeds.WORDS[number - 256] for number in ids
    ).decode("utf-8", "replace")


def _detokenize(_: Path) -> Check:
    def check(content: bytes) -> None:
        stop, _, rest = content.partition(b"\xfe")
        ids = [n if n < 0xF8 else 256 + (n - 0xF8) % len(seeds.WORDS) for n in rest]
        stops = stop.decode("utf-8", "replace").split("|")
        watch = StopWatch(_decode_words, stops)
        for number in ids:
            if watch.push(number):
                break
        given, whole = watch.finish(), _decode_words(ids)
        if "\ufffd" in whole:
            return
        ends = [(whole.find(s) + len(s), whole.find(s)) for s in stops if s and s in whole]
        right = whole[: min(ends)[1]] if ends else whole
        assert given == right, f"{given!r} instead of {right!r}"

    return check


TARGETS: tuple[Target, ...] = (
    Target("prompts", _prompts("prompts.jsonl"), seeds.PROMPTS, mutate_json_lines),
    Target("prompts-gzip", _prompts("prompts.jsonl.gz"), seeds.GZIPPED_PROMPTS, mutate_bytes),
    Target("prompts-zstd", _prompts("prompts.jsonl.zst"), seeds.ZSTD_PROMPTS, mutate_bytes),
    Target("config-toml", _config("exp.toml"), seeds.TOML, mutate_toml),
    Target("config-json", _config("exp.json"), seeds.JSON, mutate_json),
    Target("config-legacy", _config("exp_config.json"), seeds.LEGACY, mutate_json),
    Target("config-deepspeed", _deepspeed, seeds.DEEPSPEED, mutate_json),
    Target("config-words", _words, seeds.WORDS_OF_COMMAND, mutate_toml),
    Target("codec", _codec, seeds.FRAMES, mutate_msgpack),
    Target(
        "header", _model_file("model.safetensors", _read_index), seeds.HEADERS, mutate_framed_json
    ),
    Target(
        "header-index",
        _model_file("model.safetensors.index.json", _read_index),
        seeds.INDEXES,
        mutate_json,
    ),
    Target(
        "header-archive",
        _model_file("pytorch_model.bin", _read_index),
        seeds.ARCHIVES,
        mutate_bytes,
    ),
    Target(
        "header-config", _model_file("config.json", _read_spec), seeds.MODEL_CONFIGS, mutate_json
    ),
    Target(
        "header-generation",
        _model_file("generation_config.json", _read_spec),
        seeds.GENERATION_CONFIGS,
        mutate_json,
    ),
    Target("staged-manifest", _model_file(MANIFEST_NAME, _read_staged), seeds.STAGED, mutate_json),
    Target(
        "staged-unfinished",
        _model_file(UNFINISHED_NAME, _read_unfinished),
        seeds.STAGED,
        mutate_json,
    ),
    Target("staged-sums", _model_file("SHA256SUMS", _read_sums), seeds.SUMS, mutate_bytes),
    Target(
        "journal",
        _run_file("completions_rank_0.jsonl", None, "output.resume=true"),
        seeds.JOURNALS,
        mutate_json_lines,
    ),
    Target(
        "manifest",
        _run_file("manifest.json", "7", "output.resume=auto"),
        seeds.MANIFESTS,
        mutate_json,
    ),
    Target("status", _status, seeds.STATUS, mutate_json),
    Target(
        "status-claim",
        _run_file("status.json", "7", "output.resume=auto"),
        seeds.STATUS,
        mutate_json,
    ),
    Target("status-slurm", _slurm, seeds.SLURM_ANSWERS, mutate_bytes),
    Target("logs-lines", _run_lines, seeds.RUN_LINES, mutate_json_lines),
    Target("logs-documents", _run_documents, seeds.RUN_DOCUMENTS, mutate_json),
    Target("detokenize", _detokenize, seeds.GENERATED, mutate_bytes),
)
