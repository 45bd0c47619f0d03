"""`select(recipe)`: read, judge, and write what was kept and why.

kept.jsonl        the kept rows as they stood in their files: what `objective: {kind: sft, files: [...]}` reads
selection.jsonl   {"name", "kept", "score", "reason"} of every example, in order
selection.png     the scores of the kept and the dropped
recipe.yaml       as resolved
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hanlin.align.callables import load_callable
from hanlin.align.conversations import Conversation, detect_format, read_conversations, read_rows
from hanlin.align.reward_model import ModelReward
from hanlin.align.selection.car import select_car
from hanlin.align.selection.clusters import k_means
from hanlin.align.selection.decisions import Selection, keep_above, keep_top
from hanlin.align.selection.difficulty import answer_losses, select_by_difficulty
from hanlin.align.selection.diversity import select_diverse
from hanlin.align.selection.histogram import draw_scores
from hanlin.align.selection.k_center import select_k_center
from hanlin.align.selection.nuggets import golden_scores
from hanlin.align.selection.recipe import (
    Car,
    Difficulty,
    Diversity,
    Embedding,
    KCenter,
    Nuggets,
    Reward,
    Scores,
    SelectionRecipe,
)  # fmt: skip
from hanlin.align.selection.reward import select_by_reward
from hanlin.align.selection.scoring import answer_prompt, embed_texts
from hanlin.core.errors import HanlinError
from hanlin.core.files import write_text
from hanlin.core.progress import Progress
from hanlin.engine import Engine
from hanlin.models.places import find_model


@dataclass(frozen=True)
class Candidate:
    """One conversation and the row it was read from."""

    conversation: Conversation
    row: dict[str, Any]

    @property
    def chat(self) -> list[dict]:
        return self.conversation.plain()

    def text(self, part: str = "both") -> str:
        """question: all before the last answer; answer: that; both: everything."""
        turns = [str(message["content"] or "") for message in self.chat]
        return "\n\n".join({"question": turns[:-1], "answer": turns[-1:], "both": turns}[part])


def select(recipe: SelectionRecipe, *, quiet: bool = False) -> Selection:
    """Judge every conversation of the recipe's files and write the folder `recipe.out`."""
    folder = recipe.out
    if folder.exists() and any(folder.iterdir()) and not (folder / "selection.jsonl").exists():
        raise HanlinError(f"{folder} is not empty and holds no selection. Give another `name`.")
    candidates = read_candidates(recipe.files, bad_rows=recipe.bad_rows)
    selection = _Judge(recipe, candidates, quiet).decide()
    lines = [
        {"name": each.conversation.name, "kept": d.kept, "score": d.score, "reason": d.reason}
        for each, d in zip(candidates, selection.decisions, strict=True)
    ]
    write_text(folder / "kept.jsonl", _lines([candidates[place].row for place in selection.kept]))
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    draw_scores(selection, f"{recipe.name}: {recipe.method.kind}", folder / "selection.png")
    write_text(folder / "selection.jsonl", _lines(lines))
    return selection


def read_candidates(files: Sequence[Path], *, bad_rows: Any = "stop") -> list[Candidate]:
    """All conversations with their rows. Files of different formats are refused: kept.jsonl has one."""
    candidates: list[Candidate] = []
    forms: dict[str, Path] = {}
    for file in files:
        conversations = read_conversations([file], bad_rows=bad_rows).conversations
        rows = {f"{file.name}:{number}": row for number, row in read_rows(file)}
        found = [Candidate(each, rows[each.name]) for each in conversations]
        forms.setdefault(detect_format(found[0].row, str(file)), file)
        candidates += found
    if len(forms) > 1:
        told = ", ".join(f"{file} ({form})" for form, file in forms.items())
        raise HanlinError(f"The files have different formats: {told}. Select from each format by itself.")
    return candidates


class _Judge:
    """The recipe's method over the candidates; models are opened where they are needed, one at a time."""

    def __init__(self, recipe: SelectionRecipe, candidates: list[Candidate], quiet: bool) -> None:
        self.recipe, self.candidates, self.quiet = recipe, candidates, quiet

    def decide(self) -> Selection:
        method, seed = self.recipe.method, self.recipe.seed
        if isinstance(method, Reward):
            scores = self._scores(method.scores)
            if method.least is not None:
                return keep_above(scores, method.least, named="reward")
            lengths = [len(each.text("answer")) for each in self.candidates]
            return select_by_reward(scores, method.keep or 0, lengths=lengths, bins=method.bins)
        if isinstance(method, KCenter):
            names = [each.conversation.name for each in self.candidates]
            return select_k_center(self._embeddings(method.embed), method.keep, names)
        if isinstance(method, Diversity):
            clusters = method.clusters or max(1, int(math.sqrt(len(self.candidates) / 2)))
            return select_diverse(self._embeddings(method.embed), method.keep, clusters=clusters, seed=seed)
        if isinstance(method, Car):
            scores, points = self._scores(method.scores), self._embeddings(method.embed)
            return select_car(scores, points, best=method.best, each=method.each, share=method.share, seed=seed)
        if isinstance(method, Difficulty):
            chats = [each.chat for each in self.candidates]
            passes = len(chats) * (1 + (method.measure == "ifd"))
            with self._engine(method.model) as engine, self._bar("score", passes) as bar:
                losses = answer_losses(engine, chats, alone=method.measure == "ifd", advance=bar.advance)
            return select_by_difficulty(losses, method.keep, measure=method.measure, part=method.part)
        return self._nuggets(method)

    def _nuggets(self, method: Nuggets) -> Selection:
        anchors = read_candidates(method.anchors) if method.anchors else self.candidates
        with self._engine(method.model) as engine:
            if len(anchors) > method.count:
                points = embed_texts(engine, [each.text() for each in anchors]).double()
                labels, centres = k_means(points, method.count, seed=self.recipe.seed)
                distance = (points - centres[labels]).norm(dim=1)
                middles = [int(torch.where(labels == c, distance, math.inf).argmin()) for c in range(method.count)]
                anchors = [anchors[place] for place in sorted(middles)]
            with self._bar("nuggets", len(self.candidates)) as bar:
                chats = [each.chat for each in self.candidates]
                golden = golden_scores(engine, chats, [each.chat for each in anchors], advance=bar.advance)
        rule = {"named": "golden score", "unjudged": "fits in front of no anchor"}
        if method.keep is not None:
            selection = keep_top(golden.scores, method.keep, **rule)
        else:
            selection = keep_above(golden.scores, method.least or 0.0, **rule)
        hits = f"{len(anchors)} anchors; {golden.hit_rate:.0%} of the prompts' tokens came from the prefix cache"
        return replace(selection, facts=(*selection.facts, hits))

    def _scores(self, scores: Scores) -> list[float]:
        if scores.scorer is not None:
            given = list(load_callable(scores.scorer)([each.text() for each in self.candidates]))
            if len(given) != len(self.candidates):
                raise HanlinError(f"{scores.scorer} gave {len(given)} scores for {len(self.candidates)} texts.")
        elif scores.reward_model is not None:
            judge = ModelReward(find_model(str(scores.reward_model)))
            given = judge.score([answer_prompt(judge.tokenizer, each.chat).ids for each in self.candidates]).tolist()
        else:
            given = [each.row.get(scores.column) for each in self.candidates]
        source = scores.scorer or scores.reward_model or f"the column `{scores.column}`"
        pairs = zip(self.candidates, given, strict=True)
        return [_number(score, f"{each.conversation.name}: {source}") for each, score in pairs]

    def _embeddings(self, embed: Embedding) -> torch.Tensor:
        with self._engine(embed.model) as engine, self._bar("embed", len(self.candidates)) as bar:
            return embed_texts(engine, [each.text(embed.text) for each in self.candidates], advance=bar.advance)

    def _engine(self, folder: Path) -> Engine:
        return Engine.from_folder(find_model(str(folder)), device=self.recipe.device)

    def _bar(self, title: str, total: int) -> Progress:
        return Progress(title, total=total, unit="texts", quiet=self.quiet)


def _number(score: Any, where: str) -> float:
    if isinstance(score, bool | str) or not hasattr(score, "__float__") or not math.isfinite(score):
        raise HanlinError(f"{where} gives {score!r} as the score, not a number.")
    return float(score)


def _lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
