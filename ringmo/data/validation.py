"""The rules a data version must pass before anything is trained on it: Great Expectations' door.

Pixels were measured by ingest; here the manifest is judged. What spans rows (a place in two
splits, samples of a class) is computed into columns of its own (`facts`), so that every rule is a
stock expectation about one column. Great Expectations judges and counts; which rows are bad is
found again, quickly, from the same column, and the two must agree.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ringmo import console
from ringmo.config import Config
from ringmo.data import class_facts, data_docs, facts, published, store
from ringmo.data.class_facts import summary_of
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import REVISIONS, Report, parameters, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas
    import pyarrow

__all__ = ["Rule", "judge", "rules", "summary_of", "validate"]

NAMED = 10  # rows that a failed rule names


@dataclass(frozen=True)
class Rule:
    """`column` of a table of facts must lie in `low`..`high`, or in `allowed`, or differ in every
    row, or be empty; `mostly` is the share of rows for which it must. What is missing breaks no
    rule, but for the one that asks for its absence."""

    suite: str
    name: str
    says: str
    column: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[Any, ...] | None = None
    unique: bool = False
    empty: bool = False
    mostly: float = 1.0
    table: str = "tiles"  # or classes, or bands

    @property
    def page(self) -> str:
        """Address of its pictures below the Data Docs."""
        return f"rules/{self.name}.html"


def rules(config: Config) -> list[Rule]:
    """The rules, in the order in which they are told."""
    v = config.validate_
    bits = config.split.near_duplicate_bits

    structure, quality, label = (partial(Rule, s) for s in ("structure", "quality", "labels"))
    apart = partial(Rule, "splits", empty=True)
    classes = partial(Rule, "labels", table="classes")
    change = partial(Rule, "change")

    known, splits = tuple(config.sensors), ", ".join(facts.SPLITS)
    few = f"{v.min_tiles_per_class} tiles or more"
    return [
        structure("known_sensor", "the sensor is in params.yaml", "sensor", allowed=known),
        structure("known_split", f"the split is one of {splits}", "split", allowed=facts.SPLITS),
        structure("placed", "every tile has a place", "has_place", allowed=(True,)),
        structure("sizes", "width and height are 1 pixel or more", "smallest_side", low=1),
        structure("stored", "size is 1 byte or more", "size", low=1),
        structure("offsets", "the offset is not negative", "offset", low=0),
        structure("in_shard", "the tile lies within its shard", "beyond_shard", empty=True),
        structure("shares", "shares lie between 0 and 1", "bad_shares", empty=True),
        structure("measured", "every tile was measured and hashed", "unmeasured", empty=True),
        structure(
            "bands_measured",
            "every band has a mean and a deviation",
            "bands_unmeasured",
            empty=True,
        ),
        structure("unique_key", "every key is there once", "key", unique=True),
        structure("unique_content", "no two tiles are the same bytes", "content_hash", unique=True),
        structure(
            "second_dates",
            "the later tile of a change pair is there, and of the same size",
            "lost_second",
            empty=True,
        ),
        structure("heights_fit", "heights are as large as their tile", "height_unlike", empty=True),
        structure(
            "heights_measured",
            "heights are known somewhere, and their figures agree",
            "height_unmeasured",
            empty=True,
        ),
        quality(
            "nodata",
            f"at most {v.max_nodata_share:.0%} of a tile lacks data",
            "nodata_share",
            high=v.max_nodata_share,
        ),
        quality(
            "blank",
            f"at most {v.max_blank_share:.1%} of the tiles deviate by less than {v.min_std}",
            "std",
            low=v.min_std,
            mostly=1 - v.max_blank_share,
        ),
        quality(
            "saturated",
            f"at most {v.max_saturated_share:.0%} of a tile is saturated",
            "saturated_share",
            high=v.max_saturated_share,
        ),
        quality(
            "cloud",
            f"at most {v.max_cloud_share:.0%} of a tile looks like cloud",
            "cloud_share",
            high=v.max_cloud_share,
        ),
        apart("one_split_a_place", "no place is in two of train, val and test", "place_elsewhere"),
        apart(
            "identical_across_splits",
            "no two of train, val and test have tiles of the same bytes",
            "twin_elsewhere",
        ),
        apart(
            "near_across_splits",
            "no two of train, val and test have tiles that look alike "
            f"(hashes within {bits} bits, and thumbnails that agree)",
            "near_elsewhere",
        ),
        apart(
            "ground_across_splits",
            "no two of train, val and test have tiles that share ground",
            "overlap_elsewhere",
        ),
        apart(
            "pair_in_one_split",
            "the two dates of a change pair are in one split",
            "second_elsewhere",
        ),
        label("named_labels", "a label is a name, not blank", "label_named", allowed=(True,)),
        label("masks_fit", "a mask is as large as its tile", "mask_unlike", empty=True),
        label("mask_values", "the numbers in a mask stand for classes", "mask_strange", empty=True),
        label("boxes_inside", "boxes lie inside their image", "boxes_outside", high=0),
        label("boxes_named", "every box has a class", "boxes_unnamed", empty=True),
        label(
            "labels_in_shard",
            "masks, boxes and heights lie within their shards",
            "labels_beyond_shard",
            empty=True,
        ),
        label(
            "height_range",
            f"heights lie between {v.height_range[0]:g} and {v.height_range[1]:g} m",
            "height_beyond",
            empty=True,
        ),
        classes(
            "samples",
            f"every class has {v.min_per_class} samples or more",
            "samples",
            low=v.min_per_class,
        ),
        classes("trains", "every class has a train sample", "train", low=1),
        classes("tests", "every class has a test sample", "test", low=1),
        classes(
            "balance",
            f"no class has more than {v.max_imbalance:g} times the samples of another",
            "imbalance",
            high=v.max_imbalance,
        ),
        classes(
            "mask_tiles",
            f"every class of masks is in {few}",
            "masks_tiles",
            low=v.min_tiles_per_class,
        ),
        classes(
            "box_tiles",
            f"every class of boxes is in {few}",
            "boxes_tiles",
            low=v.min_tiles_per_class,
        ),
        change(
            "no_class_vanished",
            "no class of an earlier version is missing (or it is among validate.retired_classes)",
            "vanished",
            table="classes",
            allowed=(False,),
        ),
        change(
            "class_shares",
            f"no class's share has moved by more than {v.max_share_change:.0%} of the samples",
            "share_change",
            table="classes",
            high=v.max_share_change,
        ),
        change(
            "band_means",
            f"no band's mean has moved by more than {v.max_band_shift:g} of its deviation",
            "shift",
            table="bands",
            high=v.max_band_shift,
        ),
    ]


def validate(config: Config, workspace: Workspace, out: Path) -> Report:
    """Judge the store's manifest; writes out/verdict.json and the Data Docs, with pictures.

    Raises:
        AnswerIsNo: a rule is broken: which, by how many rows, and the first of them.
        BadInput: the manifest is missing or damaged.
    """
    tiles = facts.read(workspace.store / store.MANIFEST)
    if not len(tiles):
        raise BadInput(f"{workspace.store / store.MANIFEST} has no tile: run `ringmo ingest`")
    shards = {
        shard
        for column in ("shard", *(f"{part}_shard" for part in store.LABELS))
        for shard in facts.few(tiles, column)[1]
    }
    files = {shard: workspace.store / shard for shard in shards}
    write_json(
        out / "params.json",
        parameters(
            "validate",
            {"validate": config.validate_, "split": config.split},
            sensor=config.select.sensor,
            tiles={"all": len(tiles)},
            revision=REVISIONS["validate"],
        ),
    )
    verdict = judge(
        config,
        tiles,
        out,
        shard_sizes={name: path.stat().st_size for name, path in files.items() if path.is_file()},
        earlier=_earlier(workspace.store),
        codings=facts.codings(workspace.store),
        stored=store.TileStore(workspace.store),
    )
    report = Report("validate")
    report.figures = verdict["figures"]
    report.tables["rules"] = [
        {"rule": v["says"], "ok": v["ok"], "soft": v["soft"], "failed_rows": v["failed_rows"]}
        for v in verdict["rules"]
    ]
    docs = workspace.work("validate") / "docs"
    where = docs.relative_to(workspace.root)
    told = [v for v in verdict["rules"] if not v["ok"]]
    if told:
        rows = [
            (v["rule"], data_docs.standing(v), v["says"], v["failed_rows"], where / v["page"])
            for v in sorted(told, key=lambda v: v["soft"])
        ]
        console.note(console.table(rows, ("rule", "", "says", "rows", "pictures")))
    if broken := [v for v in told if not v["soft"]]:
        first = broken[0]
        more = f"; also broken: {', '.join(v['rule'] for v in broken[1:])}" if broken[1:] else ""
        raise AnswerIsNo(
            f"validation failed: {first['says']} ({first['rule']}): broken by "
            f"{first['failed_rows']} ({', '.join(first['first'])}){more}; see {docs / 'index.html'}"
        )
    every = len(verdict["rules"])
    passed = f"{every - len(told)} of {every}" if told else f"all {every}"
    console.note(f"validate: {len(tiles)} tiles pass {passed} rules")
    return report


def judge(
    config: Config,
    manifest: "pandas.DataFrame | pyarrow.Table",
    out: Path,
    *,
    shard_sizes: Mapping[str, int],
    earlier: Sequence[Mapping[str, Any]] = (),
    codings: facts.Codings | None = None,
    stored: store.TileStore | None = None,
) -> dict[str, Any]:
    """Judge a manifest by all rules; writes out/verdict.json and out/docs/, returns the verdict.

    Args:
        shard_sizes: bytes of each shard; one that is not there is missing.
        earlier: entries of the store's history before this version, oldest first.
        codings: what the numbers in masks mean.
        stored: where the bytes are. Without it there are no pictures, and of tiles with near
            hashes none is looked at: the hashes decide.
    """
    every = rules(config)
    soft = set(config.validate_.soft)
    if unknown := soft - {rule.name for rule in every}:
        raise BadInput(
            f"validate.soft: no rule is called {', '.join(sorted(unknown))}; "
            f"there are {', '.join(rule.name for rule in every)}"
        )
    if config.split.by == "published":
        soft |= set(published.LEAKS)
    tiles, known = facts.as_table(manifest), codings or {}
    columns, partners = facts.of_tiles(config, tiles, shard_sizes, known, _alike(tiles, stored))
    try:
        summary = summary_of(tiles, known)
        tables: dict[str, Any] = {
            "tiles": columns,
            "classes": class_facts.of_classes(config, tiles, summary, earlier, known),
            "bands": class_facts.of_bands(config, summary, earlier[-1] if earlier else {}),
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(
            f"{store.HISTORY} of the store is damaged: bring it back with `dvc checkout`"
        ) from None
    failed = _expect(every, soft, tables, out / "docs")
    verdicts: list[dict[str, Any]] = []
    pages: dict[str, list[data_docs.Card]] = {}
    for rule in every:
        bad = failed[rule.name]
        verdicts.append(
            {
                "rule": rule.name,
                "suite": rule.suite,
                "says": rule.says,
                "ok": not len(bad),
                "soft": rule.name in soft,
                "failed_rows": len(bad),
                "first": _names(rule, tables, tiles, bad[:NAMED]),
                "page": rule.page if len(bad) else None,
            }
        )
        if len(bad):
            shown = bad[: config.validate_.pictures]
            pages[rule.name] = _cards(config, rule, tables, tiles, partners, known, shown, stored)
    broken = sum(not v["ok"] and not v["soft"] for v in verdicts)
    verdict = {
        "ok": not broken,
        "tiles": len(tiles),
        "rules": verdicts,
        "figures": {
            "tiles": len(tiles),
            "rules": len(every),
            "broken": broken,
            "warnings": sum(not v["ok"] and v["soft"] for v in verdicts),
        },
    }
    data_docs.write(out / "docs", verdict, pages)
    write_json(out / "verdict.json", verdict)
    return verdict


def _earlier(root: Path) -> list[dict[str, Any]]:
    """The history's entries of ingests from the same sources before the present one."""
    try:
        ingests = json.loads((root / store.HISTORY).read_text())["ingests"]
        return [
            {**entry, "classes": dict(entry["classes"])}
            for entry in ingests[:-1]
            if entry["sources"] == ingests[-1]["sources"]
        ]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise BadInput(
            f"{root / store.HISTORY} is damaged: bring it back with `dvc checkout`"
        ) from None


def _alike(
    tiles: "pyarrow.Table", stored: store.TileStore | None
) -> Callable[[int, int], bool] | None:
    """Whether two rows look alike, by their stored bytes."""
    from ringmo.data.lookalikes import look_alike

    if stored is None:
        return None

    def alike(i: int, j: int) -> bool:
        try:
            one, two = (stored.read(*_bytes_of(tiles, row)) for row in (i, j))
            return look_alike(one, two)
        except (BadInput, OSError):
            return True  # nothing there speaks against the hashes

    return alike


def _bytes_of(tiles: "pyarrow.Table", row: int, kind: str = "") -> tuple[str, int, int]:
    """Shard, offset and size of a row's tile, or of its mask: kind is then "mask_"."""
    shard, offset, size = (
        tiles[f"{kind}{part}"][row].as_py() for part in ("shard", "offset", "size")
    )
    return str(shard), int(offset), int(size)


def _bad(rule: Rule, values: Any) -> NDArray[np.int64]:
    """Rows that break a rule, found from the same column that Great Expectations judges."""
    import pandas as pd

    column = pd.Series(values)
    if rule.unique:
        bad = column.duplicated(keep=False) & column.notna()
    elif rule.empty:
        bad = column.notna()
    elif rule.allowed is not None:
        bad = column.notna() & ~column.isin(rule.allowed)
    else:
        low = -np.inf if rule.low is None else rule.low
        high = np.inf if rule.high is None else rule.high
        bad = column.notna() & ~column.between(low, high)
    return np.flatnonzero(bad.to_numpy())


def _names(
    rule: Rule, tables: Mapping[str, Any], tiles: "pyarrow.Table", rows: NDArray[np.int64]
) -> list[str]:
    if rule.table != "tiles":
        return [str(name) for name in tables[rule.table]["name"].iloc[rows]]
    return [f"{tiles['key'][int(row)]} {tiles['source'][int(row)]}" for row in rows]


def _cards(
    config: Config,
    rule: Rule,
    tables: Mapping[str, Any],
    tiles: "pyarrow.Table",
    partners: Mapping[str, NDArray[np.int64]],
    known: facts.Codings,
    bad: NDArray[np.int64],
    stored: store.TileStore | None,
) -> list[data_docs.Card]:
    """What breaks a rule, with pictures: of the tiles, or of some tiles of a class or a sensor."""
    cards = []
    each = max(2, min(8, config.validate_.pictures // len(bad)))
    masks = rule.suite == "labels"
    for name, row in zip(_names(rule, tables, tiles, bad), bad, strict=True):
        if rule.table == "tiles":
            partner = partners.get(rule.column)
            other = -1 if partner is None else int(partner[row])
            behind = [int(row), *([other] if other >= 0 else [])]
            value = _shown(rule.column, tables["tiles"][rule.column][int(row)])
        else:
            entry = tables[rule.table].iloc[int(row)]
            value = _shown(rule.column, entry[rule.column])
            if rule.table == "classes":
                behind = class_facts.rows_of_class(
                    config, tiles, entry["kind"], entry["class"], known
                )
                masks = masks or entry["kind"] == "masks"
            else:
                value += f": {entry['mean_before']:.4g} before, {entry['mean']:.4g} now"
                behind = class_facts.rows_far_off(
                    tiles, entry["sensor"], entry["band"], entry["mean_before"]
                )
            behind = behind[:each]
        pictures: list[data_docs.Picture] = []
        if stored is not None:
            for i in behind:
                pictures += _pictures(config, tiles, i, stored, masks)
        cards.append(data_docs.Card(name, value, pictures))
    return cards


def _shown(column: str, value: Any) -> str:
    if isinstance(value, float | np.floating):
        value = f"{value:.6g}"
    return f"{column.replace('_', ' ')}: {value}"


def _pictures(
    config: Config, tiles: "pyarrow.Table", row: int, stored: store.TileStore, mask: bool
) -> list[data_docs.Picture]:
    """A tile, and its mask where that is asked for and there is one."""
    from ringmo.data import page
    from ringmo.data.decode import decode

    one = tiles.slice(row, 1).to_pandas().iloc[0]
    caption = f"{one['source']} at {one['row']}, {one['col']} ({one['split']})"
    pictures = []
    try:
        pictures.append(data_docs.Picture(page.tile_image(config, stored, one), caption))
        if mask and one["mask_size"] > 0:
            pixels = decode(stored.read(*_bytes_of(tiles, row, "mask_")))
            pictures.append(data_docs.Picture(data_docs.mask_picture(pixels), "its mask"))
    except (BadInput, OSError, ValueError) as error:
        pictures.append(data_docs.Picture("", f"{caption}: cannot be shown: {error}"))
    return pictures


def _expect(
    every: Sequence[Rule], soft: set[str], tables: Mapping[str, Any], docs: Path
) -> dict[str, NDArray[np.int64]]:
    """Judge the rules with Great Expectations and build its docs; rule → rows that are bad."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    nothing = np.empty(0, np.int64)
    failed = {rule.name: nothing for rule in every}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations as gx
        import pandas as pd

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        docs.mkdir(parents=True)
        site = {
            "class_name": "SiteBuilder",
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(docs.resolve()),
            },
        }
        context.add_data_docs_site(site_name="docs", site_config=site)
        source = context.data_sources.add_pandas("manifest")
        for suite, of in dict.fromkeys((rule.suite, rule.table) for rule in every):
            chosen = [rule for rule in every if (rule.suite, rule.table) == (suite, of)]
            # Only what is judged now: Great Expectations copies what it is given.
            table = pd.DataFrame({rule.column: tables[of][rule.column] for rule in chosen})
            if table.empty:
                continue
            name = suite if of == "tiles" else f"{suite}-{of}"
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
            expectations = context.suites.add(
                gx.ExpectationSuite(
                    name=name, expectations=[_expectation(r, r.name in soft) for r in chosen]
                )
            )
            definition = context.validation_definitions.add(
                gx.ValidationDefinition(name=name, data=batch, suite=expectations)
            )
            checkpoint = context.checkpoints.add(
                gx.Checkpoint(
                    name=name,
                    validation_definitions=[definition],
                    actions=[],
                    # COMPLETE would list every bad row one by one, in Python.
                    result_format={"result_format": "SUMMARY", "partial_unexpected_count": NAMED},
                )
            )
            outcome = checkpoint.run(batch_parameters={"dataframe": table})
            by_name = {rule.name: rule for rule in chosen}
            for result in next(iter(outcome.run_results.values())).results:
                rule = by_name[result.expectation_config.meta["rule"]]
                if (result.exception_info or {}).get("raised_exception"):
                    raise BadInput(f"validate: rule {rule.name} cannot be judged: {result}")
                if result.success:
                    continue
                bad = _bad(rule, table[rule.column])
                if len(bad) != result.result["unexpected_count"]:
                    raise RuntimeError(
                        f"rule {rule.name}: Great Expectations counts "
                        f"{result.result['unexpected_count']} bad rows, {len(bad)} were found"
                    )
                failed[rule.name] = bad
        context.build_data_docs(site_names=["docs"])
    return failed


def _expectation(rule: Rule, soft: bool) -> Any:
    import great_expectations.expectations as gxe

    common: dict[str, Any] = {
        "column": rule.column,
        "meta": {"rule": rule.name},
        "severity": "warning" if soft else "critical",
        # What the Data Docs say in place of their own wording.
        "description": f"{rule.name}: {rule.says}",
    }
    if rule.unique:
        return gxe.ExpectColumnValuesToBeUnique(**common)
    if rule.empty:
        return gxe.ExpectColumnValuesToBeNull(**common)
    if rule.allowed is not None:
        return gxe.ExpectColumnValuesToBeInSet(**common, value_set=list(rule.allowed))
    return gxe.ExpectColumnValuesToBeBetween(
        **common, min_value=rule.low, max_value=rule.high, mostly=rule.mostly
    )
