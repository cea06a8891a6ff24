"""A bundle behind MLflow's pyfunc interface, so that `models:/scene@champion` answers anywhere.

MLflow finds this module by name (`loader_module`), and hands it the bundle's folder: nothing is
unpickled, and whoever loads a model needs only an installed ringmo.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from ringmo.config import Sensor
    from ringmo.registry.bundle import Bundle


class Model:
    """What `mlflow.pyfunc.load_model` returns answers through this."""

    def __init__(self, bundle: "Bundle") -> None:
        self.bundle = bundle

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> "pd.DataFrame":
        """One row an image: of scenes label, confidence, and a probability for each class.

        Of other tasks what `Task.told` gives, a column each: mask, height, boxes.

        Args:
            model_input: (N, H, W, bands) as the model's sensor stores pixels, or one (H, W, bands);
                a list of such images, of file paths or of encoded files; or a table whose column
                `image` holds either. A model that reads several images of one ground needs a table
                with a column for each: its sensors' names, and `second` for the later date.

        Raises:
            BadInput: an encoder's bundle, or something that is no image this model reads.
        """
        import pandas as pd

        bundle = self.bundle
        if bundle.task is None:
            raise BadInput(f"{bundle.folder} is an encoder and has no classes")
        reads = bundle.reads
        if len(reads) > 1:
            images: list[Any] = _together(model_input, reads)
        else:
            (sensor,) = reads.values()
            images = [_pixels(item, at, sensor) for at, item in _items(model_input)]
        told = bundle.predict(images)
        if isinstance(told, list):
            return pd.DataFrame(told)
        best = told.argmax(axis=1)
        answers = pd.DataFrame(told, columns=bundle.classes)
        answers.insert(0, "confidence", told.max(axis=1))
        answers.insert(0, "label", [bundle.classes[i] for i in best])
        return answers


def _load_pyfunc(data_path: str) -> Model:
    """MLflow's entry: a model from a bundle's folder."""
    from ringmo.registry.bundle import load

    return Model(load(Path(data_path)))


def _together(table: Any, reads: "dict[str, Sensor]") -> list[dict[str, Any]]:
    """The rows of a table with a column for each image of one ground."""
    import pandas as pd

    if not isinstance(table, pd.DataFrame) or not set(reads) <= set(table.columns):
        raise BadInput(
            f"this model reads {' and '.join(reads)} of the same ground: give a table with these "
            f"columns"
        )
    columns = {name: _items(table[name].tolist()) for name in reads}
    return [
        {n: _pixels(items[i][1], f"{n} of {items[i][0]}", reads[n]) for n, items in columns.items()}
        for i in range(len(table))
    ]


def _items(model_input: Any) -> list[tuple[str, Any]]:
    import numpy as np
    import pandas as pd

    if isinstance(model_input, pd.DataFrame):
        if "image" not in model_input.columns:
            found = ", ".join(map(str, model_input.columns))
            raise BadInput(f"the table needs a column `image`, found: {found or 'none'}")
        model_input = model_input["image"].tolist()
    if isinstance(model_input, np.ndarray) and model_input.ndim == 3:
        model_input = [model_input]
    if isinstance(model_input, str | bytes | Path):
        model_input = [model_input]
    if not isinstance(model_input, Sequence | np.ndarray):
        raise BadInput(f"expected images, paths or a table, found {type(model_input).__name__}")
    return [(f"image {i}", item) for i, item in enumerate(model_input)]


def _pixels(item: Any, where: str, sensor: "Sensor") -> "NDArray[Any]":
    import numpy as np

    from ringmo.data.decode import decode
    from ringmo.registry.bundle import fit

    if isinstance(item, str | Path):
        try:
            item, where = Path(item).read_bytes(), str(item)
        except OSError as error:
            raise BadInput(f"{item}: {error.strerror}") from None
    try:
        if isinstance(item, bytes | bytearray | memoryview):
            item = decode(bytes(item))
        return fit(np.asarray(item), sensor)
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
