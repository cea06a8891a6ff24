"""Commands in processes of their own, and faults that tests bring about."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

# Imported once, by the process that all others are forked from.
PRELOADED = (
    *("mlflow.artifacts", "torch", "sqlalchemy"),
    *("ringmo.registry.promotion", "ringmo.registry.register", "ringmo.models.classifier"),
)

# Calls of MLflow's client that leave something behind.
WRITES = ("create_", "set_", "log_", "delete_", "update_", "restore_")


def forked() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """`function(*arguments)` in a process of its own, which has begun."""
    process = forked().Process(target=_here, args=(dict(os.environ), function, arguments))
    process.start()
    return process


def _here(
    environment: Mapping[str, str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """In the environment of now: the process that was forked has that of the first test."""
    os.environ.clear()
    os.environ.update(environment)
    function(*arguments)


def die_at(moment: int) -> None:
    """Kill this process with SIGKILL at its `moment`-th one.

    Moment 0 is right before its first call to MLflow that writes, 1 right after, 2 right before the
    second, and so on.
    """
    from mlflow import MlflowClient

    left = [moment]

    def pass_or_die() -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    class Mortal(MlflowClient):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if not name.startswith(WRITES):
                return found

            def called(*arguments: Any, **options: Any) -> Any:
                pass_or_die()
                answer = found(*arguments, **options)
                pass_or_die()
                return answer

            return called

    import mlflow

    mlflow.MlflowClient = Mortal
