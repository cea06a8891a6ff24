"""The pre-training model that params.yaml asks for.

All have `encoder`, `masks(batch)`, `forward(images, mask, sensor)` → loss and `reconstruct`.
"""

from collections.abc import Mapping

from ringmo.config import Model, Pretrain
from ringmo.models.backbone import encoder
from ringmo.models.mae import MAE
from ringmo.models.ringmo import RingMo


def pretraining_model(model: Model, settings: Pretrain, bands: Mapping[str, int]) -> RingMo | MAE:
    """An untrained model for `settings.method`: ringmo, simmim or mae.

    Args:
        bands: sensor → number of bands; each gets a stem and a decoder, the trunk is one.

    Raises:
        BadInput: a method that does not go with the architecture.
    """
    trunk = encoder(model, bands, settings.drop_path)
    kind = MAE if settings.method == "mae" else RingMo
    return kind(model, settings, trunk, bands)
