"""A `Rollout` writes answers with the weights of the moment. One in this process here; `ray_rollout` has many
elsewhere.

`LocalRollout` is an `Engine` over the very parameters that are trained: nothing is copied, and a step of the optimiser
is a new version of the weights. Pages of earlier weights are never read again (each renewal is a salt of its own).
With `packed` the engine has a second set of weights in the layout and precision that it reads fastest; then a version
is a copy, its seconds are told, and answers from an older one are refused.

Several turns: after each answer an `Environment` may say something (a tool's result), which the model reads and is not
trained on, and the model goes on.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hanlin.align.reference import looking
from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.engine import Engine, SamplingParams
from hanlin.engine.types import Completion
from hanlin.models.transformer import Transformer
from hanlin.nn.frozen import freeze
from hanlin.tokens import Tokenizer

AGAIN = "asked_again"  # in a sample's notes: how often it was lost before it was whole
Pending = Callable[[], list[Sample]]  # answers that are being written: waits until they are
Environment = Callable[[Sample], str | None]  # after a turn: what the model reads next; None: it has ended


class Rollout(Protocol):
    """Answers, and weights to answer with."""

    def refresh(self, version: int) -> float:
        """From now on answer with the weights as they are; returns the seconds it took."""
        ...

    def write(self, prompts: Sequence[Prompt], params: SamplingParams, *, copies: int, seed: int) -> list[Sample]:
        """`copies` answers to each prompt, those to one prompt side by side, `group` counting prompts from 0. The same
        seed and weights give the same answers."""
        ...

    def begin(self, prompts: Sequence[Prompt], params: SamplingParams, *, copies: int, seed: int) -> Pending:
        """Have them written with the weights of now, and go on; what comes back waits for them."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Turns:
    """most: answers of one sample; environment: what comes between."""

    environment: Environment
    most: int = 4


class LocalRollout:
    """An engine in this process. packed: the dtype of a second set of weights, None: the trained ones themselves."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        packed: torch.dtype | None = None,
        turns: Turns | None = None,
        **limits: Any,
    ) -> None:
        self.model, self.tokenizer, self.turns = model, tokenizer, turns
        self._packed, self._limits = packed, limits
        self._engine: Engine | None = None
        self.version = -1
        self._renewed = 0  # how often: a version may come again with other weights, after a rollback
        self._mark: tuple[float, ...] = ()  # of the trained weights when they were packed

    def refresh(self, version: int) -> float:
        start = time.perf_counter()
        if self._packed is not None:
            if self._mark != (now := mark_of(self.model)) or self._engine is None:
                self.close()
                twin = plain_copy(self.model, self._packed)
                freeze(twin)
                self._engine, self._mark = Engine(twin, self.tokenizer, **self._limits), now
        elif self._engine is None:
            with looking(self.model):
                self._engine = Engine(self.model, self.tokenizer, **self._limits)
        self.version, self._renewed = version, self._renewed + 1
        return time.perf_counter() - start

    def write(self, prompts: Sequence[Prompt], params: SamplingParams, *, copies: int, seed: int) -> list[Sample]:
        if self._engine is None:
            raise HanlinError("A rollout answers after its first `refresh`.")
        if self._packed is not None and self._mark != mark_of(self.model):
            raise HanlinError(
                f"The packed weights are those of version {self.version}, and the trained ones have changed since: "
                "call `refresh` before `write`."
            )
        seen = nullcontext() if self._packed is not None else looking(self.model)
        with seen:
            return write_turns(
                self._engine, self.tokenizer, prompts, params, copies=copies, seed=seed, version=self.version,
                salt=f"weights {self._renewed}", turns=self.turns,
            )  # fmt: skip

    def begin(self, prompts: Sequence[Prompt], params: SamplingParams, *, copies: int, seed: int) -> Pending:
        samples = self.write(prompts, params, copies=copies, seed=seed)  # nobody else could meanwhile
        return lambda: samples

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


@torch.no_grad()
def mark_of(model: Transformer) -> tuple[float, ...]:
    """Numbers that change with the trained weights: each one's sum. (What torch counts as writes leaves out those of
    its fused optimisers.)"""
    return tuple(torch.stack([p.sum(dtype=torch.float64) for p in model.parameters() if p.requires_grad]).tolist())


def write_turns(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    copies: int,
    seed: int,
    version: int,
    salt: str,
    turns: Turns | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Sample]:
    """`Rollout.write` on one engine. salt: unlike that of any weights before: pages of those are never read. seeds: of
    the prompts, where these are some of many."""
    own = prompt_seeds(prompts, seed) if seeds is None else seeds
    wanted = [replace(params, n=copies, logprobs=0, seed=each) for each in own]
    completions = engine.generate([list(prompt.ids) for prompt in prompts], wanted, salt=salt)
    samples = [
        sample_of(completion, prompts[place // copies], place // copies, version)
        for place, completion in enumerate(completions)
    ]
    if turns is None:
        return samples
    going = list(range(len(samples)))
    for turn in range(1, turns.most):
        asked, rows, going = going, [], []
        for place in asked:
            sample = samples[place]
            heard = turns.environment(sample) if sample.finish == "stop" else None
            if heard is None:
                continue
            told = tokenizer.encode(str(heard))
            row = [*sample.prompt.ids, *sample.ids, *told]
            if len(row) >= engine.max_context:  # no room to answer it
                samples[place] = replace(sample, finish="length")
                continue
            samples[place] = replace(
                sample, ids=[*sample.ids, *told], logp=[*sample.logp, *[0.0] * len(told)],
                written=[*sample.written, *[False] * len(told)],
            )  # fmt: skip
            rows.append(row)
            going.append(place)
        if not going:
            break
        seeds = [derive(own[p // copies], "turn", turn, p % copies) % 2**31 for p in going]
        again = engine.generate(rows, [replace(params, n=1, logprobs=0, seed=s) for s in seeds], salt=salt)
        for place, completion in zip(going, again, strict=True):
            before, new = samples[place], sample_of(completion, samples[place].prompt, samples[place].group, version)
            samples[place] = replace(
                new, ids=[*before.ids, *new.ids], logp=[*before.logp, *new.logp], text=before.text + new.text,
                written=[*before.written, *new.written],
            )  # fmt: skip
    return samples


def prompt_seeds(prompts: Sequence[Prompt], seed: int) -> list[int]:
    """A seed for each prompt; one that is asked twice gets two: by its places among all that were drawn, or here."""
    seen: Counter[int] = Counter()
    seeds = []
    for prompt in prompts:
        which = seen[prompt.number] if prompt.place is None else prompt.place
        seeds.append(derive(seed, "prompt", prompt.number, which) % 2**31)
        seen[prompt.number] += 1
    return seeds


def sample_of(completion: Completion, prompt: Prompt, group: int, version: int) -> Sample:
    """A completion as a sample; its log-probabilities are those of the distribution that was drawn from."""
    if completion.logprobs is None:
        raise HanlinError("The completion has no log-probabilities; ask for them with logprobs=0.")
    finish = "stop" if completion.finish_reason == "stop" else "length"
    drawn = [token.drawn for token in completion.logprobs]
    ids = list(completion.token_ids)
    return Sample(prompt, ids, completion.text, drawn, [True] * len(ids), finish, group, version)


@torch.no_grad()
def plain_weights(model: Transformer) -> dict[str, Tensor]:
    """Parameters and buffers of a plain `Transformer` with this one's config, an adapter added in, without copying what
    there is; a critic beside the model stays behind."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    adapter = getattr(model, "adapter", None)
    merged = {} if adapter is None else {f"{name}.weight": branch.merged for name, branch in adapter.branches.items()}
    names = [name for name, _ in [*plain.named_parameters(), *plain.named_buffers()]]
    return {name: merged[name]().to(known[name].dtype) if name in merged else known[name].detach() for name in names}


@torch.no_grad()
def plain_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of the weights in `dtype`, with an adapter added in."""
    with torch.random.fork_rng(devices=[]):  # what a new model draws, it draws for nothing
        twin = Transformer(model.config)
    fill(twin, plain_weights(model))
    return twin.to(device=model.device, dtype=dtype).eval()


@torch.no_grad()
def fill(twin: Transformer, weights: Mapping[str, Tensor]) -> None:
    """Put what `plain_weights` found into a plain model."""
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        tensor.copy_(weights[name])
