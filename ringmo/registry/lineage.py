"""From a model back to the pixels, and from a pixel to the models that saw it.

All of it is in the version's tags and in the files that it took along (`origins`), so that it can
be told without a commit and without the workspace, or the imagery, that made it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.errors import BadInput
from ringmo.registry import seen
from ringmo.registry.listing import metric_of, moment, of_folder, resolve
from ringmo.registry.origins import ENCODER, Origins
from ringmo.registry.tracker import Tracker, Version, run_url
from ringmo.workspace import Workspace

SHOWN = 12  # classes and sources of a part in the text; the page and --json have all


def lineage(workspace: Workspace, ref: str) -> dict[str, Any]:
    """A model's origins, nested: each `from` holds what that part was made from.

    Each part has `what` (its kind), `name`, `facts` (name → value) and `from` (parts).

    Raises:
        BadInput: unknown reference. Unreachable: MLflow does not answer.
    """
    if Path(ref).is_dir() and (Path(ref) / "model.json").exists():
        return _model(workspace, None, of_folder(Path(ref)))
    tracker = Tracker(workspace)
    return _model(workspace, tracker, resolve(workspace, ref, tracker))


def _model(workspace: Workspace, tracker: Tracker | None, version: Version) -> dict[str, Any]:
    tags, kept = version.tags, origins_of(tracker, version)
    facts = {
        "aliases": ", ".join(version.aliases) or None,
        "created": moment(version.created),
        metric_of(version): tags.get(f"test_{metric_of(version)}"),
        "gate": tags.get("verdict") and f"{tags['verdict']}: {tags.get('verdict_reasons', '')}",
        "imagery": "generated" if version.generated else "real",
        "bundle": version.bundle_hash or None,
        "files": version.cleaned or version.source,
    }
    code = {
        "commit": tags.get("code_version"),
        "tree": {"true": "clean", "false": "changed: see source.patch"}.get(
            tags.get("code_clean", "")
        ),
        "parameters": tags.get("params_digest"),
        "stage lock": tags.get("stage_lock"),
        "ringmo": tags.get("ringmo_version"),
        "files": f"{version.source}/lineage" if version.version and not version.cleaned else None,
    }
    saw = seen.summary(kept.tiles) if kept and kept.tiles else {}
    data = _data(workspace, tags.get("data_version"), kept, saw)
    counts = {name: saw[name] for name in ("tiles", *seen.SPLITS) if name in saw}
    counts |= {"training tiles by class": saw.get("classes") or None}
    selection = _part("selection", tags.get("selection"), counts, [data])
    made_from = [selection]
    if version.model == ENCODER or tags.get("kind") == ENCODER:
        training = "pre-training"
    else:
        training = "fine-tuning"
    if training == "fine-tuning" or tags.get("encoder_hash"):
        made_from.append(_encoder(workspace, tracker, version))
    made_from = [
        _part(training, version.run_id or None, _run_facts(tracker, version), made_from),
        _part("code", tags.get("code_version"), code, []),
        _part("flow run", tags.get("flow_run"), {"reason": tags.get("reason")}, []),
    ]
    return _part("model", str(version), facts, made_from)


def _encoder(workspace: Workspace, tracker: Tracker | None, version: Version) -> dict[str, Any]:
    wanted = version.tags.get("encoder_hash")
    encoder = tracker.of_bundle(ENCODER, wanted) if tracker else None
    if encoder is not None:
        return _model(workspace, tracker, encoder) | {"what": "encoder"}
    return _part("encoder", wanted and wanted[:16], {"registered": "no"} if wanted else {}, [])


def _run_facts(tracker: Tracker | None, version: Version) -> dict[str, Any]:
    run = tracker.run(version.run_id) if tracker and version.run_id else None
    if tracker is None or run is None:
        return {}
    return {
        "machine": version.tags.get("machine"),
        "experiment": run.experiment,
        "run": run.name,
        "started": moment(run.started),
        "page": run_url(tracker.uri, tracker.experiment(run.experiment), run.id),
    }


def _data(
    workspace: Workspace, version: str | None, kept: Origins | None, saw: dict[str, Any]
) -> dict[str, Any]:
    """A data version, and the sources of it with their shares of what this training saw."""
    from ringmo.data.versions import versions

    row: dict[str, Any] = (kept.data if kept else {}) or next(
        (r for r in versions(workspace) if r["version"] == version), {}
    )
    whole = row.get("tiles_by_source", {})
    sources = []
    for found in saw.get("sources", []):
        facts = {
            "share": f"{100 * found['share']:.1f} %",
            "tiles": found["tiles"],
            **{split: found[split] for split in seen.SPLITS if split in found},
            "training tiles by class": found["classes"] or None,
            "in the data version": whole.get(found["source"]),
        }
        sources.append(_part("source", found["source"], facts, []))
    names = ("time", "tiles", "classes", "labelled", "set_aside", "generated")
    facts = {name: row.get(name) for name in names}
    if not sources:
        facts["sources"] = row.get("sources")
    return _part("data", version, facts, sources)


def origins_of(tracker: Tracker | None, version: Version) -> Origins | None:
    """The files that a version took along; None where it has none, or they are gone."""
    if tracker is None or not version.run_id:
        return None
    try:
        return Origins(tracker.lineage_folder(version))
    except BadInput:
        return None


def _part(
    what: str, name: str | None, facts: dict[str, Any], made_from: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "what": what,
        "name": name,
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "from": [part for part in made_from if part["name"] or part["from"]],
    }


def text(tree: dict[str, Any]) -> str:
    """The lineage as an indented tree, for people."""
    return "\n".join(_lines(tree, "", ""))


def _lines(part: dict[str, Any], first: str, rest: str) -> list[str]:
    lines = [f"{first}{part['what']}  {part['name'] or '(not recorded)'}"]
    bar = "│ " if part["from"] else "  "
    for name, value in part["facts"].items():
        lines.append(f"{rest}{bar}  {name}: {said(value, SHOWN)}")
    children = part["from"]
    if children and children[0]["what"] == "source" and len(children) > SHOWN:
        more = {"what": f"and {len(children) - SHOWN} sources more", "name": "see --json or --html"}
        children = [*children[:SHOWN], {**more, "facts": {}, "from": []}]
    for i, child in enumerate(children):
        last = i == len(children) - 1
        lines += _lines(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
    return lines


def said(value: Any, shown: int | None = None) -> str:
    """A fact as people read it; of many, the first so many."""
    if isinstance(value, dict):
        value = [f"{name} {count}" for name, count in value.items()]
    if isinstance(value, list):
        more = len(value) - shown if shown is not None else 0
        return ", ".join(map(str, value[:shown])) + (f" and {more} more" if more > 0 else "")
    return str(value)


# From a pixel to the models


def who_saw(workspace: Workspace, what: str) -> dict[str, Any]:
    """Every registered version that saw something, the champions first.

    Args:
        what: a file of imagery, which is known by its bytes; a data version, or its first digits;
            a tile's key; or a source: a path as the store knows it, a pattern, a folder.

    Returns:
        as: file, data version, tile or source. models: rows of model, version, aliases and how:
        rows of training, through (the encoder, where it was that that saw it), by (what it is
        known by), tiles (split → count). examples: sources that were seen. silent: versions that
        do not say what they saw.

    Raises:
        Unreachable: MLflow does not answer.
    """
    tracker = Tracker(workspace)
    found = [version for model in tracker.models() for version in tracker.versions(model)]
    kind, tests = _meaning(what, found)
    encoders = {v.bundle_hash: v for v in found if v.model == ENCODER}
    examples: set[str] = set()
    sightings: dict[str, list[dict[str, Any]]] = {}
    silent = []
    for version in found:
        kept = origins_of(tracker, version)
        if kind == "data version":
            if str(version.tags.get("data_version", "")).startswith(what):
                saw = seen.summary(kept.tiles) if kept and kept.tiles else {}
                tiles = {name: saw[name] for name in seen.SPLITS if name in saw}
                sightings[str(version)] = [{"by": kind, "tiles": tiles}]
        elif kept is None or kept.tiles is None:
            silent.append(str(version) + " (cleaned)" * bool(version.cleaned))
        else:
            sightings[str(version)] = _sightings(kept.tiles, tests, examples)
    rows: list[dict[str, Any]] = []
    for version in found:
        how = [_sighting(version, None, one) for one in sightings.get(str(version), [])]
        # Its encoder, and those that this one's pre-training started from.
        before = version
        while encoder := encoders.get(before.tags.get("encoder_hash", "-")):
            through = sightings.get(str(encoder), [])
            how += [_sighting(encoder, str(encoder), one) for one in through]
            before = encoder
        if how:
            rows.append(
                {
                    "model": version.model,
                    "version": version.version,
                    "aliases": _champion_first(version.aliases),
                    "created": version.created,
                    "how": how,
                }
            )
    rows.sort(
        key=lambda row: (
            "champion" not in row["aliases"],
            not row["aliases"],
            row["model"] == ENCODER,
        )
    )
    return {
        "what": what,
        "as": kind,
        "models": rows,
        "examples": sorted(examples)[:5],
        "silent": silent,
    }


Test = Callable[[Any], Any]


def _meaning(what: str, found: list[Version]) -> tuple[str, dict[str, Test]]:
    """What somebody asks for, and by what each tile is known to be it."""
    path = Path(what)
    if path.is_file():
        whole = str(path.resolve())
        return "file", {
            "its bytes": lambda table: seen.of_file(table, path),
            "its path, with other bytes": lambda table: seen.of_source(table, whole),
        }
    if path.is_dir():
        whole = str(path.resolve())
        tests = (whole, f"{_literal(whole)}/*")
        return "source", {
            "source": lambda table: _either(*(seen.of_source(table, test) for test in tests))
        }
    data = {str(v.tags.get("data_version", "")) for v in found}
    if any(version.startswith(what) for version in data) and re.fullmatch(
        r"[0-9a-f]{6,32}(\.dir)?", what
    ):
        return "data version", {}
    if re.fullmatch(r"[0-9a-f]{16}", what):
        return "tile", {"key": lambda table: seen.of_key(table, what)}
    return "source", {"source": lambda table: seen.of_source(table, what)}


def _literal(path: str) -> str:
    """A path as a pattern of itself."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def _either(one: Any, other: Any) -> Any:
    import pyarrow.compute as pc

    return pc.or_(one, other)


def _sightings(path: Path, tests: dict[str, Test], examples: set[str]) -> list[dict[str, Any]]:
    """How a table of tiles knows something; each tile counts for the first test it passes."""
    import pyarrow.compute as pc

    table = seen.read(path)
    rows = []
    for by, test in tests.items():
        which = test(table)
        hits = table.filter(which)
        table = table.filter(pc.invert(which))
        if len(hits):
            rows.append({"by": by, "tiles": seen.splits(hits["split"].to_pylist())})
            roots, sources = (hits[n].slice(0, 5).to_pylist() for n in ("source_root", "source"))
            examples |= {f"{root}/{source}" for root, source in zip(roots, sources, strict=True)}
    return rows


def _sighting(version: Version, through: str | None, one: dict[str, Any]) -> dict[str, Any]:
    training = "pre-training" if version.model == ENCODER else f"fine-tuning {version.model}"
    return {"training": training, "through": through, **one}


def _champion_first(aliases: tuple[str, ...]) -> list[str]:
    return sorted(aliases, key=lambda name: (name != "champion", name))


def who_saw_text(answer: dict[str, Any]) -> str:
    """The answer as a table for people."""

    def told(how: dict[str, Any]) -> str:
        counts = ", ".join(f"{n} {split}" for split, n in how["tiles"].items())
        through = f" ({how['through']})" if how["through"] else ""
        known = f", by {how['by']}" if answer["as"] == "file" else ""
        return f"{how['training']}{through}: {counts or 'tiles not recorded'}{known}"

    rows = []
    for row in answer["models"]:
        name = f"{row['model']}/{row['version']}"
        for how in row["how"]:
            rows.append((name, ", ".join(row["aliases"]) if name else "", told(how)))
            name = ""
    parts = [console.table(rows, ("model", "alias", "tiles it saw"))] if rows else []
    if not rows:
        parts.append(f"No registered model saw {answer['what']} (taken for a {answer['as']}).")
    if answer["examples"] and answer["as"] != "file":
        parts.append("For example: " + ", ".join(answer["examples"][:3]))
    if answer["silent"]:
        names = said(answer["silent"], SHOWN)
        parts.append(f"Not known of {names}: their tiles were not recorded.")
    return "\n\n".join(parts)
