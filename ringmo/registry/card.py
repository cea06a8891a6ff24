"""The model card of a version: what it is for, how good it is and where not, and what made it
(the questions are those of Mitchell et al., FAT* 2019), as Markdown and as one HTML page.

Everything in it comes from the registry: the version's tags, its run, and the files beside its
bundle. So it can be made again where the workspace that trained the model is gone. Only what a
person must say comes from `card` in params.yaml: as it is now, else as it was at registration.
"""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ringmo import __version__
from ringmo.config import About, Card, Config, read_yaml
from ringmo.data.page import save
from ringmo.errors import BadInput
from ringmo.registry import card_data, card_page, card_sections, listing, promotion
from ringmo.registry.register import ENCODER
from ringmo.registry.tracker import Run, Tracker, Version, run_url
from ringmo.workspace import Workspace

FOLDER = "card"  # among the artifacts of a version's run
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Recorded:
    """All that is known of a version; what is not, is empty.

    meta: model.json. report: the evaluation's. facts: `card_data.write`. params: params.yaml as it
    was. pictures: name → PNG. moves: the promotions that it took part in, newest first. encoder:
    what is known of the encoder that it stands on. said: what people say of it.
    """

    version: Version
    meta: Mapping[str, Any]
    report: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    run: Run | None = None
    moves: tuple[Mapping[str, Any], ...] = ()
    encoder: "Recorded | None" = None
    said: Card = field(default_factory=Card)

    @property
    def kind(self) -> str:
        return str(self.meta.get("kind", self.version.model))


def write(workspace: Workspace, ref: str, out: Path | None = None) -> dict[str, Any]:
    """The card of the version that `ref` names: card.md and card.html in `out`, and attached to
    the version where it is registered.

    Args:
        out: a folder; None: .ringmo/cards/MODEL-VERSION.

    Returns:
        ref, markdown and html (paths), attached (its artifact, or None), page (the run's address
        where a server shows it).

    Raises:
        BadInput: unknown reference, or `out` cannot be written. Unreachable: MLflow does not
            answer.
    """
    folder = Path(ref).is_dir() and (Path(ref) / "model.json").exists()
    tracker = None if folder else Tracker(workspace)
    version = listing.resolve(workspace, ref, tracker)
    card = card_sections.card(_recorded(workspace, tracker, version), _footer(version))
    out = out or workspace.state / "cards" / _name(version)
    save(out / "card.md", card_page.as_markdown(card))
    save(out / "card.html", card_page.as_html(card))
    told: dict[str, Any] = {
        "ref": str(version),
        "markdown": str((out / "card.md").resolve()),
        "html": str((out / "card.html").resolve()),
        "attached": None,
        "page": None,
    }
    if tracker is not None and version.run_id:
        told["attached"] = _log(tracker, version, card)
        run = tracker.run(version.run_id)
        if run is not None:
            told["page"] = run_url(tracker.uri, tracker.experiment(run.experiment), run.id)
    return told


def attach(workspace: Workspace, version: Version) -> str:
    """Make a registered version's card an artifact of its run, in place of one that is there.

    Returns:
        The page's path among the run's artifacts.

    Raises:
        BadInput: its model.json is gone. Unreachable: MLflow does not answer.
    """
    tracker = Tracker(workspace)
    # With the aliases and tags that it has by now.
    version = tracker.version(version.model, version.version) or version
    card = card_sections.card(_recorded(workspace, tracker, version), _footer(version))
    return _log(tracker, version, card)


def text(told: Mapping[str, Any]) -> str:
    """Where a card is, for people."""
    lines = [f"The card of {told['ref']}: open file://{told['html']} in a browser"]
    lines.append(f"As Markdown: {told['markdown']}")
    if told["attached"]:
        where = told["page"] or "MLflow, which `ringmo up` starts"
        lines.append(f"Attached to the version: {told['attached']} of its run ({where})")
    return "\n".join(lines)


def _name(version: Version) -> str:
    return f"{version.model}-{version.version}"


def _footer(version: Version) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    return f"Written by ringmo {__version__} on {when}, from what the registry holds of {version}."


def _log(tracker: Tracker, version: Version, card: card_page.Card) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        for ending, said in (("md", card_page.as_markdown), ("html", card_page.as_html)):
            path = Path(scratch) / f"{_name(version)}.{ending}"
            path.write_text(said(card), encoding="utf-8")
            tracker.log_file(version.run_id, path, FOLDER)
    return f"{FOLDER}/{_name(version)}.html"


def _recorded(workspace: Workspace, tracker: Tracker | None, version: Version) -> Recorded:
    with tempfile.TemporaryDirectory() as scratch:
        return _read(workspace, tracker, version, Path(scratch))


def _read(
    workspace: Workspace, tracker: Tracker | None, version: Version, scratch: Path
) -> Recorded:
    def at(name: str) -> Path | None:
        if tracker is None or not version.run_id:
            path = Path(version.source) / name.removeprefix("data/bundle/")
            return path if path.exists() else None
        return tracker.version_path(version, name, scratch / _name(version))

    meta = _json(at("data/bundle/model.json"))
    if not meta:
        raise BadInput(f"{version}: its model.json is missing: its files were moved or deleted")
    evaluation, beside = at("evaluation"), at(card_data.FOLDER)
    told = card_data.read(beside / card_data.FILE if beside else None)
    params = _yaml(at("lineage/params.yaml"))
    encoder = None
    if tracker is not None and meta.get("kind") != ENCODER:
        wanted = (meta.get("lineage") or {}).get("encoder")
        if same := tracker.of_bundle(ENCODER, wanted):
            try:
                encoder = _read(workspace, tracker, same, scratch)
            except BadInput:
                encoder = Recorded(same, {"kind": ENCODER})
    config = Config.load(workspace.params_file)
    _add_licences(config, told)
    moves = promotion.history(workspace, version.model) if tracker and version.version else []
    return Recorded(
        version,
        meta,
        _json(evaluation / "report.json" if evaluation else None),
        told,
        params,
        {**_pictures(beside), **_pictures(evaluation)},
        tracker.run(version.run_id) if tracker and version.run_id else None,
        tuple(row for row in moves if version.version in (row["from"], row["to"])),
        encoder,
        _said(config.card, params.get("card")),
    )


def _said(now: Card, then: Any) -> Card:
    """What people say now; what they do not say now, as they said it then."""
    try:
        before = Card.model_validate(then or {})
    except ValidationError:
        return now
    return Card.model_validate({**_given(before), **_given(now)})


def _given(card: Card) -> dict[str, Any]:
    return {k: v for k, v in card.model_dump(exclude_defaults=True).items() if v is not None}


def _add_licences(config: Config, told: Mapping[str, Any]) -> None:
    """Those that were named since the model was registered."""
    for row in (told.get("data") or {}).get("sources", []):
        row["licence"] = row["licence"] or config.ingest.about.get(row["source"], About()).licence


def _json(path: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(path: Path | None) -> dict[str, Any]:
    try:
        found = read_yaml(path) if path else {}
    except BadInput:
        return {}
    return found if isinstance(found, dict) else {}


def _pictures(folder: Path | None) -> dict[str, bytes]:
    found = (
        {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))} if folder else {}
    )
    return {name: data for name, data in found.items() if data.startswith(PNG)}
