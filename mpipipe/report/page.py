"""A document as one HTML page: no script, nothing fetched, light and dark as the reader has it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from mpipipe.report.document import Commands, Drawing, Heading, Notice, Table, Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mpipipe.report.document import Block, Cell, Document

__all__ = ["STYLE", "page"]

# The browser itself refuses whatever would be fetched or run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# The colours of the plots (`--c0` …) are Okabe's and Ito's, which colour-blind readers can tell
# apart, darker on white and lighter on black so that lines keep a contrast of 3:1.
STYLE = """
:root { color-scheme: light dark; --page: #f4f5f7; --card: #ffffff; --text: #1b1f24;
  --quiet: #57606a; --rule: #d0d7de; --warn: #8a3a00; --warn-card: #fff4e5;
  --c0: #0072b2; --c1: #c04a00; --c2: #00805c; --c3: #a8487f; --c4: #3d93c4; --c5: #9a6b00;
  --c6: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --text: #e6edf3;
  --quiet: #9aa4af; --rule: #3a424c; --warn: #ffb86b; --warn-card: #2e2010;
  --c0: #4aa8e8; --c1: #f0813a; --c2: #2fc79a; --c3: #dd8fb9; --c4: #8cc8ee; --c5: #e3b341;
  --c6: #8b949e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 20px; }
h1 { font-size: 30px; line-height: 1.2; margin: 8px 0 16px; }
h2 { font-size: 23px; margin: 40px 0 8px; border-bottom: 1px solid var(--rule); }
h3 { font-size: 18px; margin: 24px 0 8px; }
p { max-width: 75em; margin: 8px 0; }
.notice { background: var(--warn-card); border-left: 4px solid var(--warn); padding: 8px 12px;
  max-width: none; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 12px; margin: 12px 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(560px, 100%), 1fr));
  gap: 16px; margin: 12px 0; }
figure { margin: 0; }
figcaption { color: var(--quiet); font-size: 14px; }
figure strong { display: block; color: var(--text); font-size: 16px; }
svg { display: block; width: 100%; height: auto; color: var(--text); margin: 8px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 6px; }
th, td { padding: 5px 6px; text-align: right; vertical-align: top; font-size: 15px;
  border-bottom: 1px solid var(--rule); }
th { font-size: 14px; line-height: 1.25; vertical-align: bottom; }
th:first-child, td:first-child, td.words, th.words { text-align: left; }
td:first-child { white-space: nowrap; }
td:first-child.fault { white-space: normal; overflow-wrap: anywhere; color: var(--warn);
  font-size: 14px; padding-top: 0; }
tr.faulty td { border-bottom: 0; }
td.words { overflow-wrap: break-word; }
td.warns { color: var(--warn); font-weight: 600; }
small { display: block; color: var(--quiet); font-size: 12px; font-weight: 400;
  line-height: 1.3; }
td.number small { white-space: nowrap; }
td.warns small { color: var(--warn); }
ul { margin: 8px 0; padding-left: 20px; color: var(--quiet); font-size: 14px; }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font: 13.5px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
"""


def page(document: Document) -> str:
    """The text of `report.html`."""
    title = html.escape(document.title)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{title}</title>",
            '<link rel="icon" href="data:,">',  # or a browser asks a server for one
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{title}</h1>",
            *_body(document.blocks),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _body(blocks: Iterable[Block]) -> Iterator[str]:
    """The blocks; plots that follow each other share a grid."""
    plots: list[str] = []
    for block in blocks:
        if isinstance(block, Drawing):
            plots += [_drawing(block)] if block.svg else []
            continue
        yield from _grid(plots)
        plots = []
        yield _block(block)
    yield from _grid(plots)


def _grid(plots: list[str]) -> Iterator[str]:
    if plots:
        yield "\n".join(['<div class="plots">', *plots, "</div>"])


def _block(block: Heading | Text | Notice | Table | Commands) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
        case Text():
            label = f"<strong>{html.escape(block.label)}</strong> " if block.label else ""
            return f"<p>{label}{html.escape(block.text)}</p>"
        case Notice():
            return f'<p class="notice" role="note">{html.escape(block.text)}</p>'
        case Commands():
            text = html.escape("\n".join(block.lines))
            return f'<div class="card"><pre><code>{text}</code></pre></div>'
        case Table():
            return _table(block)


def _drawing(drawing: Drawing) -> str:
    return (
        f'<figure class="card"><strong>{html.escape(drawing.title)}</strong>\n{drawing.svg}\n'
        f"<figcaption>{html.escape(drawing.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    kinds = [_kind(cell) for cell in table.rows[0]]
    header = "".join(
        f'<th scope="col" class="{kind}">{html.escape(name)}</th>'
        for name, kind in zip(table.header, kinds, strict=True)
    )
    faults = table.faults or ("",) * len(table.rows)
    pairs = zip(table.rows, faults, strict=True)
    rows = [line for row, fault in pairs for line in _row(row, fault)]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return "\n".join(
        [
            '<div class="card"><div class="scroll"><table>',
            f"<caption>{html.escape(table.title)}</caption>",
            f"<thead><tr>{header}</tr></thead>",
            "<tbody>",
            *rows,
            "</tbody></table></div>",
            *([f"<ul>{notes}</ul>"] if notes else []),
            "</div>",
        ]
    )


def _row(row: tuple[Cell, ...], fault: str) -> list[str]:
    """The row, and what is wrong with it over its whole width."""
    head = '<tr class="faulty">' if fault else "<tr>"
    lines = [f"{head}{''.join(map(_cell, row))}</tr>"]
    if fault:
        lines.append(f'<tr><td class="fault" colspan="{len(row)}">{html.escape(fault)}</td></tr>')
    return lines


def _kind(cell: Cell) -> str:
    return "number" if cell.is_number else "words"


def _cell(cell: Cell) -> str:
    kinds = [_kind(cell), *(["warns"] if cell.warns else [])]
    small = [f"<small>{html.escape(part)}</small>" for part in (cell.detail, cell.remark) if part]
    return f'<td class="{" ".join(kinds)}">{html.escape(cell.text)}{"".join(small)}</td>'
