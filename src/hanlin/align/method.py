"""What a method of training gives to the one loop: its data, and how model, objective and data are wired.

`hanlin train` looks up the method of the recipe's objective (`align.methods`); everything else, from the checkpoint to
the tracker, is the same for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hanlin.align.recipe import TrainRecipe
from hanlin.core.runs import Run
from hanlin.data.batch import BatchSource
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer
from hanlin.train.objective import Objective
from hanlin.train.settings import TrainSettings
from hanlin.train.trainer import Evaluate, TrainResult, Watch


@dataclass(frozen=True)
class Data:
    """What a recipe trains on. held_out: what is never trained, by the name that its loss is logged under; the first is
    the one that is judged by. epochs, lr: the objective's usual ones, if it has any; notes: what was decided or left
    out, for people; more: what else the method read and its wiring wants."""

    source: BatchSource
    held_out: dict[str, BatchSource]
    seq_len: int
    epochs: float | None
    notes: list[str]
    lr: float | None = None
    more: Any = None


@dataclass(frozen=True)
class Parts:
    """What there is before the loop starts. model: freshly built, its adapter on; run: None for a trial."""

    recipe: TrainRecipe
    tokenizer: Tokenizer
    data: Data
    settings: TrainSettings
    model: Transformer
    run: Run | None
    quiet: bool = True


@dataclass(frozen=True)
class Wiring:
    """What the loop gets. watch: says what goes wrong, line by line; rates: as the `Trainer` takes them; before: called
    once ahead of it, unless the run goes on; finish: when the run has ended and its model is saved, in the first
    process; close: in any case, at the end."""

    objective: Objective
    source: BatchSource
    evaluate: Evaluate | None = None
    evaluate_first: bool = False
    watch: Watch | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    finish: Callable[[], None] | None = None
    close: Callable[[], None] = field(default=lambda: None)


@dataclass(frozen=True)
class Method:
    """open: (recipe, tokenizer, positions of the model or None, quiet) -> `Data`, without weights; wire: the rest.
    verb: of `hanlin`, to try the model that comes out; "": it does not write.
    run: of a method that is made of several runs: (recipe, `train`, quiet) -> what came of all of them, None if this
    recipe is a run like any other."""

    open: Callable[[TrainRecipe, Tokenizer, int | None, bool], Data]
    wire: Callable[[Parts], Wiring]
    verb: str = "generate"
    run: Callable[[TrainRecipe, Callable[..., TrainResult], bool], TrainResult | None] | None = None
