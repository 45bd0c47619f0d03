"""What must be the same for a run to continue: everything that decides which weights come out.

Free to change between two tries: how often it logs, evaluates and saves, micro-batches, ranks, device, compilation,
and `steps` where every rate used so far stays what it was (a longer constant or WSD run).
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.train.schedule import lr_factor
from hanlin.train.settings import TrainSettings

DECISIVE = ("batch_size", "lr", "optimizer", "schedule", "clip")  # of the settings
DECISIVE_IF_USED = ("average", "z_loss", "balance", "router_z_loss", "mup_base_width", "tf32")


def identity(
    objective: object,
    data: Mapping[str, Any],
    settings: TrainSettings,
    *,
    seed: int,
    precision: str,
    config: Any,
    parameters: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """JSON of what decides the trajectory. data: `BatchSource.fingerprint()`; precision: as resolved; config: of the
    model; parameters: of each of the whole model's its shape and whether it is trained."""
    chosen = settings.model_dump(mode="json")
    value = {
        "train": {name: chosen[name] for name in DECISIVE} | _acting(chosen) | {"precision": precision},
        "seed": seed,
        "objective": type(objective).__name__,
        "data": dict(data),
        "model": {
            "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else {},
            "parameters": {name: list(about) for name, about in parameters.items()},
        },
    }
    if chosen_too := _own_settings(objective):
        value["objective_settings"] = chosen_too
    value["model"]["config"].pop("extra", None)  # changes no number
    return json.loads(json.dumps(value))


def _own_settings(objective: object) -> dict[str, Any]:
    """What an objective says of itself, if it has settings of its own."""
    tell = getattr(objective, "fingerprint", None)
    return {} if tell is None else dict(tell())


def _acting(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the later settings that are in use: a run that never heard of them is the same run."""
    return {name: chosen[name] for name in DECISIVE_IF_USED if chosen[name]}


def refuse_other_run(saved: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    """Raise `HanlinError` naming the fields in which the checkpoint's identity differs from this run's."""
    before, after = dict(_leaves(saved)), dict(_leaves(now))
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if not changed:
        return
    lines = [f"{name} was {_show(before, name)}, now {_show(after, name)}" for name in changed[:5]]
    more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
    raise HanlinError(
        f"{folder} was made by another run: {'; '.join(lines)}{more}. Continuing would give neither run's result. "
        "Set these back to continue, or choose another run folder to start afresh."
    )


def refuse_other_length(settings: TrainSettings, step: int, saved_steps: int, steps: int, folder: str) -> None:
    """Raise `HanlinError` if another number of steps would have given other rates in the `step` steps already made."""
    if steps == saved_steps:
        return
    schedule = settings.schedule
    same = all(lr_factor(schedule, s, saved_steps) == lr_factor(schedule, s, steps) for s in range(step))
    if not same or steps < step:
        raise HanlinError(
            f"{folder} was made by a run of {saved_steps} steps, now it is {steps}: with the schedule "
            f"{schedule.kind!r} the {step} steps already made would have had other learning "
            "rates. Set the length back to continue, or choose another run folder to start afresh."
        )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b.0", leaf) of nested JSON; an empty list or object is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


def _show(leaves: Mapping[str, Any], name: str) -> str:
    return repr(leaves[name]) if name in leaves else "absent"
