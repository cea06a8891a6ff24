"""What a person decided about single tiles: set aside, or put back although a rule says no.

They lie in the store, so that a data version has them, and every ingest obeys them.
"""

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ringmo.data import store
from ringmo.errors import BadInput
from ringmo.stage import write_json

SCHEMA = 1


@dataclass
class Decisions:
    """Tile's key → who, when and why."""

    aside: dict[str, dict[str, str]] = field(default_factory=dict)
    kept: dict[str, dict[str, str]] = field(default_factory=dict)


def read(root: Path) -> Decisions:
    """The decisions in a store.

    Raises:
        BadInput: the file is damaged, or of a later schema.
    """
    path = root / store.DECISIONS
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise BadInput(f"{path}: this version reads schema {SCHEMA}, not {found['schema']}")
        return Decisions(dict(found["aside"]), dict(found["kept"]))
    except FileNotFoundError:
        return Decisions()
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path} is damaged: bring it back with `dvc checkout`") from None


def set_aside(root: Path, names: list[str], *, by: str, reason: str) -> dict[str, Any]:
    """Tiles that leave the manifest with the next ingest, and what was said of them.

    Args:
        names: keys, or patterns of sources (`Beach/*.jpg`), of tiles in the manifest.

    Raises:
        BadInput: a name that no tile has; nothing is written.
    """
    return _decide(root, names, aside=True, by=by, reason=reason)


def put_back(root: Path, names: list[str], *, by: str, reason: str) -> dict[str, Any]:
    """Tiles that return from quarantine.parquet with the next ingest.

    Raises:
        BadInput: a name that no tile in quarantine has, or only files that could not be read.
    """
    return _decide(root, names, aside=False, by=by, reason=reason)


def _decide(root: Path, names: list[str], *, aside: bool, by: str, reason: str) -> dict[str, Any]:
    decisions = read(root)
    where = store.MANIFEST if aside else store.QUARANTINE
    columns = store.COLUMNS if aside else store.QUARANTINE_COLUMNS
    rows = store.read_arrow(root / where, columns, "run `ringmo ingest`")
    tiles = list(zip(rows["source"].to_pylist(), rows["key"].to_pylist(), strict=True))
    chosen: dict[str, str] = {}
    for name in names:
        found = [(s, k) for s, k in tiles if name in (k, s) or fnmatchcase(s, name)]
        usable = {key: source for source, key in found if key is not None}
        if not found:
            raise BadInput(f"{name}: no tile in {where} has this key or source")
        if not usable:
            raise BadInput(
                f"{name}: the file cannot be used, there is no tile to put back: mend the file "
                f"(its reason is in {root / where}) and run `ringmo ingest`"
            )
        chosen |= usable
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for key, source in sorted(chosen.items()):
        note = {"source": source, "by": by, "when": now, "reason": reason}
        into, out_of = decisions.aside, decisions.kept
        if not aside:
            into, out_of = out_of, into
        into[key] = note
        out_of.pop(key, None)
    value = {"schema": SCHEMA, "aside": decisions.aside, "kept": decisions.kept}
    write_json(root / store.DECISIONS, value)
    return {"tiles": [{"key": key, "source": chosen[key]} for key in sorted(chosen)]}
