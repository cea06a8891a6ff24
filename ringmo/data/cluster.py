"""Dask's door: processes that read imagery, on this machine by default or on a cluster.

What little there is to read is read by this process: starting others takes longer. A cluster's
machines must see the sources and the workspace's folder under the same paths as this one.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from ringmo.errors import BadInput, RingmoError, Unreachable

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Of glibc: memory that an image's arrays leave is used for the next one's. Given back to the
# kernel and asked for again, its pages cost a fifth of the reading.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
AHEAD = 4  # tasks a reader, so that none waits for the one whose turn it is
ANSWER_S = 20  # for which a cluster's scheduler is waited for


class Promise(Protocol):
    """What Dask's and Python's futures have in common."""

    def done(self) -> bool: ...
    def result(self) -> Any: ...


class Pool:
    """This process alone: a task is done when it is submitted."""

    ahead = 1  # tasks, done or under way, whose turn has not come

    def submit(self, function: Callable[..., Any], *args: Any, urgent: bool = False) -> Promise:
        done: Future[Any] = Future()
        done.set_result(function(*args))
        return done

    def share(self, value: Any) -> Any:
        """What stands for `value` among the arguments of many tasks."""
        return value

    def wait(self, promises: Iterable[Promise]) -> None:
        """Until one of them is done."""


class DaskPool(Pool):
    """The processes of a Dask cluster, `readers` of them."""

    def __init__(self, client: Any, readers: int) -> None:
        self._client, self.ahead = client, AHEAD * readers

    def submit(self, function: Callable[..., Any], *args: Any, urgent: bool = False) -> Promise:
        promise: Promise = self._client.submit(
            function, *args, pure=False, priority=10 if urgent else 0
        )
        return promise

    def share(self, value: Any) -> Any:
        return self._client.scatter(value, broadcast=True, hash=False)

    def wait(self, promises: Iterable[Promise]) -> None:
        from distributed import wait

        waiting = [promise for promise in promises if not promise.done()]
        if waiting:
            wait(waiting, return_when="FIRST_COMPLETED")


@contextmanager
def pool(workers: int | str, address: str | None, few: bool, scratch: Path) -> Iterator[Pool]:
    """Readers for as long as the block lasts.

    Args:
        workers: processes on this machine; `auto`: one a core.
        address: of a Dask scheduler that is used instead.
        few: whether this process may do it alone.
        scratch: a folder for what Dask keeps on disk.

    Raises:
        Unreachable: no cluster answers at the address, or its processes die at work.
        BadInput: what is there is no Dask scheduler.
    """
    if few and address is None:
        yield Pool()
        return
    import dask
    import distributed

    count = len(os.sched_getaffinity(0)) if workers == "auto" else int(workers)
    # A process a core, each with one thread: those of BLAS would only be in each other's way.
    settings = {
        # Looks at itself, 50 times a second by default, took 6 % of a core from those at work.
        "distributed.admin.tick.interval": "10s",
        "distributed.admin.tick.limit": "1h",
        "distributed.admin.system-monitor.interval": "10s",
        "distributed.scheduler.http.routes": [],  # no pages about us, also on the loopback address
        "distributed.worker.http.routes": [],
        "distributed.nanny.pre-spawn-environ": dict.fromkeys(THREADS, "1") | MALLOC,
        "distributed.worker.profile.enabled": False,
        # All at once, not when each has its first image: what pyarrow imports by itself, too.
        "distributed.worker.preload": ["ringmo.data.reading", "rasterio", "pandas", "PIL.Image"],
    }
    with dask.config.set(settings):
        if address is None:
            with (
                _main_hidden(),
                distributed.LocalCluster(
                    n_workers=count,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    # Whoever may connect may have code run: TLS with certificates of this moment.
                    security=True,
                    memory_limit=None,
                    local_directory=str(scratch),
                    silence_logs=50,
                ) as cluster,
                distributed.Client(cluster) as client,
                _spoken("Dask on this machine"),
            ):
                yield DaskPool(client, count)
            return
        try:
            client = distributed.Client(address, timeout=ANSWER_S)
        except (OSError, TimeoutError) as error:
            raise Unreachable(f"{address}: no Dask scheduler answers: see ingest.dask") from error
        except (ValueError, TypeError) as error:
            raise BadInput(f"ingest.dask: {address}: {error}") from None
        with client, _spoken(address):
            try:
                client.wait_for_workers(1, timeout=ANSWER_S)
            except TimeoutError:
                raise Unreachable(f"{address}: this Dask cluster has no worker") from None
            yield DaskPool(client, sum(client.nthreads().values()))


@contextmanager
def _main_hidden() -> Iterator[None]:
    """New processes would run the caller's script again, which none of ours needs."""
    main = vars(sys.modules["__main__"])
    kept: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


@contextmanager
def _spoken(where: str) -> Iterator[None]:
    """Dask's own errors as one line."""
    from distributed import CancelledError, KilledWorker
    from distributed.comm.core import CommClosedError

    try:
        yield
    except RingmoError:
        raise
    except KilledWorker:
        raise Unreachable(
            f"{where}: reading killed its process several times: is there too little memory? "
            f"see ingest.workers"
        ) from None
    except (CancelledError, CommClosedError) as error:
        raise Unreachable(f"{where}: the cluster went away: {error}") from None
    except ModuleNotFoundError as error:
        raise BadInput(f"{where}: its machines lack {error.name}: install ringmo there") from None
