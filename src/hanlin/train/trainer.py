"""`Trainer`: the one loop that learns. It knows objectives, batches by step, and nothing about what is being learnt.

One optimizer step:
    batch   = data.batch(step)                     a function of (seed, step)
    totals  = sum of objective.count(part)         over all micro-batches and ranks, before the first backward
    for part in micro-batches: step_loss(objective.loss(model, part), totals).backward()
    check finite → clip → optimizer at lr(step) → log → evaluate → checkpoint
"""

import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hanlin.core.device import choose_device, tune_allocator
from hanlin.core.errors import HanlinError
from hanlin.core.progress import say
from hanlin.core.runs import Run
from hanlin.core.seeds import derive, seed_everything
from hanlin.data.batch import BatchSource, LiveSource
from hanlin.models.transformer import Transformer
from hanlin.parallel.processes import Processes
from hanlin.parallel.settings import Layout
from hanlin.train.balance import Balance
from hanlin.train.cluster import Cluster
from hanlin.train.ema import EMA
from hanlin.train.gradient import Gradient
from hanlin.train.keeper import Keeper
from hanlin.train.lr_finder import RangeTest, range_test
from hanlin.train.monitor import Meter, peak_flops, synchronise
from hanlin.train.monitors import Monitors
from hanlin.train.mup import Scale, width_scales
from hanlin.train.nonfinite import explain_nonfinite
from hanlin.train.objective import Metrics, Objective
from hanlin.train.optim import build_optimizer, clip_gradients, group_parameters
from hanlin.train.precision import Precision, training_mode, widen_weights
from hanlin.train.prefetch import Prefetch, StepWork, prepare_step
from hanlin.train.reader import CheckpointReader, export_weights, open_checkpoint
from hanlin.train.refusals import refuse_what_cannot_act
from hanlin.train.reporting import Reporter
from hanlin.train.resume import identity, refuse_other_length, refuse_other_run
from hanlin.train.saving import TrainState, average_of, balance_of, model_tensors, put_back, take_checkpoint, untouched
from hanlin.train.scaling import LossScale, unscale_gradients
from hanlin.train.schedule import lr_factor
from hanlin.train.settings import TrainSettings
from hanlin.train.spikes import Skips, SpikeDetector, SpikeGuard
from hanlin.train.stop import StopRequest

Evaluate = Callable[[Transformer, int], dict[str, float]]  # (model, step) -> {"eval/loss": ...}
Watch = Callable[[dict[str, Any]], list[str]]  # a line of metrics -> what is wrong, in words


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
    evaluate: called without gradients every `eval_every` steps; `metrics.jsonl` gets what it returns; evaluate_first:
    and before the first step. watch: sees every line of metrics; what it says is printed and stands in it. rates:
    factors of the learning rate by how parameters' names begin. With an initialised torch.distributed group every
    process makes a `Trainer` of the same whole model; `layout` says how they share the work, and all call `evaluate`.
    The model then holds this rank's part.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        data: BatchSource,
        settings: TrainSettings,
        *,
        layout: Layout | None = None,
        run: Run | None = None,
        seed: int = 0,
        evaluate: Evaluate | None = None,
        evaluate_first: bool = False,
        watch: Watch | None = None,
        rates: Mapping[str, float] | None = None,
        title: str = "train",
        quiet: bool = False,
    ) -> None:
        self.objective, self.data, self.settings, self.run = objective, data, settings, run
        self.seed, self.evaluate, self.title, self.quiet = seed, evaluate, title, quiet
        self.evaluate_first, self.watch, self.rates = evaluate_first, watch, dict(rates or {})
        self.live = data if isinstance(data, LiveSource) else None
        self.steps = settings.planned_steps(data.steps_per_epoch)
        self.device = choose_device(settings.device)
        self.cluster = Cluster(layout or Layout(), self.device)
        refuse_what_cannot_act(settings, data, run, evaluate, self.cluster.layout)
        self.model = model.to(self.device)
        widen_weights(self.model)
        self.precision = self.cluster.agree(Precision.choose(settings.precision, self.device, tf32=settings.tf32))
        self.cluster.lay(self.model)
        self.cluster.replicate(self.model)
        self.balance = Balance(
            model, settings.balance, z_loss=settings.router_z_loss, group=self.cluster.mesh.group("replicas")
        )
        self.gradient = Gradient(model, objective, self.cluster, self.balance)
        self.laid = self.cluster.laid(model)
        self.keeper: Keeper | None = None
        if run is not None:
            self.keeper = Keeper(
                run, Processes.here(), keep_last=settings.keep_last, notice=say, background=settings.background
            )
        self.state, self.meter = TrainState(), Meter()
        self.guard = _guard(settings)
        self.saved: int | None = None  # the step of the newest checkpoint
        self.about: dict[str, Any] = {}  # what a checkpoint says of its run; filled by `fit`
        self._prepare_optimizer()

    def fit(self) -> TrainResult:
        """Train to the end, from the newest checkpoint of `run` if there is one (bit-exact on CPU).

        SIGTERM and Ctrl-C save a checkpoint and return `finished=False`; a second Ctrl-C leaves at once. A non-finite
        loss or gradient raises `HanlinError` with the step, the documents of the batch and the last good checkpoint.
        """
        resumed = self._begin()
        quiet = self.quiet or not self.cluster.first
        with (
            StopRequest("" if quiet else "Stopping after this step; Ctrl-C again leaves at once.") as stop,
            self.keeper or nullcontext(),
            self._training(),
            Reporter(
                self.title, steps=self.steps, resumed=resumed, spent=self.state.time,
                run=self.run if self.cluster.first else None, trackers=self.settings.trackers,
                online=self.settings.trackers_online, quiet=quiet,
            ) as report,
            Prefetch(self._prepare, self.steps, ahead=self.live is None) as feed,
        ):  # fmt: skip
            if self.evaluate_first and self.state.step == 0 and resumed is None:
                self._evaluate(report)
            self.meter.start()
            while self.state.step < self.steps:
                work = feed.take(self._data_step())
                totals, tokens, stopping = self._totals(work, bool(stop))
                if stopping:
                    break
                rate = self._step(work, totals, tokens, report)
                if rate is None:  # a spike: its rows are left out
                    continue
                report.show(1)
                if self._due(self.settings.log_every, first=True):
                    self._log(report, work, rate)
                best = self.evaluate is not None and self._due(self.settings.eval_every) and self._evaluate(report)
                if self.keeper and (best or self._due(self.settings.save_every)):
                    self._save(report)
            if self.keeper and self.saved != self.state.step:
                self._save(report)
        return TrainResult(self.state.step, self.state.step == self.steps, dict(self.state.last or {}))

    def backward(self, work: StepWork, totals: dict[str, float]) -> tuple[Tensor, Metrics]:
        """Fill the gradients of the whole step, summed over micro-batches and ranks (`train.gradient`); with a loss
        scale, divided by it again.

        totals: the step's denominators over all ranks. Returns the step's loss (a scalar) and this rank's metrics.
        """
        if self.scale is None:
            return self.gradient(work, totals)
        loss, metrics = self.gradient(work, totals, self.scale.scale)
        unscale_gradients(self.cluster.pieces.values(), self.scale.scale)
        return loss, metrics

    def time_steps(self, count: int = 3) -> float:
        """Seconds of one optimizer step: the median of `count`, after one to warm up. Everything is put back bit for
        bit, so the training that follows is the one that would have been without."""
        if self.device.type == "cpu":
            tune_allocator()
        seconds = []
        with self._trial():
            for number in range(count + 1):
                start = time.perf_counter()
                work = self._prepare(number % self.steps)
                _, norm, _ = self._computed(work, self._totals(work, False)[0])
                self._update(norm, 1.0)
                synchronise(self.device)
                seconds.append(time.perf_counter() - start)
        return median(seconds[1:])

    @contextmanager
    def whole_model(self) -> Generator[Transformer | None]:
        """The model to keep: whole, with averaged weights where there is an average. Every process enters; None where
        another one has it. If the model is cut it is put together from the newest checkpoint, on the CPU."""
        if self.cluster.holds_all:
            with self._weights_to_keep():
                yield self.model
                self.cluster.wait()  # nobody puts its own weights back while another one saves
            return
        if self.run is None:
            raise HanlinError(
                "A model that is cut over several processes is put together from a checkpoint: give a run."
            )
        whole = None
        if self.cluster.first:
            reader = open_checkpoint(self.run.checkpoints()[-1][1])
            whole = Transformer(self.model.config)
            weights = export_weights(reader, average=self.average is not None)
            if missing := sorted(model_tensors(whole).keys() - weights.keys()):
                raise HanlinError(f"The checkpoint {reader.folder} lacks {missing[0]}: it is of another model.")
            whole.load_state_dict(weights, strict=False)  # a tied head stands once
        yield whole

    def find_lr(self, low: float = 1e-6, high: float = 1.0, steps: int = 100) -> RangeTest:
        """A range test of the learning rate over the run's own data (`train.lr_finder`); nothing of it remains."""

        def step(number: int, rate: float) -> float:
            work = self._prepare(number % self.steps)
            loss, norm, _ = self._computed(work, self._totals(work, False)[0])
            self.balance.drop()
            self._update(norm, rate / self.settings.lr)  # the peaks are at settings.lr
            return loss

        with self._trial():
            return range_test(step, low=low, high=high, steps=steps)

    def close(self) -> None:
        """Take the hooks off the model: another trainer may have it."""
        self.cluster.close()

    @contextmanager
    def _trial(self) -> Generator[None]:
        """Steps of which nothing remains."""
        average, self.average = self.average, None
        scale = self.scale.state() if self.scale else {}
        remembered = self.live.state() if self.live else {}
        try:
            with self._training(), self.cluster.published(untouched(self.laid, self.optimizer)):
                yield
        finally:
            self.average = average
            self.balance.drop()
            if self.live is not None:
                self.live.load(remembered)
            if self.scale is not None:
                self.scale.load(scale)

    def _begin(self) -> int | None:
        """Seed, or continue from the newest checkpoint; returns its step."""
        if self.device.type == "cpu":
            tune_allocator()
        found = self.keeper.newest() if self.keeper else None
        self.saved = found.step if found else None
        seed_everything(derive(self.seed, "train", self.cluster.rank, found.step if found else 0))
        if found is not None and self.settings.precision == "auto":  # what was measured then holds now
            self.precision = Precision(found.state["identity"]["train"]["precision"], self.settings.tf32)
            self._prepare_optimizer()
        order = self.data.fingerprint()
        now = identity(
            self.objective, order, self.settings, seed=self.seed, precision=self.precision.name,
            config=self.model.config, parameters=self.cluster.described,
        )  # fmt: skip
        self.about = {"identity": now, "steps": self.steps}
        if found is not None:
            assert self.run is not None
            folder = str(self.run.checkpoint(found.step))
            refuse_other_run(found.state["identity"], now, folder)
            refuse_other_length(self.settings, found.step, found.state["steps"], self.steps, folder)
            self._restore(found)
            self._say(f"Continuing {self.title} from {folder}.")
        return self.saved

    def _restore(self, found: CheckpointReader) -> None:
        """Everything as the checkpoint has it."""
        self.state = put_back(found, self.laid, self.optimizer, chance=self.cluster.first)
        self.cluster.publish()
        self.balance.load(balance_of(found, self.balance.state()))
        if self.average is not None:
            self.average.load(average_of(found, self.laid, self.average.state()))
        if self.scale is not None and self.state.loss_scale:
            self.scale.load(self.state.loss_scale)
        if self.guard is not None and self.state.spikes:
            self.guard.load(self.state.spikes)
        if self.live is not None:
            self.live.load(self.state.source)
        self.meter.load(self.state.meter, metrics=self.cluster.first)

    def _data_step(self) -> int:
        """The data step that the next optimizer step reads."""
        skips = self.guard.skips if self.guard else Skips(tuple(self.state.spikes.get("skips", ())))
        return skips.data_step(self.state.step)

    def _totals(self, work: StepWork, stopping: bool) -> tuple[dict[str, float], int, bool]:
        """Denominators, tokens and the wish to stop, over all ranks: one small collective a step."""
        names = sorted(work.denominators)
        values = [*(work.denominators[n] for n in names), work.tokens, float(stopping)]
        *sums, tokens, stop = self.cluster.sum_rows(values)
        return dict(zip(names, sums, strict=True)), int(tokens), stop > 0

    def _step(self, work: StepWork, totals: dict[str, float], tokens: int, report: Reporter) -> float | None:
        """One optimizer step; returns the rate it was made at, None if a spike kept it from being made."""
        loss, norm, metrics = self._computed(work, totals)
        step = self.state.step
        if self.guard is not None:
            action = self.guard.judge(step, loss, norm, oldest=self.saved)
            if action != "ok":
                self._leave_out(action, loss, norm, report)
                return None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            layout = self.cluster.layout
            with self.cluster.whole():
                raise explain_nonfinite(
                    self.model, self.objective, work.parts, self.device, step=step + 1, loss=loss, norm=norm,
                    last_good=self.keeper.last_good() if self.keeper else "",
                    trace=layout.pipeline == layout.expert == 1,
                )  # fmt: skip
        metrics |= self.balance.finish()
        factor = lr_factor(self.settings.schedule, step, self.steps)
        if self.settings.monitor_every is not None and (step + 1) % self.settings.monitor_every == 0:
            found = self.monitors.gradient_norms()
            with self.monitors.watch() as ratios:
                self._update(norm, factor)
            metrics |= {name: (value, 1.0) for name, value in (found | ratios).items()}
        else:
            self._update(norm, factor)
        self.state.step += 1
        self.state.tokens += tokens
        self.meter.add(tokens, loss, norm, metrics)
        return self.settings.lr * factor

    def _computed(self, work: StepWork, totals: dict[str, float]) -> tuple[float, float, Metrics]:
        """Fill the gradients: the loss, the gradient norm, this rank's metrics. fp16: until nothing overflows."""
        while True:
            loss, metrics = self.backward(work, totals)
            norm = self.cluster.gradient_norm()
            loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()  # the step's one wait for a GPU
            if self.scale is not None and math.isfinite(loss_value):
                self.scale.update(overflowed=not math.isfinite(norm_value))
                if not math.isfinite(norm_value):  # the same step again, at a smaller scale
                    self.balance.drop()
                    continue
            return loss_value, norm_value, metrics

    def _leave_out(self, action: str, loss: float, norm: float, report: Reporter) -> None:
        """The step that was computed is a spike: forget it, and with `rollback` what came after the last checkpoint."""
        assert self.guard is not None
        self.balance.drop()
        at = self.state.step
        if action == "rollback":
            assert self.keeper is not None
            with self.meter.paused():
                found = self.keeper.newest()
                assert found is not None
                self._restore(found)
                report.rewind(self.state.step)
        back = f"; back to step {self.state.step}" if action == "rollback" else ""
        self._say(
            f"Step {at + 1}: loss {loss:.4g}, gradient norm {norm:.4g} are a spike{back}. Left out: data steps "
            f"{', '.join(map(str, self.guard.skips.steps))}."
        )
        self.state.spikes = self.guard.state()

    def _update(self, norm: float, factor: float) -> None:
        """Clip, and let the optimiser step at `factor` times its rates."""
        clip_gradients(self.cluster.pieces.values(), norm, self.settings.clip)
        self.optimizer.step(factor)
        self.cluster.publish()
        if self.average is not None:
            self.average.update()

    def _log(self, report: Reporter, work: StepWork, rate: float) -> None:
        with self.meter.paused():
            means = self.meter.means(self.cluster.sum_metrics(self.meter.metrics))
            speed = self.meter.tokens / self.meter.seconds
            dtype = self.precision.compute_dtype or next(self.model.parameters()).dtype
            flops = speed * self.model.config.flops_per_token(work.length)
            row = {
                "step": self.state.step, "time": report.elapsed, "tokens": self.state.tokens, "loss": means["loss"],
                "lr": rate, "grad_norm": means["grad_norm"], "tokens_per_s": speed,
                "mfu": flops / (self.cluster.world * peak_flops(self.device, dtype)), **means,
            }  # fmt: skip
            report.show(loss=row["loss"], tokens_per_s=round(speed))
            self._write(report, row)
            self.state.seconds += self.meter.seconds
            self.meter.reset()

    def _evaluate(self, report: Reporter) -> bool:
        """Call the evaluation; True if this is the best so far and the best is to be kept."""
        assert self.evaluate is not None
        with self.meter.paused(), torch.no_grad(), self._weights_to_keep():
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

    def _save(self, report: Reporter) -> None:
        """Write a checkpoint of this moment."""
        assert self.keeper is not None
        with self.meter.paused():
            report.sync()
            self.state.time, self.state.meter = (
                report.elapsed,
                self.meter.state(self.cluster.sum_metrics(self.meter.metrics)),
            )
            keep = int(self.state.best["step"]) if self.state.best else None
            self.state.loss_scale = self.scale.state() if self.scale else {}
            self.state.spikes = self.guard.state() if self.guard else self.state.spikes
            self.state.source = self.live.state() if self.live else {}
            checkpoint = take_checkpoint(
                self.laid, self.optimizer, self.state, self.about, balance=self.balance.state(),
                average=self.average.state() if self.average else None, first=self.cluster.first,
            )  # fmt: skip
            self.keeper.save(checkpoint, keep)
            self.saved = self.state.step

    def _write(self, report: Reporter, row: dict[str, Any]) -> None:
        alarms = self.watch(row) if self.watch is not None else []
        for alarm in alarms:
            self._say(f"Step {row['step']}: {alarm}")
        if alarms:
            row = {**row, "alarms": alarms}
        self.state.last = {**(self.state.last or {}), **row}
        report.write(row)

    def _due(self, every: int | None, *, first: bool = False) -> bool:
        """Whether something done `every` so many steps, and after the last, is to be done now."""
        step = self.state.step
        return every is not None and (step % every == 0 or step == self.steps or (first and step == 1))

    def _prepare(self, step: int) -> StepWork:
        return prepare_step(step, self.data, self.gradient.count, self.cluster.share, self.settings.micro_batch_size)

    def _prepare_optimizer(self) -> None:
        """What belongs to the precision: optimiser, loss scale, average."""
        base = self.settings.mup_base_width
        scales = None if base is None else width_scales(self.model.config, base)
        if self.rates:
            scales = self._own_rates()
        self.optimizer = build_optimizer(
            self.model, self.settings.optimizer, self.settings.lr, dtype=self.precision.products,
            pieces=self.cluster.pieces, kinds=self.cluster.kinds, exchange=self.cluster.exchange(self.model),
            scales=scales,
        )  # fmt: skip
        self.scale = LossScale() if self.precision.scales_loss else None
        pieces, groups = self.cluster.pieces, vars(group_parameters(self.model, self.cluster.kinds))
        kinds = {kind: {name: pieces[name] for name in named if name in pieces} for kind, named in groups.items()}
        self.monitors = Monitors(kinds, shares=self.cluster.shares, total=self.cluster.sum_tensor)
        average = self.settings.average
        self.average = EMA(self.cluster.pieces, average.decay, warmup=average.warmup) if average else None

    def _own_rates(self) -> dict[str, Scale]:
        """Factors of the learning rate, by parameter: those of the first beginning in `rates` that fits its name."""
        if self.settings.optimizer.kind != "adamw" or self.settings.mup_base_width is not None:
            raise HanlinError(
                "Parts with rates of their own (a critic) want train.optimizer adamw, without mup_base_width."
            )
        return {
            name: Scale(lr=next((factor for start, factor in self.rates.items() if name.startswith(start)), 1.0))
            for name in self.cluster.kinds
        }

    @contextmanager
    def _weights_to_keep(self) -> Generator[None]:
        """Inside, the weights are whole and what is evaluated and saved: the average, where there is one."""
        swapped = nullcontext() if self.average is None else self.cluster.published(self.average.swapped())
        with swapped, self.cluster.whole():
            yield

    def _training(self) -> AbstractContextManager[None]:
        chosen = self.settings
        return training_mode(
            self.model, precision=self.precision, compile=chosen.compile, recompute=chosen.recompute,
            offload=chosen.offload,
        )  # fmt: skip

    def _say(self, text: str) -> None:
        say(text, quiet=self.quiet or not self.cluster.first)


def _guard(settings: TrainSettings) -> SpikeGuard | None:
    chosen = settings.spikes
    if chosen is None:
        return None
    detector = SpikeDetector(chosen.window, chosen.threshold)
    return SpikeGuard(detector, chosen.action, before=chosen.before, most=chosen.most)
