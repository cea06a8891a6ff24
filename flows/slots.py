"""Who trains on which card: a lease on it in Prefect, so that flows of all workspaces wait in turn.

Each card is a global concurrency limit of Prefect's, named for the card's own number
(`ringmo-gpu-GPU-5f3a…`, whatever a container calls it); where there are none the machine is one
(`ringmo-cpu-HOST`). Stages that share a card on purpose (run.side_by_side) hold a part of it each,
so a limit has SHARES of them. A holder that is killed renews its lease no more, and after LEASE_S
the server gives the card to the next.
"""

import contextlib
import os
import platform
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run

from ringmo import console
from ringmo.config import Config

SHARES = 12
LEASE_S = 120.0
POLL_S = 5.0
CPU = "ringmo-cpu-" + "".join(c if c.isalnum() or c in "-." else "-" for c in platform.node())
Card = tuple[str, str]  # as CUDA_VISIBLE_DEVICES names it, and as its limit is called
TRAINING = ("pretrain", "finetune", "scratch")


def trains(stage: str) -> bool:
    """Whether a stage holds a card while it runs."""
    return stage.partition("@")[0] in TRAINING


_shares: dict[int, queue.SimpleQueue[int]] = {}  # how many → those that are free
_shares_lock = threading.Lock()


@contextmanager
def slot(config: Config, stage: str, slots: int) -> Iterator[dict[str, str]]:
    """One of so many equal shares of this machine, when one is free: its GPUs, or its cores.

    A stage that trains leases the cards of its share; alone (slots 1) as many as hardware.devices
    says, whichever are free. It waits as long as it takes.

    Yields:
        What the share is, as environment variables.
    """
    with ExitStack() as stack:
        number, own = 0, {}
        if slots > 1:
            number = stack.enter_context(_share(slots))
            own["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // slots))
        cards = gpus() if slots > 1 or trains(stage) else []
        if config.hardware.accelerator == "cpu":
            cards = []
        mine = part(cards, slots, number)
        if trains(stage):
            sharing = -(-slots // max(1, len(cards)))
            groups = [mine] if slots > 1 else _groups(config, cards)
            mine = _acquired(stack, groups if cards else [[("", CPU)]], max(1, SHARES // sharing))
        if visible := ",".join(card for card, _ in mine if card):
            own["CUDA_VISIBLE_DEVICES"] = visible
        yield own


@contextmanager
def _share(slots: int) -> Iterator[int]:
    with _shares_lock:
        if slots not in _shares:
            _shares[slots] = queue.SimpleQueue()
            for number in range(slots):
                _shares[slots].put(number)
    free = _shares[slots]
    number = free.get()
    try:
        yield number
    finally:
        free.put(number)


def _groups(config: Config, cards: list[Card]) -> list[list[Card]]:
    """As many cards as hardware.devices says, in all places where they may be."""
    wanted = config.hardware.devices
    count = min(wanted, len(cards)) if isinstance(wanted, int) else len(cards)
    return [cards[start : start + count] for start in range(0, len(cards) - count + 1, count or 1)]


def part(cards: list[Card], slots: int, number: int) -> list[Card]:
    """The cards of one of `slots` shares; with fewer cards than shares, some have the same."""
    return [card for i, card in enumerate(cards) if i % slots == number % len(cards)]


def gpus() -> list[Card]:
    """The GPUs that may be used here; none where there are none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        listed = None
    known: dict[str, str] = {}
    if listed is not None and listed.returncode == 0:
        for line in listed.stdout.splitlines():
            index, _, uuid = line.partition(",")
            known |= {index.strip(): uuid.strip(), uuid.strip(): uuid.strip()}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        names = [name for name in known if name.isdigit()]
    else:
        names = [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    # Where nvidia-smi is not installed, the number is all there is.
    return [(name, f"ringmo-gpu-{known.get(name) or f'{CPU}-{name}'}") for name in names]


def _acquired(stack: ExitStack, groups: list[list[Card]], occupy: int) -> list[Card]:
    """The first group of cards that is free, held until the stack closes."""
    cards = " or ".join(", ".join(name for _, name in group) for group in groups)
    note = threading.Timer(POLL_S, console.note, [f"waiting for {cards}: others train there"])
    note.daemon = True
    note.start()
    run = flow_run.id
    holder = ConcurrencyLeaseHolder(type="flow_run", id=UUID(str(run))) if run else None
    try:
        while True:
            for group in groups:
                names = [name for _, name in group]
                try:
                    _ensure(names)
                    lease = concurrency(
                        names,
                        occupy=occupy,
                        # One place to wait for: Prefect's client waits. Else the next is tried.
                        max_retries=None if len(groups) == 1 else 0,
                        lease_duration=LEASE_S,
                        holder=holder,
                        strict=True,  # a limit that was just deleted is made again
                        # Prefect away for a while ends no training of hours.
                        raise_on_lease_renewal_failure=False,
                    )
                    stack.enter_context(lease)
                except Exception as error:  # the cause is somewhere below what Prefect raises
                    if not _not_now(error):
                        raise
                else:
                    return group
            time.sleep(POLL_S)
    finally:
        note.cancel()


def _ensure(names: list[str]) -> None:
    """Have a limit for each card; one that somebody has changed stays as it is."""
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                with contextlib.suppress(ObjectAlreadyExists):  # by another flow, just now
                    client.create_global_concurrency_limit(
                        GlobalConcurrencyLimitCreate(name=name, limit=SHARES, active=True)
                    )


def _not_now(error: BaseException) -> bool:
    """Whether it is taken, Prefect is not to be reached, or the limit is gone."""
    last, seen = error, cast("BaseException | None", error)
    while seen is not None:
        if isinstance(seen, httpx.HTTPStatusError):
            status = seen.response.status_code
            return status == httpx.codes.LOCKED or status >= 500
        if isinstance(seen, httpx.TransportError):
            return True
        last, seen = seen, seen.__cause__ or seen.__context__
    return isinstance(last, ConcurrencySlotAcquisitionError)
