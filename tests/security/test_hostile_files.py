"""Files from strangers: what they hold is never run, nor read outside of their folder; each is
refused in one line. (Weights: tests/registry/test_bundle.py, tests/models/test_transfer.py;
archives: tests/data/test_fetch.py; what a server is sent: tests/inference/test_server.py.)"""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagery import write_class_folders
from registered import write_model

from ringmo import config
from ringmo.cli import main
from ringmo.config import Config
from ringmo.data import store, versions
from ringmo.data.ingest import ingest
from ringmo.errors import BadInput
from ringmo.registry import bundle
from ringmo.workspace import Workspace

EXECUTED = "executed"
TAG = "!!python/object/apply:os.system ['touch {}']"


class Evil:
    """A pickle that leaves a file when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return Path.touch, (self.folder / EXECUTED,)


def refused(capsys: Any, *arguments: str) -> str:
    """What a command says that refuses its input: exit code 2, one line."""
    capsys.readouterr()
    assert main([*arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("ringmo: ") and "\n" not in said, said
    return said


# YAML


@pytest.mark.parametrize("file", ["params.yaml", "dvc.yaml", "dvc.lock", "data/store.dvc"])
def test_yaml_tags_name_no_python(
    workspace: Workspace, tmp_path: Path, capsys: Any, file: str
) -> None:
    path = workspace.root / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\nevil: {TAG.format(tmp_path / EXECUTED)}\n")
    refused(capsys, "run", "--dry-run", "--workspace", str(workspace.root))
    assert not (tmp_path / EXECUTED).exists()


def test_a_value_on_the_command_line_names_no_python(
    workspace: Workspace, tmp_path: Path, capsys: Any
) -> None:
    before = workspace.params_file.read_text()
    value = TAG.format(tmp_path / EXECUTED)
    where = ("--workspace", str(workspace.root))
    said = refused(capsys, "run", "--dry-run", "--set", f"run.retries={value}", *where)
    assert "not YAML" in said
    assert not (tmp_path / EXECUTED).exists() and workspace.params_file.read_text() == before


# The manifest


@pytest.fixture
def stored(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A workspace with a few tiles, beside which a file lies that is none of its."""
    write_class_folders(tmp_path / "imagery", 2)
    config.edit(workspace.params_file, {"ingest.sources": [str(tmp_path / "imagery")]})
    ingest(Config.load(workspace.params_file), workspace)
    shard = next(workspace.store.glob("tiles-*.tar"))
    (tmp_path / "secret.tar").write_bytes(shard.read_bytes())
    return workspace


def renamed(place: Workspace, shard: str) -> None:
    """All rows of the manifest say that their bytes lie in this shard."""
    rows = store.read_arrow(place.store / store.MANIFEST, store.COLUMNS, "")
    names = [shard] * len(rows)
    changed = store.with_column(rows, "shard", names)
    store.write_table(
        place.store / store.MANIFEST, changed, store.COLUMNS, {"shards": 1, "ingest": 1}
    )


def test_a_manifest_names_no_file_outside_the_store(
    stored: Workspace, tmp_path: Path, capsys: Any
) -> None:
    secret, link = tmp_path / "secret.tar", "tiles-000007.tar"
    (stored.store / link).symlink_to(secret)
    for shard in (str(secret), "../../../secret.tar", "manifest.parquet", link):
        renamed(stored, shard)
        row = store.TileStore(stored.store).manifest().iloc[0]
        with pytest.raises(BadInput) as error:
            store.TileStore(stored.store).read(row["shard"], row["offset"], row["size"])
        assert "\n" not in str(error.value)
        refused(capsys, "data", "show", "--workspace", str(stored.root))
        assert not (stored.state / "data.html").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "a/../../x"])
def test_dvc_s_lists_name_no_file_outside_their_folder(name: str) -> None:
    listing = json.dumps([{"relpath": name, "md5": "0" * 32}]).encode()
    with pytest.raises(BadInput, match="outside of its folder"):
        versions.listed(listing)


@pytest.mark.parametrize(
    "digest", ["../etc/passwd", "..//etc/passwd", "", "0" * 31, "0" * 32 + "/"]
)
def test_a_hash_is_no_path(workspace: Workspace, digest: str) -> None:
    cache = versions.Cache(workspace)
    assert cache.file(digest) == cache.root / "none" and cache.listing(digest) is None


# Models


def changed(folder: Path, **values: Any) -> None:
    path = folder / "model.json"
    meta = json.loads(path.read_text())
    for key, value in values.items():
        meta[key] = {**meta[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "values",
    [
        {"architecture": {"embed_dim": 1 << 30}},
        {"architecture": {"depths": [1, 1 << 30]}},
        {"architecture": {"image_size": 1 << 20}},
        {"image_size": 1 << 20},
        {"kind": "../../scene"},
        {"kind": "os"},
        {"sensor": "__class__"},
        {"weights_sha256": "0" * 64},
    ],
    ids=lambda values: json.dumps(values)[:40],
)
def test_a_model_json_that_was_tampered_with(workspace: Workspace, values: Any) -> None:
    folder = write_model(workspace)
    changed(folder, **values)
    with pytest.raises(BadInput) as error:
        bundle.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1, 100_000_001])
def test_weights_whose_header_claims_to_be_huge(workspace: Workspace, size: int) -> None:
    folder = write_model(workspace)
    data = size.to_bytes(8, "little") + (folder / "model.safetensors").read_bytes()[8:]
    (folder / "model.safetensors").write_bytes(data)
    changed(folder, weights_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(BadInput, match=r"model\.safetensors is damaged") as error:
        bundle.load(folder)
    assert "\n" not in str(error.value)


def test_weights_that_torch_saved_are_no_weights(workspace: Workspace, tmp_path: Path) -> None:
    import torch

    folder = write_model(workspace)
    torch.save({"evil": Evil(tmp_path)}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    changed(folder, weights_sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(BadInput, match="is damaged"):
        bundle.load(folder)
    assert not (tmp_path / EXECUTED).exists()


# What a workspace keeps for itself, brought by somebody else


def test_a_checkpoint_that_is_a_pickle_is_put_away(tmp_path: Path) -> None:
    from ringmo.training import checkpoint

    planted = tmp_path / "step-00000009.safetensors"
    planted.write_bytes(pickle.dumps(Evil(tmp_path)))
    assert checkpoint.read(tmp_path) is None
    assert not (tmp_path / EXECUTED).exists()


def test_arrays_of_objects_are_not_unpickled(tmp_path: Path) -> None:
    """Evidence and the blocks of a scene, in which NumPy would keep objects as pickles."""
    from ringmo.inference.progress_folder import ProgressFolder

    evil = np.array([Evil(tmp_path)], dtype=object)
    np.savez(tmp_path / "0000000.npz", answer=evil)
    kept = ProgressFolder.__new__(ProgressFolder)
    kept.folder = tmp_path
    with pytest.raises(ValueError, match="allow_pickle"):
        kept.read(0, "answer")
    assert not (tmp_path / EXECUTED).exists()


# Images, and names that a shell would understand


def test_pickles_among_the_images_are_set_aside(
    workspace: Workspace, tmp_path: Path, capsys: Any
) -> None:
    source = write_class_folders(tmp_path / "imagery", 2)
    for name in ("evil.jpg", "evil.tif", "evil.png"):
        (source / "town" / name).write_bytes(pickle.dumps(Evil(tmp_path)))
    values = {"ingest.sources": [str(source)], "ingest.max_bad_share": 1.0}
    config.edit(workspace.params_file, values)
    report = ingest(Config.load(workspace.params_file), workspace)
    assert report.figures["tiles"] == 8
    aside = store.read_arrow(workspace.store / store.QUARANTINE, store.QUARANTINE_COLUMNS, "")
    assert set(aside["reason"].to_pylist()) == {"not an image (JPEG, PNG and TIFF are read)"}
    assert not (tmp_path / EXECUTED).exists()
