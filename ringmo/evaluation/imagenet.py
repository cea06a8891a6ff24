"""timm's weights from ImageNet as an encoder: the yardstick that needs no imagery of one's own."""

from dataclasses import dataclass
from pathlib import Path

from ringmo.config import Model, Sensor
from ringmo.models.backbone import encoder, timm_weights, transfer
from ringmo.registry import bundle
from ringmo.training.engine import file_hash
from ringmo.workspace import Workspace

# timm's name → its architecture, from small to large. Swin (Liu et al. 2021) is trained on
# ImageNet-1k, or 22k where it is large; BEiT (Bao et al. 2021) has the positions that the ViT with
# relative positions has, and MAE's ViT (He et al. 2021) the fixed ones.
SWIN = {
    "swin_tiny_patch4_window7_224.ms_in1k": (96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin_small_patch4_window7_224.ms_in1k": (96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin_base_patch4_window7_224.ms_in22k": (128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "swin_large_patch4_window7_224.ms_in22k": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
}
BEIT = {
    "beit_base_patch16_224.in22k_ft_in22k": (768, [12], [12]),
    "beit_large_patch16_224.in22k_ft_in22k": (1024, [24], [16]),
}
MAE = {
    "vit_base_patch16_224.mae": (768, [12], [12]),
    "vit_large_patch16_224.mae": (1024, [24], [16]),
}


@dataclass(frozen=True)
class Weights:
    """A safetensors file of timm's, and the architecture it is for."""

    file: Path
    model: Model


def nearest(model: Model) -> tuple[str, Model]:
    """timm's name of the pre-trained model nearest in size, and its architecture.

    At the model's image size, or the next that its patches divide. Its size is what the blocks
    hold: depth times width squared.
    """
    swin = model.backbone == "swin"
    known = SWIN if swin else BEIT if model.position == "relative" else MAE

    def size(width: int, depths: list[int]) -> float:
        return float(sum(depth * (width * 2**i) ** 2 for i, depth in enumerate(depths)))

    wanted = size(model.embed_dim, model.depths)

    def far(name: str) -> float:
        width, depths, _ = known[name]
        return abs(size(width, depths) / wanted - wanted / size(width, depths))

    name = min(known, key=far)
    width, depths, heads = known[name]
    patch = 4 if swin else 16
    stride = patch << (len(depths) - 1)
    return name, Model.model_validate(
        {
            "backbone": model.backbone,
            "stem": "patch",
            "position": model.position,
            "image_size": -(-model.image_size // stride) * stride,
            "patch_size": patch,
            "embed_dim": width,
            "depths": depths,
            "num_heads": heads,
            "window_size": 7 if swin else None,
        }
    )


def weights(model: Model, sensor: Sensor, workspace: Workspace) -> Weights | str:
    """timm's weights for the model nearest in size, from disk or the network; or why there are
    none.

    A file that is there is taken: .ringmo/weights/NAME.safetensors.
    """
    if len(sensor.bands) != 3:
        return f"it reads three bands, the tiles have {len(sensor.bands)}"
    name, architecture = nearest(model)
    file = workspace.state / "weights" / f"{name}.safetensors"
    if not file.is_file() and (why := _fetch(name, file)):
        return (
            f"timm's {name} could not be had ({why}); to use it all the same put its "
            f"model.safetensors at {file}"
        )
    return Weights(file, architecture)


def _fetch(name: str, file: Path) -> str | None:
    """Bring weights from timm's hub to a file; None where that went well, else why it did not."""
    import timm
    from safetensors.torch import save_file

    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever its hub's client, its cache or the network raise
        said = str(error).strip().split(". ")[0].splitlines()
        return said[0][:120] if said else repr(error)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file({name: of.contiguous() for name, of in model.state_dict().items()}, temporary)
    temporary.replace(file)
    return None


def write(folder: Path, found: Weights, name: str, sensor: Sensor) -> None:
    """An encoder's bundle of these weights, which reads one sensor.

    Raises:
        BadInput: the file is damaged, or of another architecture.
    """
    model = encoder(found.model, {name: len(sensor.bands)})
    transfer(timm_weights(found.file, found.model, name), model, str(found.file))
    meta = {
        "kind": bundle.ENCODER,
        "architecture": found.model.model_dump(mode="json"),
        "image_size": found.model.image_size,
        "sensors": {name: sensor.described()},
        "classes": None,
        "generated": False,
        "lineage": {"weights": file_hash(found.file)},
        "figures": {},
    }
    bundle.write(folder, model, meta)
