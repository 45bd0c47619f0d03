"""Reward models (InstructGPT, arXiv:2203.02155 §3.5): a language model's trunk, a number at an answer's last token.

    r(prompt, answer) = w . h[last token of the answer]            pairwise, pointwise, K-wise, listwise
    c(step k)         = W h[last token of step k] + b              process: two labels, wrong and right

The number is gathered from packed rows, where each document stands by itself, so neither padding nor what else stands
in the row changes it. The head is the model's child `reward` and is saved with it. The losses are `align.reward_loss`.
"""

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.data.batch import Batch
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.nn.heads import SequenceClassifier, TokenClassifier
from hanlin.nn.wide import wide
from hanlin.train.objective import document_mask
from hanlin.tune.lora import adapter_of

HEAD = "reward"  # the name of the head among the model's children


def add_reward_head(model: Transformer, *, steps: bool = False, seed: int = 0) -> None:
    """Give a language model the head of a reward model, or keep the one that it has. steps: of a process reward.

    A new weight is normal with a variance of 1 / (width + 1) (arXiv:2009.01325): rewards of size one at first. The
    output head for words is not trained any more. `HanlinError` if it has the head of another form.
    """
    if model.lm_head is not None and not model.config.tied_embeddings:
        model.lm_head.requires_grad_(False)
    if hasattr(model, HEAD):
        _without_branch(model)
        reward_head(model, steps=steps).requires_grad_(True)
        return
    width = model.config.width
    head = TokenClassifier(width, 2) if steps else SequenceClassifier(width, 1, pooling="last")
    chance = torch.Generator().manual_seed(derive(seed, "reward head"))
    weight = head.classifier.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=chance) * (width + 1) ** -0.5)
        if head.classifier.bias is not None:
            head.classifier.bias.zero_()
    own = next(model.parameters())
    model.add_module(HEAD, head.to(own.device, own.dtype))


def reward_head(model: Transformer, *, steps: bool) -> SequenceClassifier | TokenClassifier:
    """The model's reward head, if it is of the kind that is asked for."""
    head = getattr(model, HEAD, None)
    if steps and isinstance(head, TokenClassifier) and head.classifier.out_features == 2:
        return head
    if not steps and isinstance(head, SequenceClassifier) and head.classifier.out_features == 1:
        return head
    if head is None:
        raise HanlinError("This model has no reward head: it is no reward model. Train one: objective {kind: reward}.")
    found = "of steps" if isinstance(head, TokenClassifier) else "of whole answers"
    wanted = "steps" if steps else "whole answers"
    raise HanlinError(f"The model's reward head is one {found}; here {wanted} are judged. Give the other model.")


def answer_rewards(model: Transformer, batch: SequenceBatch) -> Tensor:
    """The reward of every document of a packed batch in order: (documents,) fp32 (fp64 for fp64), with gradient."""
    head = reward_head(model, steps=False)
    return head(_hidden(model, batch, batch.ends())[:, None]).squeeze(-1)


def step_logits(model: Transformer, batch: SequenceBatch) -> Tensor:
    """What the model says of every step, at its last token, the trained one: logits (steps, 2), wrong and right."""
    at = batch.lay_trained(torch.ones_like(batch.trained.ids)) > 0
    return reward_head(model, steps=True)(_hidden(model, batch, at))


def _without_branch(model: Transformer) -> None:
    """Take an adapter's branch off the head of a reward model that is trained on: it learns whole, and is no part of
    the adapter's files."""
    adapter = adapter_of(model)
    branch = None if adapter is None else adapter.branches.pop(f"{HEAD}.classifier", None)
    if branch is not None:
        branch.layer.branch = None
        for name in branch.children():
            delattr(branch.layer, name)


def _hidden(model: Transformer, batch: Batch, at: Tensor) -> Tensor:
    """Hidden states of some tokens, (n, width), wide: rewards are subtracted from one another."""
    if model.part is not None:
        raise HanlinError("A reward model is not cut over ranks: set parallel.tensor to 1 for this objective.")
    output = model(batch.ids, positions=batch.positions, mask=document_mask(batch), logits=None)
    return wide(output.hidden[at])
