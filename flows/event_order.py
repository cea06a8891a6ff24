"""For Prefect's server: how long an event waits for the one that it follows.

Automations look at a run's changes of state in their order, and what was seen is in the server's
memory. After a restart the next change waits a quarter of an hour for one that the server before
saw; by then it is too old for what `watch` does about it, and a crashed run is never begun again.
Half a minute is enough for events that are on their way.

Named by PREFECT_SERVER_EVENTS_CAUSAL_ORDERING (`ringmo.services.SERVER`).
"""

from datetime import timedelta

from prefect.server.events.ordering import memory
from prefect.server.events.ordering.memory import CausalOrdering

__all__ = ["CausalOrdering"]

# No setting of Prefect's has it: its module does.
memory.PRECEDING_EVENT_LOOKBACK = timedelta(seconds=30)  # type: ignore[attr-defined]
