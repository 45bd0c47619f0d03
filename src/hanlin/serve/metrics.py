"""GET /metrics: what the server did, as Prometheus text under vLLM's names, which dashboards know.

https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4). A histogram's bucket counts everything
at or below its bound.
"""

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from hanlin.engine import Engine, EngineStats, Event

Family = tuple[str, str, str, list[str]]  # name, kind, help, lines

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class Histogram:
    """How many observations fell into each bucket, and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.sum:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


@dataclass
class ModelMetrics:
    """How long one model's requests took; used by the event loop's thread only. Counts come from the engine."""

    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)

    def watch(self) -> "Watch":
        """For one generation."""
        return Watch(self)


class Watch:
    """Times the events of one generation, part by part."""

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def see(self, part: int, event: Event) -> None:
        now = time.perf_counter()
        if event.token_ids:
            if part in self._last:
                gap = (now - self._last[part]) / len(event.token_ids)
                for _ in event.token_ids:
                    self._metrics.between_tokens.observe(gap)
            else:
                self._metrics.first_token.observe(now - self._start)
            self._last[part] = now
        if event.completion is not None:
            self._metrics.whole.observe(now - self._start)


def render_metrics(engines: Mapping[str, Engine], metrics: Mapping[str, ModelMetrics]) -> str:
    """The text of /metrics for all models."""
    families: dict[tuple[str, str, str], list[str]] = {}

    def add(name: str, kind: str, help_text: str, lines: Iterator[str] | list[str]) -> None:
        families.setdefault((f"vllm:{name}", kind, help_text), []).extend(lines)

    for model, engine in engines.items():
        labels = f'model_name="{_escape(model)}"'
        stats, m = engine.stats(), metrics[model]
        for name, kind, help_text, value in _figures(stats):
            add(name, kind, help_text, [f"vllm:{name}{{{labels}}} {value}"])
        ends = [(reason, stats.finished.get(reason, 0)) for reason in REASONS]
        reasons = [f'vllm:request_success_total{{{labels},finished_reason="{r}"}} {count}' for r, count in ends]
        add("request_success_total", "counter", "Completions by the reason of their end.", reasons)
        for lines in (_steps(stats, labels), _adapters(engine, labels)):
            add(*lines)
        for name, help_text, histogram in (
            ("time_to_first_token_seconds", "From the request to its first token.", m.first_token),
            ("inter_token_latency_seconds", "From token to token.", m.between_tokens),
            ("e2e_request_latency_seconds", "From the request to its end.", m.whole),
        ):
            add(name, "histogram", help_text, histogram.lines(f"vllm:{name}", labels))
    return "".join(
        f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines)
        for (name, kind, help_text), lines in families.items()
        if lines
    )


REASONS = ("stop", "length", "abort", "error")


def _figures(stats: EngineStats) -> list[tuple[str, str, str, float]]:
    return [
        ("num_requests_running", "gauge", "Sequences being computed.", stats.running),
        ("num_requests_waiting", "gauge", "Requests in the queue.", stats.waiting),
        ("kv_cache_usage_perc", "gauge", "Fraction of the cache in use, 0 to 1.", stats.cache_usage),
        ("prompt_tokens_total", "counter", "Prompt tokens of the requests that were begun.", stats.prompt_tokens),
        ("generation_tokens_total", "counter", "Tokens generated.", stats.generated_tokens),
        ("prefix_cache_queries_total", "counter", "Prompt tokens looked up in the cache.", stats.prompt_tokens),
        ("prefix_cache_hits_total", "counter", "Prompt tokens found in the cache.", stats.cached_tokens),
        ("num_preemptions_total", "counter", "Sequences that lost their pages for a while.", stats.preemptions),
        ("spec_decode_num_draft_tokens_total", "counter", "Tokens proposed by speculation.", stats.drafted),
        ("spec_decode_num_accepted_tokens_total", "counter", "Proposed tokens that held.", stats.accepted),
    ]


def _steps(stats: EngineStats, labels: str) -> Family:
    """Only the mean is kept: all steps fall into one bucket."""
    tokens = stats.computed_prompt_tokens + stats.generated_tokens
    name = "vllm:iteration_tokens_total"
    lines = [
        f'{name}_bucket{{{labels},le="+Inf"}} {stats.steps}',
        f"{name}_sum{{{labels}}} {tokens}",
        f"{name}_count{{{labels}}} {stats.steps}",
    ]
    return "iteration_tokens_total", "histogram", "Tokens of a step.", lines


def _adapters(engine: Engine, labels: str) -> Family:
    names = _escape(",".join(engine.adapters()))
    lines = [f'vllm:lora_requests_info{{{labels},running_lora_adapters="{names}"}} 1'] if names else []
    return "lora_requests_info", "gauge", "The adapters that are loaded.", lines


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
