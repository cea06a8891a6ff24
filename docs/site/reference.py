"""The reference, made from the code while the site is built, so that it cannot lag behind it.

A hook of MkDocs (mkdocs.yml). Command line, params.yaml, recipes and environment variables are read
from where they are declared: no tool knows these. Docstrings are mkdocstrings' business. Nothing
made here is kept.
"""

import argparse
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ringmo.cli import build_parser
from ringmo.config import Config
from ringmo.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
UNLISTED = "Running it"  # the section of the navigation for pages that mkdocs.yml does not name

PYTHON = """\
# Python

What other code may call. `import ringmo` loads nothing heavy; how these are used is shown in
[Other people's code](../other-code.md).

::: ringmo.load

::: ringmo.inference.model.TrainedModel
    options:
      members: [forward, features, normalise, predict, embed, classes, encoder, image_size]

::: ringmo.models.timm_names.to_timm

::: ringmo.models.timm_names.write_timm

::: ringmo.monitoring.record.Recorder
    options:
      members: [add, close]

::: ringmo.errors
    options:
      show_root_heading: false
      show_root_toc_entry: false
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation does not name still get a place in it."""
    docs = Path(config.docs_dir)
    named = set(_named(config.nav))
    section = next(one[UNLISTED] for one in config.nav if UNLISTED in one)
    for path in sorted(docs.rglob("*.md")):
        name = path.relative_to(docs).as_posix()
        if name not in named:
            section.append(name)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "command": command_line(),
        "params": parameters(),
        "recipes": recipes(),
        "environment": variables(),
        "python": PYTHON,
    }
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def _named(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for one in nav.values() if isinstance(nav, dict) else nav:
            yield from _named(one)


def command_line() -> str:
    """Every verb of the parser itself: its usage, arguments and options."""
    parser = build_parser()
    parser.formatter_class = _Wide
    parts = [
        "# Command line\n",
        parser.description or "",
        "\nBefore the verb or after it:\n",
        _options(parser),
        "\nREF names a model: `scene@champion`, `scene/7`, or the folder of a bundle.\n",
        "## Exit codes\n\n| code | means |\n|---|---|",
        *(f"| {code} | {text} |" for code, text in EXIT_CODES.items()),
    ]
    for name, verb in _verbs(parser):
        shared = {action.dest for action in parser._actions}
        parts += [f"\n## {name}\n", f"{verb.description}\n", "```text", _usage(verb), "```\n"]
        parts += [_options(verb, shared)]
    return "\n".join(parts)


EXIT_CODES = {
    0: "done",
    1: "the answer is no: validation failed, the gate refused, production drifted",
    2: "bad input or usage: one line says what, where and what to do",
    3: "something outside did not answer; the same command later may work",
    130: "interrupted by Ctrl-C: the same command goes on from there",
    141: "whoever read the output went away",
}


class _Wide(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=98)


def _usage(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = _Wide
    return parser.format_usage().removeprefix("usage: ").rstrip()


def _verbs(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                deeper = list(_verbs(verb))
                yield from deeper or [(verb.prog, verb)]


def _options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> str:
    rows = []
    for action in parser._actions:
        if action.dest in without or action.help == argparse.SUPPRESS:
            continue
        if isinstance(action, argparse._SubParsersAction):
            continue
        name = ", ".join(f"`{flag}`" for flag in action.option_strings)
        value = action.metavar or (
            f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
        )
        value = f" `{value}`" if value and action.nargs != 0 else ""
        text = (action.help or "").replace("%%", "%").replace("|", "\\|")
        rows.append(f"| {name}{value} | {text} |")
    return "\n".join(["| argument | |", "|---|---|", *rows]) if rows else ""


def parameters() -> str:
    """params.yaml as it is, a section each with its comments, and what the checks allow."""
    text = (ROOT / "params.yaml").read_text()
    _, *rest = re.split(r"^(?=[a-z_]+:)", text, flags=re.M)
    # A comment that stands before a section is that section's.
    sections, above = [], ""
    for part in rest:
        lines = part.rstrip().split("\n")
        end = len(lines)
        while end and (not lines[end - 1] or lines[end - 1].startswith("#")):
            end -= 1
        sections.append((above + "\n".join(lines[:end]), part.partition(":")[0]))
        above = "\n".join(lines[end:]).strip()
        above = f"{above}\n" if above else ""
    schema = Config.model_json_schema(by_alias=True)
    parts = [
        "# params.yaml\n",
        "Every value that may be turned, as a new workspace has it. Edit the file, or let "
        "`ringmo run --set KEY=VALUE` do it; what ran is always what the file says. An unknown key "
        "or a value out of range is refused with a line that names it.\n",
    ]
    for yaml, name in sections:
        parts += [f"\n## {name}\n", "```yaml", yaml.strip(), "```\n", _allowed(schema, name)]
    return "\n".join(parts)


def _allowed(schema: dict[str, Any], section: str) -> str:
    """What the values of a section may be, as config.py checks them."""
    about = schema["properties"].get(section, {})
    model = _model(schema, about) or _model(schema, about.get("additionalProperties") or {})
    if not model:
        return ""
    rows = []
    for name, value in model["properties"].items():
        default = value.get("default", "–")
        rows.append(f"| `{name}` | {_kind(schema, value)} | {_plain(default)} |")
    return "\n".join(["| key | may be | where left out |", "|---|---|---|", *rows])


def _model(schema: dict[str, Any], about: dict[str, Any]) -> dict[str, Any] | None:
    if "$ref" not in about:
        return None
    found: dict[str, Any] = schema["$defs"][about["$ref"].rpartition("/")[2]]
    return found if "properties" in found else None


def _plain(value: Any) -> str:
    if value == "–":
        return "–"
    return f"`{json.dumps(value)}`" if isinstance(value, bool | None) else f"`{value}`"


def _kind(schema: dict[str, Any], value: dict[str, Any]) -> str:
    if "$ref" in value:
        return _kind(schema, schema["$defs"][value["$ref"].rpartition("/")[2]])
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_kind(schema, one) for one in value["anyOf"]))
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    kind = value.get("type", "a value")
    names = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true`, `false`",
        "object": "keys with values",
        "null": "`null`",
    }
    if kind == "array":
        inside = _kind(schema, value["items"]) if value.get("items") else "values"
        return f"list of {inside}"
    bounds = (
        ("minimum", "from"),
        ("exclusiveMinimum", "above"),
        ("maximum", "to"),
        ("exclusiveMaximum", "below"),
    )
    ends = [f"{word} {value[key]:g}" for key, word in bounds if key in value]
    return " ".join([names.get(kind, kind), *ends])


def recipes() -> str:
    """Each recipe: the comment it begins with, and its values."""
    about = "Named sets of values: `ringmo run --recipe NAME` writes them to params.yaml.\n"
    parts = ["# Recipes\n", about]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        lines = path.read_text().rstrip().split("\n")
        says = []
        while lines and lines[0].startswith("#"):
            says.append(lines.pop(0).lstrip("# "))
        parts += [f"\n## {path.stem}\n", " ".join(says), "\n```yaml", *lines, "```\n"]
    return "\n".join(parts)


def variables() -> str:
    """Environment variables, as ringmo/environment.py declares them."""
    rows = [
        f"| `{one.name}` | {one.meaning} | {'secret' if one.secret else ''} |" for one in VARIABLES
    ]
    return "\n".join(
        [
            "# Environment variables\n",
            "With none of them set all runs on this machine alone. Secrets are read from the "
            "environment and from nowhere else; they are never written down or shown.\n",
            "| variable | | |",
            "|---|---|---|",
            *rows,
        ]
    )
