"""Samples: what a model writes after some prompts, to be read by a person beside the figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from hanlin.evaluate.answers import Generate


@dataclass(frozen=True)
class Sample:
    prompt: str
    text: str


def draw_samples(prompts: Sequence[str], generate: Generate) -> list[Sample]:
    """One sample a prompt. The seed and the temperature are `generate`'s: fix them to compare stages of training."""
    return [Sample(prompt, text) for prompt, text in zip(prompts, generate(prompts), strict=True)]


def show_samples(samples: Sequence[Sample]) -> str:
    """Markdown: prompt in bold, what follows as a quotation that keeps its lines."""
    return "\n\n".join(
        f"**{sample.prompt}**\n\n" + "\n".join(f"> {line}".rstrip() for line in (sample.text or "…").split("\n"))
        for sample in samples
    )
