"""Scene classification: what a whole tile shows, one class or (`multi_label`) several.

Encoder, mean over all positions, one linear layer. Of several classes each is answered by itself,
and said from a probability of one half.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ringmo.data.tables import classes_of
from ringmo.errors import BadInput
from ringmo.evaluation import metrics
from ringmo.tasks.base import Evidence, Figures, Images, Sample, Task

if TYPE_CHECKING:
    import pandas as pd

    from ringmo.config import Finetune
    from ringmo.data.loading import SelectedTiles
    from ringmo.models.backbone import Encoder


class Scene(Task):
    """Answers are probabilities: float32 (B, classes)."""

    name = "scene"
    parts = ("label",)
    padded = False
    metric = "accuracy"
    columns: ClassVar = {"label": "string"}

    def usable(self, tiles: "pd.DataFrame") -> "pd.Series[bool]":
        return tiles["label"].notna()

    def classes(self, train: "SelectedTiles", settings: "Finetune") -> list[str]:
        labels = {str(label) for label in train.table["label"]}
        if settings.multi_label:
            labels = {name for label in labels for name in classes_of(label)}
        elif several := sorted(label for label in labels if ";" in label):
            raise BadInput(
                f"tiles have several classes (`{several[0]}`): set finetune.scene.multi_label=true"
            )
        if len(labels) < 2:
            raise BadInput(
                f"{len(train)} labelled tiles to train on, of {len(labels)} classes: put images "
                f"into two or more class folders, or label them, and ingest again"
            )
        return sorted(labels)

    def model(self, encoder: "Encoder", classes: int, settings: "Finetune") -> nn.Module:
        from ringmo.models.classifier import Classifier  # and timm: whoever selects needs none

        return Classifier(encoder, classes, settings.multi_label)

    def prepare(
        self, model: Any, train: "SelectedTiles", classes: Sequence[str], settings: "Finetune"
    ) -> None:
        if settings.class_weights == "balanced":
            counts = np.array([_counted(train, name, settings) for name in classes], np.float64)
            weights = counts.sum() / (len(counts) * np.maximum(counts, 1))
            model.class_weights = torch.tensor(weights, dtype=torch.float32)

    def loss(self, model: Any, sample: Sample, settings: "Finetune") -> Tensor:
        assert sample.labels is not None
        logits, wanted = model(sample.images).float(), sample.labels
        weights = getattr(model, "class_weights", None)
        if settings.multi_label:
            wanted = wanted * (1 - settings.label_smoothing) + settings.label_smoothing / 2
            return nn.functional.binary_cross_entropy_with_logits(
                logits, wanted, pos_weight=weights
            )
        return nn.functional.cross_entropy(
            logits, wanted, weights, label_smoothing=settings.label_smoothing
        )

    def answer(self, model: Any, images: Images) -> Tensor:
        size = model.encoder.image_size
        logits = model({name: middle(of, size) for name, of in images.items()}).float()
        said: Tensor = logits.sigmoid() if model.multi_label else logits.softmax(-1)
        return said

    def turned_back(self, answers: Sequence[Tensor], turns: Sequence[int]) -> Tensor:
        return torch.stack(list(answers)).mean(0)

    def evidence(self, answer: Tensor, sample: Sample) -> Evidence:
        """scores: the answer. truth: (tiles, classes), 0 or 1, with those the model cannot know.

        Of one class each also label (its number), predicted, right and confidence.
        """
        assert sample.labels is not None
        truth, scores = sample.labels.cpu().numpy().astype(np.int64), answer.cpu().numpy()
        evidence: Evidence = {"truth": truth, "scores": scores}
        if not self._several(truth, scores):
            best = scores.argmax(1)
            evidence |= {
                "label": truth.argmax(1),
                "predicted": best,
                "right": truth[np.arange(len(best)), best] == 1,
                "confidence": scores.max(1),
            }
        return evidence

    @staticmethod
    def _several(truth: NDArray[np.int64], scores: NDArray[np.float32]) -> bool:
        """Whether tiles have any number of classes: then scores do not add up to 1."""
        one = bool(np.allclose(scores.sum(1), 1, atol=1e-3)) and bool((truth.sum(1) == 1).all())
        return not one

    def figures(
        self, evidence: Evidence, classes: Sequence[str], weights: NDArray[np.int64] | None = None
    ) -> Figures:
        """accuracy, mean_f1; of several classes a tile also map, mean average precision.

        The accuracy of several classes is that of Godbole and Sarawagi (2004): the share of the
        classes that are said or true which are both. Of one class a tile it is the usual one.
        """
        truth, scores = evidence["truth"], evidence["scores"]
        count = max(len(classes), truth.shape[1])
        weight = np.ones(len(truth)) if weights is None else weights.astype(np.float64)
        if "predicted" in evidence:  # without tables of classes: a bootstrap asks a thousand times
            said, right = evidence["predicted"], evidence["right"]
            hit, real, claimed = (
                np.bincount(of, weight * counted, count).astype(np.float64)
                for of, counted in ((said, right), (evidence["label"], 1), (said, 1))
            )
            shared = right.astype(np.float64)
        else:
            true, answers = np.zeros((len(truth), count)), np.zeros((len(truth), count))
            true[:, : truth.shape[1]] = truth
            answers[:, : scores.shape[1]] = scores >= 0.5
            both = true * answers
            either = np.maximum(true, answers).sum(1)
            shared = np.divide(both.sum(1), either, out=np.ones(len(true)), where=either > 0)
            hit, real, claimed = weight @ both, weight @ true, weight @ answers
        f1 = 2 * hit / np.maximum(real + claimed, 1)
        there = real > 0
        whole = {
            "accuracy": float(weight @ shared / max(weight.sum(), 1)),
            "mean_f1": float(f1[there].mean()) if there.any() else float("nan"),
        }
        if "predicted" not in evidence:
            known = np.flatnonzero(there)
            precise = [
                metrics.average_precision(true[:, i], scores[:, i], weight)
                if i < scores.shape[1]
                else 0.0
                for i in known
            ]
            whole["map"] = float(np.mean(precise)) if precise else float("nan")
        rows = [
            {
                "class": classes[i],
                "f1": float(f1[i]),
                "precision": float(hit[i] / max(claimed[i], 1)),
                "recall": float(hit[i] / real[i]),
                "tiles": int(real[i]),
            }
            for i in np.flatnonzero(there).tolist()
        ]
        return Figures(whole, rows)

    def trivial(
        self,
        train: "SelectedTiles",
        sample: Sample,
        classes: Sequence[str],
        settings: "Finetune",
    ) -> Tensor:
        labels = [str(label) for label in train.table["label"]]
        if settings.multi_label:
            shares = [np.mean([name in classes_of(label) for label in labels]) for name in classes]
            said = torch.tensor(shares, dtype=torch.float32)
        else:
            commonest = max(classes, key=labels.count)
            said = torch.tensor([float(name == commonest) for name in classes])
        return said.expand(len(sample), -1)

    def told(self, answer: Tensor, classes: Sequence[str]) -> NDArray[np.float32]:
        return answer.cpu().numpy()

    def shown(
        self,
        images: Sequence[NDArray[np.uint8]],
        answer: Any,
        sample: Sample,
        at: int,
        classes: Sequence[str],
    ) -> list[NDArray[np.uint8]]:
        return [images[0]]

    def quality(self, evidence: Evidence, classes: Sequence[str]) -> NDArray[np.float64]:
        """The probability of what is true, on average over its classes."""
        truth, scores = evidence["truth"], evidence["scores"]
        known = truth[:, : scores.shape[1]]
        likely: NDArray[np.float64] = (known * scores).sum(1) / np.maximum(truth.sum(1), 1)
        return likely


def middle(images: Tensor, size: int) -> Tensor:
    """The middle size × size pixels of square images (B, C, S, S)."""
    edge = (images.shape[-1] - size) // 2
    return images[:, :, edge : edge + size, edge : edge + size]


def _counted(train: "SelectedTiles", name: str, settings: "Finetune") -> int:
    labels = train.table["label"].astype(str)
    if not settings.multi_label:
        return int((labels == name).sum())
    return sum(name in classes_of(label) for label in labels)


TASK = Scene()
