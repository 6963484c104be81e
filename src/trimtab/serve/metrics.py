"""What `/metrics` says, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab.serve.engine import Engine, Event

_NAMED = 100  # adapters with a line of their own; later ones are "other", so that names cannot fill the memory
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)

_GAUGES = {
    "waiting": ("requests_waiting", "Requests in the queue."),
    "running": ("requests_running", "Requests that hold a row of the engine."),
    "resident_adapters": ("adapters_resident", "Adapters in the table on the device."),
    "pinned_adapters": ("adapters_pinned", "Adapters that a request holds."),
    "prefix_bytes": ("prefix_store_bytes", "Size of the store of prompt prefixes."),
}
_COUNTERS = {
    "steps": ("steps", "Steps of the engine: a forward of prompts, one of answers, or both."),
    "step_seconds": ("step_seconds", "Time in them."),
    "failed_steps": ("steps_failed", "Steps that raised."),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts, computed."),
    "cached_tokens": ("prompt_tokens_cached", "Tokens of prompts, taken from the store of prefixes."),
    "generated_tokens": ("generated_tokens", "Tokens of answers."),
    "edited_rows": ("edited_rows", "Hidden states edited, counted once for all layers."),
    "table_hits": (
        "adapter_table_hits",
        "Adapters that were in the table when asked for; an untied one counts twice.",
    ),
    "table_misses": ("adapter_table_misses", "Adapters copied to the table."),
    "table_evictions": ("adapter_table_evictions", "Adapters that made room in the table."),
}


class Metrics:
    """Counts of one server: its own, and at each reading the engine's."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineStats(engine))
        self._requests = Counter("trimtab_requests", "Answered requests.", ["route", "status"], registry=registry)
        self._first = Histogram(
            "trimtab_time_to_first_token_seconds",
            "From when the engine has the request to its first token.",
            buckets=_FIRST,
            registry=registry,
        )
        self._next = Histogram(
            "trimtab_time_between_tokens_seconds", "From one token to the next.", buckets=_NEXT, registry=registry
        )
        self._answers = Counter("trimtab_answers", "Ended answers.", ["adapter", "finish_reason"], registry=registry)
        self._tokens = Counter("trimtab_adapter_tokens", "Tokens of answers.", ["adapter"], registry=registry)
        self._named: set[str] = set()

    def requested(self, route: str, status: int | None) -> None:
        """A request was answered; without a status its client left first."""
        self._requests.labels(route, status or "gone").inc()

    def waited(self, seconds: float, tokens: int, first: bool) -> None:
        """So many tokens came so long after those before them, or after the request."""
        if first:
            self._first.observe(seconds)
        else:
            for _ in range(tokens):
                self._next.observe(seconds / tokens)

    def ended(self, adapters: Iterable[str], event: Event) -> None:
        """The last event of an answer, which counts for each of its adapters; the adapter "" is the base model."""
        for name in adapters:
            label = name if name in self._named or len(self._named) < _NAMED else "other"
            self._named.add(label)
            self._answers.labels(label, event.finish_reason).inc()
            self._tokens.labels(label).inc(event.completion_tokens)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineStats(Collector):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"trimtab_{metric}", text, getattr(stats, name))
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"trimtab_{metric}", text, getattr(stats, name))
