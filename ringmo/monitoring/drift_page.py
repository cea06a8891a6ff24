"""A comparison of production with its reference as one HTML page that needs no network.

The verdict, a row a test, histograms of both sides, and the tiles that are farthest from the
reference: their pictures where they were kept, or where their file can still be read.
"""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo.config import Sensor
from ringmo.data.page import inline_jpeg, save
from ringmo.errors import BadInput
from ringmo.monitoring import record
from ringmo.monitoring.comparison import LEVEL
from ringmo.monitoring.drift import Drift, counts, said, verdict
from ringmo.registry import card_page
from ringmo.registry.card_page import Badge, Block, Card, Drawing, Section, Share, Table, Text
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

BINS = 30
WIDE, HIGH = 280, 90  # pixels of a histogram
SIDE = 128  # of a picture
BLUE, ORANGE = "#0072b2", "#d55e00"  # reference, production: Okabe and Ito's
TESTS = {
    "bands": "Bands",
    "embedding": "Embedding",
    "classes": "Answers",
    "answers": "Answers",
    "confidence": "Confidence",
}


def write(drift: Drift, out: Path, workspace: Workspace) -> None:
    """The page, to `out`, whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    save(out, card_page.as_html(card(drift, workspace)))


def card(drift: Drift, workspace: Workspace) -> Card:
    """The page as sections, from which `card_page` makes HTML or Markdown."""
    compared = drift.comparison
    headline = [
        (
            TESTS[finding.test],
            "drift" if finding.drifted else "as before",
            f"p {finding.adjusted:.3f}",
        )
        for finding in compared.findings
    ]
    sections = [_tests(drift), *_bands(drift), *_answers(drift), _unusual(drift, workspace)]
    badge = Badge("drift", "bad") if drift.drifted else Badge("no drift", "good")
    days = f"{drift.since} to {drift.until}"
    return Card(
        title=f"Drift of {drift.version}",
        lead=verdict(drift),
        badges=[badge, Badge(days), Badge(f"{compared.tiles['production']} tiles")],
        warnings=[],
        headline=headline,
        sections=sections,
        footer=f"Reference: {drift.made_of}; {compared.tiles['reference']} tiles of "
        f"{compared.scenes['reference']} places. Written by `ringmo drift {drift.task}`.",
    )


def _tests(drift: Drift) -> Section:
    rows = [
        (
            TESTS[finding.test],
            "yes" if finding.drifted else "no",
            f"{finding.value:.3g}",
            finding.unit,
            f"{finding.p:.3f}",
            f"{finding.adjusted:.3f}",
            said(finding, drift.task),
        )
        for finding in drift.comparison.findings
    ]
    text = (
        "Each test asks whether production could be a draw of the scenes that the reference is "
        "of. Scenes are permuted, not tiles, since tiles of one scene resemble each other. By "
        f"Holm's method the chance of any false alarm here is {100 * LEVEL:.0f} % at most."
    )
    header = ("of", "drift", "by", "unit", "p", "p (Holm)", "what")
    return Section("What was tested", [Text(text), Table(header, rows)])


def _bands(drift: Drift) -> list[Section]:
    finding = next(one for one in drift.comparison.findings if one.test == "bands")
    parts = sorted(finding.parts, key=lambda part: (part["p"], -abs(part["shift"])))
    rows = [
        (
            part["of"],
            part["measure"],
            f"{part['reference']:.4g}",
            f"{part['production']:.4g}",
            f"{part['shift']:+.2f}",
            f"{part['p']:.3f}",
        )
        for part in parts
    ]
    blocks: list[Block] = [
        Text(
            "Shifts are in deviations between the reference's tiles; each p holds for all rows "
            "together. Blue: the reference, orange: production."
        )
    ]
    means = [str(name) for name in drift.reference if str(name).startswith("mean:")]
    drawings = [
        _histogram(name.partition(":")[2].replace(":", " ") + ", mean", *_values(drift, name))
        for name in means
        if name in drift.production
    ]
    blocks.append(Drawing("".join(drawings), "(Histograms are in the HTML page.)"))
    header = ("band", "measure", "reference", "production", "shift", "p")
    blocks.append(Table(header, rows, "measures of bands"))
    return [Section(TESTS["bands"], blocks)]


def _values(drift: Drift, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    both = (drift.reference[name], drift.production[name])
    before, now = (rows.to_numpy(np.float64) for rows in both)
    return before[np.isfinite(before)], now[np.isfinite(now)]


def _answers(drift: Drift) -> list[Section]:
    sections: list[Section] = []
    for finding in drift.comparison.findings:
        blocks: list[Block] = []
        if finding.test == "classes":
            order = sorted(finding.parts, key=lambda p: -abs(p["production"] - p["reference"]))
            shares = not counts(drift.task)

            def cell(value: float, shares: bool = shares) -> Any:
                return Share(value) if shares else f"{value:.2f}"

            rows = [(p["of"], cell(p["reference"]), cell(p["production"])) for p in order]
            unit = "Share of the answer" if shares else "Objects a tile"
            blocks.append(Text(f"{unit}, on average; what moved most comes first."))
            blocks.append(Table(("class", "reference", "production"), rows, "classes"))
        elif finding.test in ("answers", "confidence"):
            names = [n for n in drift.reference if str(n).startswith(("answer:", "confidence"))]
            drawn = [
                _histogram(str(n).replace("answer:", "heights, "), *_values(drift, str(n)))
                for n in names
                if n in drift.production
            ]
            blocks.append(Drawing("".join(drawn), "(Histograms are in the HTML page.)"))
        if blocks:
            sections.append(Section(TESTS[finding.test], blocks))
    return sections


def _histogram(title: str, before: NDArray[Any], now: NDArray[Any]) -> str:
    """Both sides as shares of their tiles, over each other, as SVG."""
    both = np.concatenate((before, now))
    if not len(before) or not len(now):
        return ""
    low, high = float(both.min()), float(both.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts = [np.histogram(some, BINS, (low, high))[0] / len(some) for some in (before, now)]
    top = max(float(each.max()) for each in counts)
    wide = WIDE / BINS
    shapes = []
    for shares, colour in zip(counts, (BLUE, ORANGE), strict=True):
        points = [f"0,{HIGH}"]
        for i, share in enumerate(shares):
            y = HIGH - HIGH * float(share) / top
            points += [f"{i * wide:.1f},{y:.1f}", f"{(i + 1) * wide:.1f},{y:.1f}"]
        points.append(f"{WIDE},{HIGH}")
        shapes.append(
            f"<polygon points='{' '.join(points)}' fill='{colour}' fill-opacity='.28' "
            f"stroke='{colour}' stroke-width='1.2'/>"
        )
    return (
        f"<figure class='small' style='width:{WIDE + 10}px'>"
        f"<svg viewBox='-2 -4 {WIDE + 4} {HIGH + 22}' width='{WIDE + 4}' role='img' "
        f"aria-label='{escape(title, quote=True)}'>{''.join(shapes)}"
        f"<text x='0' y='{HIGH + 14}'>{low:.4g}</text>"
        f"<text x='{WIDE}' y='{HIGH + 14}' text-anchor='end'>{high:.4g}</text></svg>"
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _unusual(drift: Drift, workspace: Workspace) -> Section:
    rows = drift.unusual()
    if rows.empty:
        return Section("Unusual tiles", [Text("Nothing has an embedding to be judged by.")])
    text = (
        "The tiles of production that are farthest from any of the reference, by the model's own "
        "features; at 1 lie the farthest hundredth of the reference's own tiles."
    )
    figures, missing = [], 0
    for _, row in rows.iterrows():
        picture = _picture(row, drift, workspace)
        missing += picture is None
        if picture is not None:
            name = str(row["name"])
            figures.append(
                f"<figure class='small' style='width:{SIDE + 20}px' title='"
                f"{escape(name, quote=True)}'><img src='{picture}' alt=''>"
                f"<figcaption>{row['distance']:.2f} · {escape(_short(name))}</figcaption></figure>"
            )
    blocks: list[Block] = [Text(text)]
    if figures:
        blocks.append(Drawing("".join(figures), "(Pictures are in the HTML page.)"))
    if missing:
        blocks.append(
            Text(
                f"{missing} of {len(rows)} have no picture: none was kept (monitoring.pixels) "
                f"and their files are not here any more.",
                "note",
            )
        )
    table = [
        (str(row["name"]), f"{row['distance']:.2f}", _moment(row)) for _, row in rows.iterrows()
    ]
    blocks.append(Table(("tile", "distance", "when"), table, "unusual tiles"))
    return Section("Unusual tiles", blocks)


def _moment(row: "pd.Series[Any]") -> str:
    return f"{row['time']:%Y-%m-%d %H:%M}"


def _short(name: str) -> str:
    file, window = record.parted(name)
    last = Path(file).name
    return f"{last}, {window}" if window else last


def _picture(row: "pd.Series[Any]", drift: Drift, workspace: Workspace) -> str | None:
    """The address of a tile as it was kept, else cut out of its file again; None: neither is."""
    from PIL import Image

    kept = (
        record.folder(workspace, drift.task)
        / f"{row['time']:%Y-%m-%d}"
        / record.PIXELS
        / f"{row['digest']}.png"
    )
    try:
        if kept.is_file():
            picture: Image.Image = Image.open(kept)
        else:
            found = _cut(str(row["name"]), workspace)
            if found is None:
                return None
            picture = Image.fromarray(found[:, :, 0] if found.shape[2] == 1 else found)
        return inline_jpeg(picture, (2 * SIDE, SIDE))
    except (OSError, ValueError, BadInput, Image.DecompressionBombError):
        return None


def _cut(name: str, workspace: Workspace) -> NDArray[np.uint8] | None:
    """A window of a local image, (h, w, 1 or 3) as people see it; None: no such file."""
    from rasterio.windows import Window

    from ringmo.config import Config
    from ringmo.data import scenes
    from ringmo.data.colours import visible

    file, window = record.parted(name)
    path = Path(file)
    if not path.is_absolute() or not path.is_file():
        return None
    with scenes.opened(path) as opened:
        if window:
            left, top, wide, high = (float(part) for part in window.split(","))
            cut: Any = Window(left, top, wide, high)
        else:
            cut = None
            wide, high = opened.width, opened.height
        shape = max(1, min(SIDE, round(high))), max(1, min(SIDE, round(wide)))
        pixels = opened.read(window=cut, out_shape=(opened.count, *shape)).transpose(1, 2, 0)
    for sensor in Config.load(workspace.params_file).sensors.values():
        if len(sensor.bands) == pixels.shape[2] and sensor.dtype == str(pixels.dtype):
            return visible(pixels, sensor)
    plain = Sensor.model_validate(
        {
            "bands": [f"{i}" for i in range(pixels.shape[2])],
            "dtype": "float32",
            "mean": [0.0] * pixels.shape[2],
            "std": [1.0] * pixels.shape[2],
        }
    )
    return visible(np.abs(pixels).astype(np.float32), plain)
