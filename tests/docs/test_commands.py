"""Every command in the README and the pages of docs/ is one that works.

Those of the blocks are run in order, page by page, in real small workspaces: the one that the
start page makes (a real chain on real servers), and those that a page makes with `ringmo init`.
What cannot run here stands in LEFT with its reason, and is parsed. Pages are found, not listed.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import pytest
from doc_commands import ROOT, Command, blocks, named, pages, typed
from imagery import write_class_folders
from PIL import Image
from served import Served, tiff, write_task_model
from servers import S3, free_port
from small_models import rgb
from tiny import TINY

from ringmo import config, tasks
from ringmo.cli import build_parser, main
from ringmo.workspace import Workspace

# A command that begins so is parsed and not run, since …
LEFT = {
    "git": "it needs the repository's address",
    "sudo": "it changes the machine",
    "source": "the tests run in that environment",
    "cd ringmo": "the tests run in that folder",
    "make": "CI runs it, or would run itself",
    "docker": "no Docker runs where this is tested",
    "kubectl": "it needs a cluster",
    "torchrun": "it needs several machines",
    "gsutil": "it needs the network",
    "mlflow": "it changes a server's database",
    "dvc pull": "it needs another machine's remote",
    "pip": "it changes the environment",
    "ringmo backup": "tests/deploy/test_backup.py makes one, and restores it",
    "ringmo restore": "tests/deploy/test_backup.py",
    "ringmo user": "it needs a server with accounts: tests/deploy",
    "ringmo data fetch eurosat": "it needs the network",
    "ringmo compare": "it trains for an hour",
    "ringmo finetune change": "it needs pairs of dates; tests/tasks trains on some",
    "ringmo reproduce": "it trains all again: tests/registry/test_reproduce.py",
    "ringmo predict NAME_S2Hand.tif": "it needs a model of two sensors: tests/tasks",
}
# Refusals that a small workspace may meet with: the command worked.
ANSWERS = {
    "drift": r"too few|nothing|no drift|drift|cannot|at least|not enough|None|reference",
}
# Names in the pages, and what stands for them here.
STANDS = {
    "scene/7": "scene/1",
    "encoder/3": "encoder/1",
    "encoder/5": "encoder/1",
    "Beach/12*.jpg": "harbour/harbour_0_000.jpg",
    "imagery/new/": "imagery/town/",
    "3f9a0c1d2b4e5f60": "town/town_0_001.jpg",
    " 120": " 3",
}
IMAGE = re.compile(r"[^\s'\"=@,]+\.(?:png|jpg|tif)\b")

COMMANDS = [command for page in pages() for command in typed(page)]
NAMED = [command for page in pages() for command in named(page)]


def reason(text: str) -> str | None:
    return next((why for start, why in LEFT.items() if f"{text} ".startswith(f"{start} ")), None)


# All of them: parsed


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def check_ringmo(words: list[str], whole: bool) -> None:
    """whole: the command as it is typed; else a sentence may have left out what does not matter."""
    parser = build_parser()
    if whole:
        parser.parse_args(words)
        return
    rest = words
    while rest and (
        sub := next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
    ):
        assert rest[0] in sub.choices, f"no command {rest[0]}"
        parser, rest = sub.choices[rest[0]], rest[1:]
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert given <= options(parser), f"no option {given - options(parser)}"


def targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return {name for line in re.findall(r"^([a-z][a-z -]*):", text, re.M) for name in line.split()}


def check(command: Command, whole: bool) -> None:
    for part in re.split(r"\s&&\s", command.text):
        words = shlex.split(part.replace("TASK", "scene"), comments=True)
        while words and "=" in words[0]:  # NAME=value before a command
            words.pop(0)
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0] == "ringmo":
            try:
                check_ringmo(words[1:], whole)
            except SystemExit:
                pytest.fail(f"{command}: no such command", pytrace=False)
        if words[0] == "make":
            asked = [word for word in words[1:] if "=" not in word]
            assert set(asked) <= targets(), f"{command}: no such target"
        if words[0] == "python":
            file = ROOT / words[1]
            assert file.is_file(), command
            compile(file.read_text(), str(file), "exec")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_parses(command: Command) -> None:
    check(command, whole=True)


def test_commands_named_in_sentences_are_known() -> None:
    assert len(NAMED) > 100
    for command in NAMED:
        check(command, whole=False)


def test_python_in_the_pages_compiles() -> None:
    """tests/test_docs_other_code.py runs that of other-code.md."""
    found = 0
    for page in pages():
        for language, line, lines in blocks(page):
            if language == "python":
                compile("\n".join(lines), f"{page}:{line}", "exec")
                found += 1
    assert found > 5


# Most of them: run


class Desk:
    """Where a reader sits: folders, a shell's current one, servers that answer on other ports."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.here = root, root / "home", root
        self.home.mkdir()
        self.s3 = S3(root / "buckets")
        self.ports = {f"services.{name}_port": free_port() for name in ("mlflow", "prefect")}
        self.trained: Path | None = None
        self.server: Served | None = None
        self.ran: list[str] = []
        self.waiting: list[Command] = []
        self.up = False

    def start(self) -> None:
        self.s3.start()
        for kind in tasks.names():
            write_task_model(self.root / "models" / kind, kind)
        client = _client(self.s3)
        client.put_object(Bucket="bucket", Key="new/scene.tif", Body=tiff(rgb(1)))

    def stop(self) -> None:
        self.leave()
        self.s3.stop()
        for record in self.root.rglob("services.json"):
            self.process("ringmo", "down", cwd=record.parents[1])

    @property
    def environment(self) -> dict[str, str]:
        here = str(Path(sys.executable).parent)
        return {
            **os.environ,
            **self.world,
            "HOME": str(self.home),
            "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }

    @property
    def world(self) -> dict[str, str]:
        """What a reader has set: the buckets' address and keys."""
        return {
            **self.s3.environment,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3.port}",
        }

    def process(self, *words: str, cwd: Path | None = None) -> str:
        """What a program prints, which must end well."""
        done = subprocess.run(
            list(words),
            cwd=cwd or self.here,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def enter(self, page: str) -> None:
        """A page begins in the workspace that the start page made."""
        self.here = self.trained or self.root

    def leave(self) -> None:
        if self.server is not None:
            assert self.server.stop() == 0
            self.server = None

    def placed(self, text: str) -> str:
        """A command with what stands here for the names in it, whose images are there."""
        for name, here in STANDS.items():
            text = text.replace(name, here)
        text = re.sub(r"(?<![\w/])/data/", f"{self.root}/data/", text)
        text = text.replace("~/", f"{self.home}/")
        for kind in tasks.names():
            if kind != "scene":
                text = re.sub(rf"\b{kind}@champion", str(self.root / "models" / kind), text)
        for name in IMAGE.findall(text):
            self.image(self.here / name.replace("*", "1"))
        return text

    def image(self, path: Path) -> None:
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tif":
            path.write_bytes(tiff(rgb(len(path.name), 64, 64)))
        else:
            Image.fromarray(rgb(len(path.name), 64, 64)).save(path)

    def run(self, command: Command) -> None:
        if reason(command.text):
            return
        for part in re.split(r"\s&&\s", command.text):
            text = re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", self.placed(part))
            words = shlex.split(text, comments=True)
            if words[0] == "cd":
                self.here = (self.here / words[1]).resolve()
                assert self.here.is_dir()
            elif words[0] == "ringmo":
                self.ringmo(command, words[1:])
            elif words[0] == "python":
                self.process(sys.executable, str(ROOT / words[1]), *words[2:])
            else:
                self.shell(text)
            self.ran.append(str(command))

    def shell(self, text: str) -> None:
        if self.server is not None:
            text = text.replace("http://127.0.0.1:8000", self.server.url)
            for name in re.findall(r'"path": "([^"]+)"', text):
                self.image(self.root / "data" / "scenes" / name)
            text = text.replace("curl ", "curl --silent --show-error --fail-with-body ")
        if "$PREFECT_API_URL" in text:
            running = json.loads((self.here / ".ringmo" / "services.json").read_text())
            text = f"PREFECT_API_URL={running['prefect']['url']}/api; {text}"
        self.process("bash", "-c", f"set -euo pipefail; {text}")

    def ringmo(self, command: Command, words: list[str]) -> None:
        arguments = build_parser().parse_args(words)
        verb = arguments.verb
        if verb in ("models", "lineage", "predict", "card") and self.trained is None:
            self.waiting.append(command)  # a first run elsewhere, which is not made here
        elif verb == "init":
            self.process("ringmo", *words)
            made = Workspace((self.here / arguments.dir).resolve())
            config.edit(made.params_file, TINY | self.ports | {"monitoring.share": 1.0})
        elif verb == "run":
            self.chain(words, arguments)
        elif verb == "deploy" and arguments.init_env:
            sources = Path(mkdtemp(dir=self.root))
            shutil.copy(ROOT / "docker-compose.yml", sources)
            self.process("ringmo", *words, cwd=sources)
        elif verb in ("up", "deploy"):
            if not self.up or verb == "deploy":
                self.process("ringmo", *words)
            self.up = True
        elif verb in ("down", "status"):
            if (self.here / "params.yaml").exists():
                self.process("ringmo", *words)
                self.up = self.up and verb != "down"
        elif verb == "serve":
            # The one with scenes stays, for what the page asks of it.
            more = ["--model", str(self.root / "models" / "change")] if arguments.root else []
            for folder in [arguments.root] if arguments.root else []:
                Path(folder).mkdir(parents=True, exist_ok=True)
            place = Workspace(self.here)
            words = [str(self.here / w) if w.startswith("work/") else w for w in words[1:]]
            server = Served(place, *words, *more, environment=self.environment)
            assert server.get("/ready").status_code == 200
            if arguments.root:
                self.leave()
                self.server = server
            else:
                assert server.stop() == 0
        else:
            if verb == "pretrain":  # which page before this one changed the store does not matter
                self.select()
            self.inside(words, verb)

    def chain(self, words: list[str], arguments: argparse.Namespace) -> None:
        """The first run is a real one; of later ones it is asked what they would do."""
        if arguments.data and "://" not in arguments.data:
            folder = self.here / arguments.data
            if not folder.exists():
                write_class_folders(folder, 12)
        if self.trained is None and not arguments.dry_run:
            self.process("ringmo", *words)
            self.trained = self.here
            self.set_aside()
            for command in self.waiting:
                self.run(command)
            return
        # Recipes stand on what a new workspace has, not on this one's small models.
        place = self.root / "plain"
        if not place.exists():
            self.process("ringmo", "init", str(place))
        before, self.here = self.here, place
        if arguments.data:
            words = [str(before / w) if w == arguments.data else w for w in words]
        try:
            self.inside([*words, *["--dry-run"] * (not arguments.dry_run)], "run")
        finally:
            self.here = before

    def set_aside(self) -> None:
        """A tile that a page may take back."""
        self.inside(["data", "set-aside", "town/town_0_001.jpg"], "data")
        self.select()

    def select(self) -> None:
        for stage in ("ingest", "validate", "select"):
            self.inside([stage], stage)

    def inside(self, words: list[str], verb: str) -> None:
        """In this process: Python's heavy imports are paid for once."""
        from contextlib import redirect_stderr, redirect_stdout
        from io import StringIO

        was, said = Path.cwd(), StringIO()
        os.chdir(self.here)
        given = dict(os.environ)
        os.environ.update(self.world)
        try:
            with redirect_stdout(said), redirect_stderr(said):
                code = main(words)
        finally:
            os.chdir(was)
            os.environ.clear()
            os.environ.update(given)
        fine = code in (0, 1) or (
            code == 2 and verb in ANSWERS and re.search(ANSWERS[verb], said.getvalue())
        )
        assert fine, f"ringmo {shlex.join(words)} ended with {code}: {said.getvalue()[-3000:]}"


def _client(s3: S3) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3.port}",
        aws_access_key_id=s3.key,
        aws_secret_access_key=s3.secret,
        region_name="us-east-1",
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Iterator[Desk]:
    made = Desk(tmp_path_factory.mktemp("desk"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RINGMO_WORKSPACE"):
            patch.delenv(name, raising=False)
        try:
            made.start()
            yield made
        finally:
            made.stop()


# The start page first: it makes the workspace.
PAGES = {command.page for command in COMMANDS}
ORDER = sorted(PAGES, key=lambda page: (page != "docs/start.md", page))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("page", ORDER)
def test_a_page_runs(desk: Desk, page: str) -> None:
    desk.enter(page)
    try:
        for command in COMMANDS:
            if command.page == page:
                desk.run(command)
    finally:
        desk.leave()


@pytest.mark.slow
@pytest.mark.long
def test_most_were_run(desk: Desk) -> None:
    left = [command for command in COMMANDS if reason(command.text)]
    assert desk.trained and len(desk.ran) > 2 * len(left), (len(desk.ran), len(left))
    desk.process("ringmo", "down", cwd=desk.trained)
    running = [one for one in psutil.process_iter() if str(desk.root) in _line(one)]
    assert not [one for one in running if "rclone" not in _line(one)]


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
