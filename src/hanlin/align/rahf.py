"""RAHF (arXiv:2312.15997): preferences as a direction among hidden states, which the policy is fitted to follow.

    target = h_base + alpha * (h_good - h_bad)          at some layers, for the last 64 tokens of an answer
    loss   = mean over those tokens and layers of  || h_policy - target ||_2

    dual   h_good, h_bad: of two models, fine-tuned on the chosen and on the rejected answers
    scit   h_good, h_bad: of one model, fine-tuned on both, under a system prompt that asks for the one or the other

h_base is the model as it was, so a LoRA policy brings it along. The states are those from which an answer's tokens are
predicted. Only the layers up to the last one that follows are run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanlin.align.messages import Conversation, Message
from hanlin.align.method import Parts, Wiring
from hanlin.align.pairs import PreferenceReading, read_preferences
from hanlin.align.preference import wire_judged
from hanlin.align.preference_loss import rahf_loss, rahf_target
from hanlin.align.rahf_recipe import BAD, GOOD, RahfObjective
from hanlin.align.recipe import SftObjective, TrainRecipe
from hanlin.align.reference import Annotated, Notes, Reference
from hanlin.align.template import TrainingTemplate
from hanlin.core.errors import HanlinError
from hanlin.core.files import write_text
from hanlin.data.batch import Batch, BatchSource, document_positions, next_token_targets
from hanlin.data.examples import Example
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models import load_model
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import IGNORE
from hanlin.parallel.processes import Processes
from hanlin.tokens import Tokenizer
from hanlin.train.objective import Metrics, Term, document_mask
from hanlin.train.token_loss import expect

TARGET = "target"  # of a token, the states to follow: (layers, width)


def layer_states(model: Transformer, batch: Batch, layers: Sequence[int]) -> Tensor:
    """The outputs of some layers for the trained tokens of a batch: (n, layers, width), with gradient."""
    shared = model.share(batch.ids, positions=batch.positions, mask=document_mask(batch))
    at = batch.targets != IGNORE
    x = model.model.begin(model.embed(batch.ids), shared)
    found = {}
    for number in range(max(layers) + 1):
        x = model.model.layers[number](x, shared)
        if number in layers:
            found[number] = x[at]
    return torch.stack([found[number] for number in layers], 1)


def last_of_each(sequence: Tensor, most: int) -> Tensor:
    """(n,) bool: the last `most` tokens of each sequence; sequence (n,): whose each token is, ascending."""
    stop = torch.searchsorted(sequence, sequence, right=True)  # behind the last token of the same one
    return stop - torch.arange(len(sequence), device=sequence.device) <= most


class Rahf:
    """An `Objective` over answers whose tokens carry the states to follow."""

    def __init__(self, choice: RahfObjective, layers: Sequence[int]) -> None:
        self.choice, self.layers = choice, list(layers)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "rahf", "form": self.choice.form, "alpha": self.choice.alpha, "layers": self.layers,
                "last_tokens": self.choice.last_tokens}  # fmt: skip

    def count(self, batch: Batch) -> dict[str, float]:
        sequence = expect(batch, SequenceBatch, self).trained.sequence
        return {"tokens": float(last_of_each(sequence, self.choice.last_tokens).sum())}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        batch = expect(batch, SequenceBatch, self)
        use = last_of_each(batch.trained.sequence, self.choice.last_tokens)
        states = layer_states(model, batch, self.layers)[use]  # (n, layers, width)
        target = batch.of_trained(TARGET)[use].unflatten(-1, states.shape[1:])
        total = rahf_loss(states, target)
        return [(total, "tokens")], {"distance": (float(total.detach()), float(use.sum()))}


class Following(Annotated):
    """Answers whose tokens carry the states to follow. good, bad: what shows the direction; rows: of the data, by the
    number that every answer carries; told: the system prompts of "scit"."""

    def __init__(
        self, source: BatchSource, objective: Rahf, reference: Reference, models: Mapping[str, Transformer],
        told: Callable[[SequenceBatch, str], SequenceBatch] | None, policy: Transformer, rows: int | None,
        about: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(source, self._targets, device=lambda: policy.device, rows=rows, about=about)
        self._objective, self._reference, self._models, self._told, self._policy = (
            objective, reference, models, told, policy,
        )  # fmt: skip

    @torch.no_grad()
    def _targets(self, part: SequenceBatch) -> Notes:
        layers, alpha = self._objective.layers, self._objective.choice.alpha
        with self._reference.model() as model:
            base = layer_states(model, part, layers)
        shown = {}
        for side, model in self._models.items():
            model.to(part.ids.device)
            model.compute_dtype = self._policy.compute_dtype
            batch = part if self._told is None else self._told(part, side).to(part.ids.device)
            shown[side] = layer_states(model, batch, layers)
        return Notes({}, {TARGET: rahf_target(base, shown["good"], shown["bad"], alpha).flatten(1)})


def with_instruction(conversation: Conversation, instruction: str) -> Conversation:
    """The conversation under a system prompt, before its own if it has one."""
    first, *rest = conversation.messages
    if first.role == "system":
        return replace(conversation, messages=(Message("system", f"{instruction}\n\n{first.content}"), *rest))
    return replace(conversation, messages=(Message("system", instruction), *conversation.messages))


class Told:
    """The same answers under a system prompt: (batch, "good" or "bad") -> one document a row, in the batch's order,
    with as many trained tokens."""

    def __init__(self, rows: Sequence[Any], tokenizer: Tokenizer, prompts: Mapping[str, str], positions: int) -> None:
        self._rows, self._prompts, self._positions = rows, prompts, positions
        self._template, self._pad_id = TrainingTemplate(tokenizer), tokenizer.pad_id

    def __call__(self, part: SequenceBatch, side: str) -> SequenceBatch:
        numbers = part.of_sequences("row").long().tolist()
        talks = [self._rows[row].conversations[place % 2] for place, row in enumerate(numbers)]
        examples = [self._template.encode(with_instruction(talk, self._prompts[side])) for talk in talks]
        for example in examples:
            if len(example.ids) > self._positions:
                raise HanlinError(
                    f"{example.name} has {len(example.ids)} tokens under the system prompt of scit; the model knows "
                    f"{self._positions}. Shorten `objective.{side}_prompt`, or lower `objective.seq_len`."
                )
        return one_a_row(examples, self._pad_id)


def one_a_row(examples: Sequence[Example], pad_id: int) -> SequenceBatch:
    """Examples as rows that are padded at their end, in order."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    documents, trained = torch.full_like(ids, -1), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids[row, :size], trained[row, :size] = torch.tensor(example.ids), torch.tensor(example.trained)
        documents[row, :size] = 0
    targets = next_token_targets(ids, documents, trained)
    return SequenceBatch(ids, targets, document_positions(documents), documents, [[e.name] for e in examples])


def wire_rahf(parts: Parts) -> Wiring:
    """The base, and the model or models that show the direction."""
    choice, model = parts.recipe.objective, parts.model
    assert isinstance(choice, RahfObjective)
    depth = len(model.model.layers)
    layers = choice.layers or list(range(depth // 3, max(depth // 3 + 1, 2 * depth // 3), 2))
    if not all(0 <= number < depth for number in layers):
        raise HanlinError(f"objective.layers is {layers}; the model has the layers 0 to {depth - 1}.")
    folders = {"good": choice.good, "bad": choice.bad}
    if choice.form == "scit":
        folders = {"good": choice.hindsight, "bad": choice.hindsight}
    opened = {folder: _open(folder, model) for folder in set(folders.values())}
    models = {side: opened[folder] for side, folder in folders.items()}
    objective, reference = Rahf(choice, layers), Reference(model)
    prompts = {"good": choice.good_prompt or GOOD, "bad": choice.bad_prompt or BAD}

    def source(raw: BatchSource, name: str) -> BatchSource:
        told = None
        if choice.form == "scit":
            told = Told(parts.data.more[name], parts.tokenizer, prompts, model.config.max_positions)
        about = {**{side: str(folder) for side, folder in folders.items()}, **(prompts if told else {})}
        rows = parts.settings.micro_batch_size
        return Following(raw, objective, reference, models, told, model, rows, about)

    return wire_judged(parts, objective, source)


def _open(folder: Path | None, model: Transformer) -> Transformer:
    if folder is None:
        raise HanlinError(
            "The models that show the direction are not there yet: `hanlin train` makes them first. For a range test "
            "of the rate give `objective.good` and `objective.bad`, or `objective.hindsight`."
        )
    other = load_model(folder, dtype=torch.float32, device="cpu").requires_grad_(False).eval()
    if other.config.width != model.config.width or len(other.model.layers) != len(model.model.layers):
        raise HanlinError(f"{folder} has other layers than the model that is to follow it; both must be of one size.")
    return other


def first_models(recipe: TrainRecipe, train: Callable[..., Any], quiet: bool) -> Any:
    """Train the models that show the direction, in folders of the run, then the run itself with them; None if the
    recipe brings them. What is finished is not done again."""
    choice = recipe.objective
    assert isinstance(choice, RahfObjective)
    if choice.shown:
        return None
    rows = read_preferences(choice.files, "pairs", bad_rows=choice.bad_rows)
    prompts = (choice.good_prompt or GOOD, choice.bad_prompt or BAD)
    if choice.form == "dual":
        texts = {side: _chats(rows, place) for place, side in enumerate(("good", "bad"))}
    else:
        texts = {"hindsight": "".join(_chats(rows, place, prompt) for place, prompt in enumerate(prompts))}
    folders = {}
    for name, text in texts.items():
        first = _first_recipe(recipe, choice, name, text)
        if not (first.out / "model").exists() and not (result := train(first, quiet=quiet)).finished:
            return result
        folders[name] = first.out / "model"
    return train(recipe.model_copy(update={"objective": choice.model_copy(update=folders)}), quiet=quiet)


def _first_recipe(recipe: TrainRecipe, choice: RahfObjective, name: str, text: str) -> TrainRecipe:
    """Plain fine-tuning on one kind of answers, all weights, in a folder of the run."""
    file = recipe.out / name / "chats.jsonl"
    with Processes.here().first_alone():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise HanlinError(
                f"{file} was made from other pairs or prompts. Give the new run another `name`, or delete {recipe.out}."
            )
        if Processes.here().first and not file.exists():
            write_text(file, text)
    length = {
        "steps": None,
        "epochs": choice.first_epochs,
        "lr": choice.first_lr,
        "eval_every": None,
        "keep_best": False,
    }
    return recipe.model_copy(
        update={
            "name": name, "runs": recipe.out, "adapter": None,
            "objective": SftObjective(files=[file], packing=choice.packing),
            "train": recipe.train.model_copy(update=length),
        }
    )  # fmt: skip


def _chats(reading: PreferenceReading, place: int, instruction: str | None = None) -> str:
    """Rows of fine-tuning: of every pair the chosen (place 0) or the rejected answer."""
    lines = []
    for row in reading.rows:
        talk = row.conversations[place]
        talk = talk if instruction is None else with_instruction(talk, instruction)
        turns = [
            {**turn, "weight": int(message.trained)} if message.role == "assistant" else turn
            for turn, message in zip(talk.plain(), talk.messages, strict=True)
        ]
        row = {"messages": turns, **({"tools": [dict(tool) for tool in talk.tools]} if talk.tools else {})}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
