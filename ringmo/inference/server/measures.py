"""What Prometheus reads at /metrics."""

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

if TYPE_CHECKING:
    from ringmo.inference.server.models import Loaded

SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Measures:
    """A registry of its own, so that two servers in one process do not share figures."""

    def __init__(self) -> None:
        # The package is typed, and has forgotten this function's annotation.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter(
            "ringmo_requests",
            "Requests by model and HTTP status",
            ("model", "status"),
            registry=own,
        )
        self.seconds = Histogram(
            "ringmo_request_seconds",
            "From the first byte to the answer, of requests that were answered",
            ("model",),
            buckets=SECONDS,
            registry=own,
        )
        self.batch_size = Histogram(
            "ringmo_batch_size", "Images a batch", ("model",), buckets=SIZES, registry=own
        )
        self.model_seconds = Counter(
            "ringmo_model_seconds", "Time that the model computed", ("model",), registry=own
        )
        self.spared = Counter(
            "ringmo_encoder_images_spared",
            "Images that an encoder did not pass again for a further model",
            registry=own,
        )
        self.queue = Gauge("ringmo_queue_length", "Images that wait for the models", registry=own)
        self.within = Gauge(
            "ringmo_requests_within", "Requests let in and not answered", registry=own
        )
        self.version = Gauge(
            "ringmo_model_info",
            "1 for the version that answers",
            ("model", "version", "bundle"),
            registry=own,
        )
        self.swaps = Counter(
            "ringmo_swaps", "Versions that took over while serving", ("model",), registry=own
        )
        self.swap_failures = Counter(
            "ringmo_swap_failures",
            "Versions that should have taken over and did not load",
            ("model",),
            registry=own,
        )
        self.registry_answers = Gauge(
            "ringmo_registry_answers", "1 if the registry answered when last asked", registry=own
        )

    def batch(self, model: "Loaded", images: int, seconds: float) -> None:
        self.batch_size.labels(model.name).observe(images)
        self.model_seconds.labels(model.name).inc(seconds)

    def took_over(self, new: "Loaded", old: "Loaded | None") -> None:
        if old is not None:
            self.version.remove(old.name, old.version, old.bundle.hash[:12])
            self.swaps.labels(new.name).inc()
        self.version.labels(new.name, new.version, new.bundle.hash[:12]).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
