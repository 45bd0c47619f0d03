"""The critic of PPO: what reward is still to come, from every place in an answer (InstructGPT, arXiv:2203.02155 §3.5).

    V(what stands before token t) = w . h[t - 1] + b            one number for each token that the policy wrote

It is a second model of the policy's size or the reward model's, whose trunk it takes over: what tells a good answer at
its end is a good start for foretelling it. As `policy.critic` it is a part of what the one trainer trains and saves;
it is no part of the model folder that comes out.
"""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from hanlin.align.reward import HEAD, reward_head
from hanlin.align.reward_export import load_reward_model
from hanlin.core.errors import HanlinError
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.models.transformer import Transformer
from hanlin.nn.heads import ValueHead
from hanlin.train.objective import document_mask
from hanlin.tune.lora import adapter_of

NAME = "critic"  # of the policy's child; its parameters are named critic.trunk... and critic.head...


class Critic(nn.Module):
    """trunk: a model whose output head for words is not used; head: on its hidden states."""

    def __init__(self, trunk: Transformer, head: ValueHead) -> None:
        super().__init__()
        if trunk.lm_head is not None and not trunk.config.tied_embeddings:
            trunk.lm_head = None
        self.trunk, self.head = trunk, head

    @classmethod
    def from_reward_model(cls, folder: Path) -> "Critic":
        """Trunk and weight of a reward model: at an answer's end it begins by expecting what the reward model gives."""
        model = load_reward_model(folder, dtype=torch.float32, device="cpu")
        classifier = reward_head(model, steps=False).classifier
        head = ValueHead(model.config.width)
        with torch.no_grad():
            head.value.weight.copy_(classifier.weight)
            if classifier.bias is not None:
                head.value.bias.copy_(classifier.bias)
        delattr(model, HEAD)
        return cls(model.requires_grad_(True), head)

    @classmethod
    def from_policy(cls, policy: Transformer) -> "Critic":
        """A copy of the policy as it is, its adapter added in, with a head that expects nothing yet."""
        if hasattr(policy, NAME):
            raise HanlinError("The policy has a critic already.")
        trunk = deepcopy(policy)
        if (adapter := adapter_of(trunk)) is not None:
            adapter.merge()
            adapter.remove()
        if hasattr(trunk, HEAD):
            delattr(trunk, HEAD)
        own = next(trunk.parameters())
        head = ValueHead(trunk.config.width).to(own.device, own.dtype)
        return cls(trunk.requires_grad_(True), head)

    def forward(self, batch: SequenceBatch, *, dtype: torch.dtype | None = None) -> Tensor:
        """The value at each position that predicts a trained token, in their order: (n,) fp32 (fp64 for fp64).

        dtype: of the activations, the policy's `compute_dtype`; None: the weights'."""
        self.trunk.compute_dtype = dtype
        mask = document_mask(batch)
        hidden = self.trunk(batch.ids, positions=batch.positions, mask=mask, logits=None).hidden
        return self.head(hidden[batch.trained.at])


def check_critic(policy: Transformer, critic: Critic) -> None:
    """`HanlinError` if the critic cannot read what the policy writes."""
    mine, its = policy.config, critic.trunk.config
    if its.vocab_size < mine.vocab_size:
        raise HanlinError(
            f"The critic knows {its.vocab_size} tokens and the policy {mine.vocab_size}: the reward model it "
            "comes from has another tokenizer. Take one made from the policy, or let the critic begin as its copy."
        )
    if its.max_positions is not None and mine.max_positions is not None and its.max_positions < mine.max_positions:
        raise HanlinError(
            f"The critic knows {its.max_positions} positions and the policy {mine.max_positions}. Take a reward model "
            "with as many, or let the critic begin as a copy of the policy."
        )


def critic_of(policy: Transformer) -> Critic:
    """The policy's critic."""
    critic = getattr(policy, NAME, None)
    if not isinstance(critic, Critic):
        raise HanlinError("This policy has no critic; attach one as `policy.critic` first.")
    return critic
