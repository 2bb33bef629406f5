"""Counters of the server, for Prometheus."""

from collections.abc import Iterable

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from t3jax.serving.engine import Engine

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine):
        """Makes a registry; the engine's counts are read at each scrape."""
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(_EngineCollector(engine))  # type: ignore[arg-type]
        self.first_token = prometheus_client.Histogram(
            "t3jax_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.per_token = prometheus_client.Histogram(
            "t3jax_time_per_token_seconds",
            "Mean time of an answer's further tokens.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.refused = prometheus_client.Counter(
            "t3jax_requests_refused", "Bodies refused.", ["status"], registry=self.registry
        )

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return prometheus_client.generate_latest(self.registry)


class _EngineCollector:
    """Reads an engine's counts."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats
        yield GaugeMetricFamily("t3jax_requests_waiting", "In the queue.", self.engine.waiting)
        yield GaugeMetricFamily("t3jax_requests_running", "Read or decoded.", self.engine.running)
        yield CounterMetricFamily("t3jax_prompt_tokens", "Tokens read.", stats.prompt_tokens)
        yield CounterMetricFamily(
            "t3jax_shared_tokens",
            "Tokens not read anew: earlier prompts began alike.",
            stats.shared_tokens,
        )
        yield CounterMetricFamily("t3jax_answer_tokens", "Tokens chosen.", stats.answer_tokens)
        finished = CounterMetricFamily(
            "t3jax_requests_finished", "Requests by reason.", labels=["reason"]
        )
        for reason, count in list(stats.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        changed = CounterMetricFamily(
            "t3jax_tokens_changed",
            "Tokens whose likeliest candidate a head changed; of t3jax_answer_tokens.",
            labels=["head"],
        )
        for head, count in list(stats.changed_tokens.items()):
            changed.add_metric([head], count)
        yield changed
