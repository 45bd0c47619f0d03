"""Prompts of on-policy methods: rows with `prompt` (text) or `messages`, and whatever columns the rewards want."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hanlin.align.conversations import read_rows
from hanlin.align.samples import Prompt
from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, document_positions
from hanlin.nn.losses import IGNORE
from hanlin.tokens import Tokenizer


def read_prompts(
    files: Iterable[Path], tokenizer: Tokenizer, *, longest: int, plain: bool = False
) -> tuple[list[Prompt], list[str]]:
    """All prompts of `files` in order, and why some were left out, one sentence each.

    `messages` and, where the tokenizer has a chat template, `prompt` go through it. longest: tokens that leave room for
    an answer; a longer prompt is left out. plain: a `prompt` goes in as it is, whatever template there is.
    """
    prompts: list[Prompt] = []
    left: list[str] = []
    for file in files:
        for number, row in read_rows(Path(file)):
            where = f"{file}, row {number}"
            if not isinstance(row, Mapping):
                raise HanlinError(f"{where} is no JSON object; expected columns `prompt` (or `messages`) and `answer`.")
            ids, text = _encode(row, tokenizer, where, plain)
            if len(ids) > longest:
                left.append(f"{where}: the prompt has {len(ids)} tokens, room is for {longest}")
                continue
            meta = {key: value for key, value in row.items() if key not in ("prompt", "messages")}
            prompts.append(Prompt(tuple(ids), text, meta, len(prompts)))
    if not prompts:
        raise HanlinError(f"There is no prompt in {', '.join(map(str, files))}. {left[0] if left else ''}".strip())
    return prompts, left


def _encode(row: Mapping, tokenizer: Tokenizer, where: str, plain: bool) -> tuple[list[int], str]:
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        text = row["prompt"]
        if not text.strip():
            raise HanlinError(f"{where}: `prompt` is empty.")
        if tokenizer.has_chat and not plain:
            return tokenizer.chat([{"role": "user", "content": text}]), text
        return tokenizer.prompt(text), text
    if messages is None:
        messages = row.get("prompt")
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise HanlinError(f"{where} has the columns {', '.join(row)}; expected `prompt` (text) or `messages` (a list).")
    if not all(isinstance(turn, Mapping) for turn in messages):
        raise HanlinError(f"{where}: the turns of `messages` must be objects with `role` and `content`.")
    if messages[-1].get("role") == "assistant":
        raise HanlinError(f"{where}: the last message is the assistant's; a prompt ends with what it answers to.")
    return tokenizer.chat(messages), str(messages[-1].get("content", ""))


class PromptRows:
    """Prompts as a `BatchSource` of which nothing is trained: how many there are, and what `hanlin data preview` shows.
    rows: of a step, which are answers where several are given to a prompt."""

    def __init__(self, prompts: Sequence[Prompt], *, rows: int, steps: int, pad_id: int) -> None:
        self.prompts, self.rows_per_step, self.steps_per_epoch, self.pad_id = prompts, rows, steps, pad_id

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        stop = self.rows_per_step if stop is None else stop
        places = range(step * self.rows_per_step + start, step * self.rows_per_step + stop)
        asked = [self.prompts[place % len(self.prompts)] for place in places]
        width = max(len(prompt.ids) for prompt in asked)
        ids = torch.full((len(asked), width), self.pad_id)
        documents = torch.full_like(ids, -1)
        for row, prompt in enumerate(asked):
            ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
            documents[row, : len(prompt.ids)] = 0
        names = [[f"prompt {prompt.number}"] for prompt in asked]
        return Batch(ids, torch.full_like(ids, IGNORE), document_positions(documents), documents, names)

    def fingerprint(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([[list(p.ids), dict(p.meta)] for p in self.prompts]).encode())
        return {"kind": "prompts", "sha256": digest.hexdigest()}
