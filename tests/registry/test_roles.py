"""Accounts and roles, as far as no server is needed; tests/deploy/test_composed.py has the rest."""

import itertools
from typing import Any

import pytest

from ringmo.cli import ROLES, main
from ringmo.registry import roles


def test_each_role_may_what_the_one_before_it_may() -> None:
    assert tuple(roles.GRANTS) == ROLES
    rank = ["READ", "USE", "EDIT", "MANAGE"]
    grants = [roles.GRANTS[role] for role in ROLES]
    for less, more in itertools.pairwise(grants):
        assert less.keys() <= more.keys() and less != more
        assert all(rank.index(less[kind]) <= rank.index(more[kind]) for kind in less)
    # Who only looks creates nothing: MLflow's word for it is the workspace's USE.
    assert "workspace" not in roles.GRANTS["look"]
    assert set(roles.GRANTS["look"].values()) == {"READ"}


@pytest.mark.parametrize(
    ("uri", "code", "said"),
    [
        (None, 2, "names no server: only a server has accounts"),
        ("sqlite:///x.db", 2, "names no server"),
        ("http://127.0.0.1:9", 3, "does not answer"),
    ],
)
def test_an_account_needs_a_server(
    uri: str | None, code: int, said: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["user", "ada", "--role", "look"]) == code
    told = capsys.readouterr()
    assert said in told.err and told.err.count("\n") == 1 and not told.out
