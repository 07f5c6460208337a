"""A short run of each fuzz target that needs no torch, and the fuzzer's own promises."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from random import Random

import pytest

from mpipipe.errors import ConfigError
from tests.fuzz import seeds
from tests.fuzz.engine import Check, Target, fuzz, minimise, names
from tests.fuzz.mutate import (
    Mutator,
    mutate_bytes,
    mutate_framed_json,
    mutate_json,
    mutate_json_lines,
    mutate_msgpack,
    mutate_toml,
)
from tests.fuzz.targets import TARGETS

NUM_INPUTS = 400


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_but_the_documented_errors(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them take a disk a minute
    figures = fuzz(target, tmp_path, NUM_INPUTS, seed=0)
    assert figures.num_inputs == NUM_INPUTS
    assert not figures.findings, "\n".join(
        f"{finding.kind}\n{finding.reproducer}\n{finding.text}" for finding in figures.findings
    )


def test_a_group_of_targets_is_found_by_its_first_word() -> None:
    assert {target.name for target in names(TARGETS, "config")} >= {"config-toml", "config-words"}
    assert [target.name for target in names(TARGETS, "codec")] == ["codec"]
    assert len(names(TARGETS, "all")) == len(TARGETS)


# ---- the fuzzer finds ----------------------------------------------------------------------------


def target(check: Check, *contents: bytes, slow_s: float = 1.0) -> Target:
    return Target("own", lambda _: check, contents or (b"abc",), slow_s=slow_s)


def parse(content: bytes) -> None:
    if len(content) > 200:
        raise ConfigError("too long")
    if b"X" in content:
        raise KeyError("X")
    if b"YY" in content:
        raise AssertionError("a promise")


def test_foreign_errors_are_found_once_each_and_made_small(tmp_path: Path) -> None:
    figures = fuzz(target(parse, b"..X..", b"..YY..YY", b"." * 300), tmp_path, 500, seed=1)
    assert {finding.content for finding in figures.findings} == {b"X", b"YY"}
    assert {finding.kind.split()[0] for finding in figures.findings} == {
        "KeyError",
        "AssertionError",
    }
    assert figures.num_inputs == 500
    assert figures.outcomes["ConfigError"] >= 1
    assert figures.outcomes["ok"] >= 1


def test_what_takes_too_long_is_found(tmp_path: Path) -> None:
    def check(content: bytes) -> None:
        until_s = time.process_time() + 0.03
        while b"s" in content and time.process_time() < until_s:
            pass

    def wait(content: bytes) -> None:  # as for another process that burns the time
        if b"s" in content:
            time.sleep(0.1)

    for slow in (check, wait):
        figures = fuzz(target(slow, b"as", slow_s=0.02), tmp_path, 1, seed=0)
        assert [finding.kind for finding in figures.findings] == ["slow at slow"]


def test_a_run_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    seen: dict[int, list[bytes]] = {}
    for run, seed in enumerate((3, 3, 4)):
        seen[run] = []
        fuzz(target(seen[run].append, b"some words", b"{}"), tmp_path, 200, seed)
    assert seen[0] == seen[1] != seen[2]


def test_minimising_keeps_what_matters() -> None:
    assert minimise(b"a" * 90 + b"(" + b"b" * 70 + b")", lambda c: b"(" in c and b")" in c) == b"()"


def test_a_reproducer_is_an_expression_with_its_repetitions_told(tmp_path: Path) -> None:
    def check(content: bytes) -> None:
        assert content.count(b"[") < 50

    (finding,) = fuzz(target(check, b"x" + b"[" * 400), tmp_path, 1, seed=0).findings
    assert finding.reproducer == "b'[' * 50"


# ---- mutations -----------------------------------------------------------------------------------

CASES: list[tuple[Mutator, tuple[bytes, ...]]] = [
    (mutate_bytes, seeds.GENERATED),
    (mutate_json, seeds.JSON),
    (mutate_json_lines, seeds.PROMPTS),
    (mutate_msgpack, seeds.FRAMES),
    (mutate_framed_json, seeds.HEADERS),
    (mutate_toml, seeds.TOML),
]


@pytest.mark.parametrize(("mutate", "corpus"), CASES)
def test_most_mutations_differ_from_what_they_began_with(
    mutate: Mutator, corpus: tuple[bytes, ...]
) -> None:
    rng = Random(0)
    changed = [mutate(rng, corpus[0], corpus) != corpus[0] for _ in range(500)]
    assert sum(changed) > 400


def test_json_stays_readable_often_enough_to_reach_what_is_behind_the_parser() -> None:
    rng, readable = Random(0), 0
    for _ in range(500):
        try:
            json.loads(mutate_json(rng, seeds.JSON[0], seeds.JSON))
            readable += 1
        except (ValueError, RecursionError):
            pass
    assert readable > 250


def test_the_length_of_a_framed_header_fits_most_times() -> None:
    rng, fits = Random(0), 0
    for _ in range(500):
        content = mutate_framed_json(rng, seeds.HEADERS[0], seeds.HEADERS[:2])
        fits += content[8:].startswith(b"{") and len(content) >= 48
    assert fits > 250
