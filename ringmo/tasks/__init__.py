"""The tasks: what a model is built for on the encoder. One file each; the name is the file's.

A task is a head, a loss, metrics and a picture (`base.Task`). To add one, add its file here and
its section to finetune and gate in params.yaml.
"""

import difflib
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ringmo.errors import BadInput

if TYPE_CHECKING:
    from ringmo.tasks.base import Task

# What lies here beside the tasks.
SHARED = ("__init__", "base", "dense", "objects", "samples")


@cache
def names() -> tuple[str, ...]:
    """All tasks, in alphabetical order. Imports none of them."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(file.stem for file in files if file.stem not in SHARED))


def unknown(name: str) -> str:
    """That there is no such task, and which is meant."""
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(names())}"
    return f"`{name}` is no task; {hint}"


def find(name: str) -> "Task":
    """The task of this name.

    Raises:
        BadInput: there is none.
    """
    if name not in names():
        raise BadInput(unknown(name))
    task: Task = import_module(f"ringmo.tasks.{name}").TASK
    return task
