"""Context parallelism: the ranks of a group share the tokens of every row, and meet in attention alone.

    ring       keys and values travel from rank to rank        `parallel.ring`,    arXiv:2310.01889
    ulysses    heads are exchanged for tokens and back         `parallel.ulysses`, arXiv:2309.14509

Everything else in a layer treats each token alone, so a rank computes it for its tokens. Masks speak of places in the
whole row, so documents, windows and chunks mean what they mean in one process. Losses are sums over a rank's tokens:
summed over the group they are the loss, and gradients summed over the group are its gradient.

    context = ContextParallel(group, "ring");  context.attach(model)
    model, objective: as ever, over context.cut(batch)            whole batches: `with context.paused():`
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.config import AttentionConfig, ExpertsConfig, LatentAttentionConfig, LayerConfig, Position
from hanlin.models.transformer import Transformer
from hanlin.nn.attention import Attention, CrossReader, Scores
from hanlin.nn.latent_attention import LatentAttention
from hanlin.nn.losses import IGNORE
from hanlin.nn.mask_lowering import lower
from hanlin.nn.masks import And, Mask, Or, Padding, Permutation, SameDocument
from hanlin.nn.rope import Rope
from hanlin.parallel.collectives import Group, place
from hanlin.parallel.ring import ring_attention, ring_plan, zigzag
from hanlin.parallel.ulysses import check_heads, consecutive, ulysses_attention

Kind = Literal["ring", "ulysses"]


class ContextParallel:
    """One process's share of every row. group: the ranks that share it, None: all; every rank makes one.

    Rows whose length does not divide (by 2n for the ring's zigzag, by n for Ulysses) are padded by `cut`: ids 0,
    no target, document -1, at the end, where no token that counts sees them.
    """

    def __init__(self, group: Group, kind: Kind) -> None:
        self.group, self.kind = group, kind
        self.rank, self.ranks = place(group)
        self._models: list[Transformer] = []
        self._cut: set[int] = set()  # tokens a row of the shares that were handed out

    @property
    def unit(self) -> int:
        """Whole rows hold a multiple of so many tokens, once they are padded."""
        return 2 * self.ranks if self.kind == "ring" else self.ranks

    def chunks(self, length: int) -> list[list[tuple[int, int]]]:
        """[start, stop) of each rank's chunks of a row of `length` tokens, a multiple of `unit`."""
        return zigzag(length, self.ranks) if self.kind == "ring" else consecutive(length, self.ranks)

    def index(self, length: int, device: torch.device | None = None) -> Tensor:
        """(length / n,): the places in the row of this rank's tokens, in their order."""
        return torch.cat([torch.arange(*chunk, device=device) for chunk in self.chunks(length)[self.rank]])

    def cut(self, batch: Batch) -> Batch:
        """This rank's tokens of every row: ids, targets and positions (rows, T / n); `documents` stays whole (and is
        padded), so that a mask made of it is right. Count tokens and denominators before, on the whole batch."""
        if type(batch) is not Batch:
            raise HanlinError(
                f"parallel.context cuts packed rows of documents (Batch); found a {type(batch).__name__}, whose "
                "objective looks at whole rows. Train it with parallel.context 1."
            )
        short = -batch.ids.shape[1] % self.unit
        index = self.index(batch.ids.shape[1] + short, batch.ids.device)
        ids, targets, positions, documents = (
            F.pad(tensor, (0, short), value=value) if short else tensor
            for tensor, value in ((batch.ids, 0), (batch.targets, IGNORE), (batch.positions, 0), (batch.documents, -1))
        )
        self._cut.add(len(index))
        return Batch(ids[:, index], targets[:, index], positions[:, index], documents, batch.names)

    def real(self, batch: Batch) -> Tensor:
        """Of a batch that was cut: (rows, T / n) bool, True where this rank's token is no padding."""
        return batch.documents[:, self.index(batch.documents.shape[1], batch.documents.device)] >= 0

    def attach(self, model: Transformer) -> None:
        """From now on `model` reads cut batches. `HanlinError` with the layer's name for what cannot be shared."""
        if model.encoder is not None or model.ahead is not None:
            what = "an encoder" if model.encoder is not None else "modules of multi-token prediction"
            raise HanlinError(f"parallel.context: the model has {what}, which look at whole rows. Set it to 1.")
        for number, layer in enumerate(model.config.layers):
            _refuse(layer, f"Layer {number}")
        if self.kind == "ulysses":
            for module in model.modules():
                if isinstance(module, Attention):
                    check_heads(module.heads, module.kv_heads, self.ranks)
                elif isinstance(module, LatentAttention):
                    check_heads(module.heads, 1, self.ranks)
        model.context = self
        self._models.append(model)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Inside, the model reads whole rows by itself: for evaluation, and to look at single rows."""
        for model in self._models:
            model.context = None
        try:
            yield
        finally:
            for model in self._models:
                model.context = self

    def step(self, rows: int, length: int, mask: Mask | None, device: torch.device) -> "ContextStep":
        """One forward pass over `length` tokens of this rank in each of `rows` rows; mask: the caller's, over whole
        rows."""
        whole, known = length * self.ranks, _known_lengths(mask)
        if length not in self._cut or any(tokens != whole for tokens in known):
            raise HanlinError(
                f"parallel.context: {self.ranks} ranks with {length} tokens of a row each would hold {whole}, but the "
                f"mask knows {known or 'no'} tokens and shares of {sorted(self._cut)} were cut. Cut the batch first "
                "(ContextParallel.cut), or read whole rows inside `with context.paused():`."
            )
        return ContextStep(self, rows, whole, mask, device)


class ContextStep:
    """A forward pass of one rank: what `Attention` asks in the place of a cache (`nn.attention.Cache`)."""

    source: CrossReader | None = None

    def __init__(
        self, context: ContextParallel, rows: int, length: int, mask: Mask | None, device: torch.device
    ) -> None:
        self._context, self._rows, self._length, self._mask = context, rows, length, mask
        self._device = device
        self._made: dict[Mask, Any] = {}

    @property
    def positions(self) -> Tensor:
        """(rows, T / n): the place of each token in the whole row."""
        return self._context.index(self._length, self._device).expand(self._rows, -1)

    @property
    def lengths(self) -> Tensor:
        """(rows, T / n): tokens of the whole row."""
        return torch.full_like(self.positions, self._length)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores, *, value_dim: int | None = None
    ) -> Tensor:
        """q (rows, T / n, heads, D) attends to what all ranks hold and its mask shows."""
        context = self._context
        mask = scores.mask if v is not None or self._mask is None else self._mask  # latent attention has no own limits
        if context.kind == "ring":
            plan = self._once(mask, lambda: ring_plan(mask, context.chunks(self._length), context.rank, self._device))
            return ring_attention(q, k, v, scores, plan, context.group, value_dim=value_dim)
        lowered = self._once(mask, lambda: lower(mask, self._length, dtype=q.dtype, device=self._device))
        return ulysses_attention(q, k, v, scores, lowered, context.group, value_dim=value_dim)

    def _once(self, mask: Mask, make: Callable[[], Any]) -> Any:
        if mask not in self._made:
            self._made[mask] = make()
        return self._made[mask]


def _refuse(layer: LayerConfig, name: str) -> None:
    """What looks at other tokens of the row than through attention's mask, or by more than places."""
    attention: Any = layer.attention
    reason = None
    if not isinstance(attention, AttentionConfig | LatentAttentionConfig):
        reason = f"its mixer, {type(attention).__name__}, needs the distances of all tokens"
    else:
        reason = _refused_position(attention.position)
    if isinstance(layer.feed_forward, ExpertsConfig):
        router = layer.feed_forward.router
        if router.capacity is not None or router.capacity_factor is not None:
            reason = "its experts take a limited number of tokens of a row, first come first served"
    if reason is not None:
        raise HanlinError(f"parallel.context: {name} cannot share its rows: {reason}. Set parallel.context to 1.")


def _refused_position(position: Position | None) -> str | None:
    if position is None:
        return None
    if not isinstance(position, Rope):
        return f"its positions, {type(position).__name__}, are not rotary ones and need those of the whole row"
    if position.scaling is not None and position.scaling.by_length:
        return f"its rotary scaling, {type(position.scaling).__name__}, depends on the length of the whole document"
    return None


def _known_lengths(mask: Mask | None) -> list[int]:
    """Tokens a row of each table in a mask."""
    if isinstance(mask, And | Or):
        return [length for part in mask.parts for length in _known_lengths(part)]
    tables = {SameDocument: "ids", Padding: "valid", Permutation: "order"}
    return [getattr(mask, name).shape[1] for kind, name in tables.items() if isinstance(mask, kind)]
