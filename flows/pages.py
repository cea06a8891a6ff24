"""Addresses in Prefect's pages."""

from typing import Any

from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL


def address() -> str | None:
    """Where the pages are; None where no server shows them."""
    named = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    return named.rstrip("/") if named.startswith("http") else None


def of_run(identifier: Any) -> str | None:
    """A flow run's page."""
    at = address()
    return f"{at}/runs/flow-run/{identifier}" if at and identifier else None


def of_deployment(identifier: Any) -> str | None:
    at = address()
    return f"{at}/deployments/deployment/{identifier}" if at else None
