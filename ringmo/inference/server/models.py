"""The versions that answer. Where an alias moves, the new version is loaded and tried beside the
old one and then takes its place; requests that were let in before end with the old one.

A version is tried as a promotion does it: its recorded example must give its recorded answer. One
that fails changes nothing, and is tried again after a while; a registry that does not answer
changes nothing either.
"""

import re
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ringmo import console
from ringmo.config import Monitoring
from ringmo.errors import BadInput, RingmoError, Unreachable
from ringmo.inference.model import is_folder
from ringmo.inference.server.measures import Measures
from ringmo.inference.server.sharing import Shared, encoder_hash
from ringmo.inference.whole_images import prepared, raw_answers
from ringmo.monitoring.record import Recorder
from ringmo.registry import bundle as bundles
from ringmo.registry import listing
from ringmo.registry.bundle import META, Bundle, load_meta
from ringmo.registry.register import open_bundle
from ringmo.registry.tracker import Tracker, Version
from ringmo.tasks.base import Task
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

    def about(self) -> dict[str, Any]:
        """What a client must know of it."""
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
                {"name": name, "bands": list(sensor.bands), "dtype": sensor.dtype}
                for name, sensor in self.bundle.reads.items()
            ],
        }


class Slot:
    """One model that is served: the reference it was named by, and the version that answers."""

    def __init__(self, name: str, ref: str) -> None:
        self.name, self.ref = name, ref
        self.follows = "@" in ref and not is_folder(ref)
        self.current: Loaded | None = None
        self.failed: tuple[str, float] | None = None  # a version, and when it did not load
        self.said: str | None = None  # what is wrong with the alias, and was told

    @property
    def loaded(self) -> Loaded:
        assert self.current is not None
        return self.current


class Models:
    """All models that are served, and the thread that follows their aliases."""

    def __init__(
        self,
        workspace: Workspace,
        refs: Sequence[str],
        device: str,
        measures: Measures,
        monitoring: Monitoring,
    ) -> None:
        self.workspace, self.device, self.measures = workspace, device, measures
        self.monitoring = monitoring
        self.slots = {name: Slot(name, ref) for name, ref in _named(refs).items()}
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._silent = False
        # Those that took over from are kept by their own timers, as long as they have rows.
        self._recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()

    def load(self) -> None:
        """Load every model for the first time.

        Raises:
            BadInput: one that cannot answer, and why. Unreachable: the registry does not answer.
        """
        tracker = None
        for slot in self.slots.values():
            if not is_folder(slot.ref):
                tracker = tracker or Tracker(self.workspace)
            wanted = listing.resolve(self.workspace, slot.ref, tracker)
            self._take_over(slot, self._load(slot, wanted, tracker))
        self.measures.registry_answers.set(1)

    def follow(self, every_s: float) -> None:
        """Begin to follow the aliases."""
        if not any(slot.follows for slot in self.slots.values()):
            return
        self._thread = threading.Thread(
            target=self._follow, args=(every_s,), name="aliases", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """No version takes over from here on."""
        self._end.set()

    def close(self) -> None:
        """Write what was recorded: once no model answers any more."""
        for recorder in list(self._recorders):
            recorder.close()

    def _follow(self, every_s: float) -> None:
        while not self._end.wait(every_s):
            tracker = None
            for slot in self.slots.values():
                if not slot.follows or self._end.is_set():
                    continue
                try:
                    tracker = self._look(slot, tracker)
                # With this thread nobody would follow the champions: whatever it is, it goes on.
                except Exception as error:
                    self._say(slot, f"{slot.ref}: {type(error).__name__}: {error}")

    def _look(self, slot: Slot, tracker: Tracker | None) -> Tracker | None:
        """Whether an alias has moved; if so, change over.

        Args:
            tracker: of this round; None: there is none yet.

        Returns:
            The round's; None: the registry does not answer.
        """
        wanted = None
        try:
            tracker = tracker or Tracker(self.workspace)
            wanted = listing.resolve(self.workspace, slot.ref, tracker)
        except Unreachable as error:
            if not self._silent:
                console.note(f"serve: {slot.ref}: {error}; {slot.loaded.version} goes on")
            self._silent = True
            self.measures.registry_answers.set(0)
            return None
        except BadInput as error:  # it answers, and the alias or the model is gone
            self._say(slot, str(error))
        if self._silent:
            console.note("serve: the registry answers again")
        self._silent = False
        self.measures.registry_answers.set(1)
        if wanted is not None:
            self._follow_to(slot, wanted, tracker)
            slot.said = None
        return tracker

    def _follow_to(self, slot: Slot, wanted: Version, tracker: Tracker | None) -> None:
        if str(wanted) == slot.loaded.version:
            slot.failed = None
            return
        if slot.failed is not None:
            version, when = slot.failed
            if version == str(wanted) and time.monotonic() - when < AGAIN_S:
                return
        try:
            new = self._load(slot, wanted, tracker)
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
        if not self._end.is_set():
            self._take_over(slot, new)

    def _say(self, slot: Slot, what: str) -> None:
        """A note, once while it is so."""
        line = f"{(what.splitlines() or [''])[0][:300]}; {slot.loaded.version} goes on"
        if line != slot.said:
            console.note(f"serve: {line}")
        slot.said = line

    def _load(self, slot: Slot, version: Version, tracker: Tracker | None) -> Loaded:
        """A version, in this process, tried.

        Args:
            tracker: where a registered version was found.

        Raises:
            BadInput: its files are gone or damaged, it is an encoder or for another task, or its
                example's answer is another. Unreachable: its files cannot be fetched.
        """
        if version.run_id:
            assert tracker is not None
            bundle = open_bundle(tracker, version)
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
            loaded.recorder = Recorder(self.workspace, bundle, name, self.monitoring)
            self._recorders.add(loaded.recorder)
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
    if (Path(ref) / META).is_file():
        own = Path(ref).resolve().name
        return load_meta(Path(ref))["kind"], own, f"{own}-{number}"
    return re.split("[@/]", ref)[0], ref, ref
