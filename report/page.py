"""The report as one HTML file: styles, tables and pictures inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report.charts import Chart
from report.tables import Row
from runtime.program import UserError

# What every page says of itself; by its title a former one is known.
_TITLE = "Pretraining report"
_HEAD_CHARACTERS = 2000
# Rows of a table on the page; thousands of classes stand in the CSV file.
_MOST_ROWS = 100
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1a1a1a;
  background: #f6f7f9; }
header { background: #10304a; color: #fff; padding: 1.4rem 1rem; }
header > div, main { max-width: 1180px; margin: 0 auto; }
header h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
header p { margin: .4rem 0 0; color: #cfe0ee; overflow-wrap: anywhere; }
nav { margin-top: .7rem; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
nav a { color: #fff; }
main { padding: 1rem; }
h2 { font-size: 1.2rem; margin: 1.6rem 0 .6rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
section.card, figure { background: #fff; border: 1px solid #dde2e8; border-radius: 10px; padding: 1rem;
  margin: 0; min-width: 0; }
section.card { margin-bottom: 1rem; }
section.card p { margin: 0 0 .6rem; }
.charts { columns: 2 420px; column-gap: 1rem; }
.panels { columns: 2 520px; column-gap: 1rem; }
.charts figure, .panels figure { break-inside: avoid; margin-bottom: 1rem; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { color: #4a5560; font-size: .9rem; margin-top: .5rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .5rem; border-bottom: 1px solid #e6eaee; vertical-align: top;
  max-width: 15rem; overflow-wrap: break-word; }
th { background: #eef2f6; font-weight: 600; vertical-align: bottom; overflow-wrap: normal; }
tbody tr:last-child td { border-bottom: 0; }
details summary { cursor: pointer; font-weight: 600; }
footer { color: #4a5560; font-size: .85rem; padding: 0 1rem 2rem; max-width: 1180px; margin: 0 auto; }
"""


@dataclass(frozen=True)
class Section:
    """A table with its title and a sentence on how to read it.

    Attributes:
        title: of the table.
        text: how to read it.
        rows: of text.
        folded: closed until it is asked for.
        most_rows: rows on the page; None shows all of them.
    """

    title: str
    text: str
    rows: Sequence[Row]
    folded: bool = False
    most_rows: int | None = _MOST_ROWS


def require_own_folder(directory: Path, key: str) -> None:
    """Refuses to write a page where something else lies: files of one name would be replaced.

    Args:
        directory: of the page; it need not exist.
        key: the option that names it.

    Raises:
        UserError: it holds files, and no page of this program among them.
    """
    page = directory / "index.html"
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    is_own = page.is_file() and f"<title>{_TITLE}: " in page.read_text(errors="replace")[:_HEAD_CHARACTERS]
    if held and not is_own:
        raise UserError(
            f"{key} is {str(directory)!r}, which holds {held[0]} and no page of this program; expected an empty "
            f"folder, a new name or a former report; set {key}"
        )


def render_page(
    names: Sequence[str],
    sections: Sequence[Section],
    charts: Sequence[Chart],
    panels: Sequence[Chart],
    provenance: Sequence[Row],
    reload_s: float | None = None,
) -> str:
    """Returns the page's HTML.

    Args:
        names: of the runs.
        sections: tables.
        charts: in a grid of two columns on a laptop, one on a phone.
        panels: image panels.
        provenance: one row for each results file.
        reload_s: seconds after which a browser that shows the page reads it again; None leaves that to the reader.
    """
    parts = [("results", "Results", "".join(_table_card(section) for section in sections))]
    parts.append(("charts", "Charts", _grid("charts", charts)))
    parts.append(("images", "Images", _grid("panels", panels)))
    if provenance:
        details = f"<details><summary>What every figure was made from</summary>{_table(provenance)}</details>"
        parts.append(("provenance", "Provenance", f'<section class="card">{details}</section>'))
    parts = [part for part in parts if part[2]]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in parts)
    body = "".join(f'<h2 id="{anchor}">{title}</h2>{content}' for anchor, title, content in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        + ("" if reload_s is None else f'<meta http-equiv="refresh" content="{reload_s:g}">\n')
        +
        # An empty icon: browsers otherwise ask for /favicon.ico and note an error.
        f'<link rel="icon" href="data:,">\n<title>{_TITLE}: {html.escape(", ".join(names))}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<header><div><h1>{_TITLE}</h1>"
        f"<p>{html.escape(', '.join(names))}</p><nav>{links}</nav></div></header>\n<main>{body}</main>\n"
        "<footer>Every figure lies beside this page as a PNG; the tables are in results.csv and results.md."
        "</footer>\n</body>\n</html>\n"
    )


def _table_card(section: Section) -> str:
    title, text = html.escape(section.title), section.text
    if section.most_rows is not None and len(section.rows) > section.most_rows:
        text += f" The first {section.most_rows} of {len(section.rows)} rows; all of them are in results.csv."
    body = (f"<p>{html.escape(text)}</p>" if text else "") + _table(section.rows[: section.most_rows])
    if section.folded:
        return f'<section class="card"><details><summary>{title}</summary>{body}</details></section>'
    return f'<section class="card"><h3>{title}</h3>{body}</section>'


def _table(rows: Sequence[Row]) -> str:
    titles = list(dict.fromkeys(title for row in rows for title in row))
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = "".join(
        "<tr>" + "".join(f"<td>{_breakable(row.get(title, ''))}</td>" for title in titles) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _breakable(text: str) -> str:
    """Returns text as HTML that a narrow column may break after the joints of a long name."""
    return re.sub(r"(?<=[\w%)])([._/:-])(?=\w{3})", r"\1<wbr>", html.escape(text))


def _grid(name: str, charts: Sequence[Chart]) -> str:
    if not charts:
        return ""
    return f'<div class="{name}">' + "".join(_figure(chart) for chart in charts) + "</div>"


def _figure(chart: Chart) -> str:
    encoded = base64.b64encode(chart.png).decode()
    width, height = _png_size(chart.png)
    return (
        f'<figure id="{html.escape(chart.name)}"><img alt="{html.escape(chart.title)}" width="{width}" '
        f'height="{height}" src="data:image/png;base64,{encoded}"><figcaption>{html.escape(chart.caption)}'
        "</figcaption></figure>"
    )


def _png_size(png: bytes) -> tuple[int, int]:
    # Width and height are the first two fields of the IHDR chunk; they let the page lay out before decoding.
    width, height = struct.unpack(">II", png[16:24])
    return width, height
