"""The exact counts of one layout: memory by running the model on fake tensors, bytes call by call.

The closed forms (`plan.closed`, `plan.volumes`) choose among thousands of layouts; what they chose is counted here, and
the report shows both. What cannot be counted says why.
"""

from dataclasses import dataclass, replace

from hanlin.core.errors import HanlinError
from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job, closed_memory, micro_batches
from hanlin.plan.communication import Sent, StepShape, step_traffic
from hanlin.plan.memory import Memory, step_memory, step_segments
from hanlin.plan.seconds import Rates, Seconds, step_seconds
from hanlin.plan.work import Lora, Work
from hanlin.train.choices import Muon, OptimizerChoice, Recompute
from hanlin.tune.lora import LoraSettings

KINDS = {"none": "none", "full": "full", "selective": "operators"}


@dataclass(frozen=True)
class Counted:
    """memory: of the fullest pipeline place; sent: of the busiest; seconds: of the step on the machine of `rates`;
    why: what could not be counted, by name."""

    memory: Memory | None
    sent: list[Sent] | None
    why: dict[str, str]
    seconds: Seconds | None = None


def count_exactly(
    job: Job, layout: Layout, optimizer: OptimizerChoice, *, cuda: bool, rates: Rates | None = None
) -> Counted:
    """All counts of `job` in `layout` (`data` filled in). rates: measured ones, for a single process."""
    why: dict[str, str] = {}
    memory, sent, seconds = None, None, None
    try:
        memory = exact_memory(job, layout, optimizer, cuda=cuda)
    except HanlinError as error:
        why["memory"] = str(error)
    try:
        sent = exact_traffic(job, layout, optimizer)
    except HanlinError as error:
        why["communication"] = str(error)
    if rates is not None and layout.fitted(1) == layout:
        try:
            seconds = step_seconds(job.config, exact_work(job, layout, optimizer), rates)
        except HanlinError as error:
            why["seconds"] = str(error)
    return Counted(memory, sent, why, seconds)


def exact_memory(job: Job, layout: Layout, optimizer: OptimizerChoice, *, cuda: bool) -> Memory:
    """The peak of the fullest pipeline place: the first, the second (which may hold a layer more) or the last."""
    work = exact_work(job, layout, optimizer)
    device, places = "cuda" if cuda else "cpu", sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    segments = step_segments(job.config, work, layout, device) if len(places) > 1 else None
    found = [
        _averaged(step_memory(job.config, work, layout, stage=p, device=device, segments=segments), job, layout, p)
        for p in places
    ]
    return max(found, key=lambda memory: memory.peak)


def _averaged(memory: Memory, job: Job, layout: Layout, place: int) -> Memory:
    """With the average of the weights, which the run does not have."""
    if not job.average:
        return memory
    without = closed_memory(replace(job, average=0.0), layout, place)["optimiser"]
    more = int(closed_memory(job, layout, place)["optimiser"] - without)
    return replace(memory, parts=memory.parts | {"optimiser": memory.parts["optimiser"] + more})


def exact_work(job: Job, layout: Layout, optimizer: OptimizerChoice) -> Work:
    """One rank's step. What the model's own code cannot run is a `HanlinError`."""
    if job.method == "qlora" or job.masters:
        what = "QLoRA" if job.method == "qlora" else "half-precision master weights"
        raise HanlinError(f"The model's own code has no {what} to run; the closed form stands alone.")
    lora = None
    if job.method == "lora":
        lora = Lora(LoraSettings(job.rank), "all", "bf16")
    return Work(
        job.micro_batch, job.length, micro_batches(job, layout), job.precision, optimizer,
        Recompute.model_validate({"kind": KINDS[job.recompute]}), lora,
    )  # fmt: skip


def exact_traffic(job: Job, layout: Layout, optimizer: OptimizerChoice) -> list[Sent]:
    """Every call of the busiest pipeline place in one step of the trainer."""
    if job.method != "full" or job.masters or job.recompute == "selective":
        raise HanlinError("The bytes are counted for full training on fp32 weights, with all or nothing recomputed.")
    shape = StepShape(
        job.micro_batch, job.length, micro_batches(job, layout), job.itemsize, recompute=job.recompute == "full",
        muon=isinstance(optimizer, Muon),
    )  # fmt: skip
    return step_traffic(job.config, shape, layout, pipeline=job.sizes.busiest(layout, job.length))
