"""Whether a lineage holds: every hash from a model's weights to the pixels, computed again.

A link is `ok`, `broken`, `not here` where what it needs is not on this machine, or `not read` where
it was not asked for: of the last two nothing was compared. The links stand in the order of the
chain, the model first.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.config import Config, digest
from ringmo.data import store, versions
from ringmo.errors import BadInput
from ringmo.registry import seen
from ringmo.registry.listing import resolve
from ringmo.registry.origins import ENCODER, PATCH, STORE, SUMS, Origins
from ringmo.registry.register import code_version, commit_known, stage_of
from ringmo.registry.tracker import BUNDLE_FILES, Tracker, Version, bundle_hash
from ringmo.workspace import CHAMPION, Workspace

OK, BROKEN, NOT_HERE, NOT_READ = "ok", "broken", "not here", "not read"
WEIGHTS, META = BUNDLE_FILES


Outcome = tuple[str, str]  # state, and what was found


@dataclass(frozen=True)
class Link:
    """One comparison: of which model, what was compared, how it came out, and what was found."""

    of: str
    link: str
    state: str
    found: str


def verify(workspace: Workspace, ref: str, deep: bool = False) -> list[Link]:
    """Every link of a model's lineage, and of its encoder's.

    Args:
        deep: read all shards of the data version, and each tile's bytes, too.

    Raises:
        BadInput: no such model, or one that was never registered.
        Unreachable: MLflow does not answer.
    """
    tracker = Tracker(workspace)
    version = resolve(workspace, ref, tracker)
    if not version.run_id:
        raise BadInput(f"{ref} was never registered: there is nothing to compare it with")
    shards: dict[str, Outcome] = {}  # data version → what reading it found: once is enough
    links = _links(_Chain(workspace, tracker, version, shards), deep)
    # Its encoder, and those that this one's pre-training started from.
    while encoder := tracker.of_bundle(ENCODER, version.tags.get("encoder_hash")):
        links += _links(_Chain(workspace, tracker, encoder, shards), deep)
        version = encoder
    return links


def broken(links: list[Link]) -> list[Link]:
    return [link for link in links if link.state == BROKEN]


def result(links: list[Link]) -> dict[str, Any]:
    """The answer for programs: holds, first_broken, links."""
    first = next(iter(broken(links)), None)
    return {
        "holds": first is None,
        "first_broken": asdict(first) if first else None,
        "links": [asdict(link) for link in links],
    }


def text(links: list[Link]) -> str:
    rows = [(link.of, link.link, link.state, link.found) for link in links]
    table = console.table(rows, ("model", "link", "state", "what was compared"))
    wrong = broken(links)
    absent = [link for link in links if link.state in (NOT_HERE, NOT_READ)]
    if wrong:
        end = f"The first link that does not hold: {wrong[0].of}: {wrong[0].link}: {wrong[0].found}"
    elif absent:
        end = f"All that was compared holds; {len(absent)} links were not compared."
    else:
        end = "Every link holds."
    return f"{table}\n\n{end}"


def _links(chain: "_Chain", deep: bool) -> list[Link]:
    links = []
    for name, check in chain.checks(deep):
        try:
            state, found = check()
        except FileNotFoundError as error:
            state, found = NOT_HERE, f"{error.filename} is missing"
        except (BadInput, KeyError, ValueError, TypeError, AttributeError) as error:
            state, found = BROKEN, f"cannot be read: {str(error)[:160]}"
        links.append(Link(str(chain.version), name, state, found))
    return links


def _same(what: str, one: Any, other: Any) -> Outcome:
    """Whether two hashes are one; `what` says of which things."""
    if not other:
        return NOT_HERE, f"{what}: nothing was recorded to compare with"
    if one == other:
        return OK, what
    return BROKEN, f"{what}: {str(one)[:12]} is not {str(other)[:12]}"


class _Chain:
    """One version's links. Each check returns its outcome; what is missing raises."""

    def __init__(
        self,
        workspace: Workspace,
        tracker: Tracker,
        version: Version,
        read: dict[str, Outcome],
    ) -> None:
        self.workspace, self.tracker, self.version = workspace, tracker, version
        self.read = read
        self.tags = version.tags
        self.stage = stage_of(version.model)
        self.cache = versions.Cache(workspace)
        try:
            self.bundle: Path | None = tracker.bundle_folder(version)
        except BadInput:
            self.bundle = None
        try:
            self.kept: Origins | None = Origins(tracker.lineage_folder(version))
        except BadInput:
            self.kept = None

    def checks(self, deep: bool) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        if said := self.version.cleaned:
            yield "bundle and lineage files", lambda: (NOT_HERE, said)
            return
        if self.bundle is None:
            yield "bundle", lambda: (BROKEN, "its files are gone from MLflow's store")
        else:
            yield "weights", self._weights
            yield "bundle", self._bundle
        if self.kept is None:
            yield "lineage files", lambda: (BROKEN, "they are gone from MLflow's store")
            return
        yield "lineage files", self._files
        yield "stage lock", self._lock
        yield "parameters", self._parameters
        yield "parameters of the stages", self._stage_parameters
        yield "code", self._code
        if self.bundle is not None:
            yield f"{self.stage}: output", self._output
        if self.version.model != ENCODER:
            yield "evaluate: input", self._evaluated
            yield f"{self.stage}: encoder", self._encoder
        elif self.bundle is not None and self.tags.get("encoder_hash"):
            yield f"{self.stage}: start", self._start
        yield f"{self.stage}: inputs", self._inputs
        yield "selection", self._selection
        yield "tiles", self._tiles
        yield "select: manifest", self._manifest
        yield "data version", self._data_version
        yield "manifest", self._manifest_bytes
        yield "shards", lambda: self._shards(deep)
        yield "tiles' bytes", lambda: self._bytes(deep)

    @property
    def origins(self) -> Origins:
        assert self.kept is not None
        return self.kept

    def _weights(self) -> Outcome:
        assert self.bundle is not None
        found = store.file_sha256(self.bundle / WEIGHTS)
        said = json.loads((self.bundle / META).read_text())["weights_sha256"]
        outcome = _same("model.safetensors and model.json", found, said)
        if outcome[0] == OK and (tag := self.tags.get("weights")):
            return _same("model.safetensors, model.json and the version's tag", found, tag)
        return outcome

    def _bundle(self) -> Outcome:
        assert self.bundle is not None
        found = bundle_hash(self.bundle)
        return _same("both files and the tag bundle_hash", found, self.version.bundle_hash)

    def _files(self) -> Outcome:
        sums = self.origins.sums()
        if not sums:
            return NOT_HERE, f"no {SUMS}: registered by an earlier ringmo"
        listed = store.file_sha256(self.origins.folder / SUMS)
        if listed != self.tags.get("lineage_hash"):
            return _same(f"{SUMS} and the tag lineage_hash", listed, self.tags.get("lineage_hash"))
        for name, was in sums.items():
            path = self.origins.folder / name
            if not path.is_file():
                return BROKEN, f"{name} is gone"
            if store.file_sha256(path) != was:
                return BROKEN, f"{name} was changed after registration"
        return OK, f"{len(sums)} files, {SUMS} and the tag lineage_hash"

    def _lock(self) -> Outcome:
        found = store.file_sha256(self.origins.folder / "dvc.lock")
        return _same("dvc.lock and the tag stage_lock", found, self.tags.get("stage_lock"))

    def _parameters(self) -> Outcome:
        path = self.origins.folder / "params.yaml"
        what = "params.yaml and the tag params_digest"
        if digest(Config.load(path)) == self.tags.get("params_digest"):
            return OK, what
        # Another version of the code has other defaults for what the file leaves out.
        if self.tags.get("code_version") != code_version()[0]:
            return NOT_HERE, f"{what}: the code that reads them is another than it was"
        return BROKEN, f"{what}: it is not what was registered"

    def _stage_parameters(self) -> Outcome:
        stages = self.origins.lock
        if self.stage not in stages:
            return NOT_HERE, f"dvc.lock has no {self.stage}: it ran without DVC"
        count = 0
        for stage, entry in stages.items():
            if "@" in stage and not stage.endswith(f"@{self.version.model}"):
                continue
            for file, values in entry.get("params", {}).items():
                there = self.origins.yaml(file)
                for name, value in values.items():
                    count += 1
                    if _value(there, name) != value:
                        return BROKEN, f"{stage}: {name} in dvc.lock is not {name} in {file}"
        return OK, f"{count} values in dvc.lock, params.yaml and revisions.yaml"

    def _code(self) -> Outcome:
        commit, clean = self.tags.get("code_version", ""), self.tags.get("code_clean") == "true"
        if not commit:
            return NOT_HERE, "no code version was recorded"
        if not clean and not (self.origins.folder / PATCH).is_file():
            return BROKEN, f"{PATCH} is gone, and the code was not as its commit"
        patch = "" if clean else f" and {PATCH}"
        if not commit_known(commit):
            return NOT_HERE, f"{commit[:12]}{patch}: the commit is not in this code's repository"
        return OK, f"commit {commit[:12]} is in this code's repository{patch}"

    def _output(self) -> Outcome:
        assert self.bundle is not None
        folder = "encoder" if self.version.model == ENCODER else "model"
        out = f"work/{self.stage.replace('@', '-')}"
        recorded = _md5_of(self._entry(self.stage).get("outs", []), out)
        if recorded is None:
            return NOT_HERE, f"dvc.lock has no {self.stage}: it ran without DVC"
        listing = self._listing(out, recorded)
        if listing is None:
            return NOT_HERE, f"DVC's list of {out} is neither kept nor in the cache"
        if versions.folder_hash(listing) != recorded:
            return BROKEN, f"DVC's list of {out} is not the one in dvc.lock"
        for name in BUNDLE_FILES:
            if listing.get(f"{folder}/{name}") != versions.file_md5(self.bundle / name):
                return BROKEN, f"{name} is not the one that {self.stage} wrote"
        return OK, f"the bundle's files, DVC's list of {out}, and dvc.lock"

    def _evaluated(self) -> Outcome:
        stage = f"evaluate@{self.version.model}"
        out = f"work/{self.stage.replace('@', '-')}/model"
        recorded = _md5_of(self._entry(stage).get("deps", []), out)
        if recorded is None or self.bundle is None:
            return NOT_HERE, f"dvc.lock has no {stage}"
        return _same(f"the bundle's files and what {stage} read", _folder(self.bundle), recorded)

    def _encoder(self) -> Outcome:
        assert self.bundle is not None
        wanted = json.loads((self.bundle / META).read_text())["lineage"].get("encoder")
        if wanted != self.tags.get("encoder_hash"):
            return _same("model.json and the tag encoder_hash", wanted, self.tags["encoder_hash"])
        encoder = self.tracker.of_bundle(ENCODER, self.tags.get("encoder_hash"))
        recorded = _md5_of(self._entry(self.stage).get("deps", []), "work/pretrain/encoder")
        if encoder is None:
            return NOT_HERE, f"encoder {str(wanted)[:12]} is not registered"
        try:
            found = _folder(self.tracker.bundle_folder(encoder))
        except BadInput:
            gone = f"{encoder}: its files are gone from MLflow's store"
            return NOT_HERE, encoder.cleaned or gone
        if recorded is None:
            return NOT_HERE, f"dvc.lock does not say what {self.stage} read"
        return _same(f"{encoder}'s files and what {self.stage} read", found, recorded)

    def _start(self) -> Outcome:
        """The encoder that pre-training went on from: model.json, the tag and champion.yaml."""
        assert self.bundle is not None
        wanted = json.loads((self.bundle / META).read_text())["lineage"].get("encoder")
        if wanted != self.tags.get("encoder_hash"):
            return _same("model.json and the tag encoder_hash", wanted, self.tags["encoder_hash"])
        named = (self.origins.yaml(CHAMPION) or {}).get("encoder")
        return _same(f"model.json, the tag and {CHAMPION}", wanted, named)

    def _inputs(self) -> Outcome:
        """What the training read of the selection is what `select` wrote."""
        out = _md5_of(self._entry("select").get("outs", []), "work/select")
        if out is None:
            return NOT_HERE, "dvc.lock has no select"
        listing = self._listing("work/select", out)
        if listing is None:
            return NOT_HERE, "DVC's list of work/select is neither kept nor in the cache"
        if versions.folder_hash(listing) != out:
            return BROKEN, "DVC's list of work/select is not the one in dvc.lock"
        deps = self._entry(self.stage).get("deps", [])
        for dep in deps:
            path = str(dep["path"])
            if path.startswith("work/select/"):
                name = path.removeprefix("work/select/")
                if listing.get(name) != dep.get("md5"):
                    return BROKEN, f"{self.stage} read another {name} than select wrote"
        return OK, f"what {self.stage} read, and what select wrote"

    def _selection(self) -> Outcome:
        """The selection's sha256, which model.json names, is of the file of this MD5."""
        wanted = self.tags.get("selection")
        if self.bundle is not None:
            told = json.loads((self.bundle / META).read_text())["lineage"].get("selection")
            if told != wanted:
                return _same("model.json and the tag selection", told, wanted)
        if (self.origins.yaml(CHAMPION) or {}).get("encoder") == self.version.bundle_hash:
            return NOT_HERE, f"taken as it is ({CHAMPION}): this lock is another training's"
        name = f"{'pretrain' if self.version.model == ENCODER else self.version.model}.parquet"
        md5 = _md5_of(self._entry(self.stage).get("deps", []), f"work/select/{name}")
        if md5 is None:
            return NOT_HERE, f"dvc.lock does not say which {name} was read"
        file = self.cache.file(md5)
        if not file.is_file():
            return NOT_HERE, f"{name} is not in DVC's cache: only model.json and tag agree"
        return _same(
            f"{name} in DVC's cache, model.json and the tag", store.file_sha256(file), wanted
        )

    def _tiles(self) -> Outcome:
        """The record of what it saw names the tiles of the manifest, by key and content."""
        if self.origins.tiles is None:
            return NOT_HERE, "the tiles it saw were not recorded"
        manifest = versions.manifest_file(self.workspace, self._recorded_manifest() or "")
        if manifest is None:
            return NOT_HERE, "the manifest is neither in the store nor in DVC's cache"
        rows = self._known(manifest)
        saw = seen.read(self.origins.tiles, ("key", "content_hash"))
        for key, content in zip(
            saw["key"].to_pylist(), saw["content_hash"].to_pylist(), strict=True
        ):
            if rows.get(key, ("",))[0] != content:
                return BROKEN, f"tile {key} is not in the manifest, or has other bytes there"
        return OK, f"{len(saw)} tiles and the manifest"

    def _known(self, manifest: Path) -> dict[str, tuple[str, str, int, int]]:
        """Key → content hash, shard, offset and size."""
        names = ("key", "content_hash", "shard", "offset", "size")
        columns = {name: store.COLUMNS[name] for name in names}
        table = store.read_some(manifest, columns, ["shard"], "fetch it again")
        values = [table[name].to_pylist() for name in names]
        rows = zip(*values, strict=True)
        return {key: (content, shard, at, size) for key, content, shard, at, size in rows}

    def _manifest(self) -> Outcome:
        recorded = self._recorded_manifest()
        if recorded is None:
            return NOT_HERE, "dvc.lock does not say which manifest was selected from"
        told = self.origins.data.get("manifest")
        if told and told != recorded:
            return _same("what select read and the data version's row", recorded, told)
        listing = self._listing(STORE, str(self.tags.get("data_version")))
        if listing is None:
            return NOT_HERE, f"DVC's list of {STORE} is neither kept nor in the cache"
        return _same(
            "what select read and the data version's manifest",
            recorded,
            listing["manifest.parquet"],
        )

    def _data_version(self) -> Outcome:
        tag = self.tags.get("data_version")
        kept = self.origins.yaml("store.dvc")
        if kept is None:
            return NOT_HERE, "store.dvc was not recorded"
        found = kept["outs"][0]["md5"]
        if found != tag:
            return _same("store.dvc and the tag data_version", found, tag)
        listing = self._listing(STORE, found)
        if listing is None:
            return NOT_HERE, f"store.dvc and tag agree; DVC's list of {STORE} is not here"
        what = "store.dvc, the tag data_version and DVC's list of the store"
        return _same(what, versions.folder_hash(listing), tag)

    def _manifest_bytes(self) -> Outcome:
        recorded = self._recorded_manifest() or ""
        path = self._file("manifest.parquet", recorded)
        if path is None:
            return NOT_HERE, "neither the store nor DVC's cache has it"
        return _same("the manifest's bytes and its MD5", versions.file_md5(path), recorded)

    def _shards(self, deep: bool) -> Outcome:
        files = self._store_files()
        if files is None:
            return NOT_HERE, f"DVC's list of {STORE} is not here"
        there = {name: path for name, md5 in files.items() if (path := self._file(name, md5))}
        size = sum(path.stat().st_size for path in there.values()) / 1e9
        if not deep:
            return (
                NOT_READ,
                f"{len(there)} of {len(files)} are here, {size:.3g} GB: --deep reads them",
            )
        version = str(self.tags.get("data_version"))
        if version not in self.read:
            self.read[version] = self._read_shards(files, there, size)
        return self.read[version]

    def _read_shards(self, files: dict[str, str], there: dict[str, Path], size: float) -> Outcome:
        with console.progress("shards", len(there)) as bar:
            for name, path in there.items():
                if versions.file_md5(path) != files[name]:
                    return BROKEN, f"{name} is damaged ({path})"
                bar.advance()
        if len(there) < len(files):
            return NOT_HERE, f"{len(there)} of {len(files)} are here, and hold"
        return OK, f"the bytes of {len(files)} shards and their MD5s ({size:.3g} GB)"

    def _bytes(self, deep: bool) -> Outcome:
        """Each tile that it saw, read where the manifest says, has the hash it had."""
        if self.origins.tiles is None:
            return NOT_HERE, "the tiles it saw were not recorded"
        if not deep:
            return NOT_READ, "--deep reads them"
        manifest = versions.manifest_file(self.workspace, self._recorded_manifest() or "")
        files = self._store_files()
        if manifest is None or files is None:
            return NOT_HERE, "the manifest, or DVC's list of the store, is not here"
        rows = self._known(manifest)
        keys = seen.read(self.origins.tiles, ("key",))["key"].to_pylist()
        absent = 0
        with console.progress("tiles", len(keys)) as bar:
            for key in sorted(keys, key=lambda key: rows[key][1:3]):
                content, shard, offset, size = rows[key]
                path = self._file(shard, files.get(shard, ""))
                if path is None:
                    absent += 1
                    continue
                with path.open("rb") as file:
                    file.seek(offset)
                    if store.sha256(file.read(size)) != content:
                        return BROKEN, f"tile {key} in {shard} has other bytes than it had"
                bar.advance()
        if absent:
            return NOT_HERE, f"{len(keys) - absent} of {len(keys)} are here, and hold"
        return OK, f"the bytes of {len(keys)} tiles and their content hashes"

    def _entry(self, stage: str) -> dict[str, Any]:
        entry: dict[str, Any] = self.origins.lock.get(stage) or {}
        return entry

    def _recorded_manifest(self) -> str | None:
        return _md5_of(self._entry("select").get("deps", []), f"{STORE}/{store.MANIFEST}")

    def _listing(self, out: str, recorded: str) -> dict[str, str] | None:
        """The files of a folder that the lock names: as kept with the version, or in the cache."""
        data = self.origins.listing(out) or self.cache.listing(recorded)
        return None if data is None else versions.listed(data)

    def _store_files(self) -> dict[str, str] | None:
        """Shard → MD5, of the data version."""
        listing = self._listing(STORE, str(self.tags.get("data_version")))
        if listing is None:
            return None
        return {name: md5 for name, md5 in listing.items() if name.endswith(".tar")}

    def _file(self, name: str, md5: str) -> Path | None:
        """A file of the data version: in DVC's cache, else the store's if that is this version."""
        kept = self.cache.file(md5)
        if md5 and kept.is_file():
            return kept
        ours = self.workspace.store / Path(name).name
        current = versions.data_version(self.workspace) == self.tags.get("data_version")
        return ours if current and ours.is_file() else None


def _md5_of(entries: list[dict[str, Any]], path: str) -> str | None:
    """The hash that a stage's deps or outs have for a path."""
    return next((str(e["md5"]) for e in entries if e["path"] == path and "md5" in e), None)


def _folder(bundle: Path) -> str:
    """DVC's hash of a bundle's folder."""
    return versions.folder_hash({name: versions.file_md5(bundle / name) for name in BUNDLE_FILES})


def _value(values: Any, dotted: str) -> Any:
    """A parameter by its dotted name, or a whole section."""
    for name in dotted.split("."):
        if not isinstance(values, dict) or name not in values:
            return None
        values = values[name]
    return values
