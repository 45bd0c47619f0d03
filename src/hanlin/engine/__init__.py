"""The one generation loop: `Engine` in process, for the server, evaluation, RL rollouts and agents alike."""

from hanlin.engine.engine import Engine
from hanlin.engine.types import Completion, Event, SamplingParams, TokenLogprob, Usage

__all__ = ["Completion", "Engine", "Event", "SamplingParams", "TokenLogprob", "Usage"]
