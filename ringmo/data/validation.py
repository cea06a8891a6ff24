"""The rules a data version must pass before anything is trained on it: Great Expectations' door.

Pixels were measured by ingest; here the manifest is judged. What spans rows (a place in two
splits, samples of a class) is computed into columns of its own, so that every rule is a stock
expectation about one column, and the Data Docs show it.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import console
from ringmo.config import Config
from ringmo.data import store
from ringmo.errors import AnswerIsNo, BadInput
from ringmo.stage import Report, write_json
from ringmo.workspace import Workspace

if TYPE_CHECKING:
    import pandas

SPLITS = ["train", "val", "test", "unused"]
NAMED = 10  # rows that a failed rule names


@dataclass(frozen=True)
class Rule:
    """`column` of the table with facts must lie in `low`..`high`, or in `allowed`, or differ in
    every row; `mostly` is the share of rows for which it must."""

    name: str
    says: str
    column: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[Any, ...] | None = None
    unique: bool = False
    mostly: float = 1.0
    # Instead of tiles: the table of classes.
    of_classes: bool = False


def rules(config: Config) -> list[Rule]:
    """The rules, in the order in which they are told."""
    v = config.validate_
    known = tuple(config.sensors)
    return [
        Rule("known_sensor", "the sensor is in params.yaml", "sensor", allowed=known),
        Rule(
            "known_split",
            f"the split is one of {', '.join(SPLITS)}",
            "split",
            allowed=tuple(SPLITS),
        ),
        Rule("placed", "every tile has a place", "has_place", allowed=(True,)),
        Rule("sizes", "width and height are 1 pixel or more", "smallest_side", low=1),
        Rule("stored", "size is 1 byte or more", "size", low=1),
        Rule("offsets", "the offset is not negative", "offset", low=0),
        Rule("in_shard", "the tile lies within its shard", "in_shard", allowed=(True,)),
        Rule("shares", "shares lie between 0 and 1", "shares_valid", allowed=(True,)),
        Rule("measured", "every tile was measured and hashed", "measured", allowed=(True,)),
        Rule("unique_key", "every key is there once", "key", unique=True),
        Rule("unique_content", "no two tiles are the same bytes", "content_hash", unique=True),
        Rule(
            "one_split_a_place",
            "no place is in two of train, val and test",
            "splits_of_place",
            low=0,
            high=1,
        ),
        Rule(
            "nodata",
            f"at most {v.max_nodata_share:.0%} of a tile lacks data",
            "nodata_share",
            high=v.max_nodata_share,
        ),
        Rule(
            "blank",
            f"at most {v.max_blank_share:.1%} of the tiles deviate by less than {v.min_std}",
            "std",
            low=v.min_std,
            mostly=1 - v.max_blank_share,
        ),
        Rule(
            "cloud",
            f"at most {v.max_cloud_share:.0%} of a tile looks like cloud",
            "cloud_share",
            high=v.max_cloud_share,
        ),
        Rule("named_labels", "a label is a name, not blank", "label_named", allowed=(True,)),
        Rule(
            "samples",
            f"every class has {v.min_per_class} samples or more",
            "samples",
            low=v.min_per_class,
            of_classes=True,
        ),
        Rule("trains", "every class has a train sample", "train", low=1, of_classes=True),
        Rule("tests", "every class has a test sample", "test", low=1, of_classes=True),
        Rule(
            "no_class_vanished",
            "no class of an earlier version is missing (or it is among validate.retired_classes)",
            "vanished",
            allowed=(False,),
            of_classes=True,
        ),
        Rule(
            "class_shares",
            f"no class's share has moved by more than {v.max_share_change:.0%} of the samples",
            "share_change",
            high=v.max_share_change,
            of_classes=True,
        ),
    ]


def validate(config: Config, workspace: Workspace, out: Path) -> Report:
    """Judge the store's manifest; writes out/verdict.json and Great Expectations' Data Docs.

    Raises:
        AnswerIsNo: a rule is broken: which, by how many rows, and the first of them.
        BadInput: the manifest is missing or damaged.
    """
    manifest = store.TileStore(workspace.store).manifest()
    if manifest.empty:
        raise BadInput(f"{workspace.store / store.MANIFEST} has no tile: run `ringmo ingest`")
    tables = {
        False: _tile_facts(manifest, workspace.store),
        True: _class_facts(manifest, workspace.store, config),
    }
    verdicts: list[dict[str, Any]] = []
    every = rules(config)
    soft = set(config.validate_.soft)
    if unknown := soft - {rule.name for rule in every}:
        raise BadInput(
            f"validate.soft: no rule is called {', '.join(sorted(unknown))}; "
            f"there are {', '.join(rule.name for rule in every)}"
        )
    failed = _expect(every, tables, out / "docs")
    for rule in every:
        bad = failed[rule.name]
        rows = tables[rule.of_classes].iloc[bad]
        verdicts.append(
            {
                "rule": rule.name,
                "says": rule.says,
                "ok": not bad,
                "soft": rule.name in soft,
                "failed_rows": len(bad),
                "first": [str(name) for name in rows["name"].head(NAMED)],
            }
        )
    broken = [v for v in verdicts if not v["ok"] and not v["soft"]]
    warned = [v for v in verdicts if not v["ok"] and v["soft"]]
    write_json(out / "verdict.json", {"ok": not broken, "rules": verdicts})
    report = Report("validate")
    report.figures = {"tiles": len(manifest), "rules": len(every), "broken": len(broken)}
    report.figures["warnings"] = len(warned)
    report.tables["rules"] = [
        {"rule": v["says"], "ok": v["ok"], "soft": v["soft"], "failed_rows": v["failed_rows"]}
        for v in verdicts
    ]
    for v in warned:
        console.note(
            f"validate: warning: {v['says']} ({v['rule']}): broken by {v['failed_rows']} "
            f"({', '.join(v['first'])})"
        )
    if broken:
        first = broken[0]
        more = f"; also broken: {', '.join(v['rule'] for v in broken[1:])}" if broken[1:] else ""
        raise AnswerIsNo(
            f"validation failed: {first['says']} ({first['rule']}): broken by "
            f"{first['failed_rows']} ({', '.join(first['first'])}){more}; "
            f"see {workspace.work('validate') / 'docs' / 'index.html'}"
        )
    passed = f"{len(every) - len(warned)} of {len(every)}" if warned else f"all {len(every)}"
    console.note(f"validate: {len(manifest)} tiles pass {passed} rules")
    return report


def _tile_facts(manifest: "pandas.DataFrame", root: Path) -> "pandas.DataFrame":
    """The manifest with what the rules ask for; `name` is key and source."""
    facts = manifest.copy()
    facts["name"] = facts["key"] + " " + facts["source"]
    facts["has_place"] = facts["place"].notna() & (facts["place"] != "")
    facts["smallest_side"] = facts[["width", "height"]].min(axis=1)
    shares = facts[["nodata_share", "saturated_share"]]
    facts["shares_valid"] = ((shares >= 0) & (shares <= 1)).all(axis=1)
    measures = ["mean", "std", "entropy", "sharpness", "phash", "content_hash"]
    facts["measured"] = facts[measures].notna().all(axis=1)
    lengths = {
        shard: (root / shard).stat().st_size if (root / shard).is_file() else -1
        for shard in facts["shard"].unique()
    }
    facts["in_shard"] = facts["offset"] + facts["size"] <= facts["shard"].map(lengths)
    taught = facts[facts["split"].isin(["train", "val", "test"])]
    splits = taught.groupby("place")["split"].nunique()
    facts["splits_of_place"] = facts["place"].map(splits).fillna(0).astype(int)
    facts["label_named"] = facts["label"].isna() | (facts["label"].str.strip() != "").fillna(True)
    return facts


def _class_facts(manifest: "pandas.DataFrame", root: Path, config: Config) -> "pandas.DataFrame":
    """A row for each class, also for those that an earlier version had and this one has not.

    Samples are the tiles that the tasks see, those of select.sensor: a place that three sensors
    have seen is one sample of its class.
    """
    import pandas as pd

    rule = config.validate_
    labelled = manifest[manifest["label"].notna()]
    earlier = _counts_before(root)
    before = {
        name for counts in earlier for name, count in counts.items() if count >= rule.min_per_class
    } - set(rule.retired_classes)
    lost = before - set(labelled["label"])
    moved = _share_changes(dict(labelled["label"].value_counts()), earlier[-1] if earlier else {})
    labelled = labelled[labelled["sensor"] == config.select.sensor]
    names = sorted(set(labelled["label"]) | lost)
    split = labelled.groupby(["label", "split"]).size()
    rows = []
    for name in names:
        counts = {s: int(split.get((name, s), 0)) for s in SPLITS}
        vanished = not any(counts.values())
        # What has vanished breaks that rule alone.
        filled = dict.fromkeys(SPLITS, 1) if vanished else counts
        samples = None if vanished else sum(counts.values())
        rows.append(
            {
                "name": name,
                "samples": samples,
                "vanished": vanished,
                "share_change": moved.get(name),
                **filled,
            }
        )
    frame = pd.DataFrame(rows, columns=["name", "samples", "vanished", "share_change", *SPLITS])
    return frame.astype({"samples": float, "share_change": float})


def _share_changes(now: dict[str, int], before: dict[str, int]) -> dict[str, float]:
    """By how much each class's share of the samples has moved, among the classes of both."""
    common = [name for name in now if before.get(name)]
    whole, whole_before = sum(now[name] for name in common), sum(before[name] for name in common)
    return {name: abs(now[name] / whole - before[name] / whole_before) for name in common}


def _counts_before(root: Path) -> list[dict[str, int]]:
    """Samples a class in every ingest from the same sources before the present one, oldest first.

    What may not vanish is asked of every one, not of the last: a second ingest must not hide what
    the first has lost. A class with fewer samples than the rule asks for never passed, so that
    taking it out again loses nothing.
    """
    try:
        ingests = json.loads((root / store.HISTORY).read_text())["ingests"]
        earlier = [e["classes"] for e in ingests[:-1] if e["sources"] == ingests[-1]["sources"]]
        return [{name: int(count) for name, count in classes.items()} for classes in earlier]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise BadInput(
            f"{root / store.HISTORY} is damaged: bring it back with `dvc checkout`"
        ) from None


def _expect(
    every: list[Rule], tables: dict[bool, "pandas.DataFrame"], docs: Path
) -> dict[str, list[int]]:
    """Judge the rules with Great Expectations and build its docs; rule → numbers of bad rows."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations as gx

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
        failed: dict[str, list[int]] = {}
        for of_classes, name in ((False, "tiles"), (True, "classes")):
            table = tables[of_classes].reset_index(drop=True)
            chosen = [rule for rule in every if rule.of_classes == of_classes]
            failed |= {rule.name: [] for rule in chosen}
            if table.empty:
                continue
            table["number"] = range(len(table))
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(
                gx.ExpectationSuite(name=name, expectations=[_expectation(r) for r in chosen])
            )
            definition = context.validation_definitions.add(
                gx.ValidationDefinition(name=name, data=batch, suite=suite)
            )
            checkpoint = context.checkpoints.add(
                gx.Checkpoint(
                    name=name,
                    validation_definitions=[definition],
                    actions=[],
                    result_format={
                        "result_format": "COMPLETE",
                        "unexpected_index_column_names": ["number", "name"],
                        "partial_unexpected_count": NAMED,
                    },
                )
            )
            outcome = checkpoint.run(batch_parameters={"dataframe": table})
            for result in next(iter(outcome.run_results.values())).results:
                rule_name = result.expectation_config.meta["rule"]
                if (result.exception_info or {}).get("raised_exception"):
                    raise BadInput(f"validate: rule {rule_name} cannot be judged: {result}")
                if not result.success:
                    index = result.result.get("unexpected_index_list")
                    if not index:
                        raise BadInput(f"validate: rule {rule_name} failed without naming rows")
                    failed[rule_name] = [int(row["number"]) for row in index]
        context.build_data_docs()
    return failed


def _expectation(rule: Rule) -> Any:
    import great_expectations.expectations as gxe

    common: dict[str, Any] = {
        "column": rule.column,
        "meta": {"rule": rule.name},
        # What the Data Docs say in place of their own wording.
        "description": f"{rule.name}: {rule.says}",
    }
    if rule.unique:
        return gxe.ExpectColumnValuesToBeUnique(**common)
    if rule.allowed is not None:
        return gxe.ExpectColumnValuesToBeInSet(**common, value_set=list(rule.allowed))
    return gxe.ExpectColumnValuesToBeBetween(
        **common, min_value=rule.low, max_value=rule.high, mostly=rule.mostly
    )
