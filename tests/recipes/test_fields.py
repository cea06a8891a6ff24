"""Each field's recipe on real imagery, all stages, with trainings of seconds; and every recipe as
parameters."""

from pathlib import Path
from typing import Any

import pytest
from real import REAL
from stages import prepared, taught

from ringmo import config, tasks
from ringmo.config import Config
from ringmo.inference.predict import predict
from ringmo.workspace import init, template

RECIPES = sorted(path.stem for path in template("recipes").glob("*.yaml"))
SHORT = {"pretrain.epochs": 2, "pretrain.warmup_epochs": 1, "evaluate.bootstrap_samples": 100}
FLOODS, PAIRS = REAL / "geotiff" / "sen1floods11", REAL / "change" / "levir-cd"
LAND, GROUND = REAL / "segmentation" / "loveda", REAL / "geotiff" / "terramesh"
ROADS = REAL / "segmentation" / "roads"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_all_that_its_tasks_need(recipe: str, tmp_path: Path) -> None:
    made = init(tmp_path / "w")
    changes = config.recipe(template("recipes") / f"{recipe}.yaml")
    config.edit(made.params_file, changes)
    values = Config.load(made.params_file)
    for task in values.tasks:
        assert task in tasks.names()
        # Of its own, not what params.yaml happened to hold.
        said = {key for key in changes if key.startswith(f"finetune.{task}.")}
        names = ("epochs", "batch_size", "base_lr", "crop_scale")
        assert {f"finetune.{task}.{name}" for name in names} <= said


def run(workspace: Any, recipe: str, source: Path, epochs: int, **more: Any) -> tuple[Any, Path]:
    """The stages of a recipe's one task; its evaluation's report, and its model's folder."""
    if not source.is_dir():
        pytest.skip("no real imagery beside the checkout")
    changes = config.recipe(template("recipes") / f"{recipe}.yaml")
    [task] = changes["tasks"]
    length = {f"finetune.{task}.epochs": epochs, f"finetune.{task}.warmup_epochs": 1}
    changes |= {"ingest.sources": [str(source)], **SHORT, **length, **more}
    config.edit(workspace.params_file, changes)
    values = Config.load(workspace.params_file)
    prepared(values, workspace)
    report = taught(values, workspace, task)
    metric = tasks.find(task).metric
    for name in (f"test_{metric}", f"scratch_{metric}", f"trivial_{metric}"):
        assert report.figures[name] is not None
    folder = workspace.work(f"evaluate@{task}")
    for name in ("best.png", "worst.png", "evidence.npz", "per_class.json"):
        assert (folder / name).stat().st_size > 0
    return report, workspace.work(f"finetune@{task}") / "model"


@pytest.fixture
def fresh(tmp_path: Path) -> Any:
    return init(tmp_path / "workspace")


def answered(workspace: Any, model: Path, image: Path, **beside: Path) -> dict[str, Any]:
    """The model's answer for an image, which has files."""
    out = workspace.root / "answers"
    others = {name: str(path) for name, path in beside.items()}
    [answer] = predict(workspace, [str(image)], str(model), out=out, beside=others)
    assert "error" not in answer and answer["files"]
    assert all(Path(file).stat().st_size > 0 for file in answer["files"])
    return answer


@pytest.mark.slow
def test_construction_finds_what_changed(fresh: Any) -> None:
    _, model = run(fresh, "construction", PAIRS, 2)
    name = "test_2_0000_0000.png"
    answered(fresh, model, PAIRS / "A" / name, second=PAIRS / "B" / name)


@pytest.mark.slow
@pytest.mark.long
def test_transport_maps_roads(fresh: Any) -> None:
    _, model = run(fresh, "transport", ROADS, 2, **{"ingest.include": ["satImage_0[0-4]*"]})
    answered(fresh, model, ROADS / "images" / "satImage_004.png")


@pytest.mark.slow
@pytest.mark.long
def test_water_is_told_from_land_by_two_sensors(fresh: Any) -> None:
    report, model = run(fresh, "water", FLOODS, 12)
    assert report.figures["test_miou"] > report.figures["trivial_miou"] + 0.1
    scene = "Spain_7370579"
    answered(fresh, model, FLOODS / f"{scene}_S2Hand.tif", s1=FLOODS / f"{scene}_S1Hand.tif")


@pytest.mark.slow
@pytest.mark.long
def test_environment_maps_land_cover(fresh: Any) -> None:
    about = {str(LAND): {"layout": "masks", "masks": "loveda"}}
    _, model = run(fresh, "environment", LAND, 2, **{"ingest.about": about})
    answered(fresh, model, sorted((LAND / "images").iterdir())[0])


@pytest.mark.slow
@pytest.mark.long
def test_height_is_told_from_imagery(fresh: Any) -> None:
    _, model = run(fresh, "height", GROUND, 2)
    answered(fresh, model, sorted((GROUND / "S2L2A").iterdir())[0])
