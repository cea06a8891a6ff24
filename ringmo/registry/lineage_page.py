"""A lineage as one HTML page, which needs no server and no network: boxes and what they came from.

Each box is made from the boxes to its right; a source's bar is its share of the tiles.
"""

import re
from html import escape
from pathlib import Path
from typing import Any

from ringmo.data.page import save
from ringmo.registry.lineage import said

COLOURS = {  # Okabe and Ito's, which colour-blind people can tell apart
    "model": "#0072b2",
    "encoder": "#009e73",
    "fine-tuning": "#56b4e9",
    "pre-training": "#56b4e9",
    "selection": "#e69f00",
    "data": "#d55e00",
    "source": "#cc79a7",
}
STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5em; color: #222 }
h1 { font-size: 1.4em } .note { color: #666 }
.row { display: flex; align-items: flex-start }
.from { margin-left: 22px; border-left: 2px solid #bbb }
.from > .row { position: relative; padding: 4px 0 4px 20px }
.from > .row::before { content: ""; position: absolute; left: 0; top: 24px; width: 20px;
  border-top: 2px solid #bbb }
.box { border: 1px solid #ccc; border-top: 5px solid var(--colour, #999); border-radius: 4px;
  padding: .35em .7em .5em; width: 215px; flex: none; background: #fff }
.what { color: #666; font-size: .85em } .name { font-weight: 600; overflow-wrap: anywhere }
dl { margin: .3em 0 0; display: grid; grid-template-columns: auto 1fr; gap: 0 .6em;
  font-size: .85em }
dt { color: #666 } dd { margin: 0; overflow-wrap: anywhere; max-height: 9em; overflow-y: auto }
.bar { height: 8px; background: #eee; margin-top: .4em } .bar i { display: block; height: 100%;
  background: var(--colour) }
"""


def write(tree: dict[str, Any], out: Path) -> None:
    """The page of a tree of `lineage.lineage`, to `out`, whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    name = escape(str(tree["name"]))
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>Lineage of {name}</title><style>{STYLE}</style>"
        f"<h1>Where {name} came from</h1>"
        "<p class=note>Each box was made from the boxes to its right.</p>"
        f"{_row(tree)}</html>"
    )
    save(out, page)


def _row(part: dict[str, Any]) -> str:
    children = "".join(_row(child) for child in part["from"])
    return (
        f"<div class=row>{_box(part)}{f'<div class=from>{children}</div>' * bool(children)}</div>"
    )


def _box(part: dict[str, Any]) -> str:
    colour = COLOURS.get(part["what"], "#999999")
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{_text(said(value))}</dd>"
        for name, value in part["facts"].items()
    )
    share = part["facts"].get("share")
    width = str(share).replace(" ", "") if part["what"] == "source" and share else ""
    bar = f"<div class=bar><i style='width:{escape(width)}'></i></div>" if width else ""
    return (
        f"<div class=box style='--colour:{colour}'><div class=what>{escape(part['what'])}</div>"
        f"<div class=name>{_text(str(part['name'] or 'not recorded'))}</div>{bar}"
        f"<dl>{facts}</dl></div>"
    )


def _text(value: str) -> str:
    """A hash by its first digits: the whole one shows under the pointer."""
    if re.fullmatch(r"[0-9a-f]{20,}(\.dir)?", value):
        return f"<span title='{value}'>{value[:12]}…</span>"
    return escape(value)
