"""What a model says about texts: log-probabilities of an answer's tokens, and embeddings, both through the `Engine`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hanlin.align.sft import trained_runs
from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.engine.embedding import writes
from hanlin.tokens import Tokenizer

TOGETHER = 256  # prompts handed to the engine at once


@dataclass(frozen=True)
class Prompt:
    """Tokens, of which those from `start` on are scored."""

    ids: list[int]
    start: int


def answer_prompt(tokenizer: Tokenizer, chat: Sequence[dict]) -> Prompt:
    """A conversation up to the end of its last answer, which is what is scored."""
    told = tokenizer.chat_trained(chat)
    start, stop = trained_runs(told.trained)[-1]
    return Prompt(told.ids[:stop], start)


def prompt_logprobs(
    engine: Engine, prompts: Sequence[Prompt], *, advance: Callable[[int], None] = lambda _: None
) -> list[list[float] | None]:
    """log p of each scored token, given all before it; None for a prompt that does not fit into the context."""
    return [None if scored is None else scored[0] for scored in scored_prompts(engine, prompts, advance=advance)]


def scored_prompts(
    engine: Engine, prompts: Sequence[Prompt], *, advance: Callable[[int], None] = lambda _: None
) -> list[tuple[list[float], int] | None]:
    """(log-probabilities, how many tokens came from the prefix cache) of each, or None."""
    if not writes(engine.model):
        raise HanlinError("This model reads and does not write, so it gives no probability of an answer.")
    found: list[tuple[list[float], int] | None] = [None] * len(prompts)
    for begin in range(0, len(prompts), TOGETHER):
        part = range(begin, min(begin + TOGETHER, len(prompts)))
        fitting = [place for place in part if len(prompts[place].ids) < engine.max_context]
        params = [
            SamplingParams(
                max_tokens=1, temperature=0.0, ignore_eos=True,
                prompt_logprobs=0, prompt_logprobs_from=prompts[place].start,
            )
            for place in fitting
        ]  # fmt: skip
        completions = engine.generate([prompts[place].ids for place in fitting], params)
        for place, completion in zip(fitting, completions, strict=True):
            told = [token.logprob for token in completion.prompt_logprobs or []]
            found[place] = (told, completion.usage.cached_tokens)
        advance(len(part))
    return found


def embed_texts(engine: Engine, texts: Sequence[str], *, advance: Callable[[int], None] = lambda _: None) -> Tensor:
    """(n, width), each of length 1; a text longer than the context is cut."""
    rows = []
    for begin in range(0, len(texts), TOGETHER):
        part = texts[begin : begin + TOGETHER]
        rows.append(engine.embed([engine.tokenizer.prompt(text)[: engine.max_context] for text in part]))
        advance(len(part))
    return torch.cat(rows)
