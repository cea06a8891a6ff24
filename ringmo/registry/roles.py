"""Roles on an MLflow server with accounts: who may look, run, promote.

MLflow has roles of its own; here is what ours are made of. Its server must run with
`--enable-workspaces` (docker-compose.yml does): without it whoever has a password may create
experiments and models, and a promotion begins as one (`promotion.py`).
"""

import secrets
from typing import Any

from ringmo.environment import USER_PASSWORD
from ringmo.registry.tracker import ROLE_PREFIX, Accounts

# Role → kind of thing → what MLflow lets one do with all of the kind; the workspace's USE lets one
# create some. In MLflow whoever may register a version may point an alias as well: so both are
# `promote`, and a run's other traces are `run`.
GRANTS = {
    "look": {"experiment": "READ", "registered_model": "READ"},
    "run": {"workspace": "USE", "experiment": "EDIT", "registered_model": "READ"},
    "promote": {"workspace": "USE", "experiment": "MANAGE", "registered_model": "MANAGE"},
}


def give(name: str, role: str) -> dict[str, Any]:
    """Make the account `name` if there is none, and give it one of `GRANTS` in place of others.

    Returns:
        user, role, made (whether it is new), password (if one was made up, else None).

    Raises:
        BadInput: no server with accounts is named, its answer is no, or the password is too short.
        Unreachable: it does not answer.
    """
    accounts = Accounts()
    number = accounts.role(ROLE_PREFIX + role, GRANTS[role])
    password = USER_PASSWORD.read()
    made_up = None
    if password is None and not accounts.has(name):
        password = made_up = secrets.token_urlsafe(18)
    made = accounts.user(name, password, number)
    return {"user": name, "role": role, "made": made, "password": made_up}


def text(given: dict[str, Any]) -> str:
    """What `give` did, for people."""
    what = "is new, and may" if given["made"] else "may now"
    lines = [f"{given['user']} {what}: {given['role']}"]
    if given["password"]:
        lines.append(f"password, shown this once: {given['password']}")
    return "\n".join(lines)
