"""Numbers for Prometheus. Names follow vLLM's, with `alaya_` in front, so that its dashboards need
little change.

Times are taken where tokens leave the engine: `time_to_first_token` begins with the request and
holds its wait; `inter_token_latency` is each gap between tokens; `request_time_per_output_token`
is (last - first token) / (tokens - 1), of requests with at least two.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from alaya_jax.engine import EngineStats
from alaya_jax.serve.ledger import Entry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_KEYS = tuple(float(2**i) for i in range(5, 21))
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """All numbers of one server.

    Args:
      engine: says how the engine stands; None where there is none.
    """

    def __init__(self, engine: Callable[[], EngineStats | None]):
        self._registry = registry = CollectorRegistry()
        registry.register(_Engine(engine))

        def times(name: str, what: str, buckets: Any = _SECONDS) -> Histogram:
            return Histogram(f"alaya_{name}_seconds", what, buckets=buckets, registry=registry)

        def count(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"alaya_{name}", what, labels, registry=registry)

        self._first = times("time_to_first_token", "From a request to its first token.")
        self._gap = times("inter_token_latency", "Between two tokens of a request.", _GAPS)
        self._mean_gap = times(
            "request_time_per_output_token", "Mean of that, of each request.", _GAPS
        )
        self._whole = times("e2e_request_latency", "From a request to its last token.")
        self._queue = times("request_queue_time", "From a request to its start.")
        self._requests = count("request_success", "Texts that ended, by reason.", ("reason",))
        self._failed = count("request_failure", "Texts that ended in an error.")
        self._prompt = count("prompt_tokens", "Tokens of prompts.")
        self._cached = count("prompt_tokens_cached", "Of these, found in stored contexts.")
        self._new = count("generation_tokens", "Tokens generated.")
        self._keys = Histogram(
            "alaya_keys_read",
            "Keys that a head reads for a token, in the mean over a text.",
            buckets=_KEYS,
            registry=registry,
        )
        self.rejected = count(
            "admission_rejections", "Requests refused because the queue was full."
        )

    def ended(self, entry: Entry) -> None:
        """Takes what is known of a text at its end."""
        self._prompt.inc(entry.prompt_tokens)
        self._new.inc(entry.tokens)
        for gap in entry.gaps:
            self._gap.observe(gap)
        if entry.first_token_s is not None:
            self._first.observe(entry.first_token_s)
            self._whole.observe(entry.first_token_s + entry.decode_s)
        if entry.tokens > 1:
            self._mean_gap.observe(entry.decode_s / (entry.tokens - 1))
        if entry.result is None:
            self._failed.inc()
            return
        result = entry.result
        self._requests.labels(result.finish_reason).inc()
        self._cached.inc(result.cached_tokens)
        self._queue.observe(result.timing.queued_s)
        if not math.isnan(result.keys_read):
            self._keys.observe(result.keys_read)

    def text(self) -> bytes:
        """In Prometheus' text form, `CONTENT_TYPE`."""
        return generate_latest(self._registry)


class _Engine:
    """What the engine says of itself, asked when the numbers are."""

    def __init__(self, stats: Callable[[], EngineStats | None]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        held = stats.pages - stats.pages_free
        for name, value, what in (
            ("num_requests_running", stats.running, "Requests that have pages."),
            ("num_requests_waiting", stats.waiting, "Requests that have none yet."),
            ("kv_cache_usage_perc", held / max(stats.pages, 1), "Share of the pages in use."),
            ("kv_cache_free_pages", stats.pages_free, "Pages that nobody holds."),
        ):
            yield GaugeMetricFamily(f"alaya_{name}", what, value=value)
        for name, value, what in (
            ("num_preemptions", stats.preemptions, "Times that a request lost its pages."),
            ("engine_tokens_prefilled", stats.tokens_prefilled, "Tokens of prompts computed."),
            ("engine_tokens_generated", stats.tokens_generated, "Tokens chosen."),
            ("programs_compiled", stats.programs, "Programs compiled, or read from disk."),
        ):
            yield CounterMetricFamily(f"alaya_{name}", what, value=value)
