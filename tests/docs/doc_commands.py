"""The commands that the README and the pages of docs/ show, found as a reader finds them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("", "sh", "bash", "console", "shell")
# First words by which a line of a block is known to be typed; others are printed, or a file's.
PROGRAMS = {
    *("ringmo", "make", "python", "pip", "dvc", "mlflow", "prefect", "torchrun"),
    *(
        "curl",
        "printf",
        "git",
        "source",
        "cd",
        "export",
        "sudo",
        "tar",
        "gsutil",
        "docker",
        "kubectl",
    ),
}


@dataclass(frozen=True)
class Command:
    """A line that a reader types: where it stands, and its words."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Language, first line's number and lines of each block of code, fenced or indented."""
    lines = page.read_text().splitlines()
    number, before = 0, ""
    while number < len(lines):
        line = lines[number]
        if fence := re.match(r"\s*```\s*(\w*)", line):
            end = number + 1
            while not lines[end].strip().startswith("```"):
                end += 1
            yield fence[1], number + 2, lines[number + 1 : end]
            number, before = end + 1, ""
            continue
        if line.startswith("    ") and not before.strip():
            end = number
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            inside = [text[4:] for text in lines[number:end]]
            yield "", number + 1, inside
            number, before = end, ""
            continue
        number, before = number + 1, line


def typed(page: Path) -> Iterator[Command]:
    """The commands in a page's blocks, in order."""
    name = page.relative_to(ROOT).as_posix()
    for language, first, lines in blocks(page):
        if language not in SHELL:
            continue
        number = 0
        while number < len(lines):
            at, text = number, lines[number].strip().removeprefix("$ ")
            # NAME=value may stand before a program.
            word = re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", text).split(" ", 1)[0]
            if word in PROGRAMS:
                # A line goes on after a backslash, or while a quote is open.
                while text.endswith("\\") or _open(text):
                    number += 1
                    text = text.removesuffix("\\") + " " + lines[number].strip()
                yield Command(name, first + at, text)
            number += 1


def _open(text: str) -> bool:
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def named(page: Path) -> Iterator[Command]:
    """Commands of ringmo and make that a sentence or a table names, in backquotes."""
    name, inside = page.relative_to(ROOT).as_posix(), False
    text = page.read_text()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip().startswith("```"):
            inside = not inside
        if inside or line.startswith("    "):
            continue
        for code in re.findall(r"`([^`]+)`", line):
            if re.match(r"(ringmo|make) [a-z-]", code):
                yield Command(name, number, code)
