"""What a server tells Prometheus: requests and tokens by task, times to the first and to the next token, the bank."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefix_attn.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms of one server.

    Args:
        engine: its load and its bank are shown.
        base: the task label of requests without a prefix.
    """

    def __init__(self, engine: Engine, base: str) -> None:
        self._base = base
        self._registry = CollectorRegistry()
        self._registry.register(_State(engine))
        of_task: dict[str, Any] = {"labelnames": ("task",), "registry": self._registry}
        times: dict[str, Any] = {"registry": self._registry, "buckets": SECONDS}
        self.requests = Counter(
            "prefix_attn_requests", "Answers that ended, and how: stop, length, cancelled, error.", ("task", "outcome"),
            registry=self._registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("prefix_attn_prompt_tokens", "Tokens of prompts.", **of_task)
        self.new_tokens = Counter("prefix_attn_new_tokens", "Tokens of answers.", **of_task)
        self.first_token = Histogram("prefix_attn_first_token_seconds", "From a request to its first token.", **times)
        self.next_token = Histogram(
            "prefix_attn_next_token_seconds", "From one token to the next, in the mean of an answer.", **times
        )

    def prompt(self, task: str | None, tokens: int) -> None:
        """Count the tokens of a prompt, once however many answers it gets."""
        self.prompt_tokens.labels(self._name(task)).inc(tokens)

    def answer(self, task: str | None) -> Timed:
        """Start the clock of one answer."""
        return Timed(self, self._name(task))

    def _name(self, task: str | None) -> str:
        return self._base if task is None else task

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class Timed:
    """The clock of one answer, started by its request."""

    def __init__(self, metrics: Metrics, task: str) -> None:
        self._metrics, self._task = metrics, task
        self._began = self._first = self._last = perf_counter()
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """Record tokens that have arrived."""
        self._last = perf_counter()
        if not self.tokens and tokens:
            self._first = self._last
            self._metrics.first_token.observe(self._first - self._began)
        self.tokens += tokens
        self._metrics.new_tokens.labels(self._task).inc(tokens)

    def end(self, outcome: str) -> None:
        """Record how the answer ended."""
        self._metrics.requests.labels(self._task, outcome).inc()
        if self.tokens > 1:
            self._metrics.next_token.observe((self._last - self._first) / (self.tokens - 1))


class _State(Collector):
    """Gauges, read at the moment when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        engine, usage = self._engine, self._engine.bank.memory_usage
        for name, text, value in (
            ("running", "Requests in the batch.", engine.running),
            ("waiting", "Requests that wait for room in the batch.", engine.waiting),
            ("bank_bytes", "Bytes of memory that the bank of prefixes takes.", usage.allocated),
        ):
            yield GaugeMetricFamily(f"prefix_attn_{name}", text, value)
        prefixes = GaugeMetricFamily("prefix_attn_prefix_bytes", "Bytes of a task's prefix.", labels=("task",))
        for task, size in usage.tasks.items():
            prefixes.add_metric((task,), size)
        yield prefixes
