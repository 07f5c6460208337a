"""What a report says, before it is written as Markdown or HTML: blocks in their order."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Block", "Cell", "Commands", "Document", "Drawing", "Heading", "Notice", "Table", "Text"]


@dataclass(frozen=True, slots=True)
class Heading:
    """A title of a section; level 2 for a section, 3 below one."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph, with bold words before it."""

    text: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """A paragraph that must not be overlooked: what is wrong with the figures below."""

    text: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of a table: what it says, and its interval and a remark in smaller letters."""

    text: str
    detail: str = ""
    remark: str = ""
    warns: bool = False
    is_number: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells below a header; the first column names the row.

    `faults`: what is wrong with each row, empty for a sound one; none at all where no row can be.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawing:
    """A plot: `svg` is an `<svg>` element for inlining, empty without matplotlib."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Commands:
    """Lines for a shell, to be copied."""

    lines: tuple[str, ...]


Block = Heading | Text | Notice | Table | Drawing | Commands


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    title: str
    blocks: tuple[Block, ...]
