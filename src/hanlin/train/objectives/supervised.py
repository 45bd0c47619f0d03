"""What supervised fine-tuning may change about next-token prediction: noise on what is read, and the weight of a token.

    NEFTune   x + u * alpha / sqrt(L d),  u uniform in [-1, 1]     x: token vectors of d numbers, L: tokens of the text
    DFT       loss = - sg(p) log p                                 p: probability of the token that is learnt

NEFTune (arXiv:2310.05914) keeps a model from learning a small set by heart: its answers become longer and better
liked. L is the length of the *document*, not of the row it was packed into, so packing changes the noise of nobody;
padding gets none. DFT (arXiv:2508.05629) takes away the factor 1/p that cross-entropy's gradient has when it is read as
a policy gradient, so tokens which the model finds absurd no longer pull hardest. sg: without a gradient.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch
from hanlin.models.transformer import Output, Transformer
from hanlin.train.objective import CausalLM
from hanlin.train.token_loss import token_dft

TokenLoss = Literal["nll", "dft"]
Draw = Callable[[Tensor], Tensor]  # token vectors -> as many numbers, uniform in [-1, 1]


class Supervised(CausalLM):
    """`CausalLM` with NEFTune's noise of size `neftune` (the paper: 5, 10 or 15) and DFT in the place of nll.

    The noise is drawn in training only, never in an evaluation. It needs whole documents and one process's chance for
    each of them: data parallelism and ZeRO are fine, `tensor`, `pipeline`, `context` and `train.compile` are refused.
    """

    def __init__(
        self, *, loss: TokenLoss = "nll", neftune: float | None = None, ahead: int = 0, z_loss: float = 0.0
    ) -> None:
        super().__init__(ahead=ahead, z_loss=z_loss)
        if neftune is not None and not (neftune > 0 and math.isfinite(neftune)):
            raise HanlinError(f"`neftune` is {neftune}; it is the size of a noise, above 0 (the paper's are 5 to 15).")
        if loss == "dft" and z_loss:
            raise HanlinError("train.z_loss belongs to the loss nll; with objective.loss dft leave it out.")
        self.token_loss, self.neftune = loss, neftune
        self.plain_forward = neftune is None

    def run(self, model: Transformer, batch: Batch) -> Output:
        if self.neftune is None or not model.training:
            return super().run(model, batch)
        if model.part is not None or model._compiled_call_impl is not None:
            raise HanlinError(
                "objective.neftune draws its noise in each process on whole vectors: set parallel.tensor to 1 and "
                "leave out train.compile, or leave out neftune."
            )
        with noisy_embeddings(model, batch.documents, self.neftune):
            return super().run(model, batch)

    def cost(self, model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_dft(model, hidden, targets) if self.token_loss == "dft" else super().cost(model, hidden, targets)

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "loss": self.token_loss, "neftune": self.neftune}


def noise_scale(documents: Tensor, width: int, alpha: float) -> Tensor:
    """documents (rows, T): number within the row, -1 for padding -> (rows, T): alpha / sqrt(L d), 0 for padding."""
    real = documents >= 0
    index = torch.where(real, documents, 0)
    lengths = torch.zeros_like(documents).scatter_add_(1, index, real.to(documents.dtype)).gather(1, index)
    return torch.where(real, alpha / (lengths.clamp(min=1) * width).sqrt(), 0.0)


def uniform(vectors: Tensor) -> Tensor:
    """Numbers in [-1, 1], as many and where `vectors` (rows, T, width) are."""
    return torch.rand_like(vectors) * 2 - 1


@contextmanager
def noisy_embeddings(model: Transformer, documents: Tensor, alpha: float, *, draw: Draw = uniform) -> Generator[None]:
    """Inside, the token vectors of documents (rows, T) carry NEFTune's noise."""

    def add(module: nn.Module, inputs: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
        scale = noise_scale(documents, vectors.shape[-1], alpha).to(vectors.dtype)[..., None]  # (rows, T, 1)
        return vectors + draw(vectors.detach()) * scale

    hook = model.model.embed_tokens.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
