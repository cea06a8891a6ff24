"""Faults that tests bring about."""

import os
import signal
from typing import Any

# Calls of MLflow's client that leave something behind.
WRITES = ("create_", "set_", "log_", "delete_", "update_", "restore_")


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

    class Mortal(MlflowClient):  # type: ignore[misc]
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
