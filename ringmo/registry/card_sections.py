"""What a card says, section by section, of what is recorded of a version. Where something is not
recorded, it says so; nothing is made up for it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ringmo import console, tasks
from ringmo.data import footprint_map
from ringmo.registry.card_page import (
    Badge,
    Block,
    Card,
    Code,
    Drawing,
    Facts,
    Heading,
    Intervals,
    Items,
    Picture,
    Row,
    Section,
    Share,
    Table,
    Text,
)
from ringmo.registry.origins import ENCODER
from ringmo.registry.seen import SPLITS

if TYPE_CHECKING:
    from ringmo.registry.card import Recorded

NOT_RECORDED = "not recorded"
# From where on a card calls something a limit.
FEW_TEST = 100  # test tiles
FEW = 20  # training tiles, or objects, of a class
LITTLE = 0.01  # share of the training pixels of a class
LOW = 0.5  # a class's figure
DROP = 0.05  # what a change of the images may cost
WORSE = 0.1  # by which a part of the test tiles may be worse than all of them
MANY = 8  # names in a sentence

DOES = {
    "scene": "names the class of what an image tile shows",
    "segmentation": "gives every pixel a class",
    "change": "marks the pixels that changed between two dates of the same ground",
    "detection": "puts upright boxes around objects",
    "oriented": "puts turned boxes around objects",
    "height": "gives every pixel a height in metres",
    ENCODER: "turns imagery into features, on which task models, search and comparison stand; by "
    "itself it answers nothing",
}
HEADS = {
    "scene": "one linear layer on the encoder's mean",
    "segmentation": "UPerNet (Xiao et al., ECCV 2018)",
    "change": "UPerNet on the difference of two dates' features (Daudt et al., ICIP 2018; Xiao et "
    "al., ECCV 2018)",
    "detection": "Faster R-CNN (Ren et al., NeurIPS 2015; Lin et al., CVPR 2017)",
    "oriented": "Oriented R-CNN (Xie et al., ICCV 2021)",
    "height": "UPerNet, one number a pixel (Xiao et al., ECCV 2018)",
}
METHODS = {
    "ringmo": "RingMo's masked image modelling, PIMask (Sun et al., IEEE TGRS 2022, "
    "doi 10.1109/TGRS.2022.3194732)",
    "simmim": "SimMIM (Xie et al., CVPR 2022)",
    "mae": "masked autoencoder (He et al., CVPR 2022)",
}
TRUNKS = {"swin": "Swin (Liu et al., ICCV 2021)", "vit": "ViT (Dosovitskiy et al., ICLR 2021)"}
# Figure → what it is, in words.
MEANS = {
    "accuracy": "share of answers that are right",
    "mean_f1": "F1 of each class, averaged over the classes",
    "map": "average precision of each class, averaged over the classes",
    "miou": "overlap of answer and truth (intersection over union), averaged over the classes",
    "iou": "overlap of answer and truth (intersection over union)",
    "f1": "harmonic mean of precision and recall",
    "precision": "of what is said, the share that is right",
    "recall": "of what is there, the share that is found",
    "boundary_f1": "F1 of the outlines alone",
    "map50": "average precision where boxes overlap by half or more, averaged over the classes",
    "map50_95": "the same, averaged over overlaps from 0.5 to 0.95",
    "map50_voc07": "the same at 11 recalls, as older tables have it",
    "map50_small": "of objects under 32 × 32 pixels",
    "map50_medium": "of objects from 32 × 32 to 96 × 96 pixels",
    "map50_large": "of objects from 96 × 96 pixels",
    "mae": "mean absolute error",
    "rmse": "root of the mean squared error",
    "within_1.25": "share of pixels within a factor 1.25 of the truth",
    "ece": "expected calibration error: how far it is from being as right as it is sure",
}
ENCODER_FIGURES = {
    "val_loss": "loss on held-out tiles: what it says of hidden pixels, against what was there",
    "train_loss": "loss on the training tiles, at the end",
    "knn_accuracy": "validation tiles whose class their nearest training tiles name, by the "
    "features alone",
}
# The figure of a class that stands for it, the first that a task has.
OF_A_CLASS = ("iou", "ap50", "f1")
SHOWN = {
    "typical": "Typical answers",
    "worst": "The worst answers",
    "best": "The best answers",
    "confusion": "What is taken for what",
    "precision_recall": "Precision over recall",
}
PLOTS = ("reliability", "confusion", "precision_recall")
# Tags of an encoder's version that are no figures of it, whatever they look like.
NO_FIGURES = frozenset(
    (
        *("bundle_hash", "kind", "generated", "data_version", "selection", "stage_lock"),
        *("params_digest", "code_version", "code_clean", "ringmo_version", "flow_run", "reason"),
        *("verdict", "verdict_reasons", "verdict_against", "verdict_checks", "unit", "metric"),
        *("encoder_hash", "encoder_version", "weights", "lineage_hash", "machine"),
    )
)


def card(of: "Recorded", footer: str) -> Card:
    """The card of what is recorded."""
    figures = Figures(of)
    limits = list(_limits(of, figures))
    told = {
        "Intended use": _intended(of),
        "Limits": _limit_blocks(of, limits),
        "What it answers, and how to ask": _answers(of),
        "Figures": _encoder_figures(of) if of.kind == ENCODER else _figures(of, figures),
        "Data": _data(of),
        "Gate and history": _gate(of),
        "Time, energy and cost": _cost(of),
        "Lineage": _lineage(of),
    }
    sections = [Section(title, list(blocks)) for title, blocks in told.items()]
    warnings = []
    if _generated(of):
        warnings.append(
            "Trained on GENERATED imagery: it shows that everything works. Its figures say nothing "
            "of real imagery, and it must not be used on any."
        )
    return Card(
        _title(of),
        _lead(of),
        list(_badges(of)),
        warnings,
        list(_headline(of, figures)),
        sections,
        footer,
    )


class Figures:
    """The figures of a task's version, from its evaluation's report or else its tags."""

    def __init__(self, of: "Recorded") -> None:
        tags: dict[str, Any] = {name: _number(text) for name, text in of.version.tags.items()}
        known = {name: value for name, value in tags.items() if value is not None}
        own = {n: v for n, v in (of.report.get("figures") or {}).items() if v is not None}
        self.values: dict[str, Any] = {**known, **own}
        self.tables: Mapping[str, list[dict[str, Any]]] = of.report.get("tables") or {}
        self.notes: Sequence[str] = of.report.get("notes") or []
        self.kind = tasks.find(of.kind) if of.kind in tasks.names() else None
        told = of.version.tags.get("metric") or (self.kind.metric if self.kind else "accuracy")
        self.metric = str(own.get("metric", told))

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        return float(value) if isinstance(value, int | float) else None

    def unit(self, figure: str) -> str:
        return self.kind.unit(figure) if self.kind else "%"

    def said(self, name: str, figure: str, *, points: bool = False) -> str:
        """NAME with its interval, in the unit of the task's `figure`."""
        low, high = (self.number(f"{name}_{end}") for end in ("low", "high"))
        value, unit = self.number(name), self.unit(figure)
        return console.interval(value, low, high, unit, points=points)

    def better(self, figure: str) -> bool:
        """Whether more of it is better."""
        return self.kind is None or figure not in self.kind.lower

    @property
    def main(self) -> float | None:
        return self.number(f"test_{self.metric}")

    @property
    def of_a_class(self) -> str | None:
        rows = self.tables.get("per_class") or [{}]
        return next((name for name in OF_A_CLASS if name in rows[0]), None)


# The head of the card


def _title(of: "Recorded") -> str:
    return f"Model card: {of.version}" if of.version.version else "Model card"


def _lead(of: "Recorded") -> str:
    what = "An encoder" if of.kind == ENCODER else f"A {of.kind} model"
    return f"{what} of RingMo: it {DOES.get(of.kind, 'answers for images')}. {_reads(of)}"


def _reads(of: "Recorded") -> str:
    sensors = of.meta.get("sensors") or {}
    named = [f"{name} ({_few(sensor.get('bands') or [])})" for name, sensor in sensors.items()]
    return f"It reads imagery of {_and(named)}." if named else ""


def _badges(of: "Recorded") -> Iterator[Badge]:
    for alias in of.version.aliases:
        yield Badge(alias, "good" if alias == "champion" else "")
    verdict = of.version.tags.get("verdict")
    if verdict:
        yield Badge(f"gate: {verdict}", "good" if verdict == "passed" else "bad")
    elif of.version.version:
        yield Badge("gate: not judged")
    else:
        yield Badge("not registered", "bad")
    yield Badge("generated imagery", "bad") if _generated(of) else Badge("real imagery")
    yield Badge(of.kind)


def _headline(of: "Recorded", figures: Figures) -> Iterator[tuple[str, str, str]]:
    data = of.facts.get("data") or {}
    if of.kind == ENCODER:
        found = _encoder_values(of)
        for name, label in (("val_loss", "Held-out loss"), ("knn_accuracy", "k-NN accuracy")):
            if (share := found.get(name)) is not None:
                yield label, f"{share:.4g}" if name == "val_loss" else _percent(share), ""
    else:
        metric = figures.metric
        low, high = (figures.number(f"test_{metric}_{end}") for end in ("low", "high"))
        unit, times = ("m", 1) if figures.unit(metric) == "m" else ("%", 100)
        ends = ""
        if low is not None and high is not None:
            ends = f"95 % interval {times * low:.1f} to {times * high:.1f} {unit}"
        value = console.figure(figures.main, figures.unit(metric))
        yield f"{metric}, test tiles", value, ends or "no interval recorded"
        if figures.number("difference_to_scratch") is not None:
            said = figures.said("difference_to_scratch", metric, points=True)
            first, _, rest = said.partition(" (")
            sign = "+" if not first.startswith(("-", "0.0 ")) else ""
            more = f"95 % interval {rest.rstrip(')')}" if rest else "no interval"
            yield "Against from scratch", f"{sign}{first}", more
        if (tested := figures.number("test_tiles")) is not None:
            yield "Test tiles", f"{int(tested):,}", "never seen in training"
    splits = data.get("splits") or {}
    if splits:
        places = (data.get("places") or {}).get("train")
        yield "Training tiles", f"{splits['train']:,}", f"of {places:,} places" if places else ""
    if of.facts.get("parameters"):
        size = f"{of.facts['bytes'] / 1e6:,.1f} MB" if of.facts.get("bytes") else ""
        yield "Parameters", _short(of.facts["parameters"]), size


# Sections


def _intended(of: "Recorded") -> Iterator[Block]:
    if of.said.intended_use:
        yield Text(of.said.intended_use)
        yield Heading("What it was trained for")
    data = of.facts.get("data") or {}
    classes = of.meta.get("classes") or []
    sources = [row["source"] for row in data.get("sources", [])]
    parts = [f"It {DOES.get(of.kind, 'answers for images')}."]
    if classes:
        parts.append(f"It knows {len(classes)} classes: {_few(classes, 40)}.")
    parts.append(_reads(of))
    if sizes := data.get("sizes"):
        wide, high, _ = sizes[0]
        mostly = "mostly " if len(sizes) > 1 else ""
        parts.append(f"It learnt from tiles {mostly}of {wide} × {high} pixels{_at_gsd(data)}.")
    if sources:
        parts.append(f"Their sources: {_few(sources, 4)}.")
    yield Text(" ".join(part for part in parts if part))
    yield Heading("What it was not trained for")
    yield Items(list(_outside(of, data)))
    who = [
        (name, getattr(of.said, name)) for name in ("owner", "contact") if getattr(of.said, name)
    ]
    if who:
        yield Facts([(name.capitalize(), value) for name, value in who])
    else:
        yield Text(
            "Owner and contact: not given (card.owner, card.contact in params.yaml).", "note"
        )


def _outside(of: "Recorded", data: Mapping[str, Any]) -> Iterator[str]:
    """What lies beyond that for which there was any training."""
    if _generated(of):
        yield "Any real imagery: it has seen made-up pictures."
    gsd = (data.get("gsd_m") or {}).get("train") or {}
    if gsd.get("known"):
        yield (
            f"Imagery finer or coarser than {_metres(gsd['low'], gsd['high'])} a pixel: nothing "
            "was learnt or measured there."
        )
    else:
        yield (
            "Imagery of another scale than that of its training tiles, whose ground sampling "
            "distance is not recorded: look at the pictures below."
        )
    sensors = of.meta.get("sensors") or {}
    yield (
        f"Sensors other than {_and(list(sensors))}: other bands are refused, and the same bands of "
        "another instrument or processing look different to it."
    )
    if of.kind in ("scene", "segmentation"):
        yield "Classes that are not among its own: it answers with one of those all the same."
    elif of.kind in ("detection", "oriented"):
        yield "Objects of other classes: it does not find them, or takes them for one of its own."
    elif of.kind == "change":
        yield "Kinds of change that the training pairs did not mark: they count as unchanged."
    if of.kind == ENCODER:
        yield "Answers: fine-tune it for a task first."


def _limit_blocks(of: "Recorded", limits: Sequence[str]) -> Iterator[Block]:
    yield Text("What the records themselves show:", "note")
    yield Items(limits) if limits else Text("Nothing that the records show.")
    if of.said.limits:
        yield Heading("And in the owner's words")
        yield Text(of.said.limits)


def _limits(of: "Recorded", figures: Figures) -> Iterator[str]:
    """Each derived from a figure or a fact; what cannot be derived is not a limit here."""
    data = of.facts.get("data") or {}
    if of.kind != ENCODER:
        yield from _limits_of_figures(of, figures)
        yield from _limits_of_classes(of, figures, data)
        yield from _limits_of_slices(figures)
    elif not _encoder_values(of):
        yield "No figure of this encoder is recorded."
    if not data:
        yield "What it was trained on is not recorded in numbers."
        return
    training = (data.get("splits") or {}).get("train", 0)
    for name, what in (("gsd_m", "ground sampling distance"), ("acquired", "acquisition time")):
        unknown = training - ((data.get(name) or {}).get("train") or {}).get("known", 0)
        if training and unknown:
            share = "all" if unknown == training else f"{_percent(unknown / training)} of the"
            yield f"The {what} of {share} training tiles is unknown."
    if not (data.get("footprints") or {}).get("known"):
        yield "Where on Earth its tiles lie is not recorded: other regions may look different."
    sources = data.get("sources") or []
    if len(sources) == 1 and not _generated(of):
        yield f"All tiles came from one source ({sources[0]['source']}): others were not tried."
    if nameless := [s["source"] for s in sources if not s["licence"] and not s["generated"]]:
        yield f"No licence is recorded of {_few(nameless, 4)}: find out before you pass it on."


def _limits_of_figures(of: "Recorded", figures: Figures) -> Iterator[str]:
    if figures.main is None:
        yield "It was not evaluated, or its figures are not recorded."
        return
    tested = figures.number("test_tiles")
    if tested is not None and tested < FEW_TEST:
        yield f"Only {int(tested)} test tiles: its figures are rough."
    if figures.number(f"test_{figures.metric}_low") is None:
        yield "Its figures have no intervals: the test tiles are of one place, or it is an old run."
    low, high = (figures.number(f"difference_to_scratch_{end}") for end in ("low", "high"))
    if low is not None and high is not None:
        if low <= 0 <= high:
            yield "The gain over the same model from scratch is within chance."
        elif high < 0:
            yield "It is worse than the same model from scratch: the pre-training did not help."
    least = figures.number(f"trivial_{figures.metric}")
    ends = [figures.number(f"test_{figures.metric}{end}") for end in ("", "_low", "_high")]
    found = [end for end in ends if end is not None]
    if least is not None:
        short = min(found) <= least if figures.better(figures.metric) else max(found) >= least
        if short:
            yield "It is not surely better than an answer without looking at the image."
    histogram = figures.number(f"histogram_{figures.metric}")
    if histogram is not None and histogram >= figures.main:
        against = f"{_percent(histogram)} against {_percent(figures.main)}"
        yield f"Colour and gradient histograms alone do as well or better: {against}."
    ece = figures.number("test_ece")
    if ece is not None and ece >= WORSE:
        yield f"How sure it says it is is off by {console.figure(ece, points=True)} on average."
    for row in figures.tables.get("behaviour") or []:
        drop, low = row.get("drop"), row.get("drop_low")
        unit = figures.unit(figures.metric)
        large = DROP * (figures.main if unit == "m" else 1)
        if drop is not None and drop >= large and (low is None or low > 0):
            lost = console.figure(drop, unit, points=True)
            yield f"Sensitive to images {_changed(row)}: it loses {lost} of {figures.metric}."
    if of.version.tags.get("verdict") == "refused":
        yield f"The gate refused it: {of.version.tags.get('verdict_reasons') or NOT_RECORDED}."


def _limits_of_classes(of: "Recorded", figures: Figures, data: Mapping[str, Any]) -> Iterator[str]:
    rows, figure = figures.tables.get("per_class") or [], figures.of_a_class
    classes = of.meta.get("classes") or []
    if figure:
        low = sorted(
            (row for row in rows if row.get(figure) is not None and row[figure] < LOW),
            key=lambda row: float(row[figure]),
        )
        if low:
            named = [f"{row['class']} ({_percent(row[figure])})" for row in low]
            yield f"Classes whose {figure} is under {_percent(LOW, 0)}: {_few(named)}."
    if rows and (untested := [name for name in classes if name not in {r["class"] for r in rows}]):
        yield f"Classes without a single test tile: {_few(untested)}."
    counted, table = data.get("counted"), data.get("classes") or []
    whole = sum(row["train"] for row in table)
    if counted == "pixels":
        few = [r["class"] for r in table if whole and r["train"] / whole < LITTLE]
        less = f"less than {_percent(LITTLE, 0)} of the training pixels"
    else:
        few = [r["class"] for r in table if r["train"] < FEW]
        less = f"fewer than {FEW} training {counted}"
    if few := [name for name in few if name in classes]:
        yield f"Classes with {less}: {_few(few)}."


def _limits_of_slices(figures: Figures) -> Iterator[str]:
    main, metric = figures.main, figures.metric
    if main is None or figures.unit(metric) == "m":
        return
    for table in ("per_sensor", "per_gsd", "per_source"):
        rows = figures.tables.get(table) or []
        for row in rows if len(rows) > 1 else []:
            value = row.get(metric)
            if value is not None and main - value >= WORSE:
                name = next(str(v) for v in row.values())
                yield (
                    f"Worse on {table.removeprefix('per_')} {name}: {metric} {_percent(value)} "
                    f"({row.get('tiles')} test tiles), {_percent(main)} on all."
                )


def _answers(of: "Recorded") -> Iterator[Block]:
    meta, architecture = of.meta, of.meta.get("architecture") or {}
    rows: list[tuple[str, str]] = [("Task", f"{of.kind}: {DOES.get(of.kind, NOT_RECORDED)}")]
    if meta.get("classes"):
        rows.append(("Classes", f"{len(meta['classes'])}: {_few(meta['classes'], 40)}"))
    for name, sensor in (meta.get("sensors") or {}).items():
        rows.append((f"Sensor {name}", f"{', '.join(sensor['bands'])}; {sensor['dtype']}"))
    size = f"{meta.get('image_size')} × {meta.get('image_size')} pixels"
    resize = meta.get("resize") or meta.get("image_size")
    if resize != meta.get("image_size"):
        size += f", of tiles scaled to {resize}"
    rows.append(("Model input", size))
    if meta.get("tile_pixels"):
        rows.append(("Tile", f"{meta['tile_pixels']} pixels along its longer side"))
    trunk = TRUNKS.get(architecture.get("backbone", ""), NOT_RECORDED)
    sizes = (
        f"patches of {architecture.get('patch_size')}, depths {architecture.get('depths')}, heads "
        f"{architecture.get('num_heads')}, width {architecture.get('embed_dim')}, stem "
        f"{architecture.get('stem')}"
    )
    rows.append(("Encoder", f"{trunk}: {sizes}"))
    if of.kind in HEADS:
        rows.append(("Head", HEADS[of.kind]))
    parameters = of.facts.get("parameters")
    size = f"{of.facts.get('bytes', 0) / 1e6:,.1f} MB" if parameters else ""
    rows.append(("Parameters", f"{parameters:,}; {size}" if parameters else NOT_RECORDED))
    rows.append(("Pre-training", _pretraining(of)))
    yield Facts(rows)
    yield Code(_usage(of))


def _pretraining(of: "Recorded") -> str:
    """Method and source; of a task's model, its encoder's."""
    encoder = of if of.kind == ENCODER else of.encoder
    if encoder is None:
        wanted = (of.meta.get("lineage") or {}).get("encoder")
        return (
            f"{NOT_RECORDED}: its encoder ({wanted[:12]}) is not registered"
            if wanted
            else "none: trained from scratch"
        )
    settings = encoder.params.get("pretrain") or {}
    method = METHODS.get(settings.get("method", ""), f"method {NOT_RECORDED}")
    start = f", starting from {settings['init']}" if settings.get("init") else ""
    return method + start + ("" if encoder is of else f"; {encoder.version}")


def _usage(of: "Recorded") -> str:
    ref = str(of.version)
    if of.kind == ENCODER:
        return (
            f"ringmo embed FOLDER --model {ref} --out features.parquet\n"
            f"ringmo finetune scene --encoder {ref}\n\n"
            f'import ringmo\nmodel = ringmo.load("{ref}")\nmodel.embed(["image.tif"])'
        )
    others = [name for name in of.meta.get("sensors") or {} if name != of.meta.get("sensor")]
    others += ["second"] * (of.kind == "change")
    beside = "".join(f" --with {name}=OTHER" for name in others)
    names = "".join(f', "{name}": "{name}.tif"' for name in others)
    image = f'{{"{of.meta.get("sensor")}": "image.tif"{names}}}' if others else '"image.tif"'
    return (
        f"ringmo predict IMAGE{beside} --model {ref} --out answers\n\n"
        f'import ringmo\nmodel = ringmo.load("{ref}")\nmodel.predict([{image}])'
    )


def _figures(of: "Recorded", figures: Figures) -> Iterator[Block]:
    metric = figures.metric
    if figures.main is None:
        yield Text("Not recorded: it was registered without an evaluation.")
        return
    tiles = figures.number("test_tiles")
    of_tiles = f"{int(tiles):,} test tiles" if tiles is not None else "the test tiles"
    yield Text(
        f"{metric} ({MEANS.get(metric, 'the main figure')}) on {of_tiles} of places that no "
        "training saw, beside what it must beat; in brackets 95 % intervals, over draws of places."
    )
    yield _beside(figures)
    if figures.notes:
        yield Items([_sentence(note) for note in figures.notes])
    names = [
        name.removeprefix("test_")
        for name in figures.values
        if name.startswith("test_")
        and not name.endswith(("_low", "_high"))
        and name != "test_tiles"
    ]
    rows = [
        (name, figures.said(f"test_{name}", name, points=name == "ece"), MEANS.get(name, ""))
        for name in names
    ]
    yield Table(("figure", "value", "what it is"), rows)
    yield from _classes_of(figures)
    for table, title in (
        ("per_sensor", "By sensor"),
        ("per_gsd", "By ground sampling distance"),
        ("per_source", "By source"),
    ):
        if found := figures.tables.get(table):
            yield Heading(title)
            yield _sliced(figures, found)
    yield Heading("How sure, how right")
    if (ece := figures.number("test_ece")) is not None:
        yield Text(
            f"Expected calibration error {console.figure(ece, points=True)}: by so much the share "
            "of right answers differs from how sure it was, on average."
        )
        yield from _pictures(of, {"reliability": "How right it is, by how sure it was"})
    else:
        yield Text("Not measured: this task does not say how sure it is.")
    yield Heading("What changes of the images cost")
    yield from _behaviour(of, figures)
    if any(name in of.pictures for name in SHOWN):
        yield Heading("Pictures")
        yield from _pictures(of, SHOWN)


def _beside(figures: Figures) -> Block:
    metric = figures.metric
    names = [
        (f"test_{metric}", "This model"),
        (f"scratch_{metric}", "From scratch"),
        (f"histogram_{metric}", "Histograms alone"),
        (f"trivial_{metric}", "Without looking"),
    ]
    rows = []
    for name, label in names:
        value = figures.number(name)
        if value is not None:
            low, high = (figures.number(f"{name}_{end}") for end in ("low", "high"))
            said = figures.said(name, metric)
            rows.append(Row(label, value, low, high, said, name.startswith("test_")))
    top = max(end for row in rows for end in (row.value, row.high or 0.0))
    return Intervals(rows, 0.0, 1.0 if figures.unit(metric) == "%" else 1.05 * top)


def _classes_of(figures: Figures) -> Iterator[Block]:
    rows, main = figures.tables.get("per_class") or [], figures.of_a_class
    if not rows:
        return
    yield Heading("By class")
    names = [name for name in rows[0] if name not in ("class", main)]
    shown = [
        [
            str(row["class"]),
            *([None if row.get(main) is None else Share(float(row[main]))] if main else []),
            *(_cell(name, row.get(name)) for name in names),
        ]
        for row in rows
    ]
    yield Table(("class", *([main] if main else []), *(_plain(n) for n in names)), shown, "classes")


def _sliced(figures: Figures, rows: Sequence[Mapping[str, Any]]) -> Block:
    first, *names = [n for n in rows[0] if not n.endswith(("_low", "_high"))]

    def cell(row: Mapping[str, Any], name: str) -> Any:
        value = row.get(name)
        if value is None or name == "tiles":
            return value
        ends = row.get(f"{name}_low"), row.get(f"{name}_high")
        return console.interval(value, *ends, figures.unit(name))

    header = [_plain(name) for name in (first, *names)]
    return Table(header, [[str(row[first]), *(cell(row, n) for n in names)] for row in rows])


def _behaviour(of: "Recorded", figures: Figures) -> Iterator[Block]:
    rows, metric = figures.tables.get("behaviour") or [], figures.metric
    if not rows:
        yield Text("Not recorded.")
        return
    unit = figures.unit(metric)
    yield Table(
        ("images", metric, "worse by"),
        [
            (
                _changed(row),
                console.figure(row.get(metric), unit),
                console.interval(
                    row.get("drop"), row.get("drop_low"), row.get("drop_high"), unit, points=True
                ),
            )
            for row in rows
        ],
    )
    yield Text(
        "Below 0: better. Seen from above there is no up, so turns should cost nothing.", "note"
    )


def _encoder_values(of: "Recorded") -> dict[str, float]:
    stage = (of.facts.get("stages") or {}).get("pretrain") or {}
    told = {**of.meta.get("figures", {}), **stage.get("figures", {})}
    found = {n: told[n] for n in ENCODER_FIGURES if isinstance(told.get(n), int | float)}
    tags = {n: _number(v) for n, v in of.version.tags.items() if n not in NO_FIGURES}
    return {**found, **{n: v for n, v in tags.items() if v is not None}}


def _encoder_figures(of: "Recorded") -> Iterator[Block]:
    found = _encoder_values(of)
    if not found:
        yield Text("Not recorded.")
        return
    yield Text(
        "An encoder has no answers to measure. What is known is how well it says what was hidden, "
        "and what its features tell apart. What it is worth, the task models on it show."
    )
    shown = {n: v for n, v in found.items() if not n.endswith(("_low", "_high"))}

    def said(name: str, value: float) -> str:
        if "loss" in name or value > 1:
            return f"{value:.4g}"
        return console.interval(value, found.get(f"{name}_low"), found.get(f"{name}_high"))

    yield Table(
        ("figure", "value", "what it is"),
        [(name, said(name, v), ENCODER_FIGURES.get(name, "")) for name, v in shown.items()],
    )
    names = sorted(name for name in of.pictures if name.startswith("epoch-"))
    yield from _pictures(of, dict.fromkeys(names, "Original, masked, reconstructed"))


def _pictures(of: "Recorded", names: Mapping[str, str]) -> Iterator[Block]:
    for name, caption in names.items():
        if name in of.pictures:
            yield Picture(of.pictures[name], caption, name in PLOTS)


def _data(of: "Recorded") -> Iterator[Block]:
    version = of.version.tags.get("data_version")
    data = of.facts.get("data") or {}
    if _generated(of):
        share = f" ({data['generated']:,} of {data['tiles']:,} tiles)" if data else ""
        yield Text(f"With GENERATED imagery{share}: made up by ringmo, of nowhere.", "warning")
    if not data:
        yield Facts([("Data version", version or NOT_RECORDED), ("All else", NOT_RECORDED)])
        return
    splits, places = data["splits"], data["places"]
    rows = [("Data version", version or NOT_RECORDED)]
    for split, what in zip(SPLITS, ("train it", "choose its best epoch", "test it"), strict=True):
        if split != "test" or splits[split]:
            rows.append((f"Tiles that {what}", f"{splits[split]:,} of {places[split]:,} places"))
    if data["left_the_store"]:
        rows.append(("No longer in the store", f"{data['left_the_store']:,} of its tiles"))
    sizes = [f"{wide} × {high} ({count:,} tiles)" for wide, high, count in data["sizes"]]
    rows.append(("Sizes, in pixels", ", ".join(sizes)))
    rows += [
        ("Ground sampling distance", _known(data, "gsd_m", _metres)),
        ("Acquired", _known(data, "acquired", _days)),
    ]
    if heights := data.get("heights"):
        said = ", ".join(f"{name} {value:.1f} m" for name, value in heights.items())
        rows.append(("Heights", said))
    yield Facts(rows)
    yield Heading("Sources")
    yield Table(
        ("source", "share of tiles", *SPLITS, "licence"),
        [
            (
                row["source"],
                Share(row["tiles"] / max(1, data["tiles"])),
                *(row["splits"][split] for split in SPLITS),
                row["licence"] or ("generated" if row["generated"] else NOT_RECORDED),
            )
            for row in data["sources"]
        ],
    )
    if len(data["sensors"]) > 1 or of.kind == ENCODER:
        yield Heading("Sensors")
        yield Table(
            ("sensor", "share of tiles", *SPLITS),
            [
                (
                    row["sensor"],
                    Share(row["tiles"] / max(1, data["tiles"])),
                    *(row["splits"][split] for split in SPLITS),
                )
                for row in data["sensors"]
            ],
        )
    yield from _class_shares(data)
    yield Heading("Places")
    yield from _map(data)


def _class_shares(data: Mapping[str, Any]) -> Iterator[Block]:
    table = data.get("classes")
    if not table:
        return
    counted = data["counted"]
    whole = max(1, sum(row["train"] for row in table))
    yield Heading("Classes")
    yield Table(
        ("class", f"share of training {counted}", *(f"{split}, {counted}" for split in SPLITS)),
        [
            (row["class"], Share(row["train"] / whole), *(row[split] for split in SPLITS))
            for row in table
        ],
        "classes",
    )


def _map(data: Mapping[str, Any]) -> Iterator[Block]:
    found, tiles = data["footprints"], data["tiles"]
    if not found["drawn"]:
        yield Text("No tile has coordinates on Earth: where they lie is not recorded.")
        return
    bounds = np.array([row[:4] for row in found["drawn"]], np.float64)
    splits = [row[4] for row in found["drawn"]]
    sources = [row["source"] for row in data["sources"]]
    titles = [f"{sources[row[5]]}, {row[4]}" for row in found["drawn"]]
    west, south = bounds[:, :2].min(0)
    east, north = bounds[:, 2:].max(0)
    fewer = f" ({len(splits):,} of them drawn)" if len(splits) < found["known"] else ""
    up, down, left, right = (
        f"{abs(value):.4g}° {letters[int(value >= 0)]}"
        for value, letters in ((north, "SN"), (south, "SN"), (west, "WE"), (east, "WE"))
    )
    words = (
        f"{found['known']:,} of {tiles:,} tiles have coordinates{fewer}, from {down} to {up} and "
        f"from {left} to {right}."
    )
    if found["known"] < tiles:
        words += f" Where the other {tiles - found['known']:,} lie is not recorded."
    html = (
        f"<p>{words}</p>{footprint_map.drawn(bounds, splits, titles)}"
        f"<p class='note'>{footprint_map.key(splits)}</p>"
    )
    yield Drawing(html, words)


def _gate(of: "Recorded") -> Iterator[Block]:
    tags = of.version.tags
    if "verdict" in tags:
        against = tags.get("verdict_against", NOT_RECORDED)
        yield Facts(
            [
                ("Verdict", tags["verdict"]),
                ("Against", {"none": "no champion was there"}.get(against, against)),
                ("Because", tags.get("verdict_reasons") or NOT_RECORDED),
            ]
        )
        if checks := _checks(tags.get("verdict_checks")):
            yield Table(
                ("rule", "", "what it found"),
                [(c["rule"], "passed" if c["ok"] else "refused", c["said"]) for c in checks],
            )
    else:
        yield Text("The gate has not judged it.")
    yield Heading("Promotions")
    if not of.moves:
        yield Text("It never was champion.")
        return
    rows = [
        (
            move["when"].replace("T", " ").rstrip("Z"),
            f"{move['what']}{' (forced)' if move.get('forced') else ''}",
            f"{move['model']}/{move['from']}" if move["from"] else "-",
            f"{move['model']}/{move['to']}",
            move["who"],
            move["why"] or "-",
        )
        for move in of.moves
    ]
    yield Table(("when (UTC)", "what", "from", "to", "who", "why"), rows)
    if not all(move["intact"] for move in of.moves):
        yield Text("An entry of this history was changed after it was written.", "warning")


def _checks(text: str | None) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
        return [
            {"rule": str(c["rule"]), "ok": bool(c["ok"]), "said": str(c["said"])} for c in found
        ]
    except (ValueError, KeyError, TypeError):
        return []


def _stages(of: "Recorded") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and figures of every stage that made it, its encoder's first, with `hours`."""
    if of.encoder is not None:
        for name, figures in _stages(of.encoder):
            yield f"{name}, {of.encoder.version}", figures
    stages = of.facts.get("stages") or {}
    if not stages and of.run is not None and of.run.metrics:
        # Of a version from before there were origins: its training's run knows.
        stages = {of.run.experiment: {"figures": {**of.run.tags, **of.run.metrics}}}
    for name, stage in stages.items():
        figures = dict(stage.get("figures") or {})
        seconds = max(stage.get("seconds") or 0, _number(figures.get("seconds_training")) or 0)
        hours = _number(figures.get("hours"))
        yield name, {**figures, "hours": hours if hours is not None else seconds / 3600 or None}


def _cost(of: "Recorded") -> Iterator[Block]:
    stages = list(_stages(of))
    if not stages:
        yield Text("Not recorded.")
        return
    price, currency, grams = of.said.price_per_hour, of.said.currency, of.said.grams_co2_per_kwh
    rows: list[list[str | None]] = []
    for name, figures in stages:
        rows.append([name, *_costs(figures["hours"], _number(figures.get("energy_wh")), of)])
        if figures.get("energy_source"):
            rows[-1][0] = f"{name} (energy: {figures['energy_source']})"
    hours = [f["hours"] for _, f in stages if f["hours"]]
    energies = [e for _, f in stages if (e := _number(f.get("energy_wh"))) is not None]
    energy = sum(energies) if energies else None
    if len(stages) > 1:
        rows.append(["together", *_costs(sum(hours) or None, energy, of)])
    header = ["stage", "time", "energy"]
    if price is not None:
        header.append(f"cost at {price:g} {currency} an hour")
    if grams is not None:
        header.append(f"CO2 at {grams:g} g a kWh")
    yield Table(header, rows)
    if not energies:
        yield Text("Energy was not measured" + (", so emissions are not told." if grams else "."))
    elif len(energies) < len(stages):
        yield Text("The energy of some stages was not measured: the whole is at least this.")
    shared = " The encoder's pre-training may serve several models." if of.encoder else ""
    yield Text(
        "Of each stage's last whole run; reading the imagery and trials that were thrown away are "
        f"not in it.{shared}",
        "note",
    )


def _costs(hours: float | None, energy_wh: float | None, of: "Recorded") -> list[str | None]:
    """Time, energy, cost and emissions, as the columns of `_cost` ask for."""
    price, currency, grams = of.said.price_per_hour, of.said.currency, of.said.grams_co2_per_kwh
    cells: list[str | None] = [None if hours is None else _time(hours)]
    cells.append("not measured" if energy_wh is None else _energy(energy_wh))
    if price is not None:
        cells.append(None if hours is None else f"{hours * price:.2f} {currency}")
    if grams is not None:
        cells.append(None if energy_wh is None else f"{energy_wh / 1000 * grams:.3g} g")
    return cells


def _lineage(of: "Recorded") -> Iterator[Block]:
    tags, version = of.version.tags, of.version
    lineage = of.meta.get("lineage") or {}
    clean = {"true": "clean", "false": "changed: see source.patch among its files"}
    if of.kind == ENCODER:
        encoder = "itself"
    else:
        named = str(of.encoder.version) if of.encoder else tags.get("encoder_version")
        encoder = named or (lineage.get("encoder") or "")[:16] or "none"
    rows = [
        ("Data version", tags.get("data_version")),
        ("Selection", tags.get("selection") or lineage.get("selection")),
        ("Encoder", encoder),
        ("Code", tags.get("code_version")),
        ("Its tree", clean.get(tags.get("code_clean", ""))),
        ("Parameters' digest", tags.get("params_digest") or lineage.get("params")),
        ("Stage lock", tags.get("stage_lock")),
        ("Training's run", version.run_id or None),
        ("Flow run", tags.get("flow_run")),
        ("ringmo", tags.get("ringmo_version")),
        ("Bundle's hash", version.bundle_hash or None),
    ]
    yield Facts(
        [(name, value or NOT_RECORDED) for name, value in rows if name != "Flow run" or value]
    )
    if version.version:
        yield Text("From production back to the pixels, and the same again:")
        yield Code(f"ringmo lineage {version}\nringmo reproduce {version}")


# Words


def _generated(of: "Recorded") -> bool:
    return bool(of.version.generated or of.meta.get("generated"))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _few(names: Sequence[Any], most: int = MANY) -> str:
    """Names in a row; of many, the first and how many more."""
    shown = [str(name) for name in names[:most]]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown) + more


def _and(names: Sequence[str]) -> str:
    *first, last = names or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _short(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}".rstrip(".") + "."


def _changed(row: Mapping[str, Any]) -> str:
    change = str(row.get("change"))
    said = {"noise": "with noise", "band lost": "without one band"}
    return said.get(change, f"{change}°" if change.startswith("turned") else change)


def _cell(name: str, value: Any) -> str | int | None:
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return f"{value:.2f}" if name == "threshold" else _percent(value)
    return None if value is None else str(value)


def _metres(low: float, high: float) -> str:
    return f"{low:.3g} m" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g} m"


def _days(low: str, high: str) -> str:
    return low[:10] if low[:10] == high[:10] else f"{low[:10]} to {high[:10]}"


def _at_gsd(data: Mapping[str, Any]) -> str:
    gsd = (data.get("gsd_m") or {}).get("train") or {}
    if not gsd.get("known"):
        return ", of which the ground sampling distance is not recorded"
    return f" at {_metres(gsd['low'], gsd['high'])} a pixel"


def _known(data: Mapping[str, Any], name: str, said: Callable[[Any, Any], str]) -> str:
    """The range of the training tiles, of how many it is known, and that of the test tiles."""
    told, parts = data.get(name) or {}, []
    for split, what in (("train", "training"), ("test", "test")):
        row, tiles = told.get(split) or {}, data["splits"][split]
        if row.get("known"):
            of = "" if row["known"] == tiles else f", of {row['known']:,} of {tiles:,}"
            parts.append(f"{said(row['low'], row['high'])} ({what} tiles{of})")
    return "; ".join(parts) or NOT_RECORDED


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def _energy(energy_wh: float) -> str:
    return f"{energy_wh / 1000:.3g} kWh" if energy_wh >= 1000 else f"{energy_wh:.3g} Wh"
