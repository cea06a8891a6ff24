"""The versions that answer. Where an alias moves, the new version is loaded and tried beside the
old one and then takes its place; requests that were let in before end with the old one.

A version is tried as a promotion does it: its recorded example must give its recorded answer. One
that fails changes nothing, and is tried again after a while; a registry that does not answer
changes nothing either.
"""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.config import Config, Monitoring
from ringmo.errors import BadInput, RingmoError
from ringmo.inference.server.measures import Measures
from ringmo.inference.server.sharing import Shared, encoder_hash
from ringmo.inference.whole_images import prepared, raw_answers
from ringmo.monitoring.record import Recorder, open_recorder
from ringmo.registry.bundle import Bundle
from ringmo.tasks.base import SECOND, Task
from ringmo.workspace import Workspace

AGAIN_S = 60.0  # until a version that did not load is tried again


@dataclass(eq=False)
class Loaded:
    """A version that can answer. name: what it is asked by. version: as answers say it."""

    name: str
    version: str
    bundle: Bundle
    task: Task
    encoder_hash: str
    shared: Shared
    recorder: Recorder | None = None  # of a registered version

    @property
    def reads(self) -> list[str]:
        """What it reads of one ground: its sensors, and the later date as `second`."""
        return [*self.bundle.sensors, *[SECOND] * (SECOND in self.task.parts)]

    def bands(self, what: str) -> int:
        """Of one of `reads`."""
        first = next(iter(self.bundle.sensors))
        return len(self.bundle.sensors[first if what == SECOND else what].bands)

    def about(self) -> dict[str, Any]:
        """What a client must know of it."""
        first, *_ = self.bundle.sensors.items()
        return {
            "name": self.name,
            "task": self.task.name,
            "version": self.version,
            "bundle": self.bundle.hash,
            "encoder": self.encoder_hash,
            "generated": bool(self.bundle.meta["generated"]),
            "image_size": int(self.bundle.meta["image_size"]),
            "classes": self.bundle.classes,
            "reads": [
                {"name": what, "bands": list(sensor.bands), "dtype": sensor.dtype}
                for what in self.reads
                for sensor in [self.bundle.sensors.get(what, first[1])]
            ],
        }


class Slot:
    """One model that is served: the reference it was named by, and the version that answers."""

    def __init__(self, name: str, ref: str) -> None:
        self.name, self.ref = name, ref
        self.current: Loaded | None = None
        self.failed: tuple[str, float] | None = None  # a version, and when it did not load

    @property
    def loaded(self) -> Loaded:
        assert self.current is not None
        return self.current


class Models:
    """All models that are served, and the thread that follows their aliases."""

    def __init__(
        self, workspace: Workspace, refs: Sequence[str], device: str, measures: Measures
    ) -> None:
        self.workspace, self.device, self.measures = workspace, device, measures
        self.slots = {name: Slot(name, ref) for name, ref in _named(refs).items()}
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._silent = False
        path = workspace.params_file
        self.monitoring = Config.load(path).monitoring if path.is_file() else Monitoring(share=0)

    def load(self) -> None:
        """Load every model for the first time.

        Raises:
            BadInput: one that cannot answer, and why. Unreachable: the registry does not answer.
        """
        for slot in self.slots.values():
            self._take_over(slot, self._load(slot, self._wanted(slot)))

    def follow(self, every_s: float) -> None:
        """Begin to follow the aliases."""
        if not any("@" in slot.ref for slot in self.slots.values()):
            return
        self._thread = threading.Thread(
            target=self._follow, args=(every_s,), name="aliases", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        for slot in self.slots.values():
            if slot.current is not None and slot.current.recorder is not None:
                slot.current.recorder.close()

    def _follow(self, every_s: float) -> None:
        while not self._end.wait(every_s):
            for slot in self.slots.values():
                if "@" in slot.ref and not self._end.is_set():
                    self._look(slot)

    def _look(self, slot: Slot) -> None:
        try:
            wanted = self._wanted(slot)
        except RingmoError as error:
            if not self._silent:
                console.note(f"serve: {slot.ref}: {error}; {slot.loaded.version} goes on")
            self._silent = True
            self.measures.registry_answers.set(0)
            return
        if self._silent:
            console.note("serve: the registry answers again")
        self._silent = False
        self.measures.registry_answers.set(1)
        if str(wanted) == slot.loaded.version:
            slot.failed = None
            return
        if slot.failed is not None:
            version, when = slot.failed
            if version == str(wanted) and time.monotonic() - when < AGAIN_S:
                return
        try:
            new = self._load(slot, wanted)
        # Whatever is wrong with the new version: the old one answers.
        except Exception as error:
            slot.failed = (str(wanted), time.monotonic())
            self.measures.swap_failures.labels(slot.name).inc()
            why = (
                str(error) if isinstance(error, RingmoError) else f"{type(error).__name__}: {error}"
            )
            line = why.splitlines()[0][:300]
            console.note(f"serve: {wanted} does not load ({line}); {slot.loaded.version} goes on")
            return
        slot.failed = None
        self._take_over(slot, new)

    def _wanted(self, slot: Slot) -> Any:
        """The version that the reference names now.

        Raises:
            BadInput: none. Unreachable: the registry does not answer.
        """
        from ringmo.registry import listing
        from ringmo.registry.tracker import Tracker

        if Path(slot.ref).is_dir():
            return listing.of_folder(Path(slot.ref))
        self._tracker = Tracker(self.workspace)
        return listing.resolve(self.workspace, slot.ref, self._tracker)

    def _load(self, slot: Slot, version: Any) -> Loaded:
        """A version, in this process, tried.

        Raises:
            BadInput: its files are gone or damaged, it is an encoder or for another task, or its
                example's answer is another. Unreachable: its files cannot be fetched.
        """
        from ringmo.registry import bundle as bundles
        from ringmo.registry.register import open_bundle

        if version.run_id:
            bundle = open_bundle(self._tracker, version)
        else:
            bundle = bundles.load(Path(version.source))
        task = bundle.task
        if task is None:
            raise BadInput(f"{slot.ref} is an encoder and has no answers: name a task's model")
        if version.run_id and task.name != version.model:
            raise BadInput(f"{version} is a model for {task.name}, not {version.model}")
        bundle.check_example()
        bundle = replace(bundle, model=bundle.model.to(self.device), device=self.device)
        hashed = encoder_hash(bundle)
        shared = self._encoder(hashed, bundle)
        name = str(version) if version.run_id else f"{task.name}-{bundle.hash[:12]}"
        loaded = Loaded(slot.name, name, bundle, task, hashed, shared)
        _warm(loaded)
        if version.run_id:
            loaded.recorder = open_recorder(self.workspace, bundle, name, self.monitoring)
        return loaded

    def _encoder(self, hashed: str, bundle: Bundle) -> Shared:
        """The encoder that this process has already, in place of the bundle's own equal one."""
        for slot in self.slots.values():
            if slot.current is not None and slot.current.encoder_hash == hashed:
                bundle.model.encoder = slot.current.bundle.encoder
                return slot.current.shared
        return Shared(bundle.encoder)

    def _take_over(self, slot: Slot, new: Loaded) -> None:
        old, slot.current = slot.current, new
        self.measures.took_over(new, old)
        if old is not None:
            if old.recorder is not None:  # batches that are still its own lack their embeddings
                old.recorder.close()
            console.note(f"serve: {slot.name}: {new.version} takes over from {old.version}")


def _warm(loaded: Loaded) -> None:
    """The first answers cost more than all later ones: alone, and as a batch."""
    one = prepared(loaded.bundle, loaded.task, loaded.bundle.example_pixels)
    for size in (1, 4):
        raw_answers(loaded.bundle, loaded.task, [one] * size)


def _named(refs: Sequence[str]) -> dict[str, str]:
    """What each model is asked by: its registered name, of a folder its task; where two would have
    one name, the reference as it was given, or the folder's name.

    Raises:
        BadInput: the same twice, or no bundle.
    """
    if len(set(refs)) < len(refs):
        raise BadInput("--model: the same model twice")
    choices = [_names(ref, number) for number, ref in enumerate(refs, 1)]
    names = [first for first, *_ in choices]
    for level in (1, 2):
        names = [
            name if names.count(name) == 1 else choice[level]
            for name, choice in zip(names, choices, strict=True)
        ]
    return dict(zip(names, refs, strict=True))


def _names(ref: str, number: int) -> tuple[str, str, str]:
    """From the shortest to one that no other has."""
    from ringmo.registry.bundle import META, load_meta

    if (Path(ref) / META).is_file():
        own = Path(ref).resolve().name
        return load_meta(Path(ref))["kind"], own, f"{own}-{number}"
    return re.split("[@/]", ref)[0], ref, ref
