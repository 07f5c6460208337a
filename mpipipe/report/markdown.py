"""A document as Markdown: all but the plots, which are on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpipipe.report.document import Commands, Drawing, Heading, Notice, Table, Text

if TYPE_CHECKING:
    from mpipipe.report.document import Block, Cell, Document

__all__ = ["markdown"]


def markdown(document: Document) -> str:
    """The text of `report.md`."""
    parts = [f"# {document.title}", *(_block(block) for block in document.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return f"**{block.label}** {block.text}" if block.label else block.text
        case Notice():
            return f"> **Note.** {block.text}"
        case Commands():
            return "\n".join(["```", *block.lines, "```"])
        case Drawing():
            return f"*{block.title}* is plotted in `report.html`." if block.svg else ""
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    lines = [
        f"**{table.title}**",
        "",
        _line([*table.header, *(["Validity"] if table.faults else [])]),
        _line([*map(_rule, table.rows[0]), *(["---"] if table.faults else [])]),
        *(_line(cells) for cells in _rows(table)),
    ]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines)


def _rows(table: Table) -> list[list[str]]:
    if not table.faults:
        return [[_cell(cell) for cell in row] for row in table.rows]
    return [
        [*(_cell(cell) for cell in row), _escaped(f"**{fault}**" if fault else "ok")]
        for row, fault in zip(table.rows, table.faults, strict=True)
    ]


def _rule(cell: Cell) -> str:
    return "---:" if cell.is_number else "---"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.warns else cell.text
    details = ", ".join(part for part in (cell.detail, cell.remark) if part)
    return _escaped(f"{text} ({details})" if details else text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
