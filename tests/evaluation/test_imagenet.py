"""timm's weights as an encoder to begin with: which, from where, and what if there are none."""

from pathlib import Path
from typing import Any

import made_store
import pytest
import timm
import torch
from safetensors.torch import save_file

from ringmo import config
from ringmo.config import Config, Model, Sensor
from ringmo.errors import BadInput
from ringmo.evaluation import compare, imagenet
from ringmo.registry import bundle

RGB = Sensor.model_validate(
    {"bands": ["r", "g", "b"], "dtype": "uint8", "mean": [0.0] * 3, "std": [1.0] * 3}
)
SMALL = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "swin_tiny_patch4_window7_224.ms_in1k"),
        (
            {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
            "swin_base_patch4_window7_224.ms_in22k",
        ),
        (
            {"backbone": "vit", "embed_dim": 768, "depths": [12], "num_heads": [12]},
            "beit_base_patch16_224.in22k_ft_in22k",
        ),
        (
            {
                "backbone": "vit",
                "position": "sincos",
                "embed_dim": 1000,
                "depths": [24],
                "num_heads": [10],
            },
            "vit_large_patch16_224.mae",
        ),
    ],
)
def test_the_model_nearest_in_size_is_one_that_timm_has(change: Any, name: str) -> None:
    patch = 16 if change.get("backbone") == "vit" else 4
    model = Model.model_validate({**SMALL, "patch_size": patch, **change})
    found, architecture = imagenet.nearest(model)
    assert found == name and timm.is_model_pretrained(name)
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False)
    assert theirs.num_features == architecture.embed_dim << (len(architecture.depths) - 1)
    assert architecture.image_size % architecture.stride == 0
    assert architecture.image_size >= model.image_size


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of timm's that is quick."""
    name = "swin_tiny_patch4_window7_224.ms_in1k"
    monkeypatch.setattr(imagenet, "SWIN", {name: (16, [1, 1], [2, 4])})
    return name


def saved(workspace: Any, name: str) -> Any:
    """timm's model with weights of its own, where the comparison looks for them."""
    torch.manual_seed(1)
    theirs = timm.models.SwinTransformer(
        img_size=224, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=7
    )
    file = workspace.state / "weights" / f"{name}.safetensors"
    file.parent.mkdir(parents=True)
    save_file({key: of.contiguous() for key, of in theirs.state_dict().items()}, file)
    return theirs.eval()


def test_its_weights_give_timm_s_features(workspace: Any, tmp_path: Path, known: str) -> None:
    theirs = saved(workspace, known)
    found = imagenet.weights(Model.model_validate({**SMALL, "image_size": 224}), RGB, workspace)
    assert not isinstance(found, str)
    imagenet.write(tmp_path / "encoder", found, "rgb", RGB)
    ours = bundle.load(tmp_path / "encoder")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        wanted = theirs.forward_features(images)
        assert torch.allclose(ours.encoder(images, "rgb"), wanted, atol=1e-5)


def test_without_weights_and_for_other_bands_the_reason_is_said(workspace: Any, known: str) -> None:
    said = imagenet.weights(Model.model_validate(SMALL), RGB, workspace)
    assert isinstance(said, str)
    assert known in said and "could not be had" in said and ".safetensors" in said
    grey = Sensor.model_validate({"bands": ["g"], "dtype": "uint8", "mean": [0.0], "std": [1.0]})
    said = imagenet.weights(Model.model_validate(SMALL), grey, workspace)
    assert said == "it reads three bands, the tiles have 1"


def compared(workspace: Any, tmp_path: Path, **changes: Any) -> Any:
    changes = {f"compare.{name}": value for name, value in changes.items()}
    config.edit(
        workspace.params_file,
        {
            "compare.labels.scene": [2],
            "compare.seeds": [1],
            "compare.finetune_steps": 2,
            "compare.scratch_equal_total": False,
            "evaluate.bootstrap_samples": 100,
            **changes,
        },
    )
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return compare.compare(Config.load(workspace.params_file), workspace, out)


@pytest.mark.long
def test_a_comparison_takes_what_is_there_and_says_what_is_not(
    workspace: Any, tmp_path: Path, known: str
) -> None:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    begun = ["imagenet", "scratch"]
    report = compared(workspace, tmp_path, initialisations=begun)
    assert [n for n in report.notes if n.startswith("ImageNet is left out: timm's swin_tiny")]
    assert {cell["row"] for cell in report.tables["measures"]} == {
        *("scratch", "histograms", "without looking"),
    }
    with pytest.raises(BadInput, match="nothing is left to compare: ImageNet is left out"):
        compared(workspace, tmp_path, initialisations=["imagenet"])

    saved(workspace, known)
    report = compared(workspace, tmp_path, initialisations=begun)
    assert {cell["row"] for cell in report.tables["measures"]} >= {"ImageNet", "scratch"}
    assert {one["of"] for one in report.tables["differences"]} == {"ImageNet"}
    assert any("ImageNet: trained elsewhere" in note for note in report.notes)
    # The encoder is kept as a bundle, so it can be begun from under its folder's name as well.
    (folder,) = (workspace.state / "compare").glob("encoder-imagenet-*/encoder")
    again = compared(workspace, tmp_path, initialisations=["scratch", str(folder)])
    cells = {(c["row"], c["column"]): c["value"] for c in report.tables["measures"]}
    same = {(c["row"], c["column"]): c["value"] for c in again.tables["measures"]}
    assert same[str(folder), "2 labels"] == cells["ImageNet", "2 labels"]


def test_what_is_no_encoder_is_no_beginning(workspace: Any, tmp_path: Path) -> None:
    made_store.make_selections(workspace, made_store.make_store(workspace))
    with pytest.raises(BadInput, match="nowhere"):
        compared(workspace, tmp_path, initialisations=["nowhere/to/be/found"])
