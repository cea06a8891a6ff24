"""Every error text that the page quotes still is one that the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def text(node: ast.AST) -> str:
    """What a node says, with `…` for what is put in when it runs."""
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def texts() -> Iterator[str]:
    """Texts in the shipped code."""
    for path in [*(ROOT / "ringmo").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                yield text(node)


def quoted() -> list[str]:
    """First cells of the page's tables."""
    return re.findall(r"^\| `(.+?)` \| ", PAGE.read_text(), re.M)


def says(said: str, quote: str) -> bool:
    """Whether a text of the code may read as the page quotes it."""
    at = 0
    for part in quote.split("…"):
        at = said.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


TEXTS = sorted({one for one in texts() if len(one) < 1000})


@pytest.mark.parametrize("quote", quoted())
def test_the_code_says_so(quote: str) -> None:
    assert max(len(part.strip(" :;,().")) for part in quote.split("…")) >= 5, "says nothing"
    assert any(says(one, quote) for one in TEXTS), f"nothing in the code says: {quote}"


def test_the_page_quotes_many() -> None:
    assert len(quoted()) > 50
    assert not says("ends before byte 5", "ends after byte …")


def test_whatever_does_not_answer_is_on_the_page() -> None:
    """Errors of the night, when nobody is there who could ask."""
    found = []
    for path in [*(ROOT / "ringmo").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            if ast.unparse(node.exc.func) == "Unreachable" and node.exc.args:
                found += [text(node.exc.args[0])]
    told = [one for one in found if len(re.sub(r"[…\W]", "", one)) >= 5]
    assert len(told) > 8
    missing = [one for one in told if not any(says(one, quote) for quote in quoted())]
    assert not missing, missing
