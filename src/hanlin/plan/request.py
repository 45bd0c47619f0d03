"""What is to be planned: a training recipe, a model folder, a config.json or a well-known name, and what flags add.

A recipe says model, rows, length, precision, optimizer, recompute and layout. Its tokenizer need not be there: then
`vocab_size` has to be given. A model alone is planned with the defaults below.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hanlin.align.recipe import NewModel, TrainRecipe
from hanlin.core.errors import HanlinError
from hanlin.models import ModelConfig, load_config
from hanlin.models.places import find_model
from hanlin.parallel.settings import Layout
from hanlin.plan.closed import Job
from hanlin.plan.formulas import Recompute
from hanlin.plan.known import KNOWN, known_config
from hanlin.plan.shares import Sizes
from hanlin.tokens import Tokenizer
from hanlin.train.choices import SGD, Adafactor, OptimizerChoice
from hanlin.train.settings import AdamW

ROWS, LENGTH = 256, 4096  # of a step and a row, where neither recipe nor flag says it
RECOMPUTED = {"none": "none", "full": "full", "operators": "selective", "layers": "full"}


@dataclass(frozen=True)
class Request:
    """name: for people; job: one optimizer step; layout: what was asked for (None: to be searched); steps: of the run,
    where known; notes: what was assumed; optimizer: as the trainer takes it; fixed_rows: the rows of a micro-batch were
    asked for; recompute: what was asked for (None: to be searched)."""

    name: str
    job: Job
    layout: Layout | None
    optimizer: OptimizerChoice
    steps: int | None
    notes: list[str]
    fixed_rows: bool = False
    recompute: Recompute | None = None


@dataclass(frozen=True)
class VocabularySize:
    """In the place of a tokenizer that is not here."""

    size: int


def read_request(source: str, *, vocab_size: int | None = None, overrides: dict[str, Any] | None = None) -> Request:
    """source: a recipe (.yaml), a model folder, a config.json, a pulled model or a known name.

    overrides: fields of `Job` that flags set (batch, length, micro_batch, precision, recompute, method, rank, masters).
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if source.endswith((".yaml", ".yml")):
        return _from_recipe(Path(source), vocab_size, given)
    config = model_config(source)
    if vocab_size is not None:
        config = config.with_vocabulary(vocab_size)
    notes = []
    if "length" not in given:
        given["length"] = min(LENGTH, config.max_positions)
        notes.append(f"rows of {given['length']:,} tokens (--seq-len)")
    if "batch" not in given:
        given["batch"] = ROWS
        notes.append(f"{ROWS} rows a step (--batch)")
    asked = {"fixed_rows": "micro_batch" in given, "recompute": given.get("recompute")}
    return Request(source, _job(config, given), None, AdamW(), None, notes, **asked)


def model_config(source: str) -> ModelConfig:
    """The config of a model folder, a config.json, a pulled model, or a well-known name."""
    path = Path(source)
    if not path.exists() and source.lower() in KNOWN:
        return known_config(source)
    if path.exists():
        return load_config(path)
    try:
        return load_config(find_model(source))
    except HanlinError:
        return known_config(source)  # which names what is known


def recipe_config(recipe: TrainRecipe, vocab_size: int | None = None) -> ModelConfig:
    """The model that a recipe trains, without its weights. vocab_size: in the place of a tokenizer that is not here."""
    if not isinstance(recipe.model, NewModel):
        config = load_config(recipe.model.path)
        return config if vocab_size is None else config.with_vocabulary(vocab_size)
    from hanlin.align.build import new_config  # which brings the trainer

    length = recipe.objective.seq_len or LENGTH
    if vocab_size is not None:
        return new_config(recipe.model, cast(Tokenizer, VocabularySize(vocab_size)), length)
    if recipe.tokenizer is None or not recipe.tokenizer.exists():
        raise HanlinError(
            f"The vocabulary of the new model is its tokenizer's, and there is no {recipe.tokenizer}. Give "
            "--vocab-size N to plan without it."
        )
    return new_config(recipe.model, Tokenizer.load(recipe.tokenizer), length)


def _from_recipe(path: Path, vocab_size: int | None, given: dict[str, Any]) -> Request:
    recipe = TrainRecipe.load(path, usage="hanlin train RECIPE")
    config, train, notes = recipe_config(recipe, vocab_size), recipe.train, []
    length = recipe.objective.seq_len
    if length is None and "length" not in given:
        length = min(LENGTH, config.max_positions)
        notes.append(f"rows of {length:,} tokens (the recipe leaves it to the data; --seq-len)")
    said: dict[str, Any] = {
        "batch": train.batch_size,
        "length": length,
        "precision": "bf16" if train.precision == "auto" else train.precision,
        "states": states_bytes(train.optimizer),
        "average": 4.0 if train.average is not None else 0.0,
    }
    if "recompute" in train.model_fields_set:
        said["recompute"] = RECOMPUTED[train.recompute.kind]
    if train.precision == "auto":
        notes.append("precision auto is planned as bf16")
    if train.recompute.kind == "layers":
        notes.append("recompute of some layers is planned as of all")
    if train.offload is not None:
        notes.append("train.offload is not modelled: activations are planned as if all of them stayed on the device")
    if train.micro_batch_size is not None:
        said["micro_batch"] = train.micro_batch_size
    if recipe.adapter is not None:
        if recipe.adapter.path is not None:
            notes.append("adapter.path is planned as a LoRA of rank 16: its files were not read")
        said |= {"method": "lora", "rank": recipe.adapter.rank}
    if besides := BESIDES.get(recipe.objective.kind, ON_POLICY if hasattr(recipe.objective, "prompts") else ""):
        notes.append(f"only the trained model is counted, not {besides}")
    said |= given
    asked = {"fixed_rows": "micro_batch" in said, "recompute": said.get("recompute")}
    layout = None if recipe.parallel == Layout() else recipe.parallel
    return Request(recipe.name, _job(config, said), layout, train.optimizer, train.steps, notes, **asked)


ON_POLICY = "the engine's pages, a reference or a critic of on-policy methods"
BESIDES = {  # what an objective holds beside the model that it trains
    "distill": "the teacher",
    "iterated": "what writes and judges between the runs",
    **dict.fromkeys(("dpo", "cdpo", "robust", "hinge", "ipo", "dpop", "tdpo1", "tdpo2", "kto"), "the reference"),
}


def states_bytes(optimizer: OptimizerChoice) -> float:
    """Bytes of optimizer states a parameter (of the matrices, which are nearly all)."""
    bits = getattr(optimizer, "state_bits", 32)
    moments = 1.0 if optimizer.kind == "muon" else 2.0
    if isinstance(optimizer, SGD | Adafactor):
        moments = 1.0 if optimizer.momentum else 0.0
    return moments * (4.0 if bits == 32 else 1.0 + 4.0 / 256)


def _job(config: ModelConfig, fields: dict[str, Any]) -> Job:
    job = Job(Sizes(config), int(fields.pop("batch")), int(fields.pop("length")))
    job = replace(job, **fields)
    for name in ("batch", "length", "micro_batch", "rank"):
        if getattr(job, name) < 1:
            raise HanlinError(f"{name.replace('_', ' ')} is {getattr(job, name)}; it must be at least 1.")
    return job
