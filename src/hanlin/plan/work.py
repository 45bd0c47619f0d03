"""One optimizer step as the `Trainer` makes it, in pieces that run alike on real and on fake tensors.

    for part in micro-batches:  (run → score → / totals).backward()        gradients add up
    norm → clip → optimizer.step

`plan.memory` runs it on tensors without memory, `plan.measure` on real ones; a plan is true if both see the same bytes.
"""

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.config import ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.float8 import use_float8
from hanlin.train.choices import AdamW, OptimizerChoice, Recompute
from hanlin.train.objective import CausalLM, step_loss
from hanlin.train.optim import Optimizer, build_optimizer, clip_gradients, gradient_norm
from hanlin.train.precision import Precision, widen_weights
from hanlin.train.recompute import recompute_layers
from hanlin.tune.lora import LoraSettings, add_lora

Stage = Callable[[str], AbstractContextManager[None]]  # "forward", "loss", "backward", "optimiser" -> around that part


@dataclass(frozen=True)
class Lora:
    """What `hanlin.tune.add_lora` is told. weights: dtype of the frozen model."""

    settings: LoraSettings = field(default_factory=LoraSettings)
    targets: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "o_proj")
    weights: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Work:
    """What one optimizer step is made of.

    rows, length: of one micro-batch, tokens of a row; micro_batches: how many add up to the step; precision: of the
    activations over fp32 weights; recompute: what backward makes again (`train.recompute`); documents: equally long
    ones in each row (more than one needs a mask of length x length); clip: limit of the gradient's norm.
    """

    rows: int
    length: int
    micro_batches: int = 1
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "bf16"
    optimizer: OptimizerChoice = field(default_factory=AdamW)
    recompute: Recompute = field(default_factory=Recompute)
    lora: Lora | None = None
    documents: int = 1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("rows", "length", "micro_batches", "documents"):
            if getattr(self, name) < 1:
                raise HanlinError(f"`{name}` of a step is {getattr(self, name)}; it must be at least 1.")
        if self.documents > self.length:
            raise HanlinError(f"{self.documents} documents do not fit into a row of {self.length} tokens.")

    @property
    def tokens(self) -> int:
        """Of the whole step on this rank."""
        return self.rows * self.length * self.micro_batches

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2


@dataclass
class Bench:
    """A model, its optimiser and the micro-batches of a step."""

    config: ModelConfig
    work: Work
    model: Transformer
    optimizer: Optimizer
    objective: CausalLM
    parts: list[Batch]
    totals: dict[str, float]
    device: torch.device

    def renew(self, number: int) -> None:
        """Other rows, as many: tokens go to other experts, in other numbers."""
        count = self.work.micro_batches
        self.parts = [make_batch(self.config, self.work, number * count + i) for i in range(count)]

    def step(self, stage: Stage | None = None) -> float:
        """One optimizer step, as `Trainer.backward` and what follows it; returns the loss."""
        stage = stage or (lambda name: nullcontext())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        shares: list[Tensor] = []
        for part in self.parts:
            batch = part.to(self.device)
            with stage("forward"):
                output = self.objective.run(self.model, batch)
            with stage("loss"):
                terms, _ = self.objective.score(self.model, output, batch)
                share = step_loss(terms, self.totals)
            del output, terms
            with stage("backward"):
                share.backward()
            shares.append(share.detach())
        with stage("optimiser"):
            norm = gradient_norm(parameters)
            clip_gradients(parameters, float(norm), self.work.clip)
            self.optimizer.step(1.0)
        return float(torch.stack(shares).sum())


def open_bench(
    config: ModelConfig, work: Work, device: torch.device, *, part: Callable[[Transformer], None] | None = None
) -> Bench:
    """The model with random weights on `device`, ready for its first step. part: takes away what other ranks hold."""
    if config.encoder:
        raise HanlinError("A plan knows decoders; this model has an encoder beside it.")
    with _default_dtype(torch.bfloat16 if work.lora is not None and work.lora.weights == "bf16" else torch.float32):
        model = Transformer(config)
        if part is not None:
            part(model)
    if work.lora is not None:
        s = work.lora.settings
        add_lora(model, s.rank, s.alpha, work.lora.targets, rslora=s.rslora, dora=s.dora, dropout=s.dropout)
    if model.device != device:
        model = model.to(device)
    widen_weights(model)
    model.train()
    precision = Precision(work.precision)
    model.compute_dtype = precision.compute_dtype
    if work.precision == "fp8":
        use_float8(model)
    recompute_layers(model, work.recompute)
    optimizer = build_optimizer(model, work.optimizer, 1e-4, dtype=precision.products)
    parts = [make_batch(config, work, number) for number in range(work.micro_batches)]
    objective = CausalLM(ahead=config.predict_ahead)
    totals: dict[str, float] = {}
    for batch in parts:
        for name, count in objective.count(batch).items():
            totals[name] = totals.get(name, 0.0) + count
    return Bench(config, work, model, optimizer, objective, parts, totals, device)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    """New weights are of this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_batch(config: ModelConfig, work: Work, number: int = 0) -> Batch:
    """Random rows: ids below the vocabulary, `work.documents` equally long documents in each."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, config.vocab_size, (work.rows, work.length), generator=generator)
    documents = torch.arange(work.length) * work.documents // work.length
    documents = documents.expand(work.rows, -1).contiguous()
    return Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)
