from typing import Any

import made_store
import numpy as np
import pandas as pd
import pytest
import rasterio
import torch

from ringmo.data.loading import SelectedTiles, shuffled, square, squares
from ringmo.data.store import COLUMNS, MANIFEST, ShardWriter, sha256, write_table
from ringmo.errors import BadInput

# What each made sensor measures: bands, dtype, and the values between which its pixels lie.
SENSORS = {
    "s2": (13, "int16", -50, 12_000),
    "raw": (4, "uint16", 0, 65_535),
    "s1": (2, "float32", -30, 5),
    "old": (1, "float64", -30, 5),
}


@pytest.fixture
def filled(workspace: Any) -> Any:
    made_store.make_selections(workspace, made_store.make_store(workspace, per_class=5))
    return workspace


@pytest.fixture
def measured(workspace: Any) -> tuple[Any, dict[str, Any]]:
    """A store of GeoTIFF tiles of four sensors, 20 pixels and larger, and what is in them."""
    random = np.random.default_rng(1)
    workspace.store.mkdir(parents=True, exist_ok=True)
    writer, rows, images = ShardWriter(workspace.store, 0, 64), [], {}
    for number in range(12):
        name = list(SENSORS)[number % len(SENSORS)]
        bands, dtype, low, high = SENSORS[name]
        side = 20 + number
        image = random.uniform(low, high, (bands, side, side)).astype(dtype)
        with rasterio.MemoryFile() as memory:
            with memory.open(
                driver="GTiff", width=side, height=side, count=bands, dtype=dtype
            ) as file:
                file.write(image)
            data = memory.read()
        digest = sha256(data)
        shard, offset = writer.add(f"{digest[:16]}.tif", data)
        facts: dict[str, Any] = dict.fromkeys(COLUMNS)
        facts |= {"key": digest[:16], "shard": shard, "offset": offset, "size": len(data)}
        facts |= {"row": 0, "col": 0, "width": side, "height": side, "sensor": name}
        facts |= {"bands": bands, "dtype": dtype, "content_hash": digest, "split": "train"}
        rows.append(facts | {"member": f"{digest[:16]}.tif", "generated": True, "ingest": 1})
        images[digest[:16]] = image.transpose(1, 2, 0)
    writer.commit()
    write_table(workspace.store / MANIFEST, rows, COLUMNS)
    made_store.make_selections(workspace, pd.DataFrame(rows))
    return workspace, images


def test_square_is_the_centre_and_the_same_bytes_at_its_own_size() -> None:
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    same = square(image, 40)
    assert same.shape == (3, 40, 40) and same.dtype == torch.uint8
    assert np.array_equal(same.permute(1, 2, 0).numpy(), image[:, 10:50])


def test_shrinking_averages_instead_of_skipping() -> None:
    chequered = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    small = square(chequered, 16).float()
    assert (small[:, 2:-2, 2:-2] - 127.5).abs().max() < 20


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("bands", [1, 2, 3, 13])
def test_squares_keep_the_dtype_and_the_values(dtype: str, bands: int) -> None:
    flat = np.full((60, 50, bands), 113, dtype)
    small = square(flat, 16)
    assert small.shape == (bands, 16, 16)
    assert small.dtype == getattr(torch, "float32" if dtype == "float64" else dtype)
    assert np.allclose(small.numpy(), 113, rtol=1e-6 if small.is_floating_point() else 0)
    if dtype in ("int16", "uint16"):
        top = np.iinfo(dtype).max
        assert (square(np.full((60, 50, bands), top, dtype), 16).numpy() == top).all()


def test_a_tile_is_the_same_alone_and_among_others() -> None:
    random = np.random.default_rng(0)
    for dtype, bands in (("uint8", 3), ("uint8", 1), ("uint16", 4), ("int16", 13), ("float32", 2)):
        shapes = [(90, 90), (90, 70), (64, 64), (90, 90), (50, 90), (90, 90)]
        images = [(random.random((*s, bands)) * 250).astype(dtype) for s in shapes]
        together = squares(images, 64)
        assert together.shape == (6, 64, 64, bands)
        for image, tile in zip(images, together, strict=True):
            assert torch.equal(square(image, 64), tile.permute(2, 0, 1)), dtype


def test_pixels_that_no_sensor_has_are_refused() -> None:
    with pytest.raises(BadInput, match="complex64"):
        square(np.zeros((8, 8, 1), np.complex64), 4)


def test_a_sensors_tiles_come_as_they_were_measured(measured: Any) -> None:
    workspace, images = measured
    selection = workspace.work("select") / "pretrain.parquet"
    for name, (bands, dtype, low, high) in SENSORS.items():
        tiles = SelectedTiles(workspace, selection, sensor=name)
        assert len(tiles) == 3 and set(tiles.table["sensor"]) == {name}
        for batch in tiles.batches(np.arange(3), 2, 20):
            assert batch.images.shape[1:] == (bands, 20, 20)
            assert batch.images.dtype == getattr(torch, dtype.replace("64", "32"))
            values = batch.images.numpy()
            assert values.min() >= low and values.max() <= high
            assert len(np.unique(values)) > 100
            for tile, key in zip(batch.images, tiles.keys(batch.rows), strict=True):
                assert torch.equal(tile, square(images[key], 20))
    assert len(SelectedTiles(workspace, selection, sensor="rgb")) == 0


def test_one_batch_holds_one_sensor(measured: Any) -> None:
    workspace, _ = measured
    tiles = SelectedTiles(workspace, workspace.work("select") / "pretrain.parquet")
    assert len(tiles) == 12
    with pytest.raises(BadInput, match="more than one kind"):
        list(tiles.batches(np.arange(12), 4, 20))


def test_tile_that_is_not_what_the_manifest_says_is_named(measured: Any) -> None:
    workspace, _ = measured
    tiles = SelectedTiles(workspace, workspace.work("select") / "pretrain.parquet", sensor="s2")
    tiles.table["bands"] = 12
    with pytest.raises(BadInput, match=f"{tiles.keys([0])[0]}: 13 bands of int16"):
        list(tiles.batches(np.arange(3), 3, 20))


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


@pytest.mark.parametrize("tiles_cached", [0, 2, 15])
def test_cache_changes_no_pixel(
    filled: Any, monkeypatch: pytest.MonkeyPatch, tiles_cached: int
) -> None:
    monkeypatch.setattr("ringmo.data.loading.CACHE_BYTES", tiles_cached * 3 * 24 * 24)
    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    order = shuffled(15, 0, 0)
    twice = [torch.cat([b.images for b in tiles.batches(order, 4, 24)]) for _ in "ab"]
    assert torch.equal(*twice)
    assert torch.equal(twice[0][3], square(tiles.image(int(order[3])), 24))


def test_cache_is_bounded_over_all_sizes(filled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 4 * 3 * 24 * 24
    monkeypatch.setattr("ringmo.data.loading.CACHE_BYTES", limit)
    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    for size in (24, 16, 20):
        for _ in tiles.batches(np.arange(15), 4, size):
            pass
    kept = sum(tile.untyped_storage().nbytes() for tile in tiles._cache.values())
    assert limit / 2 < kept <= limit


def test_tiles_kept_are_not_decoded_again(filled: Any) -> None:
    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    before = torch.cat([b.images for b in tiles.batches(np.arange(15), 4, 24)])
    (shard,) = filled.store.glob("*.tar")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert torch.equal(torch.cat([b.images for b in tiles.batches(np.arange(15), 4, 24)]), before)
    assert torch.equal(tiles.small(3, 24), before[3])


def test_workers_change_no_pixel_and_no_order(filled: Any) -> None:
    def all_of(workers: int | None) -> list[torch.Tensor]:
        tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
        batches = tiles.batches(shuffled(15, 0, 0), 4, 24, workers=workers, ahead=2)
        return [batch.images for batch in batches]

    for workers in (1, 7, None):
        assert all(map(torch.equal, all_of(3), all_of(workers)))


def test_a_training_that_stops_early_leaves_no_thread(filled: Any) -> None:
    import threading

    tiles = SelectedTiles(filled, filled.work("select") / "scene.parquet")
    batches = tiles.batches(np.tile(np.arange(15), 20), 4, 24)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("tiles")]


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
