"""RingMo: remote-sensing foundation models trained, judged and kept in production."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from ringmo.inference.model import TrainedModel

__version__ = "0.1.0"


def load(
    ref: "str | os.PathLike[str]",
    device: str = "cpu",
    workspace: "str | os.PathLike[str] | None" = None,
) -> "TrainedModel":
    """A trained model as a PyTorch module that does its normalisation itself.

    Args:
        ref: `scene@champion`, `scene/7`, `encoder@champion`, or a bundle's folder.
        workspace: in whose registry a name is looked up; None: RINGMO_WORKSPACE, or this folder.

    Raises:
        ringmo.errors.BadInput: no such model, a damaged one, or no workspace where one is needed.
        ringmo.errors.Unreachable: MLflow does not answer.
    """
    from ringmo.inference.model import TrainedModel, open_bundle

    return TrainedModel(open_bundle(ref, device, workspace))
