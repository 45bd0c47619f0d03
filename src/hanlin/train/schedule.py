"""Learning-rate schedules as pure functions: (schedule, step, steps) -> factor of the peak rate.

`step` counts from 0 and is the optimizer step about to be made. Warm-up over w steps gives step s the factor
(s + 1) / w, so no step is made at rate zero; the decay reaches its floor at `steps`, one past the last step, so no step
is wasted there.

    cosine    floor + (1 - floor) * (1 + cos(pi * t)) / 2,  t = (s - w) / (steps - w)
    WSD       1 until the last d steps, then 1 - (1 - floor) * t,  t = (s - (steps - d)) / d
    constant  1
"""

import math

from hanlin.train.settings import WSD, Constant, Cosine


def lr_factor(schedule: Cosine | WSD | Constant, step: int, steps: int) -> float:
    """The factor of optimizer step `step` (0-based) out of `steps`."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(schedule, Cosine):
        return cosine(step - warmup, steps - warmup, schedule.floor)
    if isinstance(schedule, WSD):
        decay = min(round(schedule.decay * steps), steps - warmup)
        return linear(step - (steps - decay), decay, schedule.floor)
    return 1.0


def cosine(place: int, length: int, floor: float) -> float:
    """Half a cosine from 1 at place 0 to `floor` at place `length`."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, place / length))) / 2


def linear(place: int, length: int, floor: float) -> float:
    """1 up to place 0, then straight down to `floor` at place `length`."""
    return 1.0 if place <= 0 else 1 - (1 - floor) * min(1.0, place / length)
