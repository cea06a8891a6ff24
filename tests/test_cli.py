"""The command's surface: what it offers, how fast it says so, and how it refuses."""

import argparse
import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ringmo.cli import build_parser, main
from ringmo.workspace import Workspace

VERBS = {
    "run": {"--data", "--recipe", "--set", "--task", "--dry-run"},
    "init": {"--set"},
    "up": set(),
    "down": set(),
    "status": set(),
    "doctor": set(),
    "clean": {"--dry-run", "--shared"},
    "deploy": {"--init-env"},
    "user": {"--role"},
    "backup": set(),
    "restore": {"--set"},
    "ingest": set(),
    "validate": set(),
    "select": set(),
    "pretrain": set(),
    "finetune": {"--from-scratch", "--encoder"},
    "evaluate": set(),
    "register": {"--flow-run"},
    "data": set(),
    "compare": {"--data", "--recipe", "--set"},
    "models": {"--history"},
    "promote": {"--force", "--by", "--reason"},
    "rollback": {"--by", "--reason"},
    "lineage": {"--of", "--html", "--verify", "--deep"},
    "reproduce": {"--to"},
    "card": {"--out"},
    "predict": {"--model", "--top", "--out", "--with", "--probabilities", "--workers"},
    "drift": {"--model", "--days", "--since", "--html"},
    "export": {"--format", "--out"},
    "serve": {
        *("--model", "--host", "--port", "--root", "--device"),
        *("--batch-size", "--queue", "--max-body", "--max-side", "--time-limit", "--poll"),
    },
    "embed": {"--model", "--out"},
    "similar": {"--model", "--in", "--top", "--out"},
}
COMMON = {"-h", "--help", "--json", "--quiet", "--workspace", "--log"}


def test_verbs_and_options_change_only_on_purpose() -> None:
    actions = build_parser()._subparsers
    assert actions is not None
    verbs = next(a for a in actions._group_actions if isinstance(a, argparse._SubParsersAction))
    found = {
        name: {o for a in parser._actions for o in a.option_strings} - COMMON
        for name, parser in verbs.choices.items()
    }
    assert found == VERBS


def test_help_loads_nothing_heavy() -> None:
    seen = (
        "import sys; from ringmo.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    seen += (
        "print(sorted({'torch','pandas','prefect','mlflow','dvc','pydantic'} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert time.monotonic() - started < 0.5 * 4  # 0.05 s when nothing else runs


def test_selecting_loads_no_models_and_training_no_metrics_of_others() -> None:
    code = (
        "import sys\n"
        "from ringmo import config, tasks\n"
        "from ringmo.data import selection\n"
        "kinds = [tasks.find(name) for name in tasks.names()]\n"
        "before = sorted({'timm', 'torchvision', 'mlflow'} & set(sys.modules))\n"
        "from ringmo.training.machine import Machine\n"
        "Machine(config.Hardware(accelerator='cpu'))\n"
        "print(before, 'torchmetrics' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--data", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["run", "--set", "pretrain.epoch=3"], "did you mean `epochs`?"),
        (["run", "--set", "pretrain.mask_ratio=7"], "pretrain.mask_ratio"),
        (["run", "--set", "nonsense"], "expected key=value"),
        (["run", "--recipe", "huge"], "no such recipe; there are:"),
        (["ingest", "--workspace", "/"], "is no workspace"),
    ],
)
def test_bad_usage_is_one_line_and_exit_two(
    workspace: Workspace,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RINGMO_WORKSPACE", str(workspace.root))
    before = workspace.params_file.read_bytes()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert workspace.params_file.read_bytes() == before


@pytest.mark.parametrize("before", [True, False])
def test_an_error_is_json_where_json_was_asked_for(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], before: bool
) -> None:
    common = ["--json", "--workspace", str(workspace.root)]
    verb = ["run", "--data", "/nowhere"]
    assert main([*common, *verb] if before else [*verb, *common]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["exit_code"] == 2 and "no such folder" in answer["error"]


def test_an_empty_folder_is_refused_before_any_server_starts(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ["ingest", "--workspace", str(workspace.root)]
    from ringmo import config

    config.edit(workspace.params_file, {"ingest.sources": [str(tmp_path / "empty")]})
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "empty" in error and "Traceback" not in error


def test_a_part_that_is_not_installed_is_one_line(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in an installation for prediction only: None in sys.modules is Python's own "not there".
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main(["models", "--workspace", str(workspace.root)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mlflow" in error and "ringmo[platform]" in error


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workspace: Workspace
) -> None:
    def full(_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/shard-7.tar")

    monkeypatch.setattr("ringmo.cli._status", full)
    assert main(["status", "--workspace", str(workspace.root)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ringmo: /data/shard-7.tar: no space left") and said.count("\n") == 1


def test_a_workspace_is_made_with_other_values_or_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "wrong"), "--set", "versioning.remotes=s3://b"]) == 2
    assert "did you mean `remote`?" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    made = tmp_path / "made"
    assert main(["init", str(made), "--set", "versioning.remote=s3://b/p"]) == 0
    text = (made / "params.yaml").read_text()
    assert 'remote: "s3://b/p"' in text and "# a folder, or s3://bucket/prefix" in text
