"""Recipe → parts → `Trainer` → model folder: `train(recipe)` is `hanlin train` and the quickstart's training stages.

What a recipe leaves open (the sequence length, the epochs, the learning rate, how often to evaluate) is decided here,
from the data and the model that it starts from, said in one line each, and written to the run's `recipe.yaml`.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from hanlin.align.continued import grow
from hanlin.align.method import Data, Parts
from hanlin.align.methods import method_of, open_data
from hanlin.align.recipe import ContinuedObjective, NewModel, SavedModel, TrainRecipe
from hanlin.align.sft import usual_lr
from hanlin.align.sources import open_tokenizer
from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, write_text
from hanlin.core.progress import say
from hanlin.core.runs import Run
from hanlin.core.seeds import seed_everything
from hanlin.models import (
    AttentionConfig,
    FeedForwardConfig,
    ModelConfig,
    Transformer,
    load_model,
    save_model,
)
from hanlin.models.config import ExpertsConfig
from hanlin.models.families import find_family
from hanlin.nn.routing import RouterConfig
from hanlin.parallel.processes import Processes
from hanlin.tokens import Tokenizer
from hanlin.train import Trainer, TrainSettings
from hanlin.train.lr_finder import RangeTest, draw_range_test
from hanlin.train.mup import scale_weights, width_scales
from hanlin.train.trainer import TrainResult
from hanlin.tune.peft_files import save_lora

USUAL_PEAK = {"adamw": 1e-3, "muon": 4e-3}  # rates for models of some million parameters
EVALUATIONS = 10  # during a run, where held-out data is given and `eval_every` is not


def train(recipe: TrainRecipe, *, quiet: bool = False) -> TrainResult:
    """Train as the recipe says, in its run folder, from the newest checkpoint there if there is one.

    When the run is finished the model folder `runs/NAME/model` (weights, tokenizer, chat template, generation config)
    is written; `finished=False` in the result means that a signal ended the run early, with a checkpoint.
    With an initialised process group every process calls this with the same recipe.
    """
    ranks = Processes.here()
    quiet = quiet or not ranks.first
    method = method_of(recipe)
    if method.run is not None and (result := method.run(recipe, train, quiet)) is not None:
        return result
    seed_everything(recipe.seed)
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer, quiet=quiet)
    settings, notes = resolve_settings(recipe, data)
    for note in (*data.notes, *notes):
        say(note, quiet=quiet)
    resolved = resolve_recipe(recipe, data, settings)
    with ranks.first_alone():
        run = open_run(recipe.out, resolved, writes=ranks.first)
    model = build_model(recipe, tokenizer, data.seq_len)
    say(f"{model.parameter_count() / 1e6:.2f} million parameters", quiet=quiet)
    wiring = method.wire(Parts(recipe, tokenizer, data, settings, model, run, quiet))
    with closing(wiring):
        if wiring.before is not None and not run.checkpoints():
            wiring.before()
        trainer = Trainer(
            model,
            wiring.objective,
            wiring.source,
            settings,
            layout=recipe.parallel,
            run=run,
            seed=recipe.seed,
            evaluate=wiring.evaluate,
            evaluate_first=wiring.evaluate_first,
            watch=wiring.watch,
            rates=wiring.rates,
            title=recipe.name,
            quiet=quiet,
        )
        result = trainer.fit()
        if ranks.first:
            write_text(run.recipe, resolved.to_yaml())
        if result.finished:
            with trainer.whole_model() as whole:
                if ranks.first:
                    assert whole is not None
                    save_trained(whole, tokenizer, run, recipe)
                    if wiring.finish is not None:
                        wiring.finish()
    ranks.wait()
    return result


def find_lr(recipe: TrainRecipe, *, quiet: bool = False) -> RangeTest:
    """Try rates from 1e-6 to 1 on the recipe's model and data, and draw the losses to `RUN/lr.png`."""
    ranks = Processes.here()
    quiet = quiet or not ranks.first
    seed_everything(recipe.seed)
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer, quiet=quiet)
    settings, _ = resolve_settings(recipe, data)
    model = build_model(recipe, tokenizer, data.seq_len)
    off = {"eval_every": None, "save_every": None, "trackers": [], "keep_best": False, "spikes": None}
    plain = settings.model_copy(update=off)
    wiring = method_of(recipe).wire(Parts(recipe, tokenizer, data, plain, model, None))
    with closing(wiring):
        trainer = Trainer(
            model, wiring.objective, wiring.source, plain, layout=recipe.parallel, seed=recipe.seed, quiet=True
        )
        found = trainer.find_lr()
    if ranks.first:
        out = Run.open(recipe.out).path / "lr.png"
        draw_range_test(found, out)
        say(f"The loss falls fastest at a rate of {found.suggestion:.2g} and is lowest at {found.best:.2g}: {out}")
    ranks.wait()
    return found


def resolve_settings(recipe: TrainRecipe, data: Data) -> tuple[TrainSettings, list[str]]:
    """The complete settings of the loop, and a line for each that was decided here."""
    choice = recipe.train.model_dump() | {"batch_size": data.source.rows_per_step}
    notes = []
    if recipe.train.steps is None and recipe.train.epochs is None:
        if data.epochs is None:
            raise HanlinError(
                "How long to train? Give `train.steps` (optimizer steps) or `train.epochs` (passes over the data)."
            )
        choice["epochs"] = data.epochs
        notes.append(f"epochs: {data.epochs:g} (the usual number for this many conversations)")
    if recipe.train.lr is None:
        kind = recipe.train.optimizer.kind
        if kind not in USUAL_PEAK:
            raise HanlinError(f"There is no usual rate for the optimizer {kind}: give `train.lr`.")
        rate, why = USUAL_PEAK[kind], f"the usual peak of {kind} for a small model"
        if data.lr is not None:
            rate, why = data.lr, f"the usual one of the objective {recipe.objective.kind}"
        elif not isinstance(recipe.model, NewModel):
            known, reason = usual_lr(recipe.model.path)
            if known <= rate:  # more would be another optimiser's rate
                rate, why = known, reason
        choice["lr"] = rate
        notes.append(f"learning rate: {rate:g} ({why})")
    if recipe.train.eval_every is not None and not data.held_out:
        raise HanlinError("`train.eval_every` is set, but there is nothing to evaluate on: give `objective.held_out`.")
    settings = TrainSettings.model_validate(choice)
    if settings.eval_every is None and data.held_out:
        steps = settings.planned_steps(data.source.steps_per_epoch)
        settings = settings.model_copy(update={"eval_every": max(1, steps // EVALUATIONS)})
    return settings, notes


def resolve_recipe(recipe: TrainRecipe, data: Data, settings: TrainSettings) -> TrainRecipe:
    """The recipe with nothing left open: what `recipe.yaml` of the run folder holds."""
    raw = recipe.model_dump()
    raw["train"] = settings.model_dump()
    raw["objective"]["seq_len"] = data.seq_len
    return type(recipe).model_validate(raw)


def open_run(out: Path, resolved: TrainRecipe, *, writes: bool = True) -> Run:
    """The run folder with its `recipe.yaml`. writes: False in all processes of a run but the first.

    A folder with checkpoints keeps its recipe until the `Trainer` has agreed to continue them (it refuses other data,
    another model or other settings). What it cannot see is checked here: from which weights the run set out.
    """
    run = Run.open(out) if writes else Run(out)
    if not run.checkpoints():
        if writes:
            write_text(run.recipe, resolved.to_yaml())
    elif run.recipe.exists():
        before = yaml.safe_load(run.recipe.read_text(encoding="utf-8")).get("model")
        now = resolved.model.model_dump(mode="json")
        if before != now:
            raise HanlinError(
                f"{out} was begun from another model ({before}, now {now}), so it cannot be continued with this "
                f"recipe. Give the new run another `name`, or delete {out} to begin again."
            )
    return run


def build_model(recipe: TrainRecipe, tokenizer: Tokenizer, seq_len: int) -> Transformer:
    """The model to train, with fp32 weights: new, or the saved one."""
    if isinstance(recipe.model, NewModel):
        model = Transformer(with_token_ids(new_config(recipe.model, tokenizer, seq_len), tokenizer))
        if recipe.train.mup_base_width is not None:
            scale_weights(model, width_scales(model.config, recipe.train.mup_base_width))
        return model
    model = load_model(recipe.model.path, dtype=torch.float32, device="cpu")
    if isinstance(recipe.objective, ContinuedObjective):
        grow(model, recipe.model.path, tokenizer)
    if model.config.vocab_size < tokenizer.size:
        raise HanlinError(
            f"The tokenizer has {tokenizer.size} tokens, but the model in {recipe.model.path} knows only "
            f"{model.config.vocab_size}. Use the tokenizer that the model was trained with."
        )
    model.config = with_token_ids(model.config, tokenizer)
    if recipe.adapter is not None:
        recipe.adapter.hang_on(model, recipe.seed)
    return model


def new_config(new: NewModel, tokenizer: Tokenizer, seq_len: int) -> ModelConfig:
    """The configuration of a new model for this tokenizer."""
    feed_forward: FeedForwardConfig | ExpertsConfig = FeedForwardConfig(new.hidden)
    family = new.family
    if new.experts is not None:
        e = new.experts
        feed_forward = ExpertsConfig(e.count, e.hidden, RouterConfig(e.top_k))
        family = {"qwen3": "qwen3_moe", "mistral": "mixtral"}[new.family]
    return ModelConfig.uniform(
        family,
        depth=new.depth,
        attention=AttentionConfig(
            heads=new.heads,
            kv_heads=new.kv_heads,
            head_dim=new.head_dim or new.width // new.heads,
            window=new.window,
            **find_family(family, "The recipe's model.family").attention_traits(),
        ),
        feed_forward=feed_forward,
        vocab_size=tokenizer.size,
        width=new.width,
        max_positions=new.max_positions or seq_len,
        rope_theta=new.rope_theta,
        tied_embeddings=new.tied,
    )


def with_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The config with the tokens at which generation ends, for `config.json` and `generation_config.json`."""
    ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    generation = {**config.extra.get("generation_config", {}), **ids}
    return replace(config, extra={**config.extra, **ids, "generation_config": generation})


def save_trained(model: Transformer, tokenizer: Tokenizer, run: Run, recipe: TrainRecipe) -> None:
    """`RUN/model`, and where an adapter was trained `RUN/adapter` in PEFT's files: the model then has it merged."""
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        assert isinstance(recipe.model, SavedModel)
        with atomic_folder(run.path / "adapter") as folder:
            save_lora(adapter, folder, base_model=str(recipe.model.path))
        adapter.merge()
        adapter.remove()
    if hasattr(model, "critic"):  # it was of use to training only
        del model.critic
    save_model_folder(model, tokenizer, run.model)


def save_model_folder(model: Transformer, tokenizer: Tokenizer, path: Path) -> None:
    """Weights, config and tokenizer in one folder, whole or not at all."""
    with atomic_folder(path) as folder:
        save_model(model, folder)
        tokenizer.save(folder)
