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
    """Counts what goes through a server.

    Args:
        engine: whose load and bank are shown.
        base: how requests without a prefix are called among the tasks.
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
        """A prompt has come, for one answer or several."""
        self.prompt_tokens.labels(self._name(task)).inc(tokens)

    def answer(self, task: str | None) -> Timed:
        """Begin to watch an answer."""
        return Timed(self, self._name(task))

    def _name(self, task: str | None) -> str:
        return self._base if task is None else task

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self._registry)


class Timed:
    """One answer, from the request on."""

    def __init__(self, metrics: Metrics, task: str) -> None:
        self._metrics, self._task = metrics, task
        self._began = self._first = self._last = perf_counter()
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """More tokens have come."""
        self._last = perf_counter()
        if not self.tokens and tokens:
            self._first = self._last
            self._metrics.first_token.observe(self._first - self._began)
        self.tokens += tokens
        self._metrics.new_tokens.labels(self._task).inc(tokens)

    def end(self, outcome: str) -> None:
        """No more will come."""
        self._metrics.requests.labels(self._task, outcome).inc()
        if self.tokens > 1:
            self._metrics.next_token.observe((self._last - self._first) / (self.tokens - 1))


class _State(Collector):
    """What holds at the moment when Prometheus asks."""

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
