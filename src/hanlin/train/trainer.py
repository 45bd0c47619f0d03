"""`Trainer`: the one loop that learns. It knows objectives, batches by step, and nothing about what is being learnt.

One optimizer step:
    batch   = data.batch(step)                     a function of (seed, step)
    totals  = sum of objective.count(part)         over all micro-batches and ranks, before the first backward
    for part in micro-batches: step_loss(objective.loss(model, part), totals).backward()
    check finite → clip → optimizer at lr(step) → log → evaluate → checkpoint
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hanlin.core.device import choose_device, choose_dtype, tune_allocator
from hanlin.core.errors import HanlinError
from hanlin.core.progress import say
from hanlin.core.runs import Run
from hanlin.core.seeds import derive, seed_everything
from hanlin.data.batch import BatchSource
from hanlin.models.transformer import Transformer
from hanlin.train.checkpoint import Keeper
from hanlin.train.monitor import Meter, add_metrics, peak_flops, synchronise
from hanlin.train.nonfinite import explain_nonfinite
from hanlin.train.objective import Metrics, Objective, step_loss
from hanlin.train.optim import build_optimizer, clip_gradients, gradient_norm
from hanlin.train.precision import training_mode, widen_weights
from hanlin.train.prefetch import Prefetch, StepWork, prepare_step
from hanlin.train.ranks import Ranks
from hanlin.train.reporting import Reporter
from hanlin.train.resume import identity, refuse_other_length, refuse_other_run
from hanlin.train.saving import TrainState, model_tensors, put_back, take_checkpoint, untouched
from hanlin.train.schedule import lr_factor
from hanlin.train.settings import TrainSettings
from hanlin.train.stop import StopRequest

Evaluate = Callable[[Transformer, int], dict[str, float]]  # (model, step) -> {"eval/loss": ...}


@dataclass(frozen=True)
class TrainResult:
    """step: how many optimizer steps are done; finished: False if a signal ended the run early (it is saved);
    metrics: the last line of training and of evaluation together."""

    step: int
    finished: bool
    metrics: dict[str, Any]


class Trainer:
    """Trains `model` in place on `data` until `settings` says so; with a `run` it logs, checkpoints and resumes there.

    The model is moved to the device of the settings; half-precision weights become fp32 (bf16 is for activations).
    evaluate: called without gradients every `eval_every` steps; `metrics.jsonl` gets what it returns.
    With an initialised torch.distributed group each process takes its rows of every step, and all call `evaluate`.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        data: BatchSource,
        settings: TrainSettings,
        *,
        run: Run | None = None,
        seed: int = 0,
        evaluate: Evaluate | None = None,
        title: str = "train",
        quiet: bool = False,
    ) -> None:
        self.objective, self.data, self.settings, self.run = objective, data, settings, run
        self.seed, self.evaluate, self.title, self.quiet = seed, evaluate, title, quiet
        self.steps = settings.planned_steps(data.steps_per_epoch)
        self.device = choose_device(settings.device)
        self.ranks = Ranks.current(self.device)
        _refuse_what_cannot_act(settings, data, run, evaluate, self.ranks)
        self.model = model.to(self.device)
        widen_weights(self.model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.keeper = Keeper(run, self.ranks, keep_last=settings.keep_last, notice=say) if run else None
        self.state, self.meter = TrainState(), Meter()
        self.about: dict[str, Any] = {}  # what a checkpoint says of its run; filled by `fit`
        self._use_precision(choose_dtype(settings.precision, self.device))

    def fit(self) -> TrainResult:
        """Train to the end, from the newest checkpoint of `run` if there is one (bit-exact on CPU).

        SIGTERM and Ctrl-C save a checkpoint and return `finished=False`; a second Ctrl-C leaves at once. A non-finite
        loss or gradient raises `HanlinError` with the step, the documents of the batch and the last good checkpoint.
        """
        saved = resumed = self._begin()
        quiet = self.quiet or not self.ranks.first
        with (
            self._training(),
            Reporter(
                self.title, steps=self.steps, resumed=resumed, spent=self.state.time,
                run=self.run if self.ranks.first else None, tensorboard=self.settings.tensorboard, quiet=quiet,
            ) as report,
            Prefetch(self._prepare, self.steps) as feed,
            StopRequest("" if quiet else "Stopping after this step; Ctrl-C again leaves at once.") as stop,
        ):  # fmt: skip
            self.meter.start()
            while self.state.step < self.steps:
                work = feed.take(self.state.step)
                totals, tokens, stopping = self._totals(work, bool(stop))
                if stopping:
                    break
                rate = self._step(work, totals, tokens)
                report.show(1)
                if self._due(self.settings.log_every, first=True):
                    self._log(report, work, rate)
                best = self.evaluate is not None and self._due(self.settings.eval_every) and self._evaluate(report)
                if self.keeper and (best or self._due(self.settings.save_every)):
                    saved = self._save(report)
            if self.keeper and saved != self.state.step:
                self._save(report)
        return TrainResult(self.state.step, self.state.step == self.steps, dict(self.state.last or {}))

    def backward(self, work: StepWork, totals: dict[str, float]) -> tuple[Tensor, Metrics]:
        """Fill `.grad` with the gradient of the whole step, summed over micro-batches and ranks.

        totals: the step's denominators over all ranks. Returns the step's loss (a scalar) and this rank's metrics.
        """
        for parameter in self.parameters:
            parameter.grad = None
        shares: list[Tensor] = []
        metrics: Metrics = {}
        for part in work.parts:
            terms, found = self.objective.loss(self.model, part.to(self.device))
            share = step_loss(terms, totals)
            share.backward()
            shares.append(share.detach())
            add_metrics(metrics, found)
        self.ranks.sum_gradients(self.parameters)
        return self.ranks.sum_tensor(torch.stack(shares).sum()), metrics

    def time_steps(self, count: int = 3) -> float:
        """Seconds of one optimizer step: the median of `count`, after one to warm up. Weights, optimiser and random
        states are put back bit for bit, so the training that follows is the one that would have been without."""
        if self.device.type == "cpu":
            tune_allocator()
        seconds = []
        with self._training(), untouched(self.model, self.optimizer):
            for number in range(count + 1):
                start = time.perf_counter()
                work = self._prepare(number % self.steps)
                self.backward(work, self._totals(work, False)[0])
                clip_gradients(self.parameters, float(gradient_norm(self.parameters)), self.settings.clip)
                self.optimizer.step(1.0)
                synchronise(self.device)
                seconds.append(time.perf_counter() - start)
        return median(seconds[1:])

    def _begin(self) -> int | None:
        """Seed, or continue from the newest checkpoint; returns its step."""
        if self.device.type == "cpu":
            tune_allocator()
        found = self.keeper.newest() if self.keeper else None
        seed_everything(derive(self.seed, "train", self.ranks.rank, found.step if found else 0))
        if found is not None and self.settings.precision == "auto":  # what was measured then holds now
            bf16 = found.state["identity"]["train"]["precision"] == "bf16"
            self._use_precision(torch.bfloat16 if bf16 else torch.float32)
        order = self.data.fingerprint()
        now = identity(self.model, self.objective, order, self.settings, seed=self.seed, precision=self.precision)
        self.about = {"identity": now, "steps": self.steps}
        if found is not None:
            assert self.run is not None
            folder = str(self.run.checkpoint(found.step))
            refuse_other_run(found.state["identity"], now, folder)
            refuse_other_length(self.settings, found.step, found.state["steps"], self.steps, folder)
            self.state = put_back(found, self.model, self.optimizer, chance=self.ranks.first)
            self.meter.load(self.state.meter, metrics=self.ranks.first)
            self._say(f"Continuing {self.title} from {folder}.")
        self.ranks.broadcast(model_tensors(self.model).values())
        return found.step if found else None

    def _totals(self, work: StepWork, stopping: bool) -> tuple[dict[str, float], int, bool]:
        """Denominators, tokens and the wish to stop, over all ranks: one small collective a step."""
        names = sorted(work.denominators)
        *sums, tokens, stop = self.ranks.sum([*(work.denominators[n] for n in names), work.tokens, float(stopping)])
        return dict(zip(names, sums, strict=True)), int(tokens), stop > 0

    def _step(self, work: StepWork, totals: dict[str, float], tokens: int) -> float:
        """One optimizer step; returns the rate it was made at."""
        loss, metrics = self.backward(work, totals)
        norm = gradient_norm(self.parameters)
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()  # the step's one wait for a GPU
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise explain_nonfinite(
                self.model, self.objective, work.parts, self.device, step=work.step + 1, loss=loss_value,
                norm=norm_value, last_good=self.keeper.last_good() if self.keeper else "",
            )  # fmt: skip
        clip_gradients(self.parameters, norm_value, self.settings.clip)
        factor = lr_factor(self.settings.schedule, work.step, self.steps)
        self.optimizer.step(factor)
        self.state.step += 1
        self.state.tokens += tokens
        self.meter.add(tokens, loss_value, norm_value, metrics)
        return self.settings.lr * factor

    def _log(self, report: Reporter, work: StepWork, rate: float) -> None:
        with self.meter.paused():
            means = self.meter.means(self._metric_sums())
            speed = self.meter.tokens / self.meter.seconds
            dtype = torch.bfloat16 if self.precision == "bf16" else self.parameters[0].dtype
            flops = speed * self.model.config.flops_per_token(work.length)
            row = {
                "step": self.state.step, "time": report.elapsed, "tokens": self.state.tokens, "loss": means["loss"],
                "lr": rate, "grad_norm": means["grad_norm"], "tokens_per_s": speed,
                "mfu": flops / (self.ranks.world * peak_flops(self.device, dtype)), **means,
            }  # fmt: skip
            report.show(loss=row["loss"], tokens_per_s=round(speed))
            self._write(report, row)
            self.state.seconds += self.meter.seconds
            self.meter.reset()

    def _evaluate(self, report: Reporter) -> bool:
        """Call the evaluation; True if this is the best so far and the best is to be kept."""
        assert self.evaluate is not None
        with self.meter.paused(), torch.no_grad():
            self.model.eval()
            found = self.evaluate(self.model, self.state.step)
            self.model.train()
            self._write(report, {"step": self.state.step, "time": report.elapsed, "tokens": self.state.tokens, **found})
        if "eval/loss" in found:
            report.show(eval_loss=found["eval/loss"])
        if not self.settings.keep_best:
            return False
        if "eval/loss" not in found:
            raise HanlinError(f"train.keep_best needs the evaluation's 'eval/loss'; it returned {sorted(found)}.")
        best = self.state.best
        if not found["eval/loss"] < (best["eval/loss"] if best else math.inf):  # NaN is never better
            return False
        self.state.best = {"step": self.state.step, "eval/loss": found["eval/loss"]}
        return True

    def _save(self, report: Reporter) -> int:
        """Write a checkpoint of this moment; returns its step."""
        assert self.keeper is not None
        with self.meter.paused():
            report.sync()
            self.state.time, self.state.meter = report.elapsed, self.meter.state(self._metric_sums())
            keep = int(self.state.best["step"]) if self.state.best else None
            self.keeper.save(take_checkpoint(self.model, self.optimizer, self.state, self.about), keep)
        return self.state.step

    def _metric_sums(self) -> dict[str, float]:
        """The objective's sums since the last line, over all ranks."""
        sums = self.meter.metric_sums()
        return dict(zip(sums, self.ranks.sum(sums.values()), strict=True))

    def _write(self, report: Reporter, row: dict[str, Any]) -> None:
        self.state.last = {**(self.state.last or {}), **row}
        report.write(row)

    def _due(self, every: int | None, *, first: bool = False) -> bool:
        """Whether something done `every` so many steps, and after the last, is to be done now."""
        step = self.state.step
        return every is not None and (step % every == 0 or step == self.steps or (first and step == 1))

    def _prepare(self, step: int) -> StepWork:
        return prepare_step(step, self.data, self.objective, self.ranks, self.settings.micro_batch_size)

    def _use_precision(self, dtype: torch.dtype) -> None:
        self.precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        products = dtype if dtype == torch.bfloat16 else None
        self.optimizer = build_optimizer(self.model, self.settings.optimizer, self.settings.lr, dtype=products)

    def _training(self) -> AbstractContextManager[None]:
        return training_mode(self.model, bf16=self.precision == "bf16", compile=self.settings.compile)

    def _say(self, text: str) -> None:
        say(text, quiet=self.quiet or not self.ranks.first)


def _refuse_what_cannot_act(
    settings: TrainSettings, data: BatchSource, run: Run | None, evaluate: Evaluate | None, ranks: Ranks
) -> None:
    if data.rows_per_step != settings.batch_size:
        raise HanlinError(
            f"train.batch_size is {settings.batch_size}, but the data gives {data.rows_per_step} rows a step; "
            "make the data with the same batch size."
        )
    if settings.batch_size % ranks.world:
        raise HanlinError(f"train.batch_size {settings.batch_size} does not divide among {ranks.world} processes.")
    if evaluate is None and settings.eval_every is not None:
        raise HanlinError(
            "train.eval_every is set, but there is nothing to evaluate on: give held-out data, or unset it."
        )
    if run is None and (settings.save_every is not None or settings.tensorboard or settings.keep_best):
        raise HanlinError("train.save_every, keep_best and tensorboard write files: they need a run folder.")
