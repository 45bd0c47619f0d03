"""Distillation in the one loop (arXiv:1503.02531; on-policy: GKD, arXiv:2306.13649).

    loss = sum over trained tokens of D(teacher, student)  +  weight * -log student(token)

The teacher is a constant: frozen, read without gradient on the very rows that the student learns from. On-policy the
student writes those rows itself, so that it is told about the mistakes it really makes; from the teacher's text it
learns by whole sequences (arXiv:1606.07947)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hanlin.align.conversations import Conversation, read_conversations
from hanlin.align.distillation_recipe import DistillObjective
from hanlin.align.held_out import held_out_loss
from hanlin.align.method import Data, Parts, Wiring
from hanlin.align.recipe import SftObjective, TrainRecipe
from hanlin.align.rollout import LocalRollout, Rollout
from hanlin.align.samples import Prompt
from hanlin.align.sources import sft_data
from hanlin.core.device import choose_device
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import Batch, BatchSource
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.engine import SamplingParams
from hanlin.models import Transformer, load_model
from hanlin.nn.distillation import Divergence, forward_kl, jensen_shannon, reverse_kl
from hanlin.nn.losses import IGNORE, count_targets
from hanlin.tokens import Tokenizer
from hanlin.train.objective import Metrics, Term, document_mask
from hanlin.train.token_loss import distillation_loss, token_loss


class Distillation:
    """An `Objective`: the student's next-token distributions follow the teacher's wherever a token is trained."""

    def __init__(
        self,
        teacher: Transformer,
        divergence: Divergence,
        *,
        data_loss: float = 0.0,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.teacher, self.divergence, self.data_loss = teacher.requires_grad_(False).eval(), divergence, data_loss
        self._about = about or {}

    def fingerprint(self) -> dict[str, Any]:
        return self._about

    def count(self, batch: Batch) -> dict[str, float]:
        return {"tokens": float(count_targets(batch.targets))}

    def loss(self, model: Transformer, batch: Batch) -> tuple[list[Term], Metrics]:
        at, mask = batch.targets != IGNORE, document_mask(batch)
        self.teacher.to(model.device)
        self.teacher.compute_dtype = model.compute_dtype
        with torch.no_grad():
            told = self.teacher(batch.ids, positions=batch.positions, mask=mask, logits=None).hidden[at]
        hidden = model(batch.ids, positions=batch.positions, mask=mask, logits=None).hidden
        apart = distillation_loss(model, hidden[at], self.teacher, told, self.divergence)
        terms: list[Term] = [(apart, "tokens")]
        n = float(at.sum())
        metrics: Metrics = {"loss": (float(apart.detach()), n), "divergence": (float(apart.detach()), n)}
        if self.data_loss:
            plain = token_loss(model, hidden, batch.targets)
            terms.append((plain * self.data_loss, "tokens"))
            metrics["data_loss"] = (float(plain.detach()), n)
        return terms, metrics


class Written:
    """A `LiveSource`: in a share of the steps the rows are answers written anew; in the others those of `source`."""

    live = True

    def __init__(
        self, source: BatchSource, prompts: Sequence[Prompt], rollout: Rollout, params: SamplingParams, *,
        share: float, row: int, pad_id: int, seed: int,
    ) -> None:  # fmt: skip
        self.source, self.prompts, self.rollout, self.params = source, prompts, rollout, params
        self.share, self.row, self.pad_id, self.seed = share, row, pad_id, seed
        self.rows_per_step, self.steps_per_epoch = source.rows_per_step, source.steps_per_epoch

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        stop = self.rows_per_step if stop is None else stop
        if derive(self.seed, "written", step) >= self.share * 2**63:
            return self.source.batch(step, start, stop)
        order = torch.randperm(
            len(self.prompts), generator=torch.Generator().manual_seed(derive(self.seed, "prompts", step))
        ).tolist()
        asked = [self.prompts[order[place % len(order)]] for place in range(start, stop)]
        self.rollout.refresh(step)
        samples = self.rollout.write(asked, self.params, copies=1, seed=derive(self.seed, "write", step))
        examples = [
            Example([*s.prompt.ids, *s.ids], [*[False] * len(s.prompt.ids), *s.written], f"step {step}, answer {place}")
            for place, s in enumerate(samples)
        ]
        packed = PackedExamples(
            examples, seq_len=self.row, rows_per_step=len(examples), seed=0, pad_id=self.pad_id, pack=False
        )
        return packed.batch(0)

    def fingerprint(self) -> dict[str, Any]:
        return {**self.source.fingerprint(), "prompts": len(self.prompts)}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass


def distill_data(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """The conversations, as for supervised fine-tuning; of the first question of each, prompts to write to."""
    objective = recipe.objective
    assert isinstance(objective, DistillObjective)
    if Tokenizer.load(objective.teacher).fingerprint != tokenizer.fingerprint:
        raise HanlinError(
            f"The teacher in {objective.teacher} has another tokenizer than the student; distillation compares what "
            "both say of the same tokens. Take models with one tokenizer, or let the teacher write text (`hanlin "
            "data synthesize`) and fine-tune on that."
        )
    read = SftObjective(
        files=objective.files, held_out=objective.held_out, held_out_rows=objective.held_out_rows,
        seq_len=objective.seq_len,
    )  # fmt: skip
    data = sft_data(recipe.model_copy(update={"objective": read}), tokenizer, positions, quiet)
    if objective.writer == "data":
        return data
    prompts = [
        Prompt(tuple(tokenizer.chat(_question(conversation))), conversation.name, {}, number)
        for number, conversation in enumerate(read_conversations(objective.files).conversations)
    ]
    room = data.seq_len - objective.max_tokens
    kept = [prompt for prompt in prompts if len(prompt.ids) <= room]
    if not kept:
        raise HanlinError(
            f"Rows have {data.seq_len} tokens and written answers up to {objective.max_tokens}: no question fits "
            "beside them. Raise objective.seq_len, or lower max_tokens."
        )
    notes = [*data.notes, f"{len(kept):,} questions are answered by the {objective.writer}"]
    return replace(data, notes=notes, more=kept)


def wire_distillation(parts: Parts) -> Wiring:
    """Student, teacher, and who writes."""
    objective = parts.recipe.objective
    assert isinstance(objective, DistillObjective)
    teacher = load_model(objective.teacher, dtype=torch.float32, device=choose_device(parts.settings.device))
    settings: dict[str, Any] = {"temperature": objective.temperature}
    if objective.divergence == "jsd":
        settings["beta"] = objective.beta
    about = objective.model_dump(mode="json", exclude={"held_out", "held_out_rows"})
    divergence = partial(DIVERGENCES[objective.divergence], **settings)
    learnt = Distillation(teacher, divergence, data_loss=objective.data_loss, about=about)
    evaluate = held_out_loss(parts.data.held_out, parts.tokenizer, objective.held_out_rows)
    if objective.writer == "data":
        return Wiring(learnt, parts.data.source, evaluate)
    writer = parts.model if objective.writer == "student" else teacher
    rollout = LocalRollout(writer, parts.tokenizer, max_batch=min(parts.settings.batch_size, 256))
    source = Written(
        parts.data.source, parts.data.more, rollout,
        SamplingParams(max_tokens=objective.max_tokens, temperature=objective.writing_temperature),
        share=objective.written, row=parts.data.seq_len, pad_id=parts.tokenizer.pad_id,
        seed=derive(parts.recipe.seed, "distillation"),
    )  # fmt: skip
    return Wiring(learnt, source, evaluate, close=rollout.close)


def _question(conversation: Conversation) -> list[dict[str, Any]]:
    """What stands before the first answer."""
    turns = conversation.plain()
    first = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:first]


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jensen_shannon}
