"""Probes: what frozen features tell about classes, by neighbours and by a linear classifier.

Neither trains the encoder, so both measure what pre-training alone has put there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ringmo.data.loading import IMAGE, SelectedTiles
from ringmo.models.backbone import Encoder
from ringmo.registry import bundle

BATCH = 256  # tiles whose features are taken at a time
CHUNK = 1024  # test rows at a time: bounds the similarity matrix to CHUNK × N
# Weight of the squared coefficients beside the mean cross-entropy, from the strongest down.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
STEPS = 100  # of L-BFGS for each penalty; each starts where the one before ended


def tile_features(
    model: Encoder,
    meta: Mapping[str, Any],
    tiles: SelectedTiles,
    sensor: str,
    device: torch.device,
    part: str = IMAGE,
) -> NDArray[np.float32]:
    """Features (N, C) of every tile, uncropped, in their order.

    Args:
        model: on the device. meta: as `bundle.features` reads it. sensor: what the images are of.
        part: which of a tile's images: `second` is its later date, `beside:SENSOR` another's.
    """
    order = np.arange(len(tiles))
    found = [
        bundle.features(
            model,
            (batch.images if part == IMAGE else batch.parts[part]).to(device),
            meta,
            sensor,
        )
        for batch in tiles.batches(order, BATCH, bundle.read_size(meta))
    ]
    return np.concatenate(found) if found else np.zeros((0, 1), np.float32)


def knn(
    train: Tensor, labels: Tensor, test: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Predicted class numbers (M,) for `test` (M, C) by its k nearest of `train` (N, C).

    Neighbours are nearest in cosine similarity s and vote with exp(s / temperature), as in Wu et
    al. 2018 (arXiv:1805.01978) and DINO's evaluation. `labels` (N,) int64. With fewer than k
    training rows, all vote. The answer lies on the features' device.

    Raises:
        ValueError: no training rows, or shapes that do not belong together.
    """
    if not len(train) or train.shape[1:] != test.shape[1:] or labels.shape != train.shape[:1]:
        raise ValueError(
            f"knn: train {tuple(train.shape)}, labels {tuple(labels.shape)} and "
            f"test {tuple(test.shape)} do not belong together"
        )
    known = functional.normalize(train.float(), dim=1).T
    labels = labels.to(train.device)
    classes = int(labels.max()) + 1
    predicted = []
    for start in range(0, len(test), CHUNK):
        rows = test[start : start + CHUNK]
        similarity = functional.normalize(rows.float(), dim=1) @ known
        nearest, index = similarity.topk(min(k, len(train)), dim=1)
        # Less the largest: no overflow at low temperatures, and the votes compare alike.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = torch.zeros(len(rows), classes, device=weights.device)
        votes.scatter_add_(1, labels[index], weights)
        predicted.append(votes.argmax(1))
    return torch.cat(predicted) if predicted else labels.new_empty(0)


def linear_probe(
    train: Tensor,
    labels: Tensor,
    val: Tensor,
    val_labels: Tensor,
    test: Tensor,
    classes: int,
) -> Tensor:
    """Predicted class numbers (M,) for `test` (M, C) by multinomial logistic regression.

    Features are standardised by `train` (N, C); the penalty is the one of PENALTIES with the most
    right answers on `val` (V, C), the strongest among equals. The whole batch at once, by L-BFGS:
    nothing is drawn at random, so the same features give the same answer. `labels` (N,) and
    `val_labels` (V,) int64 in [0, classes).
    """
    mean, std = train.float().mean(0), train.float().std(0).clamp_min(1e-6)
    train, val, test = ((rows.float() - mean) / std for rows in (train, val, test))
    labels, val_labels = labels.to(train.device), val_labels.to(train.device)
    # Callers stand in inference_mode or no_grad as often as not.
    with torch.inference_mode(False), torch.enable_grad():
        train, val, test = train.clone(), val.clone(), test.clone()
        labels = labels.clone()
        weight = torch.zeros(classes, train.shape[1], device=train.device, requires_grad=True)
        bias = torch.zeros(classes, device=train.device, requires_grad=True)
        best, predicted = -1, torch.empty(0)
        for penalty in PENALTIES:
            optimiser = torch.optim.LBFGS(
                [weight, bias],
                max_iter=STEPS,
                tolerance_grad=1e-4,  # further steps move no answer
                tolerance_change=1e-6,
                line_search_fn="strong_wolfe",
            )

            def loss(penalty: float = penalty, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
                optimiser.zero_grad()
                value = functional.cross_entropy(train @ weight.T + bias, labels)
                value = value + penalty / 2 * weight.square().sum()
                value.backward()  # type: ignore[no-untyped-call]
                return value

            optimiser.step(loss)  # type: ignore[no-untyped-call]
            with torch.no_grad():
                right = int(((val @ weight.T + bias).argmax(1) == val_labels).sum())
                if right > best:
                    best, predicted = right, (test @ weight.T + bias).argmax(1)
    return predicted
