"""A lineage that was tampered with is told, and the first link that does not hold is named."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ringmo.cli import main
from ringmo.data import versions
from ringmo.registry import verify
from ringmo.registry.origins import SUMS
from ringmo.registry.tracker import Tracker
from ringmo.workspace import Workspace

pytestmark = pytest.mark.slow


class Registered:
    """scene/1 as it lies in MLflow; what a test changes is put back."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.tracker = workspace, Tracker(workspace)
        version = self.tracker.version("scene", 1)
        assert version is not None
        self.version = version
        self.bundle = self.tracker.bundle_folder(version)
        self.lineage = self.tracker.lineage_folder(version)

    def tag(self, **tags: str) -> None:
        self.tracker.tag_version(self.version, tags)

    def seal(self, **tags: str) -> None:
        """Sums and tags as a forger would make them fit."""
        names = (line.partition("  ")[2] for line in (self.lineage / SUMS).read_text().splitlines())
        there = [name for name in names if (self.lineage / name).is_file()]
        sums = "".join(f"{_sha256(self.lineage / name)}  {name}\n" for name in there)
        (self.lineage / SUMS).write_text(sums)
        lock = _sha256(self.lineage / "dvc.lock")
        self.tag(lineage_hash=_sha256(self.lineage / SUMS), stage_lock=lock)
        self.tag(**tags)

    def edit(self, name: str, old: str, new: str, count: int = 1) -> None:
        path = self.lineage / name
        text, made = re.subn(old, new, path.read_text(), count=count, flags=re.DOTALL)
        assert made, f"{name} has no {old}"
        path.write_text(text)

    def cached(self, path: str) -> Path:
        """A file of the data version in DVC's cache."""
        files = versions.listed((self.lineage / "outs" / "data" / "store.json").read_bytes())
        return versions.Cache(self.workspace).file(files[path])

    def first_broken(self, deep: bool = False) -> str | None:
        links = verify.broken(verify.verify(self.workspace, "scene/1", deep))
        return links[0].link if links else None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registered(made: Workspace, tmp_path: Path) -> Iterator[Registered]:
    found = Registered(made)
    kept = tmp_path / "kept"
    places = (found.bundle, found.lineage, made.root / ".dvc" / "cache")
    for i, folder in enumerate(places):
        shutil.copytree(folder, kept / str(i))
    yield found
    for i, folder in enumerate(places):
        shutil.rmtree(folder)
        shutil.copytree(kept / str(i), folder)
    found.tag(**found.version.tags)


def _other(path: Path) -> None:
    """Another last byte, in a file of its own: the store's is a link to the same bytes."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def _weights(at: Registered) -> None:
    _other(at.bundle / "model.safetensors")


def _description(at: Registered) -> None:
    meta = json.loads((at.bundle / "model.json").read_text())
    (at.bundle / "model.json").write_text(json.dumps(meta | {"figures": {}}))


def _file(at: Registered) -> None:
    at.edit("environment.txt", "torch==", "torch==9.")


def _lock(at: Registered) -> None:
    at.edit("dvc.lock", "cmd: ringmo validate", "cmd: ringmo  validate")
    lock = str(at.version.tags["stage_lock"])
    at.seal()
    at.tag(stage_lock=lock)


def _parameters(at: Registered) -> None:
    at.edit("params.yaml", "mlflow_port: 5000", "mlflow_port: 5001")
    at.seal()


def _stage_parameters(at: Registered) -> None:
    from ringmo.config import Config, digest

    at.edit("params.yaml", r"mask_ratio: 0\.6", "mask_ratio: 0.7")
    at.seal(params_digest=digest(Config.load(at.lineage / "params.yaml")))


def _code(at: Registered) -> None:
    (at.lineage / "source.patch").unlink(missing_ok=True)
    at.seal(code_clean="false")


def _listing(at: Registered) -> None:
    at.edit("outs/work/finetune-scene.json", '"md5": "..', '"md5": "00')
    at.seal()


def _dep(stage: str, path: str) -> Callable[[Registered], None]:
    def change(at: Registered) -> None:
        at.edit(
            "dvc.lock",
            rf"(\n  {stage}:.*?- path: {path}\n      hash: md5\n      md5: )..",
            r"\g<1>00",
        )
        at.seal()

    return change


def _selection(at: Registered) -> None:
    at.tag(selection="0" * 64)


def _tiles(at: Registered) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(at.lineage / "tiles.parquet")
    hashes = table["content_hash"].to_pylist()
    other = pa.array(["0" * 64, *hashes[1:]])
    pq.write_table(table.set_column(1, "content_hash", other), at.lineage / "tiles.parquet")
    at.seal()


def _row(at: Registered) -> None:
    at.edit("data.json", '"manifest": "..', '"manifest": "00')
    at.seal()


def _store(at: Registered) -> None:
    at.edit("store.dvc", "md5: ..", "md5: 00")
    at.seal()


def _manifest(at: Registered) -> None:
    path = at.cached("manifest.parquet")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"\n")


def _shard(at: Registered) -> None:
    _other(at.cached("tiles-000000.tar"))


@pytest.mark.parametrize(
    ("change", "link"),
    [
        (_weights, "weights"),
        (_description, "bundle"),
        (_file, "lineage files"),
        (_lock, "stage lock"),
        (_parameters, "parameters"),
        (_stage_parameters, "parameters of the stages"),
        (_code, "code"),
        (_listing, "finetune@scene: output"),
        (_dep("evaluate@scene", "work/finetune-scene/model"), "evaluate: input"),
        (_dep("finetune@scene", "work/pretrain/encoder"), "finetune@scene: encoder"),
        (_dep("finetune@scene", "work/select/scene.parquet"), "finetune@scene: inputs"),
        (_selection, "selection"),
        (_tiles, "tiles"),
        (_row, "select: manifest"),
        (_store, "data version"),
        (_shard, "shards"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_link_that_does_not_hold_is_named(
    registered: Registered, change: Callable[[Registered], None], link: str
) -> None:
    change(registered)
    assert registered.first_broken(deep=link == "shards") == link


def test_a_manifest_with_other_bytes_is_named(registered: Registered) -> None:
    _manifest(registered)
    links = verify.broken(verify.verify(registered.workspace, "scene/1"))
    assert "manifest" in [link.link for link in links if link.of == "scene/1"]


def test_tiles_with_other_bytes_are_named(registered: Registered) -> None:
    path = registered.cached("tiles-000000.tar")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(bytes(len(data)))
    links = verify.broken(verify.verify(registered.workspace, "scene/1", deep=True))
    assert [link.link for link in links][:2] == ["shards", "tiles' bytes"]


def test_a_whole_lineage_holds_and_says_what_was_not_read(
    made: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--workspace", str(made.root)]
    assert main(["lineage", "scene@champion", "--verify", "--json", *where]) == 0
    answer: Any = json.loads(capsys.readouterr().out)
    assert answer["holds"] and answer["first_broken"] is None
    unread = {link["link"] for link in answer["links"] if link["state"] != "ok"}
    assert unread == {"shards", "tiles' bytes"}
    assert {link["of"] for link in answer["links"]} == {"scene/1", "encoder/1"}
    assert main(["lineage", "scene@champion", "--verify", "--deep", *where]) == 0
    assert "Every link holds." in capsys.readouterr().out


def test_what_is_not_here_is_said_and_is_no_failure(registered: Registered) -> None:
    made = registered.workspace
    shutil.rmtree(made.root / ".dvc" / "cache" / "files")
    away = made.root.parent / "store-away"
    made.store.rename(away)
    try:
        links = verify.verify(made, "scene/1", deep=True)
    finally:
        away.rename(made.store)
    assert not verify.broken(links)
    absent = {link.link for link in links if link.of == "scene/1" and link.state == verify.NOT_HERE}
    assert absent == {"selection", "tiles", "manifest", "shards", "tiles' bytes"}


def test_a_broken_link_ends_with_exit_code_1(
    registered: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    _weights(registered)
    where = ["--workspace", str(registered.workspace.root)]
    assert main(["lineage", "scene/1", "--verify", *where]) == 1
    assert "The first link that does not hold: scene/1: weights" in capsys.readouterr().out
