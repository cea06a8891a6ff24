from typing import Any

import made_store
import numpy as np
import pandas as pd
import pytest
import torch

from ringmo.data.loading import SelectedTiles, shuffled, square
from ringmo.errors import BadInput


@pytest.fixture
def filled(workspace: Any) -> Any:
    made_store.make_selections(workspace, made_store.make_store(workspace, per_class=5))
    return workspace


def test_square_is_the_centre_and_the_same_bytes_at_its_own_size() -> None:
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    same = square(image, 40)
    assert same.shape == (3, 40, 40) and same.dtype == torch.uint8
    assert np.array_equal(same.permute(1, 2, 0).numpy(), image[:, 10:50])


def test_shrinking_averages_instead_of_skipping() -> None:
    chequered = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    small = square(chequered, 16).float()
    assert (small[:, 2:-2, 2:-2] - 127.5).abs().max() < 20


def test_every_tile_comes_once_in_the_order_asked_for(filled: Any) -> None:
    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    order = shuffled(len(tiles), seed=3, epoch=2)
    assert sorted(order) == list(range(15))
    batches = list(tiles.batches(order, 4, 24))
    assert [len(batch.images) for batch in batches] == [4, 4, 4, 3]
    assert np.array_equal(np.concatenate([batch.rows for batch in batches]), order)
    for batch in batches:
        for image, row in zip(batch.images, batch.rows, strict=True):
            assert torch.equal(image, square(tiles.image(int(row)), 24))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert np.array_equal(shuffled(50, 1, 2), shuffled(50, 1, 2))
    assert not np.array_equal(shuffled(50, 1, 2), shuffled(50, 1, 3))
    assert not np.array_equal(shuffled(50, 1, 2), shuffled(50, 2, 2))


def test_small_cache_changes_no_pixel(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringmo.data.loading.CACHE_BYTES", 3 * 24 * 24 * 2)
    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    twice = [torch.cat([b.images for b in tiles.batches(np.arange(15), 4, 24)]) for _ in "ab"]
    assert torch.equal(*twice)


def test_splits_and_labels_are_the_selections(filled: Any) -> None:
    path = filled.work("select") / "scene.parquet"
    table = pd.read_parquet(path)
    table["label"] = "Corrected"
    table.to_parquet(path, index=False)
    tiles = SelectedTiles(filled, path, "test")
    assert set(tiles.table["label"]) == {"Corrected"} and set(tiles.table["split"]) == {"test"}
    assert tiles.table["place"].notna().all()


def test_selection_that_does_not_fit_the_store_is_refused(filled: Any) -> None:
    path = filled.work("select") / "scene.parquet"
    table = pd.read_parquet(path)
    for column, value in (("key", "0" * 16), ("content_hash", "0" * 64)):
        wrong = table.copy()
        wrong.loc[3, column] = value
        wrong.to_parquet(path, index=False)
        with pytest.raises(BadInput, match=r"\(1 such\): run `ringmo select`"):
            SelectedTiles(filled, path)
    path.write_bytes(b"no parquet")
    with pytest.raises(BadInput, match="damaged"):
        SelectedTiles(filled, path)


def test_unreadable_tile_is_named(filled: Any) -> None:
    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    (shard,) = filled.store.glob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(BadInput, match=tiles.keys([2])[0]):
        tiles.image(2)
    with pytest.raises(BadInput, match="tile"):
        list(tiles.batches(np.arange(15), 4, 24))
