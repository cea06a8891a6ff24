"""A card's two forms: Markdown, and one HTML page that needs no network.

A card is sections of blocks (`card.py` makes them). Every text in a block may hold what data or
people brought: it is escaped here, at the one place where it becomes markup.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

INLINE_BYTES = 150_000  # a larger picture goes into the page as JPEG
INLINE_WIDE = 1600  # pixels
LONG = 16  # rows of a table that are shown; more are folded away

STYLE = """
:root { --ink: #1b2430; --soft: #5b6673; --line: #dfe4ea; --paper: #fff; --tint: #f5f7f9;
  --blue: #0072b2; --orange: #d55e00 }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth }
body { margin: 0; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  color: var(--ink); background: var(--paper) }
main { max-width: 62rem; margin: 0 auto; padding: 2.2rem 1.5rem 4rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; margin: 3rem 0 .9rem; padding-top: 1.1rem;
  border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.9rem 0 .5rem }
p, ul { margin: .5rem 0 .9rem; max-width: 46rem; overflow-wrap: anywhere }
ul { padding-left: 1.2rem } li { margin: .25rem 0 } li::marker { color: var(--soft) }
.lead { font-size: 1.1rem; color: var(--soft); margin: .6rem 0 1.2rem }
.note { color: var(--soft); font-size: .9rem }
.badges { display: flex; flex-wrap: wrap; gap: .4rem; margin: .7rem 0 0 }
.badge { font-size: .8rem; padding: .1rem .6rem; border: 1px solid var(--line);
  border-radius: 1rem; background: var(--tint) }
.badge.good { color: #14663a; border-color: #a9d5bc; background: #eff8f2 }
.badge.bad { color: #9b2c16; border-color: #eec0b3; background: #fdf2ee }
.warning { background: #fff4d6; border-left: 4px solid #e69f00; padding: .7rem 1rem;
  margin: 1.2rem 0; max-width: none; font-weight: 500 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0 0 }
.cards div { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem .9rem }
.cards b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.cards span { display: block; color: var(--soft); font-size: .83rem; line-height: 1.4 }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.5rem 0 0; font-size: .9rem }
a { color: #0a5b94; text-decoration: none } a:hover { text-decoration: underline }
.scroll { overflow-x: auto; margin: .6rem 0 1rem }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th { font-weight: 600; color: var(--soft); font-size: .83rem; vertical-align: bottom }
th, td { text-align: left; padding: .34rem 1.3rem .34rem 0; border-bottom: 1px solid var(--line) }
td { vertical-align: top; overflow-wrap: break-word }
td.short { white-space: nowrap }
th.number, td.number { text-align: right; white-space: nowrap }
td.said { min-width: 12rem; max-width: 30rem; overflow-wrap: anywhere }
.facts td { overflow-wrap: anywhere }
.facts th { text-align: left; vertical-align: top; white-space: nowrap; font-weight: 500;
  font-size: .92rem; padding-right: 2rem; border-bottom-color: var(--line) }
.bar { display: flex; align-items: center; gap: .6rem; white-space: nowrap; min-width: 11rem }
.bar i { height: .6rem; flex: none; width: 6rem; background: #e8ecf0; border-radius: .15rem;
  overflow: hidden }
.bar i i { display: block; background: var(--blue); border-radius: 0; width: auto }
.intervals { margin: .8rem 0 1.2rem; max-width: 46rem }
.intervals div { display: grid; grid-template-columns: 10.5rem 1fr 11rem; gap: 1rem;
  align-items: center; padding: .28rem 0; border-bottom: 1px solid var(--line); font-size: .92rem }
.intervals span:last-child { text-align: right; font-variant-numeric: tabular-nums }
.track { position: relative; height: 1.1rem; background: linear-gradient(#e3e7ec, #e3e7ec)
  center / 100% 1px no-repeat }
.track i { position: absolute; top: calc(50% - 2px); height: 4px; border-radius: 2px;
  background: var(--blue); opacity: .35; min-width: 2px }
.track b { position: absolute; top: calc(50% - 5px); width: 10px; height: 10px; margin-left: -5px;
  border-radius: 50%; background: var(--blue) }
.other .track i, .other .track b { background: #8a94a0 }
figure { margin: 1.2rem 0 } figure.small { display: inline-block; vertical-align: top;
  width: min(29rem, 100%); margin-right: 1rem }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .35rem }
figure img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .3rem;
  display: block }
.map svg { max-width: 100%; height: auto; border-radius: .3rem; display: block }
.map text { font-size: 11px; fill: #5b6673 } .key { margin-right: 1rem; white-space: nowrap }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: .4rem;
  padding: .8rem 1rem; overflow-x: auto; font-size: .87rem; line-height: 1.5; max-width: 46rem }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace }
details { margin: .4rem 0 1rem } summary { cursor: pointer; color: #0a5b94; font-size: .92rem }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--line);
  color: var(--soft); font-size: .85rem }
@media (max-width: 640px) {
  body { font-size: 15px } main { padding: 1.4rem 1rem 3rem } h1 { font-size: 1.6rem }
  .cards { grid-template-columns: 1fr 1fr; gap: .6rem } .cards b { font-size: 1.2rem }
  .facts, .facts tbody, .facts tr, .facts th, .facts td { display: block; border: 0; padding: 0 }
  .facts tr { border-bottom: 1px solid var(--line); padding: .45rem 0 }
  .facts th { font-size: .83rem }
  .intervals div { grid-template-columns: 1fr auto; gap: 0 1rem }
  .intervals .track { grid-column: 1 / 3; grid-row: 2 } td.said { max-width: 18rem }
  th, td { padding-right: .8rem } .bar { min-width: 0 } .bar i { width: 3rem }
}
@media print { nav { display: none } h2 { break-after: avoid } figure, tr { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: `note` is smaller, `warning` cannot be overlooked."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Items:
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Share:
    """A cell: a share from 0 to 1, with a bar where there is room for one."""

    value: float


Cell = str | int | Share | None


@dataclass(frozen=True)
class Table:
    """Rows of cells; a number as text (`12.3 %`) stands to the right as numbers do."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    what: str = "rows"  # what is folded away where there are many


@dataclass(frozen=True)
class Row:
    """Of `Intervals`: a value with its interval, in the unit of the axis; said: it, in words."""

    name: str
    value: float
    low: float | None
    high: float | None
    said: str
    main: bool = False


@dataclass(frozen=True)
class Intervals:
    """Values beside each other on an axis from `low` to `high`."""

    rows: Sequence[Row]
    low: float
    high: float


@dataclass(frozen=True)
class Picture:
    """A PNG of the version's. small: a plot, which need not have the page's width."""

    data: bytes
    caption: str
    small: bool = False


@dataclass(frozen=True)
class Drawing:
    """SVG and HTML of ours, in which what came from outside is escaped; words: instead of it."""

    html: str
    words: str


@dataclass(frozen=True)
class Code:
    text: str


Block = Text | Heading | Items | Facts | Table | Intervals | Picture | Drawing | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Badge:
    text: str
    kind: str = ""  # good, bad


@dataclass(frozen=True)
class Card:
    """headline: label, value, and what more to say of it."""

    title: str
    lead: str
    badges: Sequence[Badge]
    warnings: Sequence[str]
    headline: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    footer: str = field(default="")


NUMBER = re.compile(r"[<>+-]?[\d,.]+( ?(%|m|points|h|Wh|kWh|g|kg|[A-Z]{3}))?( \(.*\))?|-|")


# Markdown


def as_markdown(card: Card) -> str:
    """The card as GitHub's Markdown, without its pictures."""
    lines = [f"# {_md(card.title)}", "", _md(card.lead), ""]
    if card.badges:
        lines += [" · ".join(_md(badge.text) for badge in card.badges), ""]
    lines += [line for text in card.warnings for line in (f"> **{_md(text)}**", "")]
    if card.headline:
        rows = [(label, value, more) for label, value, more in card.headline]
        lines += [_md_table(("", "", ""), rows), ""]
    for section in card.sections:
        lines += [f"## {_md(section.title)}", ""]
        for block in section.blocks:
            if text := _md_block(block):
                lines += [text, ""]
    return "\n".join([*lines, "---", "", _md(card.footer), ""])


def _md_block(block: Block) -> str:
    match block:
        case Text():
            parts = [_md(part) for part in block.text.split("\n\n") if part.strip()]
            return "\n\n".join(f"> **{p}**" if block.kind == "warning" else p for p in parts)
        case Heading():
            return f"### {_md(block.text)}"
        case Items():
            return "\n".join(f"- {_md(item)}" for item in block.items)
        case Facts():
            return _md_table(("", ""), block.rows)
        case Table():
            return _md_table(block.header, block.rows)
        case Intervals():
            return _md_table(("", ""), [(row.name, row.said) for row in block.rows])
        case Drawing():
            return _md(block.words)
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}\n{block.text}\n{fence}"
        case Picture():
            return f"(In the HTML page: {_md(block.caption)}.)"


def _md_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    def line(cells: Sequence[Cell]) -> str:
        return f"| {' | '.join(_md(_said(cell)) for cell in cells)} |"

    numbers = _numbers(len(header), rows)
    rule = "|".join("---:" if number else "---" for number in numbers)
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])


def _md(text: str) -> str:
    """A text that stays what it is, in a line and in a cell of a table."""
    one_line = " ".join(text.split())
    safe = one_line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    safe = re.sub(r"([\\`*\[\]|~])", r"\\\1", safe)
    safe = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", safe)
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", safe)


# HTML


def as_html(card: Card) -> str:
    """The card as one page, pictures inside."""
    badges = "".join(f"<span class='badge {b.kind}'>{escape(b.text)}</span>" for b in card.badges)
    headline = "".join(
        f"<div><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>"
        for label, value, more in card.headline
    )
    links = "".join(
        f"<a href='#s{i}'>{escape(section.title)}</a>" for i, section in enumerate(card.sections)
    )
    body = "".join(
        f"<section id='s{i}'><h2>{escape(section.title)}</h2>"
        f"{''.join(_html_block(block) for block in section.blocks)}</section>"
        for i, section in enumerate(card.sections)
    )
    warnings = "".join(f"<p class='warning'>{escape(text)}</p>" for text in card.warnings)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(card.title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(card.title)}</h1><div class='badges'>{badges}</div>"
        f"<p class='lead'>{escape(card.lead)}</p>{warnings}<div class='cards'>{headline}</div>"
        f"<nav>{links}</nav></header>{body}<footer>{escape(card.footer)}</footer>"
        "</main></body></html>\n"
    )


def _html_block(block: Block) -> str:
    match block:
        case Text():
            paragraphs = [part for part in block.text.split("\n\n") if part.strip()]
            return "".join(f"<p class='{block.kind}'>{escape(part)}</p>" for part in paragraphs)
        case Heading():
            return f"<h3>{escape(block.text)}</h3>"
        case Items():
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in block.items)}</ul>"
        case Facts():
            rows = "".join(
                f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
                for name, value in block.rows
            )
            return f"<div class='scroll'><table class='facts'>{rows}</table></div>"
        case Table():
            return _html_table(block)
        case Intervals():
            return _html_intervals(block)
        case Picture():
            caption, kind = escape(block.caption), "small" if block.small else ""
            return (
                f"<figure class='{kind}'><img alt='{caption}' src='{inline(block.data)}'>"
                f"<figcaption>{caption}</figcaption></figure>"
            )
        case Drawing():
            return f"<div class='map'>{block.html}</div>"
        case Code():
            return f"<pre>{escape(block.text)}</pre>"


def _html_table(table: Table) -> str:
    numbers = _numbers(len(table.header), table.rows)

    def line(cells: Sequence[Cell], tag: str) -> str:
        shown = []
        for cell, number in zip(cells, numbers, strict=True):
            if isinstance(cell, Share):
                wide = 100 * min(1.0, max(0.0, cell.value))
                bar = f"<i><i style='width:{wide:.1f}%'></i></i>"
                shown.append(f"<td><span class='bar'>{bar}{_said(cell)}</span></td>")
            else:
                text = _said(cell)
                kind = "number" if number else "said" if len(text) > 30 else "short"
                shown.append(f"<{tag} class='{kind}'>{escape(text)}</{tag}>")
        return f"<tr>{''.join(shown)}</tr>"

    head = line(table.header, "th")
    body = "".join(line(row, "td") for row in table.rows)
    whole = f"<div class='scroll'><table>{head}{body}</table></div>"
    if len(table.rows) <= LONG:
        return whole
    return (
        f"<details><summary>All {len(table.rows)} {escape(table.what)}</summary>{whole}</details>"
    )


def _html_intervals(chart: Intervals) -> str:
    span = (chart.high - chart.low) or 1.0

    def at(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, (value - chart.low) / span)):.2f}%"

    lines = []
    for row in chart.rows:
        ends = ""
        if row.low is not None and row.high is not None:
            wide = 100 * (row.high - row.low) / span
            ends = f"<i style='left:{at(row.low)};width:{wide:.2f}%'></i>"
        lines.append(
            f"<div class='{'' if row.main else 'other'}'><span>{escape(row.name)}</span>"
            f"<span class='track'>{ends}<b style='left:{at(row.value)}'></b></span>"
            f"<span>{escape(row.said)}</span></div>"
        )
    return f"<div class='intervals'>{''.join(lines)}</div>"


def _said(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, Share):
        return f"{100 * cell.value:.1f} %"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _numbers(columns: int, rows: Sequence[Sequence[Cell]]) -> list[bool]:
    """Which columns hold numbers alone; one with bars is none of them."""

    def number(cell: Cell) -> bool:
        if isinstance(cell, Share):
            return False
        return cell is None or isinstance(cell, int) or bool(NUMBER.fullmatch(cell))

    return [bool(rows) and all(number(row[i]) for row in rows) for i in range(columns)]


def inline(png: bytes) -> str:
    """A picture as the address of itself; a large one as JPEG, and no wider than a screen."""
    from PIL import Image

    as_it_is = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    if len(png) <= INLINE_BYTES:
        return as_it_is
    try:
        picture = Image.open(io.BytesIO(png)).convert("RGB")
    except OSError:  # damaged: the browser says so in its place
        return as_it_is
    picture.thumbnail((INLINE_WIDE, 10 * INLINE_WIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
