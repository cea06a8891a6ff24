"""Recipes of public data sets on tiny folders laid out as these are published: the splits are the
published ones, and every split of the task's selection has tiles."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ringmo import config
from ringmo.config import Config
from ringmo.data.ingest import ingest
from ringmo.data.selection import select
from ringmo.stage import run_stage
from ringmo.workspace import init, template

MANY, FEW, SIDE = 30, 4, 48
PARTS = {"train": range(MANY), "val": range(MANY, MANY + FEW), "test": range(100, 100 + FEW)}
Made = tuple[dict[str, Any], range]  # further parameters, and the numbers of the test's images


def texture(number: int) -> Any:
    coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def halves(one: Any, other: Any) -> Any:
    """A mask of two values."""
    mask = np.empty((SIDE, SIDE, *np.shape(one)), np.uint8)
    mask[: SIDE // 2], mask[SIDE // 2 :] = one, other
    return mask


def text(path: Path, lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def loveda(folder: Path) -> Made:
    for part, numbers in PARTS.items():
        for i in numbers:
            below = folder / part.title() / ("Urban" if i % 2 else "Rural")
            save(below / "images_png" / f"{i}.png", texture(i))
            if part != "test":
                save(below / "masks_png" / f"{i}.png", halves(1, 2 + i % 6))
    return {"ingest.about": {str(folder): {"layout": "masks", "masks": "loveda"}}}, PARTS["val"]


def isaid(folder: Path) -> Made:
    for part, numbers in PARTS.items():
        for i in numbers:
            save(folder / part / "images" / f"P{i:04d}.png", texture(i))
            if part != "test":
                mask = halves((0, 0, 0), (0, 0, 63) if i % 2 else (0, 127, 255))
                save(folder / part / "masks" / f"P{i:04d}_instance_color_RGB.png", mask)
    return {}, PARTS["val"]


def potsdam(folder: Path) -> Made:
    """The test's lists are as the recipe says to write them; there is no val."""
    for part in ("train", "test"):
        for i in PARTS[part]:
            name = f"top_potsdam_2_{i}"
            save(folder / "2_Ortho_RGB" / f"{name}_RGB.tif", texture(i))
            mask = halves((255, 255, 255), (0, 0, 255))
            save(folder / "5_Labels_all" / f"{name}_label.tif", mask)
        lines = [f"top_potsdam_2_{i}_RGB.tif" for i in PARTS[part]]
        text(folder / f"{part}.txt", lines)
    return {}, PARTS["test"]


def levir_cd(folder: Path) -> Made:
    for part, numbers in PARTS.items():
        for i in numbers:
            for date in ("A", "B"):
                save(folder / part / date / f"{part}_{i}.png", texture(i + 1000 * (date == "B")))
            save(folder / part / "label" / f"{part}_{i}.png", halves(0, 255))
    return {}, PARTS["test"]


def dior(folder: Path) -> Made:
    box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
    for part, numbers in PARTS.items():
        where = "JPEGImages-test" if part == "test" else "JPEGImages-trainval"
        for i in numbers:
            save(folder / where / f"{i:05d}.jpg", texture(i))
            name = "ship" if i % 2 else "airplane"
            said = f"<annotation><object><name>{name}</name>{box}</object></annotation>"
            text(folder / "Annotations" / f"{i:05d}.xml", [said])
        text(folder / "ImageSets" / "Main" / f"{part}.txt", [f"{i:05d}" for i in numbers])
    return {}, PARTS["test"]


def dota(folder: Path) -> Made:
    for part, numbers in PARTS.items():
        for i in numbers:
            save(folder / part / "images" / f"P{i:04d}.png", texture(i))
            if part != "test":
                line = f"5 6 30 6 30 40 5 40 {'ship' if i % 2 else 'plane'} 0"
                text(folder / part / "labelTxt" / f"P{i:04d}.txt", [line])
    return {}, PARTS["val"]


def sen1floods11(folder: Path) -> Made:
    import rasterio
    from rasterio.transform import from_origin

    def write(layer: str, i: int, values: Any) -> None:
        path = folder / layer / f"Ghana_{i}_{layer}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        place = from_origin(i, 5, 1e-4, 1e-4)
        with rasterio.open(
            path, "w", driver="GTiff", width=SIDE, height=SIDE, count=len(values),
            dtype=str(values.dtype), crs="EPSG:4326", transform=place,
        ) as file:  # fmt: skip
            file.write(values)

    for part, numbers in PARTS.items():
        for i in numbers:
            bands = texture(i)[..., np.arange(13) % 3].transpose(2, 0, 1).astype(float)
            write("S2Hand", i, (1200 + 20 * bands).astype("int16"))
            write("S1Hand", i, (-25 + 0.1 * bands[:2]).astype("float32"))
            water = halves(0, 1).astype("int16")
            water[:2] = -1
            write("LabelHand", i, water[None])
        name = "valid" if part == "val" else part
        lines = [f"Ghana_{i}_S1Hand.tif,Ghana_{i}_LabelHand.tif" for i in numbers]
        text(folder / "splits" / f"flood_{name}_data.csv", lines)
    return {}, PARTS["test"]


LAYOUTS: dict[str, Callable[[Path], Made]] = {
    "loveda": loveda,
    "isaid": isaid,
    "potsdam": potsdam,
    "levir-cd": levir_cd,
    "dior": dior,
    "dota": dota,
    "sen1floods11": sen1floods11,
}


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_a_public_set_is_selected_as_it_was_published(recipe: str, tmp_path: Path) -> None:
    source = tmp_path / "in"
    more, tested = LAYOUTS[recipe](source)
    workspace = init(tmp_path / "workspace")
    changes = config.recipe(template("recipes") / f"{recipe}.yaml")
    config.edit(workspace.params_file, changes | {"ingest.sources": [str(source)]} | more)
    values = Config.load(workspace.params_file)
    assert values.split.by == "published"
    ingest(values, workspace)
    [task] = values.tasks
    run_stage(workspace, "select", lambda out: select(values, workspace, out))
    chosen = pd.read_parquet(workspace.work("select") / f"{task}.parquet")
    manifest = pd.read_parquet(workspace.store / "manifest.parquet").set_index("key")
    number = manifest["source"].str.extract(r"(\d+)(?:_S.Hand|_RGB)?\.\w+$")[0].astype(int)
    number = number.reindex(chosen["key"]).to_numpy()
    split = chosen["split"].to_numpy()
    assert set(number[split == "test"]) == set(tested)
    assert set(split) == {"train", "val", "test"}
    assert (split == "train").sum() > MANY / 2
