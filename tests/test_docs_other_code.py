"""docs/other-code.md: every block runs as it stands, in order, on small real models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_models import SWIN, rgb, write_model

from ringmo.workspace import init

PAGE = Path(__file__).parents[1] / "docs" / "other-code.md"


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    import rasterio
    from rasterio.transform import from_origin

    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == PAGE.read_text().count("```python") == 7
    init(tmp_path)
    write_model(tmp_path / "scene", classes=["airport", "forest"])
    write_model(tmp_path / "encoder")
    write_model(tmp_path / "plain", SWIN | {"stem": "patch"})
    (tmp_path / "imagery").mkdir()
    for name, seed in (("a", 1), ("b", 2)):
        Image.fromarray(rgb(seed)).save(tmp_path / "imagery" / f"{name}.png")
    profile = {"width": 40, "height": 40, "count": 3, "dtype": "uint8", "crs": "EPSG:32631"}
    place = from_origin(500_000, 5_000_000, 10, 10)
    with rasterio.open(
        tmp_path / "imagery" / "c.tif", "w", "GTiff", transform=place, **profile
    ) as file:
        file.write(rgb(3, 40, 40).transpose(2, 0, 1))
    checks = (
        "assert len(best) == 2 and set(best) <= {'airport', 'forest'}\n"
        "assert vectors_of_two.shape == (2, 32)\n"
        "assert len(tiles) == 3 and len(placed) == 1\n"
        "import torch\n"
        "images = torch.rand(1, 3, 32, 32)\n"
        "a, b = same.eval().forward_features(images), also.eval().forward_features(images)\n"
        "assert torch.equal(a, b)\n"
    )
    first, *others = blocks
    code = "\n".join([first, "vectors_of_two = vectors", *others, checks])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # 400 m squared, as the Mercator projection shows it at 45° N: twice as large.
    area = float(re.search(r"([\d.]+) km²", done.stdout)[1])
    assert area == pytest.approx(0.16 * 2, rel=0.02)


@pytest.mark.slow
def test_torchgeo_s_trainers_take_the_names() -> None:
    """As the page says, by name alone."""
    from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask

    import ringmo.models.timm_names

    assert ringmo.models.timm_names.NAMES
    task = ClassificationTask(model="ringmo_swin_tiny", in_channels=4, num_classes=3)
    assert task.model.patch_embed.convolutions[0].in_channels == 4
    assert task.model.get_classifier().out_features == 3
    dense = SemanticSegmentationTask(
        model="unet", backbone="tu-ringmo_swin_tiny", in_channels=4, num_classes=3
    )
    assert dense.model.encoder.model.patch_embed.convolutions[0].in_channels == 4
