"""`QuickstartRecipe`: every size, rate and share of the quickstart; the defaults were measured on two cores."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from hanlin.align.recipe import NewModel, TrainChoices
from hanlin.core.recipe import Recipe, Section
from hanlin.quickstart.instructions import InstructionSettings
from hanlin.train.settings import WSD, Cosine, Muon


class TimePlan(Section):
    """How the minutes are divided. What text, tokenizer and shards have cost is taken off first."""

    evaluation: Annotated[float, Field(gt=0, lt=1, description="share of the whole kept for evaluation and report")] = (
        0.12
    )
    longest_evaluation: Annotated[float, Field(gt=0, description="seconds; more is not needed")] = 60.0
    least_training: Annotated[float, Field(gt=0, lt=1, description="share of the whole that training always gets")] = (
        0.5
    )
    sft: Annotated[float, Field(gt=0, lt=1, description="share of the training time for instruction tuning")] = 0.35
    most_sft_epochs: Annotated[float, Field(gt=0, description="more time than for this goes to pretraining")] = 6.0
    most_epochs: Annotated[float, Field(gt=0, description="passes over the text, at most")] = 8.0


class QuickstartRecipe(Recipe):
    """Raw text to a chat page."""

    out: Annotated[Path, Field(description="folder of everything that is made")] = Path("runs/quickstart")
    text: Annotated[list[Path], Field(default_factory=list, description="your own files; none: Python's documentation")]
    minutes: Annotated[float, Field(gt=0, description="for everything up to the page; scales the training")] = 10.0
    seed: int = 0
    vocab_size: Annotated[int, Field(ge=300)] = 4096
    held_out: Annotated[float, Field(gt=0, lt=0.5, description="share of the text that is never trained on")] = 0.04
    evaluated_kb: Annotated[int, Field(gt=0, description="kilobytes of held-out text to measure on, spread evenly")] = (
        300
    )
    seq_len: Annotated[int, Field(ge=32, description="tokens a row, in both training stages")] = 256
    model: NewModel = NewModel(depth=6, width=192, heads=3, kv_heads=1, head_dim=64, hidden=512, max_positions=1024)
    instructions: InstructionSettings = InstructionSettings()
    pretrain: Annotated[TrainChoices, Field(description="steps None: as many as the minutes allow")] = TrainChoices(
        batch_size=8, lr=4e-3, optimizer=Muon(), schedule=WSD()
    )
    sft: Annotated[TrainChoices, Field(description="steps None: as many as the minutes allow")] = TrainChoices(
        batch_size=8, lr=3e-3, optimizer=Muon(), schedule=Cosine(floor=0.0)
    )
    plan: TimePlan = TimePlan()
