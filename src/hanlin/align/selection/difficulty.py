"""By how hard the answer is for a model: perplexity, or instruction-following difficulty (arXiv:2308.12032).

    perplexity = exp loss(answer | question)          IFD = loss(answer | question) / loss(answer)

An IFD of 1 or more says that the question does not help to foresee its answer: they do not belong together, and it is
never kept. Both losses are means over the same tokens: the answer's words, without the template's control tokens;
alone, the answer stands behind the token that ends documents.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from hanlin.align.selection.decisions import Decision, Selection, check_count, ranked
from hanlin.align.selection.scoring import Prompt, answer_prompt, prompt_logprobs
from hanlin.engine import Engine


def answer_losses(
    engine: Engine, chats: Sequence[list[dict]], *, alone: bool, advance: Callable[[int], None] = lambda _: None
) -> list[tuple[float, float] | None]:
    """(loss of the last answer behind its question, loss of it alone or NaN) of each; None: it does not fit."""
    special = set(engine.tokenizer.special.values())
    asked: list[Prompt] = []
    words: list[list[int]] = []  # where the answer's own tokens stand among the scored ones
    for chat in chats:
        prompt = answer_prompt(engine.tokenizer, chat)
        answer = prompt.ids[prompt.start :]
        words.append([place for place, token in enumerate(answer) if token not in special])
        asked.append(prompt)
        if alone:
            asked.append(Prompt([engine.tokenizer.eos_id, *(answer[place] for place in words[-1])], 1))
    scored = prompt_logprobs(engine, asked, advance=advance)
    losses: list[tuple[float, float] | None] = []
    for place, chosen in enumerate(words):
        behind, without = (scored[2 * place], scored[2 * place + 1]) if alone else (scored[place], None)
        if behind is None or not chosen:
            losses.append(None)
            continue
        bare = math.nan if without is None else -math.fsum(without) / len(chosen)
        losses.append((-math.fsum(behind[i] for i in chosen) / len(chosen), bare))
    return losses


def select_by_difficulty(
    losses: Sequence[tuple[float, float] | None],
    keep: int,
    *,
    measure: Literal["perplexity", "ifd"],
    part: Literal["top", "middle", "bottom"],
) -> Selection:
    """The `keep` hardest, easiest or those in the middle of the ranking. losses: of `answer_losses`."""
    scores: list[float | None] = [
        None
        if pair is None or pair[1] == 0  # known by heart: nothing to divide by
        else math.exp(min(pair[0], 700))
        if measure == "perplexity"
        else pair[0] / pair[1]
        for pair in losses
    ]
    fit = [None if score is None or (measure == "ifd" and score >= 1) else score for score in scores]
    order = ranked(fit)
    check_count(keep, len(order))
    first = {"top": 0, "middle": (len(order) - keep) // 2, "bottom": len(order) - keep}[part]
    rank = {place: number for number, place in enumerate(order)}
    decisions = []
    for place, score in enumerate(scores):
        if score is None:
            decisions.append(
                Decision(False, None, "not judged: longer than the model's context, or nothing to foresee")
            )
        elif place not in rank:
            decisions.append(Decision(False, score, f"IFD {score:.4g} >= 1: the question does not help the answer"))
        else:
            kept = first <= rank[place] < first + keep
            decisions.append(Decision(kept, score, f"{measure} {score:.4g}, rank {rank[place] + 1} of {len(order)}"))
    return Selection(decisions, scores[order[keep - 1]] if part == "top" else None)
