"""How often `ringmo drift` cries wolf, and what it finds: real aerial scenes, changed on purpose.

    python -m benchmarks.drift                      the table of docs/drift.md
    python -m benchmarks.drift --model FOLDER       with another encoder: a bundle's folder
    python -m benchmarks.drift --repeats 20         a trial

AID's images (30 classes, 120 each, 150 pixels) are parted once. A third teaches a linear classifier
on the encoder's features, which gives answers and confidence. Of the others each repeat draws 600
as the reference and some as production, and changes the latter:

    a band lost      green is 0 everywhere, or its mean over all images
    season           red gains and green loses a share of its value
    darker           all bands lose a share
    new class        a share of production is of one class that neither the classifier nor the
                     reference knows; each of the 30 in turn

Without --model the encoder is that of params.yaml, seeded and untrained.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ringmo import console
from ringmo.config import Config
from ringmo.data.decode import decode
from ringmo.data.loading import squares
from ringmo.models.backbone import encoder
from ringmo.models.classifier import Classifier
from ringmo.monitoring import facts
from ringmo.monitoring.comparison import compare
from ringmo.registry import bundle
from ringmo.registry.bundle import Bundle
from ringmo.workspace import template

AID = Path(__file__).resolve().parents[2] / "shared" / "data" / "scene" / "aid"
REFERENCE = 600  # tiles
SIZES = (50, 200, 600)  # tiles of production
TOGETHER = 128
SCENES = 600  # that are cut into four tiles each
SEED = 1

Rows = NDArray[np.int64]
Change = Callable[[Tensor], Tensor]


def lost(images: Tensor, value: float) -> Tensor:
    changed = images.clone()
    changed[:, 1] = round(value)
    return changed


def season(images: Tensor, share: float) -> Tensor:
    changed = images.float()
    changed[:, 0] *= 1 + share
    changed[:, 1] *= 1 - share
    return changed.clamp(0, 255).round().to(torch.uint8)


def darker(images: Tensor, share: float) -> Tensor:
    return (images.float() * (1 - share)).round().to(torch.uint8)


CHANGES: dict[str, Change] = {
    "a band lost: 0": lambda images: lost(images, 0),
    "a band lost: its mean": lambda images: lost(images, float(images[:, 1].float().mean())),
    "season: red +5 %, green -5 %": lambda images: season(images, 0.05),
    "season: red +10 %, green -10 %": lambda images: season(images, 0.10),
    "season: red +20 %, green -20 %": lambda images: season(images, 0.20),
    "darker by 10 %": lambda images: darker(images, 0.10),
}
NEW = {0.1: (200, 600), 0.3: (50, 200, 360)}  # share → tiles; a class has 120 images to draw from


@dataclass
class Seen:
    """What is known of images: a row each, without answers; and their embeddings."""

    rows: pd.DataFrame
    features: NDArray[np.float64]


@torch.inference_mode()
def seen(model: Bundle, images: Tensor, names: Sequence[str], scenes: Sequence[str]) -> Seen:
    """As production records them; answers come later, from a classifier of our own."""
    parts, embeddings = [], facts.Embeddings(model)
    assert model.task is not None
    with console.progress("images", len(images)) as bar:
        for start in range(0, len(images), TOGETHER):
            pixels = {"rgb": images[start : start + TOGETHER]}
            answer = model.task.answer(model.model, model.normalised(pixels))
            count = len(answer)
            passed = embeddings.taken(count, images.shape[-1])
            parts.append(facts.of_tiles(model, pixels, answer, range(count), passed))
            bar.advance(count)
    embeddings.close()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    features = columns.pop("embedding").astype(np.float64)
    kept = {n: of for n, of in columns.items() if not n.startswith("class:") and n != "confidence"}
    rows = pd.DataFrame(kept).assign(name=list(names), scene=list(scenes))
    return Seen(rows.assign(embedding=list(features.astype(np.float32))), features)


class Head:
    """A linear classifier on features: logistic regression."""

    def __init__(self, features: NDArray[np.float64], labels: NDArray[Any]) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
        self.model.fit(features, labels)
        self.classes = [str(name) for name in self.model.classes_]

    def answered(self, of: Seen, rows: Rows) -> pd.DataFrame:
        shares = self.model.predict_proba(of.features[rows])
        said = shares.argmax(1)
        classes = {f"class:{n}": (said == i) * 1.0 for i, n in enumerate(self.classes)}
        table = of.rows.iloc[rows].reset_index(drop=True)
        return table.assign(**classes, confidence=shares.max(1))


class World:
    """AID through one encoder."""

    def __init__(self, model: Bundle, folder: Path) -> None:
        self.model = model
        paths = sorted(folder.glob("*/*.jpg"))
        self.labels = np.array([path.parent.name for path in paths])
        self.classes = sorted(set(self.labels))
        size = int(model.meta["image_size"])
        pixels = [decode(path.read_bytes()) for path in paths]
        self.images = squares(pixels, size).permute(0, 3, 1, 2).contiguous()
        self.names = [path.name for path in paths]
        order = np.random.default_rng(SEED).permutation(len(paths))
        self.taught, self.pool = order[: len(order) // 3], order[len(order) // 3 :]
        self.plain = seen(model, self.images, self.names, self.names)
        self.changed = {
            name: self._of(change(self.images[self.pool])) for name, change in CHANGES.items()
        }
        self.place = {int(row): at for at, row in enumerate(self.pool)}
        # Four quarters of a scene resemble each other as tiles of one scene do.
        some = self.pool[:SCENES]
        quarters = [
            pixels[row][top : top + 75, left : left + 75]
            for row in some
            for top in (0, 75)
            for left in (0, 75)
        ]
        self.quarters = seen(
            model,
            squares(quarters, size).permute(0, 3, 1, 2).contiguous(),
            [str(i) for i in range(len(quarters))],
            [self.names[row] for row in some for _ in range(4)],
        )

    def _of(self, images: Tensor) -> Seen:
        names = [self.names[row] for row in self.pool]
        return seen(self.model, images, names, names)

    @cache  # noqa: B019  # there is one world
    def head(self, without: str | None = None) -> Head:
        rows = self.taught[self.labels[self.taught] != without]
        return Head(self.plain.features[rows], self.labels[rows])

    def accuracy(self) -> float:
        said = self.head().model.predict(self.plain.features[self.pool])
        return float((said == self.labels[self.pool]).mean())

    def unchanged(self, tiles: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        order = np.random.default_rng((seed, tiles)).permutation(self.pool)
        rows = order[:REFERENCE], order[REFERENCE : REFERENCE + tiles]
        before, now = (self.head().answered(self.plain, some) for some in rows)
        return before, now

    def with_change(self, change: str, tiles: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        order = np.random.default_rng((seed, tiles, 7)).permutation(self.pool)
        before = self.head().answered(self.plain, order[:REFERENCE])
        rows = order[REFERENCE : REFERENCE + tiles]
        places = np.array([self.place[int(row)] for row in rows])
        return before, self.head().answered(self.changed[change], places)

    def with_new_class(
        self, share: float, tiles: int, seed: int
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        name = self.classes[seed % len(self.classes)]
        head = self.head(name)
        random = np.random.default_rng((seed, tiles, 9))
        known = random.permutation(self.pool[self.labels[self.pool] != name])
        fresh = np.flatnonzero(self.labels == name)  # also of the third that taught the others
        fresh = random.permutation(fresh)[: round(share * tiles)]
        rows = np.concatenate((known[REFERENCE : REFERENCE + tiles - len(fresh)], fresh))
        return head.answered(self.plain, known[:REFERENCE]), head.answered(self.plain, rows)

    def in_scenes(self, tiles: int, seed: int, apart: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
        """150 scenes of four tiles each, and production of so many tiles; unchanged."""
        order = np.random.default_rng((seed, tiles, 11)).permutation(SCENES)
        halves = []
        for some in (order[:150], order[150 : 150 + tiles // 4]):
            rows = (some[:, None] * 4 + np.arange(4)).ravel()
            table = self.head().answered(self.quarters, rows)
            halves.append(table.assign(scene=table["name"]) if apart else table)
        return halves[0], halves[1]


def found(
    draw: Callable[[int], tuple[pd.DataFrame, pd.DataFrame]], repeats: int
) -> dict[str, float]:
    """Share of the repeats in which each test found drift, and any of them did."""
    rows = []
    for seed in range(repeats):
        result = compare(*draw(seed), seed=seed)
        rows.append({one.test: one.drifted for one in result.findings} | {"any": result.drifted})
    return {str(name): float(share) for name, share in pd.DataFrame(rows).mean().items()}


def untrained(folder: Path) -> Bundle:
    """A bundle of params.yaml's architecture with seeded weights; its head is not asked."""
    config = Config.load(template("params.yaml"))
    torch.manual_seed(SEED)
    model = Classifier(encoder(config.model, {"rgb": 3}, finetuning=True), 2)
    meta = {
        "kind": "scene",
        "architecture": config.model.model_dump(),
        "image_size": config.model.image_size,
        "sensors": {"rgb": config.sensors["rgb"].model_dump()},
        "sensor": "rgb",
        "classes": ["a", "b"],
        "generated": True,
        "lineage": {},
        "figures": {},
    }
    bundle.write(folder, model, meta)
    return bundle.load(folder)


TESTS = ("any", "bands", "embedding", "classes", "confidence")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drift", description="What `ringmo drift` finds, and when not."
    )
    parser.add_argument("--model", metavar="FOLDER", help="a bundle of a scene model")
    parser.add_argument("--repeats", type=int, default=60, help="of each change: default 60")
    parser.add_argument("--unchanged", type=int, default=200, help="without one: default 200")
    parser.add_argument("--images", metavar="DIR", default=str(AID), help="AID's class folders")
    given = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.model) if given.model else None
        model = bundle.load(folder) if folder else untrained(Path(scratch) / "model")
        world = World(model, Path(given.images))
    print(f"A linear classifier on its features is right of {100 * world.accuracy():.0f} %.\n")
    print("| production | tiles | repeats | any test | bands | embedding | classes | confidence |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)

    def row(name: str, tiles: int, repeats: int, draw: Any) -> None:
        started = time.monotonic()
        shares = found(draw, repeats)
        cells = [f"{100 * shares[test]:.1f} %" for test in TESTS]
        print(f"| {name} | {tiles} | {repeats} | {' | '.join(cells)} |", flush=True)
        console.note(f"{(time.monotonic() - started) / repeats:.2f} s a comparison")

    for tiles in SIZES:
        row("unchanged", tiles, given.unchanged, lambda seed, n=tiles: world.unchanged(n, seed))
    for name, apart in (("unchanged, 4 tiles a scene", False), ("… scenes not told", True)):
        repeats = given.unchanged
        row(name, 200, repeats, lambda seed, a=apart: world.in_scenes(200, seed, a))
    for change in CHANGES:
        for tiles in SIZES:
            row(
                change,
                tiles,
                given.repeats,
                lambda seed, c=change, n=tiles: world.with_change(c, n, seed),
            )
    for share, sizes in NEW.items():
        for tiles in sizes:
            row(
                f"new class, {100 * share:.0f} %",
                tiles,
                given.repeats,
                lambda seed, s=share, n=tiles: world.with_new_class(s, n, seed),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
