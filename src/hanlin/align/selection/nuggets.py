"""Nuggets (arXiv:2312.10302): an example is golden if, shown once, it makes the answers to other questions likelier.

    golden(z) = share of anchors j with   mean log p(a_j | z, q_j)  >  mean log p(a_j | q_j)
                                          one-shot                     zero-shot

All anchors follow the same demonstration z, so its tokens are computed once: the first anchor leaves them in the
engine's prefix cache and the others begin there. An example that is an anchor itself is not asked about itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hanlin.align.selection.scoring import Prompt, answer_prompt, scored_prompts
from hanlin.engine import Engine

WAVE = 8  # demonstrations in the cache together


@dataclass(frozen=True)
class Golden:
    """scores: of each candidate, None where it fits in front of no anchor. hit_rate: of the one-shot prompts' tokens,
    the share that came from the prefix cache."""

    scores: list[float | None]
    hit_rate: float


def golden_scores(
    engine: Engine,
    candidates: Sequence[list[dict]],
    anchors: Sequence[list[dict]],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> Golden:
    """Messages of conversations, each ending with an answer; system messages are left out on both sides."""
    shown, asked = [_turns(chat) for chat in candidates], [_turns(chat) for chat in anchors]
    zero = [
        None if scored is None else _mean(scored[0])
        for scored in scored_prompts(engine, [answer_prompt(engine.tokenizer, chat) for chat in asked])
    ]
    scores: list[float | None] = []
    cached = total = 0
    for begin in range(0, len(shown), WAVE):
        wave = range(begin, min(begin + WAVE, len(shown)))
        pairs = [(z, j) for z in wave for j in range(len(asked)) if zero[j] is not None and asked[j] != shown[z]]
        first = {pair[0]: pair for pair in reversed(pairs)}
        rest = [pair for pair in pairs if first[pair[0]] != pair]
        better: dict[int, list[bool]] = {z: [] for z in wave}
        for part in (list(first.values()), rest):  # the first of each fills the cache for the rest
            prompts: list[Prompt] = [answer_prompt(engine.tokenizer, [*shown[z], *asked[j]]) for z, j in part]
            for (z, j), prompt, scored in zip(part, prompts, scored_prompts(engine, prompts), strict=True):
                before = zero[j]
                if scored is None or before is None:
                    continue
                better[z].append(_mean(scored[0]) > before)
                cached, total = cached + scored[1], total + len(prompt.ids)
        scores += [sum(better[z]) / len(better[z]) if better[z] else None for z in wave]
        advance(len(wave))
    return Golden(scores, cached / max(1, total))


def _turns(chat: Sequence[dict]) -> list[dict]:
    return [message for message in chat if message["role"] != "system"]


def _mean(logprobs: Sequence[float]) -> float:
    return math.fsum(logprobs) / len(logprobs)
