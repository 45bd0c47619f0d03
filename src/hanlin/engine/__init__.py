"""The one generation loop: `Engine` in process, for the server, evaluation, RL rollouts and agents alike."""

from hanlin.engine.engine import Engine
from hanlin.engine.handle import RequestHandle
from hanlin.engine.types import (
    Busy,
    Completion,
    Constraint,
    EngineStats,
    Event,
    SamplingParams,
    TokenLogprob,
    Usage,
)

__all__ = [
    "Busy",
    "Completion",
    "Constraint",
    "Engine",
    "EngineStats",
    "Event",
    "RequestHandle",
    "SamplingParams",
    "TokenLogprob",
    "Usage",
]
