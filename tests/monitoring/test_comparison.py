"""The tests themselves: as often wrong as they say, and able to find what they are for."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import NearestNeighbors

from ringmo.errors import BadInput
from ringmo.monitoring import comparison
from ringmo.monitoring.comparison import compare, distances, holm


def rows(
    random: np.random.Generator,
    scenes: int,
    tiles: int = 1,
    *,
    spread: float = 1.0,
    shift: float = 0.0,
    classes: tuple[float, ...] = (0.5, 0.3, 0.2),
    prefix: str = "s",
) -> pd.DataFrame:
    """Tiles of scenes, which differ by `spread` between scenes and by 1 within."""
    count = scenes * tiles
    scene = np.arange(count) // tiles
    between = random.normal(0, spread, (scenes, 8))[scene]
    features = random.normal(0, 1, (count, 8)) + between + shift
    # A scene's class is the same in all its tiles.
    label = random.choice(len(classes), scenes, p=classes)[scene]
    table: dict[str, Any] = {
        "scene": [f"{prefix}{i}" for i in scene],
        "name": [f"{prefix}{i}#{k}" for k, i in enumerate(scene)],
        "mean:rgb:red": 100 + 10 * features[:, 0],
        "mean:rgb:green": 90 + 10 * features[:, 1],
        "deviation:rgb:red": np.exp(0.2 * features[:, 2]),
        "deviation:rgb:green": np.exp(0.2 * features[:, 3]),
        "nodata:rgb": np.zeros(count),
        "confidence": 1 / (1 + np.exp(-features[:, 4])),
        "embedding": list(features.astype(np.float32)),
    }
    table |= {f"class:{name}": (label == i) * 1.0 for i, name in enumerate("abc")}
    return pd.DataFrame(table)


def alarms(repeats: int, **options: Any) -> int:
    found = 0
    for seed in range(repeats):
        random = np.random.default_rng(seed)
        before, now = rows(random, 60, 4), rows(random, 20, 4)
        if options.get("apart"):  # as if tiles were independent
            before, now = (f.assign(scene=f["name"] + str(i)) for i, f in enumerate((before, now)))
        found += compare(before, now, seed=seed).drifted
    return found


def test_false_alarms_are_as_rare_as_promised_though_tiles_of_a_scene_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comparison, "PERMUTATIONS", 199)
    # 5 of 100 are promised at most; 10 or more happen by chance in 3 of 100 such tests.
    assert alarms(100) < 10
    # Whoever takes tiles for independent is wrong nearly always.
    assert alarms(20, apart=True) > 10


@pytest.mark.parametrize(
    ("change", "test"),
    [
        ({"shift": 0.8}, {"bands", "embedding", "confidence"}),
        ({"classes": (0.05, 0.15, 0.8)}, {"classes"}),
    ],
)
def test_what_changed_is_found_and_named(change: dict[str, Any], test: set[str]) -> None:
    random = np.random.default_rng(3)
    found = compare(rows(random, 150), rows(random, 80, **change))
    assert {one.test for one in found.findings if one.drifted} == test


def test_one_band_alone_is_named() -> None:
    random = np.random.default_rng(4)
    before, now = rows(random, 100), rows(random, 40)
    now["mean:rgb:green"] = 0.0
    now["deviation:rgb:green"] = 0.0
    (bands, *others) = compare(before, now).findings
    assert bands.drifted and not any(one.drifted for one in others)
    assert {(p["of"], p["measure"]) for p in bands.parts if p["p"] <= 0.05} == {
        ("rgb green", "mean"),
        ("rgb green", "deviation"),
    }


def test_one_scene_of_many_tiles_is_one_witness() -> None:
    """A hundred tiles of one place that differs from others as places do are no drift."""
    random = np.random.default_rng(5)
    found = 0
    for seed in range(10):
        before, now = rows(random, 150, spread=2), rows(random, 1, 100, spread=2)
        found += compare(before, now, seed=seed).drifted
    assert found <= 2
    now = rows(random, 1, 100, spread=2, shift=30)  # but what no place ever was is
    assert compare(before, now).drifted


def test_the_discrepancy_is_gretton_s() -> None:
    random = np.random.default_rng(6)
    x, y = random.normal(0, 1, (30, 4)), random.normal(0.5, 1, (25, 4))
    drawn = comparison._drawn(55, 25, random)
    value, _, _, _ = comparison._discrepancy([x, y], np.arange(55), drawn)
    both = np.concatenate((x, y))
    both = (both - both.mean(0)) / both.std(0)
    squared = ((both[:, None] - both) ** 2).sum(2)
    median = np.median(squared[squared > 1e-9])
    kernel = np.mean([np.exp(-squared / (2 * median * w**2)) for w in (0.5, 1, 2)], axis=0)
    own = [kernel[:30, :30], kernel[30:, 30:]]
    parts = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in own]
    assert value == pytest.approx(sum(parts) - 2 * kernel[:30, 30:].mean(), rel=1e-2, abs=1e-4)


def test_order_of_rows_makes_no_difference() -> None:
    random = np.random.default_rng(7)
    before, now = rows(random, 40, 3), rows(random, 30, 2, shift=0.2)
    mixed = now.sample(frac=1, random_state=1).reset_index(drop=True)
    one, other = compare(before, now), compare(before, mixed)
    for a, b in zip(one.findings, other.findings, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-3) and a.p == pytest.approx(b.p, abs=0.003)


def test_distances_are_those_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "TOGETHER", 7)
    random = np.random.default_rng(8)
    x, y = random.normal(0, 1, (60, 5)), random.normal(0, 3, (20, 5))
    scale = x.std(0)
    search = NearestNeighbors(n_neighbors=5).fit(x / scale)
    own = search.kneighbors()[0].mean(1)
    wanted = search.kneighbors(y / scale)[0].mean(1) / np.quantile(own, 0.99)
    assert distances(x, y) == pytest.approx(wanted)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_heights_and_objects_are_compared_too() -> None:
    random = np.random.default_rng(9)
    before, now = rows(random, 100), rows(random, 50)
    keep = [name for name in before if not name.startswith(("class:", "confidence"))]
    heights = [
        f[keep].assign(**{"answer:mean": random.normal(5, 2, len(f))}) for f in (before, now)
    ]
    heights[1]["answer:mean"] += 3
    assert [f.test for f in compare(*heights).findings if f.drifted] == ["answers"]
    for table, mean in ((before, 2.0), (now, 4.0)):
        table["class:a"] = random.poisson(mean, len(table))
        table.loc[table.index % 3 == 0, "confidence"] = np.nan
    (found,) = [f for f in compare(before, now).findings if f.test == "classes"]
    assert found.drifted and found.value > 0.3


def test_an_embedding_that_some_lack_is_compared_of_the_others() -> None:
    random = np.random.default_rng(10)
    before, now = rows(random, 100), rows(random, 60, shift=1.0)
    now.loc[now.index % 2 == 0, "embedding"] = None
    found = compare(before, now)
    assert "embedding" in {f.test for f in found.findings if f.drifted}
    assert np.isnan(found.distance).sum() == 30
    found = compare(before, now.drop(columns="embedding"))
    assert {f.test for f in found.findings} == {"bands", "classes", "confidence"}


def test_too_little_is_said() -> None:
    random = np.random.default_rng(11)
    with pytest.raises(BadInput, match="5 tiles of production: at least 20"):
        compare(rows(random, 100), rows(random, 5))
    with pytest.raises(BadInput, match="1 scenes of production and 4 of the reference"):
        compare(rows(random, 4, 20), rows(random, 1, 40))


@pytest.mark.parametrize(("places", "drifted"), [(79, True), (78, None)])
def test_where_chance_alone_could_do_it_nothing_is_compared_and_else_it_can_be_found(
    places: int, drifted: bool | None
) -> None:
    """One scene of production, as far from all others as can be."""
    random = np.random.default_rng(12)
    before, now = rows(random, places), rows(random, 1, 40, shift=50)
    if drifted is None:
        with pytest.raises(BadInput, match="too few"):
            compare(before, now)
    else:
        found = {f.test: f for f in compare(before, now).findings}
        assert found["embedding"].p == 1 / (places + 1) and found["embedding"].drifted


def test_all_ways_there_are_each_once() -> None:
    chosen = comparison._drawn(6, 2, np.random.default_rng(0))
    assert len(chosen) == 15 == len({tuple(row) for row in chosen})
    assert chosen[0].tolist() == [0, 0, 0, 0, 1, 1] and set(chosen.sum(1)) == {2}
