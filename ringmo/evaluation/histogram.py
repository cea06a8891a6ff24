"""The yardstick: logistic regression on colour and gradient histograms.

A model that does not beat it has learnt nothing about what lies in an image. It sees the same
training labels as the model.
"""

import numpy as np
from numpy.typing import NDArray

from ringmo.data.decode import Pixels

COLOUR_BINS = 8  # a band and side: joint bins of the first three bands, and each band by itself
GRADIENT_BINS = 12  # directions, weighted by strength, in a 2×2 grid
SIDE = 96  # pixels: histograms change little with more
COMPONENTS = 128


def describe(image: Pixels) -> NDArray[np.float32]:
    """Histograms of a square tile (H, W, C): colours jointly and a band, gradients in quadrants."""
    pixels = image.astype(np.float32)
    bands = pixels.shape[2]
    parts = []
    coarse = image[:, :, : min(3, bands)].astype(np.int64) * COLOUR_BINS // 256
    joint = np.zeros(coarse.shape[:2], np.int64)
    for band in range(coarse.shape[2]):
        joint = joint * COLOUR_BINS + coarse[:, :, band]
    parts.append(np.bincount(joint.ravel(), minlength=COLOUR_BINS ** coarse.shape[2]))
    for band in range(bands):
        fine = np.bincount((image[:, :, band] // 8).ravel(), minlength=32)
        parts.append(fine)
    down, right = np.gradient(pixels.mean(2))
    strength = np.hypot(down, right)
    angle = (np.arctan2(down, right) % np.pi) / np.pi * GRADIENT_BINS
    direction = np.minimum(angle.astype(np.int64), GRADIENT_BINS - 1)
    half = image.shape[0] // 2
    for rows in (slice(0, half), slice(half, None)):
        for columns in (slice(0, half), slice(half, None)):
            weights = strength[rows, columns].ravel()
            bins = direction[rows, columns].ravel()
            parts.append(np.bincount(bins, weights=weights, minlength=GRADIENT_BINS))
    levels = np.minimum(strength / 4, 15).astype(np.int64)
    parts.append(np.bincount(levels.ravel(), minlength=16))
    # Square roots: a histogram's few large bins would otherwise drown all others.
    return np.concatenate([np.sqrt(part / max(part.sum(), 1e-9)) for part in parts]).astype("f4")


def fit_predict(
    train: NDArray[np.float32], labels: NDArray[np.int64], test: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Class numbers (M,) for `test` (M, D) after training on `train` (N, D)."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    # A fifth of the components hold nearly all that tells classes apart, in a tenth of the time.
    keep = min(COMPONENTS, *train.shape)
    axes = PCA(keep, whiten=True, svd_solver="covariance_eigh", random_state=0).fit(train)
    model = LogisticRegression(C=0.01, max_iter=300)
    model.fit(axes.transform(train), labels)
    predicted: NDArray[np.int64] = model.predict(axes.transform(test))
    return predicted
