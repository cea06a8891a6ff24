"""For Prefect's server: when an event was, and how long it waits for the one that it follows.

Automations believe the time that an event says of itself. On a machine whose clock is set ahead a
run's sign of life then comes so long after the one before it that the run counts as dead at once;
where it is set back, a dead run is not found. So an event whose time is far from the one at which
it came here counts as of that.

Automations look at a run's changes of state in their order, and what was seen is in the server's
memory. After a restart the next change waits a quarter of an hour for one that the server before
saw; by then it is too old for what `watch` does about it, and a crashed run is never begun again.
Half a minute is enough for events that are on their way.

Named by PREFECT_SERVER_EVENTS_CAUSAL_ORDERING (`ringmo.services.SERVER`).
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent

# No setting of Prefect's has it: its module does.
memory.PRECEDING_EVENT_LOOKBACK = timedelta(seconds=30)  # type: ignore[attr-defined]
# More than an event is commonly on its way, less than the silence of the dead (`watch.SILENCE_S`).
APART = timedelta(seconds=60)


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, in memory, which is asked before automations look at an event."""

    @asynccontextmanager
    async def preceding_event_confirmed(
        self, handler: Any, event: ReceivedEvent, depth: int = 0
    ) -> AsyncGenerator[None, None]:
        if abs(event.occurred - event.received) > APART:
            event.occurred = event.received
        async with super().preceding_event_confirmed(handler, event, depth):
            yield
