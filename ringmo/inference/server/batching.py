"""From requests to batches: a queue for each model, and one thread in which all models run.

A batch is what is there when the thread is free. Only while further requests are on their way (read
and decoded) it waits for them, a few milliseconds at most: a lone client waits for nobody. The
queue with the oldest request comes first.

A request that asks several models with the same encoder (frozen fine-tuning) is one job for all of
them: they run one after the other on the same images, and the encoder passes each image once.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ringmo import console
from ringmo.inference.server.measures import Measures
from ringmo.inference.server.models import Loaded
from ringmo.inference.whole_images import Prepared, raw_answers

WAIT_S = 0.004  # for requests that are on their way
LAST_BATCH_S = 5.0  # at the end, when every request has its answer
BATCH_SIDE = 1024  # pixels: a batch of larger images has as many as make a batch of these


@dataclass(eq=False)
class Job:
    """One image for one model, or for several with the same encoder.

    name: as the sample of production knows it (`Recorder.add`). answer: comes to a list of what
    `raw_answers` says, one a model.
    """

    models: tuple[Loaded, ...]
    image: Prepared
    name: str
    answer: "asyncio.Future[list[Any]]"
    since: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> tuple[Any, ...]:
        """Jobs with the same may be one batch."""
        return (*self.models, self.image.side)


class Engine:
    """The thread, its queues, and the futures that wait for it."""

    def __init__(self, batch_size: int, measures: Measures) -> None:
        self.batch_size, self.measures = batch_size, measures
        self.on_way = 0  # requests that were let in and are no job yet
        self._queues: dict[tuple[Any, ...], deque[Job]] = {}
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Within the event loop whose futures wait."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread once its queues are empty. A batch that nobody waits for any longer, since
        its time was over, is not waited for either."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join(LAST_BATCH_S)

    def expect(self, more: int) -> None:
        """So many more requests, or fewer, are on their way."""
        self.on_way += more
        if more < 0:
            with self._changed:
                self._changed.notify()

    def submit(
        self, models: tuple[Loaded, ...], image: Prepared, name: str
    ) -> "asyncio.Future[list[Any]]":
        assert self._loop is not None
        job = Job(models, image, name, self._loop.create_future())
        with self._changed:
            self._queues.setdefault(job.key, deque()).append(job)
            self.measures.queue.inc()
            self._changed.notify()
        return job.answer

    def _run(self) -> None:
        while True:
            with self._changed:
                jobs = self._next()
            if jobs is None:
                return
            self.measures.queue.dec(len(jobs))
            jobs = [job for job in jobs if not job.answer.cancelled()]
            if jobs:
                self._answer(jobs)

    def _next(self) -> list[Job] | None:
        """The next batch, as soon as it is to begin; None: there is no more, ever."""
        while True:
            if not self._queues:
                if self._ending:
                    return None
                self._changed.wait()
                continue
            key = min(self._queues, key=lambda key: self._queues[key][0].since)
            queue = self._queues[key]
            most = self._most(key[-1])
            left = queue[0].since + WAIT_S - time.monotonic()
            if len(queue) < most and self.on_way > 0 and left > 0:
                self._changed.wait(left)
                continue
            jobs = [queue.popleft() for _ in range(min(most, len(queue)))]
            if not queue:
                del self._queues[key]
            return jobs

    def _most(self, side: int) -> int:
        return max(1, min(self.batch_size, int(self.batch_size * (BATCH_SIDE / side) ** 2)))

    def _answer(self, jobs: list[Job]) -> None:
        models = jobs[0].models
        images, names = [job.image for job in jobs], [job.name for job in jobs]
        told: list[Any] = []
        before = models[0].shared.spared
        try:
            with models[0].shared.keeping() if len(models) > 1 else contextlib.nullcontext():
                for model in models:
                    started = time.perf_counter()
                    said = raw_answers(model.bundle, model.task, images, model.recorder, names)
                    told.append(said)
                    self.measures.batch(model, len(images), time.perf_counter() - started)
        # This thread answers for all models: whatever one image does to one of them, it goes on.
        except Exception as error:
            if len(jobs) > 1:  # which of them was it?
                for job in jobs:
                    self._answer([job])
                return
            console.note(f"serve: {models[0].version}: {type(error).__name__}: {error}")
            self._deliver(jobs, error)
            return
        self.measures.spared.inc(models[0].shared.spared - before)
        self._deliver(jobs, told)

    def _deliver(self, jobs: Sequence[Job], told: list[Any] | Exception) -> None:
        def deliver() -> None:
            for at, job in enumerate(jobs):
                if job.answer.done():  # its request's time was over
                    continue
                if isinstance(told, Exception):
                    job.answer.set_exception(told)
                else:
                    job.answer.set_result([said[at] for said in told])

        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(deliver)
