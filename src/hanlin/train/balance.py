"""Experts kept busy during training, from what all tokens of an optimizer step chose: every micro-batch, every rank.

    bias   after each step   correction_e += rate * sign(mean load - load_e)              arXiv:2408.15664
    loss   in each step      weight * sum over tokens and experts of E * f_e * p_te / tokens    arXiv:2101.03961

f_e is the share of choices that fell on expert e. It is counted over the whole step, so it is known only when the step
is over: the loss takes the f of the step before (the first step: even shares, whose slope is zero). So the loss is a
sum over tokens like every other, and accumulation, sharding and ranks cannot change it. (Counting f in each
micro-batch instead pushes every small batch towards even loads: arXiv:2501.11873.)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.models.config import ExpertsConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.balance import expert_load, max_violation, router_z_loss
from hanlin.nn.routing import Router, Routing, update_correction
from hanlin.train.settings import BalanceByBias, BalanceByLoss

ROUTED = "routed tokens"  # the denominator of what is summed over tokens


class Balance:
    """The balance of one model's routers. choice: None only counts. z_loss: weight of the routers' z-loss.

    group: the ranks whose tokens belong together; None: this process alone.
    """

    def __init__(
        self,
        model: Transformer,
        choice: BalanceByBias | BalanceByLoss | None,
        *,
        z_loss: float = 0.0,
        group: Any = None,
    ) -> None:
        self.choice, self.z_loss, self.group = choice, z_loss, group
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]
        self.routers: dict[str, Router] = dict(found)
        stacks = (*model.config.layers, *model.config.encoder)
        self.layers = sum(isinstance(layer.feed_forward, ExpertsConfig) for layer in stacks)  # other ranks' too
        corrected = [router for router in self.routers.values() if router.correction is not None]
        if isinstance(choice, BalanceByBias) and len(corrected) < len(self.routers):
            raise HanlinError(
                "train.balance is `bias`, but this model's routers have no correction to adjust. Take a model whose "
                "router has one (deepseek-v3), or balance by `loss`."
            )
        device = next(model.parameters()).device
        self.loads = [torch.zeros(len(r.weight), dtype=torch.float64, device=device) for r in self.routers.values()]
        self.shares = [
            torch.full((len(r.weight),), r.config.top_k / len(r.weight), dtype=torch.float64, device=device)
            for r in self.routers.values()
        ]  # f of the step before

    @property
    def needed(self) -> bool:
        """Whether the model has experts at all."""
        return self.layers > 0

    def terms(self, notes: Sequence[Routing], real: Tensor, first: int = 0) -> list[tuple[Tensor, str]]:
        """Count what `notes` chose, and give the (sum, denominator) terms of this micro-batch.

        notes: of consecutive layers with experts, the first of which is router `first` of this model; real (rows, T):
        True where a token is no padding.
        """
        keep = real.reshape(-1)
        layers = self.layers
        terms: list[tuple[Tensor, str]] = []
        for place, note in enumerate(notes, start=first):
            self.loads[place] += expert_load(note, keep).double()
            if isinstance(self.choice, BalanceByLoss):
                shares = note.scores / note.scores.sum(-1, keepdim=True)
                each = (shares * keep[:, None]).sum(0)  # (experts,): sum over tokens of p
                slope = self.shares[place].to(each.dtype) * (len(each) * self.choice.weight / layers)
                terms.append(((each * slope).sum(), ROUTED))
        if self.z_loss and notes:
            terms.append((router_z_loss(notes, keep) * (self.z_loss / layers), ROUTED))
        return terms

    @torch.no_grad()
    def finish(self) -> dict[str, tuple[float, float]]:
        """The step is over: sum the loads over the ranks, move the corrections. Returns metrics, equal on all ranks."""
        if not self.routers:
            return {}
        loads = torch.stack(self.loads)
        if self.group is not None:
            dist.all_reduce(loads, group=self.group)
        for load in self.loads:
            load.zero_()
        routers = list(self.routers.values())
        self.shares = [
            load / load.sum().clamp_min(1.0) * router.config.top_k for load, router in zip(loads, routers, strict=True)
        ]
        if isinstance(self.choice, BalanceByBias):
            for router, load in zip(routers, loads, strict=True):
                assert router.correction is not None
                router.correction.copy_(update_correction(router.correction, load, self.choice.rate))
        worst = max_violation(loads).nan_to_num()
        return {"router/max_violation": (float(worst.sum()), float(len(worst)))}

    def drop(self) -> None:
        """Forget what this step counted: it is not made, or made again."""
        for load in self.loads:
            load.zero_()

    def state(self) -> dict[str, Tensor]:
        """Named tensors for a checkpoint (corrections are buffers of the model)."""
        return {f"{name}/share": share for name, share in zip(self.routers, self.shares, strict=True)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave."""
        self.shares = [
            tensors[f"{name}/share"].to(share) for name, share in zip(self.routers, self.shares, strict=True)
        ]
