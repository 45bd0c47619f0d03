"""From logits to tokens. Pure functions over (rows, vocabulary), in the order in which they are applied:

    repetition penalty → temperature → top-k → top-p → min-p → draw

Every filter is a floor: tokens whose logit lies below it cannot be drawn (a tie with the last token kept is kept too).
So filters combine by taking the highest floor, and a row's result never depends on how the other rows are filtered.

A row draws with one uniform number of its own generator against the cumulative probabilities in the order of the
vocabulary (inverse transform sampling): its draws are the same whoever runs beside it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hanlin.engine.types import SamplingParams, TokenLogprob

BROKEN = -1  # the "token" of a row whose logits are not finite numbers
NUCLEUS = (256, 4096)  # top-p looks at so many tokens first; they nearly always suffice, and sorting 150k takes 15 ms


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """CTRL, arXiv:1909.05858: seen (rows, V) bool, penalty (rows, 1) -> seen tokens' logits divided by it if positive,
    multiplied if negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - max) / temperature (rows, 1): the same distribution as without the shift, and nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp_min(1e-30)


def top_k_floor(ordered: Tensor, k: Tensor) -> Tensor:
    """The k-th largest logit of each row: ordered (rows, W) descending, W ≥ k; k (rows, 1), 0 is off -> (rows, 1)."""
    kth = ordered.gather(-1, (k - 1).clamp(0, ordered.shape[-1] - 1))
    return kth.masked_fill(k == 0, -math.inf)


def top_p_floor(logits: Tensor, p: Tensor) -> Tensor:
    """The lowest logit of the nucleus (arXiv:1904.09751): the fewest likeliest tokens that together reach p.

    logits (rows, V), p (rows, 1), 1 is off -> (rows, 1).
    """
    size = logits.shape[-1]
    norm = logits.double().logsumexp(-1, keepdim=True)
    for width in (*(w for w in NUCLEUS if w < size), size):
        ordered = logits.topk(width).values
        probability = (ordered - norm).exp()
        inside = probability.cumsum(-1) - probability < p  # what the likelier ones sum to
        if width == size or bool((~inside[:, -1:] | (p >= 1)).all()):
            break
    last = inside.sum(-1, keepdim=True).sub_(1).clamp_min_(0)
    return ordered.gather(-1, last).masked_fill(p >= 1, -math.inf)


def min_p_floor(logits: Tensor, p: Tensor) -> Tensor:
    """arXiv:2407.01082: below p times the top probability. p (rows, 1), 0 is off -> (rows, 1)."""
    return logits.amax(-1, keepdim=True) + p.log()


def drop_below(logits: Tensor, floor: Tensor) -> Tensor:
    return logits.masked_fill(logits < floor, -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row: logits (rows, V), uniform (rows,) in [0, 1) fp64 -> tokens (rows,), whether the row was finite.

    Sums run in fp64: over 150k tokens fp32 would lose the tail.
    """
    total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (rows, V)
    end = total[:, -1:]
    point = torch.minimum(uniform[:, None] * end, torch.nextafter(end, torch.zeros_like(end)))
    return torch.searchsorted(total, point, right=True)[:, 0].clamp_max_(logits.shape[-1] - 1), end[:, 0].isfinite()


def report_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Under the model's own distribution: logits (rows, V) unfiltered; counts: alternatives to report of each row."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(min(max(counts), logits.shape[-1]))
    rows = zip(tokens, own, ids.tolist(), values.tolist(), counts, strict=True)
    return [TokenLogprob(t, lp, tuple(zip(i[:n], v[:n], strict=True))) for t, lp, i, v, n in rows]


@dataclass
class Row:
    """What sampling knows of one sequence. ids: prompt and output, growing; prompt: tokens of the prompt;
    ends: tokens that would end it, which cannot be drawn before `min_tokens`."""

    params: SamplingParams
    ids: list[int]
    prompt: int
    ends: list[int] = field(default_factory=list)
    generator: random.Random = field(default_factory=random.Random)


class Sampler:
    """Chooses the next tokens of some rows, step after step while the rows stay the same; does only what one of them
    asks for: for greedy rows that is one pass over the logits and no sort."""

    def __init__(self, rows: Sequence[Row], vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.rows = rows
        params = [row.params for row in rows]

        def column(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # (rows, 1)

        self._drawn = [i for i, p in enumerate(params) if p.temperature > 0]
        drawn = [params[i] for i in self._drawn]
        self._greedy = [i for i, p in enumerate(params) if p.temperature == 0]
        self._temperature = column([p.temperature for p in drawn])
        self._widest = min(max((p.top_k for p in drawn), default=0), vocabulary)
        self._top_k = column([p.top_k for p in drawn], torch.int64)
        self._top_p = column([p.top_p for p in drawn], torch.float64) if any(p.top_p < 1 for p in drawn) else None
        self._min_p = column([p.min_p for p in drawn]) if any(p.min_p > 0 for p in drawn) else None
        self._reporting = [i for i, p in enumerate(params) if p.logprobs is not None]
        self._held_open = [row for row in enumerate(rows) if row[1].params.min_tokens and row[1].ends]
        self._seen = self._penalty = None
        if any(p.repetition_penalty != 1 for p in params):
            self._penalty = column([p.repetition_penalty for p in params])
            self._seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
            for mark, row in zip(self._seen, rows, strict=True):
                if row.params.repetition_penalty != 1:
                    mark[row.ids] = True

    def choose(self, logits: Tensor) -> tuple[list[int], list[TokenLogprob | None]]:
        """logits (rows, V) -> a token a row (`BROKEN` where logits are not finite), and its report if asked for."""
        raw = logits = logits.float()
        for index, row in self._held_open:
            if len(row.ids) - row.prompt < row.params.min_tokens:
                logits = logits.clone() if logits is raw else logits
                logits[index, row.ends] = -math.inf
        if self._seen is not None and self._penalty is not None:
            logits = penalise_repetition(logits, self._seen, self._penalty)
        tokens = self._pick(logits)
        if self._seen is not None:
            index = torch.arange(len(tokens), device=logits.device)
            self._seen[index, torch.tensor(tokens, device=logits.device).clamp_min_(0)] = True  # rows off: penalty 1
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        if self._reporting:
            counts = [self.rows[i].params.logprobs or 0 for i in self._reporting]
            reports = report_logprobs(raw[self._reporting], [max(tokens[i], 0) for i in self._reporting], counts)
            for i, report in zip(self._reporting, reports, strict=True):
                logprobs[i] = report
        return tokens, logprobs

    def _pick(self, logits: Tensor) -> list[int]:
        if not self._drawn:
            best, tokens = logits.max(-1)
            return [t if math.isfinite(b) else BROKEN for t, b in zip(tokens.tolist(), best.tolist(), strict=True)]
        drawn, finite = self._draw(logits[self._drawn] if self._greedy else logits)
        chosen = dict(zip(self._drawn, torch.where(finite, drawn, BROKEN).tolist(), strict=True))
        if self._greedy:
            best, tokens = logits[self._greedy].max(-1)
            chosen |= zip(self._greedy, torch.where(best.isfinite(), tokens, BROKEN).tolist(), strict=True)
        return [chosen[i] for i in range(len(self.rows))]

    def _draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = apply_temperature(logits, self._temperature)
        if self._widest:
            logits = drop_below(logits, top_k_floor(logits.topk(self._widest).values, self._top_k))
        if self._top_p is not None:
            logits = drop_below(logits, top_p_floor(logits, self._top_p))
        if self._min_p is not None:
            logits = drop_below(logits, min_p_floor(logits, self._min_p))
        uniform = [self.rows[i].generator.random() for i in self._drawn]
        return draw(logits, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
