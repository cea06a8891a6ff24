"""The search for near-duplicates among millions of perceptual hashes, in a process of its own.

    python -m benchmarks.duplicates '{"listed": FILE, "hashes": 2000000}'

A third are hashes of real images, turned and mirrored, with a tenth of their bits flipped: as
unevenly spread as real ones, with pairs by chance. A third have more flipped, a third are random.
Every twentieth is a copy of another with up to three bits flipped, so that what must be found is
known; every fiftieth is a blank tile, as alike as can be and left out before the search.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.child import peak_mb
from benchmarks.growth import flips

BITS = 3
SAMPLE = 100  # hashes that are compared with every other one


def real_hashes(files: list[str]) -> NDArray[np.uint64]:
    """Hashes of the images in each of the eight ways to lay a square."""
    from ringmo.data.decode import decode
    from ringmo.data.measures import grey, perceptual_hash

    found = []
    for file in files:
        shade = grey(decode(Path(file).read_bytes())[:, :, :3])
        for turns in range(4):
            for mirrored in (False, True):
                laid = np.rot90(shade.T if mirrored else shade, turns)
                found.append(int(perceptual_hash(np.ascontiguousarray(laid)), 16))
    return np.array(found, np.uint64)


def hashes(files: list[str], count: int) -> tuple[NDArray[np.uint64], NDArray[np.bool_], Any]:
    """Hashes; which are of blank tiles; and pairs (N, 2) that were planted."""
    dice = np.random.default_rng(0)
    real = real_hashes(files)
    third = count // 3
    parents = real[dice.integers(len(real), size=2 * third)]
    parents ^= np.concatenate([flips(dice, third, 0.1), flips(dice, third, 0.3)])
    others = dice.integers(2**64, size=count - 2 * third, dtype=np.uint64)
    every = dice.permutation(np.concatenate([parents, others]))
    copies, originals = np.split(dice.permutation(count)[: count // 20 * 2], 2)
    bits = np.uint64(1) << dice.integers(64, size=(len(copies), BITS)).astype(np.uint64)
    every[copies] = every[originals] ^ np.bitwise_xor.reduce(bits, axis=1)
    blank = np.zeros(count, np.bool_)
    blank[dice.permutation(count)[: count // 50]] = True
    every[blank] = 0
    planted = np.stack([copies, originals], axis=1)
    return every, blank, planted[~blank[planted].any(axis=1)]


def search(spec: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the search; every planted pair and a sample by brute force must be found."""
    from ringmo.data import lookalikes

    every, blank, planted = hashes(Path(spec["listed"]).read_text().splitlines(), spec["hashes"])
    textured = np.flatnonzero(~blank)
    before = peak_mb()
    started = time.perf_counter()
    pairs = lookalikes.near_duplicates(every[textured], BITS, np.ones(len(textured), np.bool_))
    # A generator, or an array (N, 2).
    found = np.asarray(pairs if isinstance(pairs, np.ndarray) else list(pairs), np.int64)
    seconds = time.perf_counter() - started
    peak = peak_mb()
    found = np.unique(np.sort(textured[found.reshape(-1, 2)], axis=1), axis=0)
    have = set(map(tuple, found.tolist()))
    wanted = {(min(a, b), max(a, b)) for a, b in planted.tolist()}
    for i in np.random.default_rng(1).choice(textured, min(SAMPLE, len(textured)), replace=False):
        near = textured[np.bitwise_count(every[textured] ^ every[i]) <= BITS]
        wanted |= {(min(i, j), max(i, j)) for j in near.tolist() if j != i}
    apart = np.bitwise_count(every[found[:, 0]] ^ every[found[:, 1]])
    missed = len(wanted - have)
    if missed or (apart > BITS).any():
        raise SystemExit(f"{missed} of {len(wanted)} pairs missed, {(apart > BITS).sum()} false")
    return {
        "seconds": seconds,
        "memory_mb": peak,
        "before_mb": before,
        "pairs": len(found),
        "checked": len(wanted),
        "blank": int(blank.sum()),
    }


if __name__ == "__main__":
    from benchmarks.child import begin

    asked = json.loads(sys.argv[1])
    begin(asked["cores"])
    print(json.dumps(search(asked)), flush=True)
