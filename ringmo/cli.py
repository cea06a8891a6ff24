"""The `ringmo` command: parses, calls one function, prints its report. Loads nothing heavy."""

import argparse
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringmo import __version__, console, environment, tasks
from ringmo.errors import BadInput, RingmoError

if TYPE_CHECKING:
    from ringmo.config import Config
    from ringmo.stage import Report
    from ringmo.workspace import Workspace

Arguments = argparse.Namespace
ROLES = ("look", "run", "promote")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Tables of a report that are worth a look at a stage's end, from two rows on; a long one is in its
# files.
SHOWN_TABLES, SHOWN_ROWS = ("per_class", "per_sensor", "per_gsd", "per_source"), range(2, 41)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 no, 2 bad input, 3 nobody answered)."""
    given = Arguments(json=False, quiet=False, workspace=None, log=None)
    arguments = build_parser().parse_args(argv, given)
    console.quiet, console.as_json = arguments.quiet, arguments.json
    if arguments.log:
        os.environ[environment.LOG.name] = arguments.log  # children are to speak alike
    if console.log_is_json():
        console.speak_json()
    try:
        environment.part_passwords(os.environ)
        return _call(arguments)
    except RingmoError as error:
        said = environment.shown(str(error))
        if console.as_json:
            console.result({"error": said, "exit_code": error.exit_code}, "")
        else:
            console.say(f"ringmo: {said}", "error", exit_code=error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        console.say("ringmo: interrupted; the same command goes on from here", "warning")
        return 130


def _call(arguments: Arguments) -> int:
    try:
        return int(arguments.run(arguments) or 0)
    except ModuleNotFoundError as error:
        if (error.name or "ringmo").split(".")[0] in ("ringmo", "flows"):
            raise
        raise BadInput(
            f"{error.name} is not installed: `{arguments.verb}` needs "
            "`pip install 'ringmo[platform]'`"
        ) from None
    except OSError as error:
        # Python finds no folder for temporary files where none has room for one.
        if error.errno not in FULL and "No usable temporary directory" not in str(error):
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise BadInput(
            f"{where}no space left on the disk: free some, and the same command goes on from here"
        ) from None


def build_parser() -> argparse.ArgumentParser:
    # Before the verb or after it: what is not given sets nothing, and undoes nothing.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    common.add_argument("--quiet", action="store_true", help="no progress, no notes")
    common.add_argument(
        "--log", choices=("text", "json"), help="json: each line of the log as an object"
    )
    common.add_argument("--workspace", metavar="DIR", help="the workspace; default: this folder")

    parser = argparse.ArgumentParser(
        prog="ringmo",
        description="Train a remote-sensing foundation model on your imagery, fine-tune it, and "
        "keep the better model in production.",
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"ringmo {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)

    def verb(
        name: str, run: Callable[[Arguments], int | None], text: str, within: Any = None
    ) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = (within or verbs).add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", parents=[common]
        )
        added.set_defaults(run=run)
        return added

    kinds = f"one of {', '.join(tasks.names())}"

    def task_argument(added: argparse.ArgumentParser, *more: str) -> None:
        added.add_argument("task", choices=(*tasks.names(), *more), metavar="TASK", help=kinds)

    def settings_arguments(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--data",
            metavar="PATH",
            help="folder of imagery (class folders give labels), or a list",
        )
        added.add_argument(
            "--recipe", metavar="NAME", help="write a named set of values to params.yaml"
        )
        added.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="extend",
            nargs="+",
            default=[],
            help="set values of params.yaml",
        )

    run = verb("run", _run, "run the whole chain: new imagery in, the better model in production")
    settings_arguments(run)
    run.add_argument(
        "--task",
        metavar="NAME",
        action="extend",
        nargs="+",
        choices=tasks.names(),
        help=f"what to fine-tune for: {', '.join(tasks.names())}",
    )
    run.add_argument("--dry-run", action="store_true", help="say what would run, and why")

    init = verb("init", _init, "make a workspace")
    init.add_argument("dir", metavar="DIR")
    verb("up", _up, "start the local MLflow and Prefect servers and a worker")
    verb("down", _down, "end what `up` and `run` started")
    verb("status", _status, "what runs where")
    verb("doctor", _doctor, "what is missing or odd on this machine and here, and how to mend it")
    clean = verb("clean", _clean, "remove what no champion and none of the last runs needs")
    clean.add_argument("--dry-run", action="store_true", help="say what would go")
    clean.add_argument(
        "--shared",
        action="store_true",
        help="also what other workspaces may use: the DVC remote, a cache outside, MLflow's server",
    )
    deploy = verb("deploy", _deploy, "create the scheduled flows of params.yaml in Prefect")
    deploy.add_argument(
        "--init-env",
        action="store_true",
        help="write the passwords that docker-compose.yml asks for to .env, and nothing else",
    )
    backup = verb("backup", _backup, "copy all that would be missed into one folder")
    backup.add_argument("dir", metavar="DIR", help="a new folder, best on another disk")
    restore = verb("restore", _restore, "bring a backup onto empty servers, into a workspace")
    restore.add_argument("dir", metavar="DIR", help="what `backup` wrote")
    for added in (init, restore):
        added.add_argument(
            "--set",
            metavar="KEY=VALUE",
            action="extend",
            nargs="+",
            default=[],
            help="values of its params.yaml that differ",
        )
    user = verb("user", _user, "an account on MLflow's server: who may look, run, promote")
    user.add_argument("name", metavar="NAME", help="of an account that is there, or shall be")
    user.add_argument(
        "--role",
        metavar="ROLE",
        choices=ROLES,
        required=True,
        help="look: read all; run: and log runs; promote: and register, promote, roll back",
    )

    verb("ingest", _ingest, "read new imagery into the tile store and version it")
    verb("validate", _validate, "check the data version against the rules")
    verb("select", _select, "choose which tiles, splits and labels train")
    verb("pretrain", _pretrain, "train the encoder by masked image modelling")
    finetune = verb("finetune", _finetune, "train a task model from the encoder")
    task_argument(finetune)
    either = finetune.add_mutually_exclusive_group()
    either.add_argument("--from-scratch", action="store_true", help="without the encoder")
    either.add_argument(
        "--encoder", metavar="REF", help="from this encoder: encoder/3, or a bundle's folder"
    )
    task_argument(verb("evaluate", _evaluate, "measure a task model on the test tiles"))
    register = verb("register", _register, "make the model a version in the registry, and judge it")
    task_argument(register, "encoder")
    register.add_argument("--flow-run", metavar="ID", help=argparse.SUPPRESS)

    data = verbs.add_parser("data", help="the data's versions", description="The data's versions.")
    data_verbs = data.add_subparsers(dest="data_verb", metavar="COMMAND", required=True)
    verb("versions", _data_versions, "list data versions with tiles and classes", data_verbs)

    diff = verb("diff", _data_diff, "what one data version has and another has not", data_verbs)
    diff.add_argument("a", metavar="A", help="a version, or its first digits; e.g. latest~1")
    diff.add_argument("b", metavar="B", nargs="?", default="latest", help="default: latest")

    show = verb("show", _data_show, "the tile store as an HTML page to look at", data_verbs)
    show.add_argument("--out", metavar="FILE", help="default: .ringmo/data.html")

    verb("compact", _data_compact, "drop the bytes of tiles that left the store", data_verbs)
    names = "a tile's key, its source, or a pattern of sources: 'Beach/*.jpg'"
    aside = verb("set-aside", _data_set_aside, "take tiles out of the store", data_verbs)
    back = verb("put-back", _data_put_back, "take tiles back from quarantine", data_verbs)
    for added in (aside, back):
        added.add_argument("tiles", metavar="TILE", nargs="+", help=names)
    fetch = verb("fetch", _data_fetch, "download a public data set, checked", data_verbs)
    fetch.add_argument("name", nargs="?", metavar="NAME", help="e.g. eurosat; see --list")
    fetch.add_argument("--to", metavar="DIR", help="default: .ringmo/public; it comes to DIR/NAME")
    fetch.add_argument("--list", action="store_true", help="the data sets there are")

    compare = verb("compare", _compare, "measure what each method's encoder is worth, side by side")
    settings_arguments(compare)

    models = verb("models", _models, "versions, aliases and figures of the registered models")
    models.add_argument("task", nargs="?", choices=(*tasks.names(), "encoder"), metavar="TASK")
    models.add_argument("--history", action="store_true", help="every promotion and rollback")
    promote = verb("promote", _promote, "make a version the champion")
    promote.add_argument("ref", metavar="MODEL", help="a version, as scene/7; scene: its candidate")
    promote.add_argument("--force", action="store_true", help="although the gate refused it")
    rollback = verb("rollback", _rollback, "make the previous champion the champion again")
    task_argument(rollback, "encoder")
    for added in (aside, back, promote, rollback):
        added.add_argument("--by", metavar="NAME", help="who; default: the user of this machine")
        added.add_argument("--reason", metavar="TEXT", default="", help="why")
    lineage = verb("lineage", _lineage, "where a model came from: from production to the pixels")
    asked = lineage.add_mutually_exclusive_group(required=True)
    asked.add_argument("ref", metavar="REF", nargs="?", help="e.g. scene@champion, scene/7")
    asked.add_argument(
        "--of",
        metavar="WHAT",
        help="the other way round: every model that saw an image file, a folder, a source or a "
        "pattern of sources ('Beach/*'), a tile's key, or a data version",
    )
    lineage.add_argument("--html", metavar="FILE", help="write the tree as a page to look at")
    lineage.add_argument(
        "--verify", action="store_true", help="recompute the hashes from the model to the pixels"
    )
    lineage.add_argument(
        "--deep", action="store_true", help="with --verify: read every byte of the data version too"
    )
    reproduce = verb("reproduce", _reproduce, "make a model again from its lineage, and compare")
    reproduce.add_argument("ref", metavar="REF", help="e.g. scene@champion, scene/7")
    reproduce.add_argument(
        "--to", metavar="DIR", help="where; default: .ringmo/reproduced/MODEL-VERSION"
    )
    card = verb("card", _card, "a model's card: what it is for, how good it is, and where not")
    card.add_argument("ref", metavar="REF", help="e.g. scene@champion, scene/7, encoder/3")
    card.add_argument(
        "--out",
        metavar="DIR",
        help="for card.md and card.html; default: .ringmo/cards/MODEL-VERSION",
    )

    predict = verb("predict", _predict, "answer for images with a registered model")
    predict.add_argument(
        "images", nargs="+", metavar="IMAGE", help="files, folders, globs or s3://BUCKET/PREFIX"
    )
    predict.add_argument("--model", metavar="REF", default="scene@champion")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="labels to show")
    predict.add_argument(
        "--with",
        dest="beside",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="what else the model reads of the same ground: second=FILE (the later date) or a "
        "sensor's name; a folder has files of the same names",
    )
    predict.add_argument(
        "--out", metavar="DIR", help="write predictions.json there, masks, heights and boxes"
    )
    predict.add_argument(
        "--probabilities", action="store_true", help="of scenes, those of every class too"
    )
    predict.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the scenes"
    )

    drift = verb("drift", _drift, "does production still look as the model's test tiles do")
    task_argument(drift)
    drift.add_argument("--model", metavar="REF", help="e.g. scene/7; default: the champion")
    when = drift.add_mutually_exclusive_group()
    when.add_argument("--days", type=int, metavar="N", help="default: monitoring.days")
    when.add_argument("--since", metavar="DATE", help="from this day on, as 2026-11-20")
    drift.add_argument("--html", metavar="FILE", help="the report as a page to look at")

    serve = verb("serve", _serve, "answer over HTTP, and follow the champions as they change")
    serve.add_argument(
        "--model",
        metavar="REF",
        action="append",
        help="may be given again; default: scene@champion",
    )
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: a free one")
    serve.add_argument(
        "--root",
        metavar="DIR",
        help="scenes below this folder, or s3://BUCKET/PREFIX, may be named in place of an image",
    )
    serve.add_argument("--device", default="auto", help="cuda, cpu; default: a GPU where one is")
    for name, default, text in (
        ("--batch-size", 32, "images that a model is given at a time"),
        ("--queue", 128, "requests within at a time; further ones are told to come again"),
        ("--max-body", 32_000_000, "bytes"),
        ("--max-side", 2048, "pixels of an image's side"),
        ("--time-limit", 30, "seconds, each of a request's body and its answer"),
        ("--poll", 5, "seconds between two looks at the registry"),
    ):
        serve.add_argument(name, type=int, default=default, metavar="N", help=f"{text} ({default})")

    export = verb(
        "export", _export, "write a model for programs without ringmo: ONNX, torch.export"
    )
    export.add_argument("ref", metavar="REF", help="e.g. scene@champion, segmentation/2, a folder")
    export.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="default: onnx")
    export.add_argument("--out", metavar="FILE", required=True, help="e.g. scene.onnx, scene.pt2")

    embed = verb("embed", _embed, "write an encoder's features of every tile, with footprints")
    embed.add_argument("source", metavar="SOURCE", help="a file, folder or glob; store: all tiles")
    embed.add_argument("--out", metavar="FILE", required=True, help="GeoParquet, e.g. t.parquet")
    similar = verb("similar", _similar, "find the tiles that look like an image")
    similar.add_argument("image", metavar="IMAGE", help="a file, no larger than two tiles")
    similar.add_argument(
        "--in", metavar="FILE", dest="among", help="search what `embed` wrote; default: the store"
    )
    similar.add_argument("--top", type=int, default=10, metavar="N", help="tiles to show")
    similar.add_argument("--out", metavar="FILE", help="the page; default: .ringmo/similar.html")
    for added in (embed, similar):
        added.add_argument("--model", metavar="REF", default="encoder@champion")
    return parser


def _open(arguments: Arguments) -> "tuple[Config, Workspace]":
    from ringmo.config import Config
    from ringmo.workspace import Workspace

    workspace = Workspace.find(arguments.workspace)
    return Config.load(workspace.params_file), workspace


# The chain


def _run(arguments: Arguments) -> int:
    from ringmo import config as configuration
    from ringmo.workspace import Workspace

    workspace = Workspace.find(arguments.workspace)
    changes = _changes(arguments)
    if changes and not arguments.dry_run:
        configuration.edit(workspace.params_file, changes)

    from ringmo import chain

    if arguments.dry_run:
        config = configuration.edited(workspace.params_file, changes)
        plan = chain.plan(config, workspace)
        console.result({"stages": plan}, chain.plan_text(plan))
        return 0
    from ringmo.registry import outbox

    config = configuration.Config.load(workspace.params_file)
    outbox.check(config.promotion)
    try:
        summary = chain.run(config, workspace)
    finally:
        outbox.deliver(workspace, config.promotion)
    console.result(summary, chain.summary_text(summary))
    return int(summary["exit_code"])


def _changes(arguments: Arguments) -> dict[str, Any]:
    """What --recipe, --set and --data change in params.yaml, by dotted key."""
    from ringmo import config as configuration
    from ringmo.workspace import template

    changes: dict[str, Any] = {}
    if arguments.recipe:
        recipe = template("recipes") / f"{arguments.recipe}.yaml"
        if not recipe.is_file():
            known = ", ".join(sorted(path.stem for path in recipe.parent.glob("*.yaml")))
            raise BadInput(f"--recipe {arguments.recipe}: no such recipe; there are: {known}")
        changes |= configuration.recipe(recipe)
    changes |= _assigned(arguments.set)
    if getattr(arguments, "task", None):
        changes["tasks"] = list(dict.fromkeys(arguments.task))
    if arguments.data:
        changes["ingest.sources"] = [_source(arguments.data)]
    return changes


def _source(text: str) -> str:
    """A source as params.yaml keeps it: absolute, so that it means the same from everywhere."""
    if text == "generated" or text.startswith("s3://"):
        return text
    folder = Path(text).expanduser()
    if not folder.exists():
        raise BadInput(
            f"{text}: no such folder; --data takes a folder of images, a list, or s3://…"
        )
    return str(folder.resolve())


# Services


def _assigned(texts: list[str]) -> dict[str, Any]:
    """What --set changes, by dotted key."""
    from ringmo import config as configuration

    return dict(configuration.parse_assignment(text) for text in texts)


def _init(arguments: Arguments) -> None:
    from ringmo import config as configuration
    from ringmo.workspace import init, template

    changes = _assigned(arguments.set)
    configuration.edited(template("params.yaml"), changes)  # before anything is made
    made = init(Path(arguments.dir))
    configuration.edit(made.params_file, changes)
    there = "" if made.root == Path.cwd() else f"cd {shlex.quote(arguments.dir)} && "
    console.result(
        {"workspace": str(made.root)},
        f"A workspace in {made.root}\nNext: {there}ringmo run --data FOLDER",
    )


def _up(arguments: Arguments) -> None:
    from ringmo import services

    config, workspace = _open(arguments)
    running = services.up(config, workspace, worker=True)
    console.result({"services": running}, services.status_text(running))


def _down(arguments: Arguments) -> None:
    from ringmo import services

    _, workspace = _open(arguments)
    ended = services.down(workspace)
    console.result({"ended": ended}, f"Ended: {', '.join(ended)}" if ended else "Nothing was up.")


def _status(arguments: Arguments) -> None:
    from ringmo import status
    from ringmo.workspace import Workspace

    state = status.look(Workspace.find(arguments.workspace))
    console.result(state, status.text(state))


def _doctor(arguments: Arguments) -> int:
    from ringmo import doctor

    findings = doctor.examine(arguments.workspace)
    console.result(doctor.result(findings), doctor.text(findings))
    return 1 if doctor.problems(findings) else 0


def _clean(arguments: Arguments) -> None:
    from ringmo import cleaning

    config, workspace = _open(arguments)
    done = cleaning.clean(config, workspace, dry_run=arguments.dry_run, shared=arguments.shared)
    console.result(done, cleaning.text(done))


def _deploy(arguments: Arguments) -> None:
    if arguments.init_env:
        from ringmo import compose_env

        path = compose_env.write(Path.cwd())
        console.result(
            {"env": str(path)},
            f"{path}: random passwords, for you alone to read\nNext: docker compose up -d --build",
        )
        return
    from ringmo import services

    config, workspace = _open(arguments)
    running = services.up(config, workspace, worker=True)
    os.environ.update(services.environment(workspace))  # before Prefect is first imported
    from flows.deployment import deploy
    from flows.stages import as_ringmo_error

    try:
        rows = deploy(config, workspace)
    except RingmoError:
        raise
    except Exception as error:  # Prefect refuses the password, or went away
        raise as_ringmo_error(error) from error
    text = console.table(
        [
            (row["deployment"], row["schedule"] or "-", row["does"] or "by hand", row["url"] or "")
            for row in rows
        ],
        ("deployment", "schedule", "for", "where"),
    )
    console.result({"deployments": rows, "services": running}, text)


def _backup(arguments: Arguments) -> None:
    from ringmo import backup

    config, workspace = _open(arguments)
    done = backup.backup(config, workspace, Path(arguments.dir))
    following = f"copy {done['backup']} to another machine; back with `ringmo restore DIR`"
    console.result(done, backup.text(done, following))


def _restore(arguments: Arguments) -> None:
    from ringmo import backup

    root = Path(arguments.workspace or os.environ.get("RINGMO_WORKSPACE") or ".")
    done = backup.restore(root, Path(arguments.dir), _assigned(arguments.set))
    following = f"start the servers, then `ringmo deploy --workspace {done['workspace']}`"
    console.result(done, backup.text(done, following))


def _user(arguments: Arguments) -> None:
    from ringmo.registry import roles

    made = roles.give(arguments.name, arguments.role)
    console.result(made, roles.text(made))


# One step each


def _print_report(report: "Report") -> int:
    from dataclasses import asdict

    ends = "; in brackets 95 % intervals" * any(name.endswith("_low") for name in report.figures)
    parts = [f"{report.stage}: done in {report.seconds:.1f} s{ends}"]
    parts.append(console.figures(report.figures))
    for name in SHOWN_TABLES:
        if len(rows := report.tables.get(name, [])) in SHOWN_ROWS:
            parts += [f"\n{name.replace('_', ' ')}", console.table(*console.folded(rows))]
    console.result(asdict(report), "\n".join([*parts, *report.notes]).rstrip())
    return report.exit_code


def _ingest(arguments: Arguments) -> int:
    return _print_report(_ingested(*_open(arguments)))


def _ingested(config: "Config", workspace: "Workspace") -> "Report":
    from ringmo.data import versions
    from ringmo.data.ingest import ingest
    from ringmo.stage import failure_reported

    with failure_reported(workspace, "ingest"):
        report = ingest(config, workspace)
        report.figures["data_version"] = versions.add_store(workspace, config)
        report.write(workspace.report_file("ingest"))
    return report


def _stage(arguments: Arguments, name: str, function: str, **options: Any) -> int:
    """Run the stage that `module:function` is."""
    from importlib import import_module

    from ringmo.stage import run_stage

    config, workspace = _open(arguments)
    module, _, called = function.partition(":")

    def work(out: Path) -> "Report":
        report: Report = getattr(import_module(module), called)(config, workspace, out, **options)
        return report

    return _print_report(run_stage(workspace, name, work))


def _validate(arguments: Arguments) -> int:
    return _stage(arguments, "validate", "ringmo.data.validation:validate")


def _select(arguments: Arguments) -> int:
    return _stage(arguments, "select", "ringmo.data.selection:select")


def _training(
    arguments: Arguments, again: list[str], name: str, function: str, **options: Any
) -> int:
    """Run a stage that trains, in as many processes as hardware.devices says.

    Each runs the command `again` under torchrun; the first alone has outputs and a report.
    """
    from ringmo.training import launch

    if launch.joined():
        launch.end_with_torchrun()
        if not launch.leads():
            console.quiet, console.as_json = True, False
            return launch.follow(*_open(arguments), function, options)
    else:
        config, workspace = _open(arguments)
        count = launch.processes(config.hardware)
        if count > 1 or launch.several_machines():
            flags = ["--quiet"] * arguments.quiet + ["--json"] * arguments.json
            where = ["--workspace", str(workspace.root)]
            return launch.torchrun(count, [*again, *where, *flags])
    return _stage(arguments, name, function, **options)


def _pretrain(arguments: Arguments) -> int:
    function = "ringmo.training.pretrain:pretrain"
    return _training(arguments, ["pretrain"], "pretrain", function)


def _finetune(arguments: Arguments) -> int:
    again = ["finetune", arguments.task, *["--from-scratch"] * arguments.from_scratch]
    more: dict[str, Any] = {}
    if arguments.encoder:
        from ringmo.inference.model import open_bundle

        # Its folder: the processes of a training need not find the registry.
        more["encoder"] = open_bundle(arguments.encoder, workspace=arguments.workspace).folder
        again += ["--encoder", str(more["encoder"])]
    return _training(
        arguments,
        again,
        f"{'scratch' if arguments.from_scratch else 'finetune'}@{arguments.task}",
        "ringmo.training.finetune:finetune",
        task=arguments.task,
        from_scratch=arguments.from_scratch,
        **more,
    )


def _evaluate(arguments: Arguments) -> int:
    return _stage(
        arguments,
        f"evaluate@{arguments.task}",
        "ringmo.evaluation.evaluate:evaluate",
        task=arguments.task,
    )


def _register(arguments: Arguments) -> int:
    from ringmo import chain
    from ringmo.stage import failure_reported

    config, workspace = _open(arguments)
    with failure_reported(workspace, f"register@{arguments.task}"):
        report = chain.register(config, workspace, arguments.task, arguments.flow_run)
    if report.ok and not arguments.flow_run:  # the chain promotes by itself
        report.notes.append(f"Next: ringmo promote {report.figures['model']}")
    return _print_report(report)


# Data and models


def _data_versions(arguments: Arguments) -> None:
    from ringmo.data import class_facts, versions

    _, workspace = _open(arguments)
    rows = versions.versions(workspace)
    names = ("version", "time", "tiles", "classes", "labelled", "set_aside", "sources")
    text = console.table(
        [
            [
                ", ".join(row[name]) + (" (generated)" if row.get("generated") else "")
                if name == "sources"
                else class_facts.said(row["labels"])
                if name == "labelled" and "labels" in row
                else row[name]
                for name in names
            ]
            for row in rows
        ],
        [name.replace("_", " ") for name in names],
    )
    console.result({"versions": rows}, text if rows else "No data version yet. Next: ringmo ingest")


def _data_diff(arguments: Arguments) -> None:
    from ringmo.data import versions

    _, workspace = _open(arguments)
    found = versions.diff(workspace, arguments.a, arguments.b)

    def said(counts: dict[str, int]) -> str:
        return ", ".join(f"{count} {what}" for what, count in counts.items())

    parts = [
        console.table(
            [(name, str(found[name])) for name in ("from", "to")]
            + [(name, said(found[name])) for name in ("tiles", "places")]
        )
    ]
    for name, one in (("classes", "class"), ("sensors", "sensor")):
        rows = [(what, counts["added"], counts["removed"]) for what, counts in found[name].items()]
        if rows:
            parts.append(console.table(rows, (one, "added", "removed")))
    console.result(found, "\n\n".join(parts))


def _data_show(arguments: Arguments) -> None:
    from ringmo.data import page

    config, workspace = _open(arguments)
    out = Path(arguments.out) if arguments.out else workspace.state / "data.html"
    shown = page.write(config, workspace, out.resolve())
    console.result(shown, f"{shown['tiles']} tiles: open file://{shown['page']} in a browser")


def _data_compact(arguments: Arguments) -> int:
    from ringmo.data import versions
    from ringmo.data.compact import compact

    config, workspace = _open(arguments)
    report = compact(workspace)
    report.figures["data_version"] = versions.add_store(workspace, config)
    return _print_report(report)


def _data_set_aside(arguments: Arguments) -> None:
    from ringmo.data import decisions

    _decide(arguments, decisions.set_aside, "set aside")


def _data_put_back(arguments: Arguments) -> None:
    from ringmo.data import decisions

    _decide(arguments, decisions.put_back, "put back")


def _decide(arguments: Arguments, decide: Callable[..., dict[str, Any]], what: str) -> None:
    from ringmo.data.ingest import alone

    _, workspace = _open(arguments)
    with alone(workspace):
        names, by = arguments.tiles, _mover(arguments)
        decided = decide(workspace.store, names, by=by, reason=arguments.reason)
    rows = [(row["key"], row["source"]) for row in decided["tiles"]]
    text = console.table(rows, ("tile", "source"))
    console.result(decided, f"{text}\n\n{len(rows)} to be {what}. Next: ringmo ingest")


def _data_fetch(arguments: Arguments) -> None:
    from ringmo.data import fetch

    if arguments.list or arguments.name is None:
        rows = fetch.listing()
        if not arguments.list:
            raise BadInput(f"fetch which? There are {', '.join(row['name'] for row in rows)}")
        names = ("name", "what", "how")
        lines = console.table([[row[name] for name in names] for row in rows], names)
        console.result({"sets": rows}, lines)
        return
    if arguments.to:
        to = Path(arguments.to)
    else:
        from ringmo.workspace import Workspace

        to = Workspace.find(arguments.workspace).state / "public"
    found = fetch.fetch(arguments.name, to)
    console.result(found, fetch.text(found))


def _compare(arguments: Arguments) -> None:
    from dataclasses import asdict

    from ringmo import config as configuration
    from ringmo.workspace import Workspace

    workspace = Workspace.find(arguments.workspace)
    if changes := _changes(arguments):
        configuration.edit(workspace.params_file, changes)
    config = configuration.Config.load(workspace.params_file)
    compared = config.compare.tasks or config.tasks
    selections = [workspace.work("select") / f"{task}.parquet" for task in compared]
    if arguments.data or not all(path.is_file() for path in selections):
        from ringmo.data.selection import select
        from ringmo.data.validation import validate
        from ringmo.stage import run_stage

        _ingested(config, workspace)
        run_stage(workspace, "validate", lambda out: validate(config, workspace, out))
        run_stage(workspace, "select", lambda out: select(config, workspace, out))

    from ringmo.evaluation import compare

    report = compare.run(config, workspace)
    plot = workspace.work("compare") / "comparison.png"
    console.result(
        asdict(report),
        f"{compare.text(report)}\n\nPlot: {plot}\n"
        f"      and MLflow's experiment `compare` (`ringmo up` starts it and says where)",
    )


def _models(arguments: Arguments) -> None:
    from ringmo.registry import listing, promotion

    _, workspace = _open(arguments)
    if arguments.history:
        models = [arguments.task] if arguments.task else [*tasks.names(), "encoder"]
        moves = [row for model in models for row in promotion.history(workspace, model)]
        text = promotion.history_text(moves) if moves else "No promotion yet."
        console.result({"history": moves}, text)
        return
    rows = listing.models(workspace, arguments.task)
    console.result(
        {"models": rows},
        listing.models_text(rows) if rows else "No model registered yet. Next: ringmo run",
    )


def _mover(arguments: Arguments) -> str:
    import getpass

    return arguments.by or getpass.getuser()


def _promote(arguments: Arguments) -> None:
    from ringmo.registry import listing, promotion
    from ringmo.stage import Report, failure_reported

    _, workspace = _open(arguments)
    ref = arguments.ref
    if "/" not in ref and "@" not in ref:
        ref = f"{ref}@candidate"
    stage = f"promote@{re.split('[@/]', ref)[0]}"
    with failure_reported(workspace, stage):
        chosen = listing.resolve(workspace, ref)
        moved = promotion.promote(
            workspace,
            chosen.model,
            chosen.version,
            by=_mover(arguments),
            reason=arguments.reason,
            force=arguments.force,
        )
        Report(stage, figures=moved).write(workspace.report_file(stage))
    console.result(moved, promotion.move_text(moved))


def _rollback(arguments: Arguments) -> None:
    from ringmo.registry import promotion

    _, workspace = _open(arguments)
    moved = promotion.rollback(
        workspace, arguments.task, by=_mover(arguments), reason=arguments.reason
    )
    console.result(moved, promotion.move_text(moved))


def _lineage(arguments: Arguments) -> int:
    from ringmo.registry import lineage

    _, workspace = _open(arguments)
    if arguments.deep and not arguments.verify:
        raise BadInput("--deep belongs to --verify")
    if (arguments.html or arguments.verify) and arguments.of:
        raise BadInput("--of answers with a table: it takes neither --html nor --verify")
    if arguments.html and arguments.verify:
        raise BadInput("--verify answers with a table: ask for --html apart")
    if arguments.of:
        answer = lineage.who_saw(workspace, arguments.of)
        console.result(answer, lineage.who_saw_text(answer))
        return 0
    if arguments.verify:
        from ringmo.registry import verify

        links = verify.verify(workspace, arguments.ref, deep=arguments.deep)
        console.result(verify.result(links), verify.text(links))
        return 1 if verify.broken(links) else 0
    tree = lineage.lineage(workspace, arguments.ref)
    if arguments.html:
        from ringmo.registry import lineage_page

        page = Path(arguments.html).resolve()
        lineage_page.write(tree, page)
        console.result({"page": str(page), **tree}, f"open file://{page} in a browser")
        return 0
    console.result(tree, lineage.text(tree))
    return 0


def _reproduce(arguments: Arguments) -> int:
    from ringmo.registry import reproduce

    _, workspace = _open(arguments)
    to = Path(arguments.to) if arguments.to else None
    done = reproduce.reproduce(workspace, arguments.ref, to)
    console.result(done, reproduce.text(done))
    return 0 if done["reproduced"] else 1


def _card(arguments: Arguments) -> None:
    from ringmo.registry import card

    _, workspace = _open(arguments)
    told = card.write(workspace, arguments.ref, Path(arguments.out) if arguments.out else None)
    console.result(told, card.text(told))


def _drift(arguments: Arguments) -> int:
    from ringmo.monitoring import drift, drift_page

    config, workspace = _open(arguments)
    of = arguments.model, arguments.days, arguments.since
    found = drift.drift(config, workspace, arguments.task, *of)
    page = None
    if arguments.html:
        page = str(Path(arguments.html).resolve())
        drift_page.write(found, Path(arguments.html), workspace)
    console.result(drift.result(found, page), drift.text(found, page))
    return 1 if found.drifted else 0


def _predict(arguments: Arguments) -> int:
    from ringmo.inference import predict

    _, workspace = _open(arguments)
    for given in arguments.beside:
        if "=" not in given:
            raise BadInput(f"--with {given}: expected NAME=PATH, as second=later.tif")
    answers = predict.predict(
        workspace,
        arguments.images,
        arguments.model,
        top=arguments.top,
        out=Path(arguments.out) if arguments.out else None,
        beside=dict(given.split("=", 1) for given in arguments.beside),
        probabilities=arguments.probabilities,
        workers=arguments.workers,
    )
    console.result({"predictions": answers}, predict.text(answers))
    return 0


def _serve(arguments: Arguments) -> None:
    from ringmo.data.buckets import Bucket
    from ringmo.inference import given
    from ringmo.inference.server import running
    from ringmo.inference.server.app import Limits

    for name in ("batch_size", "queue", "max_body", "max_side", "time_limit", "poll"):
        if (value := getattr(arguments, name)) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {value}: at least 1")
    if not 0 <= arguments.port < 2**16:
        raise BadInput(f"--port {arguments.port}: from 0 to {2**16 - 1}")
    config, workspace = _open(arguments)
    root: Path | Bucket | None = Path(arguments.root) if arguments.root else None
    if (arguments.root or "").startswith(given.S3):
        root = Bucket(arguments.root, config.ingest.endpoint)
    running.serve(
        workspace,
        arguments.model or ["scene@champion"],
        host=arguments.host,
        port=arguments.port,
        root=root,
        limits=Limits(
            arguments.queue, arguments.max_body, arguments.max_side, arguments.time_limit
        ),
        batch_size=arguments.batch_size,
        poll_s=arguments.poll,
        device=_device(arguments.device),
        monitoring=config.monitoring,
    )


def _export(arguments: Arguments) -> None:
    from ringmo.inference import export

    _, workspace = _open(arguments)
    done = export.export(workspace, arguments.ref, arguments.format, Path(arguments.out))
    console.result(done, export.text(done))


def _device(chosen: str) -> str:
    import torch

    if chosen == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if chosen not in ("cuda", "cpu") or (chosen == "cuda" and not torch.cuda.is_available()):
        raise BadInput(f"--device {chosen}: cpu, or cuda where there is a GPU")
    return chosen


def _embed(arguments: Arguments) -> None:
    from ringmo.inference import embed

    config, workspace = _open(arguments)
    out = Path(arguments.out)
    done = embed.embed(config, workspace, arguments.source, arguments.model, out)
    console.result(done, embed.text(done))


def _similar(arguments: Arguments) -> None:
    from ringmo.inference import similar

    config, workspace = _open(arguments)
    found = similar.similar(
        config,
        workspace,
        Path(arguments.image),
        arguments.model,
        among=Path(arguments.among) if arguments.among else None,
        top=arguments.top,
        out=Path(arguments.out) if arguments.out else None,
    )
    console.result(found, similar.text(found))
