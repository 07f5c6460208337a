"""Dataclasses survive the way through plain values, and nothing else passes for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import pytest

from mpipipe.plain_values import from_json, from_plain, row_reader, row_writer, to_json


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.5


@dataclass(frozen=True)
class Shape:
    name: str
    kind: Literal["open", "closed"]
    points: tuple[Point, ...]
    centre: Point | None = None
    pair: tuple[str, Point] = ("corner", Point(9))
    by_name: Mapping[str, Point] = field(default_factory=dict)
    ids: tuple[tuple[int, ...], ...] = ()
    scale: float | None = None
    hidden: bool = False


SHAPES = (
    Shape("dot", "open", ()),
    Shape(
        "line",
        "closed",
        (Point(1, 2.0), Point(3)),
        Point(2),
        ("end", Point(4, 4.0)),
        {"first": Point(1, 2.0)},
        ((1, 2), ()),
        0.25,
        hidden=True,
    ),
)


@pytest.mark.parametrize("shape", SHAPES)
def test_json_round_trip_keeps_values_and_tuples(shape: Shape) -> None:
    again = from_json(Shape, to_json(shape))
    assert again == shape
    assert type(again.points) is tuple
    assert from_json(list[Shape], to_json([shape, shape]).encode()) == [shape, shape]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_round_trip_through_msgpack(shape: Shape) -> None:
    row = msgpack.unpackb(msgpack.packb(row_writer(Shape)(shape)), use_list=False)
    assert row_reader(Shape)(row) == shape


def test_json_of_equal_values_is_equal_text() -> None:
    assert to_json(Point(y=1.0, x=2)) == '{"x": 2, "y": 1.0}'


def test_a_default_takes_the_place_of_a_name_that_lacks_but_not_in_rows() -> None:
    assert from_plain(Point, {"x": 1}) == Point(1)
    with pytest.raises(TypeError, match="Point has 2 fields, not 1"):
        row_reader(Point)((1,))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "Shape cannot be made of []"),
        ({"name": "a", "kind": "open"}, "Shape cannot be made of"),  # no points
        ({"colour": 1}, "Shape cannot be made of"),
        ({"name": 1}, "Shape.name: 1 is not of type str"),
        ({"kind": "round"}, "Shape.kind: 'round' is not one of ('open', 'closed')"),
        ({"points": "xy"}, "Shape.points: 'xy' is not a list"),
        ({"points": [[1, 2]]}, "Shape.points: Point cannot be made of [1, 2]"),
        ({"points": [{"x": 1.5}]}, "Shape.points: Point.x: 1.5 is not of type int"),
        ({"points": [{"x": True}]}, "Shape.points: Point.x: True is not of type int"),
        ({"centre": 3}, "Shape.centre: Point cannot be made of 3"),
        ({"pair": ["corner"]}, "Shape.pair: "),
        ({"by_name": [1]}, "Shape.by_name: [1] is not a mapping"),
        ({"ids": [[1], ["2"]]}, "Shape.ids: '2' is not of type int"),
        ({"hidden": 0}, "Shape.hidden: 0 is not of type bool"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(values: Any, said: str) -> None:
    whole = {"name": "a", "kind": "open", "points": []}
    lacks = isinstance(values, list) or values.keys() == {"name", "kind"}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the text is compared below
        from_plain(Shape, values if lacks else whole | values)
    assert str(raised.value).startswith(said)


def test_a_whole_number_is_a_float_too() -> None:
    assert from_json(Point, '{"x": 1, "y": 2}') == Point(1, 2.0)


@pytest.mark.parametrize("text", ["", "{", b"\xff"])
def test_text_that_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own words
        from_json(Point, text)
