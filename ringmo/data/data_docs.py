"""Data Docs that are read without a network, and the tiles behind a broken rule as pictures.

Great Expectations' pages fetch their styles and scripts from the web, and its index is empty
without them. Here they get a small style sheet of their own, an index, and a page a broken rule.
"""

import base64
import io
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ringmo.data import page
from ringmo.data.decode import Pixels

INDEX = "index.html"
SIDE = 192  # pixels at which a picture is shown
STYLE = (
    page.STYLE
    + """
code { font-size: .9em } .ok, .text-success { color: #20713a } .warned { color: #9a6700 }
.failed, .text-danger { color: #b3261e; font-weight: 600 } a { color: #0b57d0 }
td { vertical-align: top } .cards { display: flex; flex-wrap: wrap; gap: 14px; margin: 1em 0 }
figure { margin: 0; padding: 8px; border: 1px solid #ddd; border-radius: 4px; max-width: 100% }
figure img { height: 192px; min-width: 60px; background: #eee; image-rendering: pixelated }
figcaption { font-size: 13px; overflow-wrap: anywhere }
.pictures { display: flex; flex-wrap: wrap; gap: 8px }
.pictures div { max-width: 210px; font-size: 12px; overflow-wrap: anywhere }
"""
)
# For Great Expectations' own pages: what of Bootstrap and Font Awesome they cannot do without.
PLAIN = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5em auto; max-width: 1100px; color: #222 }
nav, .sticky, [data-toggle=collapse], .cooltip .top, #ge-cta-footer { display: none }
h4 { margin: .2em 0 } h5 { font-size: 1.05em; margin: 1.4em 0 .3em; font-weight: 600 }
h6, .h6 { font-size: 1em; margin: .8em 0 .2em; font-weight: 600 } strong { font-weight: 600 }
table { border-collapse: collapse; width: auto } th, td { text-align: left; vertical-align: top;
padding: .25em 1.2em .25em 0; border-bottom: 1px solid #e5e5e5 } pre, code { font-size: .9em }
.text-success { color: #20713a } .text-danger { color: #b3261e; font-weight: 600 }
.fa-check-circle::before { content: "✓" } .fa-times::before { content: "✗" }
.fa-exclamation-triangle::before { content: "!" } .text-warning { color: #9a6700 }
i { font-style: normal } a { color: #0b57d0 }
"""


@dataclass(frozen=True)
class Picture:
    """An <img> of a tile and the line below it."""

    image: str
    caption: str


@dataclass(frozen=True)
class Card:
    """One thing that breaks a rule: a tile (and the one it is bad for), a class or a band."""

    name: str
    value: str
    pictures: list[Picture] = field(default_factory=list)


def rule_page(verdict: Mapping[str, Any], cards: Sequence[Card]) -> str:
    """The page of one broken rule."""
    shown = "" if len(cards) == verdict["failed_rows"] else f", {len(cards):,} of them shown"
    body = []
    for card in cards:
        pictures = "".join(
            f"<div>{picture.image}<br>{escape(picture.caption)}</div>" for picture in card.pictures
        )
        body.append(
            f"<figure><div class='pictures'>{pictures}</div><figcaption><b>{escape(card.name)}"
            f"</b><br>{escape(card.value)}</figcaption></figure>"
        )
    return _page(
        f"{verdict['rule']}: {verdict['says']}",
        f"<p><a href='../{INDEX}'>All rules</a></p><h1>{escape(verdict['rule'])}</h1>"
        f"<p>{escape(verdict['says'])}</p><p>{_standing(verdict)}, broken by "
        f"{verdict['failed_rows']:,}{shown}.</p><div class='cards'>{''.join(body)}</div>",
    )


def index(verdict: Mapping[str, Any], docs: Path) -> str:
    """The first page: every rule by suite, with links to pictures and to the suites' own pages."""
    parts = [
        "<h1>Validation of the tile store</h1>",
        f"<p>{_headline(verdict, '<span class=failed>Failed</span>')}</p>",
    ]
    for suite in dict.fromkeys(v["suite"] for v in verdict["rules"]):
        rows = "".join(
            f"<tr><td>{_standing(v)}</td><td>{escape(v['rule'])}</td><td>{escape(v['says'])}</td>"
            f"<td class='number'>{v['failed_rows'] or ''}</td><td>{_link(v)}</td></tr>"
            for v in verdict["rules"]
            if v["suite"] == suite
        )
        # Of classes and of bands there are suites of their own, with the same name before them.
        own = [
            f"<a href='{quote(path.relative_to(docs).as_posix())}'>{escape(path.parts[-4])}</a>"
            for path in sorted((docs / "validations").glob("*/*/*/*.html"))
            if path.parts[-4].split("-")[0] == suite
        ]
        parts.append(
            f"<h2>{escape(suite)}</h2><table><tr><th></th><th>rule</th><th>says</th>"
            f"<th class='number'>rows</th><th></th></tr>{rows}</table>"
            f"<p class='note'>Great Expectations' own page: {', '.join(own) or 'no rows'}</p>"
        )
    return _page("Validation of the tile store", "".join(parts))


def _headline(verdict: Mapping[str, Any], failed: str) -> str:
    standings = [standing(v) for v in verdict["rules"]]
    broken, warned = standings.count("FAILED"), standings.count("warning")
    outcome = f"{failed}: {broken} of {len(standings)} rules broken"
    return (
        f"{outcome if broken else f'Passed: {len(standings)} rules'}, "
        f"{warned} warning{'s' * (warned != 1)}, {verdict['tiles']:,} tiles"
    )


def standing(verdict: Mapping[str, Any]) -> str:
    """ok, warning or FAILED."""
    return "ok" if verdict["ok"] else "warning" if verdict["soft"] else "FAILED"


def _standing(verdict: Mapping[str, Any]) -> str:
    word = standing(verdict)
    style = {"ok": "ok", "warning": "warned", "FAILED": "failed"}[word]
    return f"<span class='{style}'>{word}</span>"


def _link(verdict: Mapping[str, Any]) -> str:
    return f"<a href='{quote(verdict['page'])}'>pictures</a>" if verdict["page"] else ""


def _page(title: str, body: str) -> str:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{STYLE}</style>{body}</html>"
    )


def write(docs: Path, verdict: Mapping[str, Any], pages: Mapping[str, Sequence[Card]]) -> None:
    """Complete the Data Docs that Great Expectations built in `docs`.

    Args:
        verdict: what verdict.json says.
        pages: rule → cards of its page, for those that are broken.
    """
    by_rule = {v["rule"]: v for v in verdict["rules"]}
    for rule, cards in pages.items():
        path = docs / by_rule[rule]["page"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rule_page(by_rule[rule], cards), encoding="utf-8")
    for path in docs.rglob("*.html"):
        if path.parent != docs / "rules":
            up = "../" * (len(path.relative_to(docs).parts) - 1)
            path.write_text(_offline(path.read_text("utf-8"), up, pages), encoding="utf-8")
    shutil.rmtree(docs / "static", ignore_errors=True)  # fonts and logos of what is cut out
    (docs / INDEX).write_text(index(verdict, docs), encoding="utf-8")


def _offline(html: str, up: str, broken: Mapping[str, Any]) -> str:
    """One of Great Expectations' pages without anything from the web."""
    for tag in ("script", "style", "footer"):
        html = re.sub(rf"<{tag}\b.*?</{tag}>", "", html, flags=re.DOTALL)
    html = re.sub(r"<link\b[^>]*>", "", html)
    html = re.sub(r"<a href=\"https?://[^>]*>(.*?)</a>", r"\1", html, flags=re.DOTALL)
    html = re.sub(r"<img\b[^>]*\"https?://[^>]*>", "", html)
    html = html.replace("</head>", f"<style>{PLAIN}</style></head>", 1)
    home = f'<p><a href="{up}{INDEX}">All rules</a></p>'
    html = re.sub(r"<body\b[^>]*>", lambda found: found[0] + home, html, count=1)
    for rule in broken:
        link = f'<a href="{up}rules/{quote(rule)}.html">{escape(rule)}</a>: '
        html = re.sub(rf"(?<=>)(\s*){re.escape(escape(rule))}: ", rf"\1{link}", html)
    return html


def mask_picture(mask: Pixels) -> str:
    """A mask (H, W, 1) as an inline PNG: a colour a class, grey where the class is not known."""
    from PIL import Image

    # Steps of the golden angle: neighbouring numbers have hues that differ most.
    hues = (np.arange(256) * 137.508 / 360 * 255).astype(np.uint8)
    palette = np.stack([hues, np.full(256, 170, np.uint8), np.full(256, 220, np.uint8)], axis=1)
    palette[0] = 0
    colours = Image.fromarray(palette[None], "HSV").convert("RGB")
    table = np.asarray(colours)[0].copy()
    table[255] = 128
    picture = Image.fromarray(table[mask[:, :, 0]])
    picture.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f"<img loading='lazy' title='its mask' src='data:image/png;base64,{data}'>"


def markdown(verdict: Mapping[str, Any], link: Callable[[str], str]) -> str:
    """The verdict as a table in Markdown; `link` makes one of a path below the Data Docs."""

    def cell(text: Any) -> str:
        return str(text).replace("|", "\\|").replace("\n", " ")

    lines = [
        f"{_headline(verdict, '**FAILED**')}. Data Docs: {link(INDEX)}",
        "",
        # What matters most comes first: Prefect's pages cut a wide table off at the right.
        "| | suite | rule | rows | pictures | says | first |",
        "|---|---|---|---:|---|---|---|",
    ]
    for v in sorted(verdict["rules"], key=lambda v: ["FAILED", "warning", "ok"].index(standing(v))):
        word = standing(v)
        lines.append(
            f"| {f'**{word}**' if word == 'FAILED' else word} | {v['suite']} | {v['rule']} "
            f"| {v['failed_rows'] or ''} | {link(v['page']) if v['page'] else ''} "
            f"| {cell(v['says'])} | {cell(', '.join(v['first'][:3]))} |"
        )
    return "\n".join(lines)
