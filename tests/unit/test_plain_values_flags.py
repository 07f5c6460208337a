"""Flags in plain values: they are told by the names of their members."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import pytest

from mpipipe.plain_values import from_json, from_plain, to_json


class Side(enum.Flag):
    NOTHING = 0
    LEFT = 1
    RIGHT = 2
    TOP = 4


@dataclass(frozen=True)
class Frame:
    sides: Side


@pytest.mark.parametrize("number", range(8))
def test_flags_are_their_names(number: int) -> None:
    frame = Frame(Side(number))
    assert from_json(Frame, to_json(frame)) == frame


def test_the_names_of_several_members_stand_side_by_side() -> None:
    assert to_json(Frame(Side.LEFT | Side.TOP)) == '{"sides": "LEFT|TOP"}'


@pytest.mark.parametrize("value", ["", "left", "LEFT|", "LEFT,TOP", 3, None, ["LEFT"]])
def test_a_name_that_no_flag_has_is_an_error(value: object) -> None:
    with pytest.raises(ValueError, match=r"Frame\.sides"):
        from_plain(Frame, {"sides": value})
