"""Nothing that is shipped runs what it reads: no pickle, no eval, no shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted([*(ROOT / "ringmo").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])
UNPICKLERS = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and reason of whatever runs, or may run, what it is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [one.name for one in node.names]
            of = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in [of, *names]:
                if name.split(".")[0] in UNPICKLERS:
                    yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        given = {one.arg: ast.unparse(one.value) for one in node.keywords}
        if called in ("eval", "exec", "compile", "__import__"):
            yield node.lineno, called
        if called in (
            "os.system",
            "os.popen",
            "subprocess.getoutput",
            "subprocess.getstatusoutput",
        ):
            yield node.lineno, called
        if given.get("shell", "False") != "False":
            yield node.lineno, f"{called}(shell={given['shell']})"
        if given.get("allow_pickle", "False") != "False":
            yield node.lineno, f"{called}(allow_pickle={given['allow_pickle']})"
        if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            yield node.lineno, f"{called} that does not say allow_pickle=False"
        if called == "torch.load" and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if last in ("read_pickle", "to_pickle", "full_load", "unsafe_load", "trust_remote_code"):
            yield node.lineno, called
        if called in ("yaml.load", "yaml.load_all") and "Loader" in given:
            yield node.lineno, f"{called} with a loader of its own"
        if called == "YAML" and given.get("typ", "'rt'") not in ("'safe'", "'rt'"):
            yield node.lineno, f"YAML(typ={given['typ']})"


def test_shipped_code_runs_nothing_that_it_reads() -> None:
    found = {
        str(path.relative_to(ROOT)): list(unsafe(ast.parse(path.read_text()))) for path in SHIPPED
    }
    assert len(found) > 100
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "YAML(typ='unsafe').load(path)",
        "pd.read_pickle(path)",
    ],
)
def test_this_very_test_would_see_it(line: str) -> None:
    assert list(unsafe(ast.parse(line)))


def test_yaml_is_read_by_ruamel_alone() -> None:
    """So that `yaml.load` in the code is the method of a `YAML()`, whose loaders are safe."""
    for path in SHIPPED:
        tree = ast.parse(path.read_text())
        names = [
            one.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for one in node.names
        ]
        assert "yaml" not in names, path
