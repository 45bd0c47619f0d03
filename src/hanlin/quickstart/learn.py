"""The stages that train: a plan that turns minutes into steps, pretraining, instruction tuning.

The plan is made once and recorded. So a run that was killed goes on to the very same number of steps, and the same
minutes on a faster machine give a better model rather than a shorter wait.
"""

from pathlib import Path
from typing import Any

from hanlin.align.build import build_model, resolve_settings, train
from hanlin.align.methods import open_data
from hanlin.align.recipe import CausalLmObjective, SavedModel, SftObjective, Shards, TrainChoices, TrainRecipe
from hanlin.align.sources import open_tokenizer
from hanlin.core.errors import HanlinError
from hanlin.quickstart.plan import plan_steps
from hanlin.quickstart.recipe import QuickstartRecipe
from hanlin.quickstart.stage import Done, run_stage
from hanlin.train import CausalLM, Trainer

TIMED = 4  # optimizer steps that are timed together
ROUNDS = 3  # the fastest counts: what else the machine does for a moment must not decide the whole run
CHECKPOINTS = 10  # during a stage
EVALUATIONS = 10  # during pretraining, but at least so many steps apart:
LEAST_EVAL = 50
FREE = {  # change no weight
    "log_every", "eval_every", "save_every", "keep_last", "trackers", "trackers_online", "background", "monitor_every",
}  # fmt: skip


def plan_stage(recipe: QuickstartRecipe, earlier: list[Done], *, quiet: bool) -> Done:
    """`plan`: seconds a step, measured, and the steps of both training stages. earlier: text, instructions, tokenizer,
    shards."""
    _, instructions, tokenizer, shards = earlier
    inputs = {
        "before": [done.fingerprint for done in earlier],
        "minutes": recipe.minutes,
        "plan": recipe.plan.model_dump(mode="json"),
        "model": recipe.model.model_dump(mode="json"),
        "pretrain": _timing(recipe.pretrain),
        "sft": _timing(recipe.sft),
        "seq_len": recipe.seq_len,
    }

    def work(folder: Path) -> dict[str, Any]:
        pretrain = pretrain_recipe(recipe, tokenizer, shards, steps=1000)
        trial = pretrain.model_copy(
            update={
                "objective": SftObjective(files=[instructions.folder / "instructions.jsonl"], seq_len=recipe.seq_len),
                "train": _choice(recipe.sft, 1000),
            }
        )
        seconds, epoch, parameters = zip(*(time_recipe(r) for r in (pretrain, trial)), strict=True)
        steps = plan_steps(
            recipe.plan,
            minutes=recipe.minutes,
            spent=sum(done.seconds for done in earlier),
            seconds_a_step=(seconds[0], seconds[1]),
            steps_an_epoch=(epoch[0], epoch[1]),
        )
        return {
            "pretrain_steps": recipe.pretrain.steps or steps.pretrain,
            "sft_steps": recipe.sft.steps or steps.sft,
            "pretrain_seconds_a_step": seconds[0],
            "sft_seconds_a_step": seconds[1],
            "parameters": parameters[0],
        }

    return run_stage(recipe.out, "5-plan", inputs, work, quiet=quiet)


def time_recipe(recipe: TrainRecipe) -> tuple[float, int, int]:
    """(seconds of an optimizer step, steps of an epoch, parameters) of a recipe, without training anything."""
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer)
    settings, _ = resolve_settings(recipe, data)
    model = build_model(recipe, tokenizer, data.seq_len)
    settings = settings.model_copy(update={"eval_every": None, "save_every": None})
    trainer = Trainer(model, CausalLM(), data.source, settings, quiet=True)
    seconds = min(trainer.time_steps(TIMED) for _ in range(ROUNDS))
    return seconds, data.source.steps_per_epoch, model.parameter_count()


def pretrain_stage(recipe: QuickstartRecipe, plan: Done, tokenizer: Done, shards: Done, *, quiet: bool) -> Done:
    """A run folder whose `model/` has read the text."""
    inputs = {
        "shards": shards.fingerprint,
        "steps": plan.result["pretrain_steps"],
        "model": recipe.model.model_dump(mode="json"),
        "settings": _settings(recipe.pretrain),
        "seq_len": recipe.seq_len,
        "seed": recipe.seed,
    }

    def work(folder: Path) -> dict[str, Any]:
        return _train(pretrain_recipe(recipe, tokenizer, shards, steps=plan.result["pretrain_steps"]), quiet)

    return run_stage(recipe.out, "6-pretrain", inputs, work, quiet=quiet)


def sft_stage(
    recipe: QuickstartRecipe, plan: Done, instructions: Done, tokenizer: Done, pretrain: Done, *, quiet: bool
) -> Done:
    """A run folder whose `model/` answers."""
    inputs = {
        "pretrain": pretrain.fingerprint,
        "instructions": instructions.fingerprint,
        "steps": plan.result["sft_steps"],
        "settings": _settings(recipe.sft),
    }

    def work(folder: Path) -> dict[str, Any]:
        return _train(
            TrainRecipe(
                name="7-sft",
                runs=recipe.out,
                seed=recipe.seed,
                tokenizer=tokenizer.folder,
                model=SavedModel(path=pretrain.folder / "model"),
                objective=SftObjective(files=[instructions.folder / "instructions.jsonl"], seq_len=recipe.seq_len),
                train=_choice(recipe.sft, plan.result["sft_steps"]),
            ),
            quiet,
        )

    return run_stage(recipe.out, "7-sft", inputs, work, quiet=quiet)


def pretrain_recipe(recipe: QuickstartRecipe, tokenizer: Done, shards: Done, *, steps: int) -> TrainRecipe:
    """What `hanlin train` would be given to do the same."""
    return TrainRecipe(
        name="6-pretrain",
        runs=recipe.out,
        seed=recipe.seed,
        tokenizer=tokenizer.folder,
        model=recipe.model,
        objective=CausalLmObjective(
            shards=[Shards(path=shards.folder / "train")],
            held_out=[shards.folder / "heldout"],
            held_out_rows=32,
            seq_len=recipe.seq_len,
        ),
        train=_choice(recipe.pretrain, steps, eval_every=min(steps, max(LEAST_EVAL, steps // EVALUATIONS))),
    )


def _train(recipe: TrainRecipe, quiet: bool) -> dict[str, Any]:
    result = train(recipe, quiet=quiet)
    if not result.finished:
        raise HanlinError(
            f"Stopped after step {result.step} of {recipe.train.steps}; a checkpoint is saved in {recipe.out}. "
            "Run the same command again and it goes on from there."
        )
    return {"steps": result.step, **{key: result.metrics.get(key) for key in ("loss", "tokens")}}


def _choice(choice: TrainChoices, steps: int, *, eval_every: int | None = None) -> TrainChoices:
    """The recipe's choice with the planned steps (its own come first), checkpoints and evaluations on the way."""
    steps = choice.steps or steps
    changes: dict[str, Any] = {"steps": steps, "epochs": None, "eval_every": choice.eval_every or eval_every}
    if choice.save_every is None:
        changes["save_every"] = max(1, steps // CHECKPOINTS)
    return choice.model_copy(update=changes)


def _settings(choice: TrainChoices) -> dict[str, Any]:
    """What decides the weights."""
    return choice.model_dump(mode="json", exclude=FREE)


def _timing(choice: TrainChoices) -> dict[str, Any]:
    """What decides how long a step takes, and how many were asked for."""
    return _settings(choice) | {"lr": None, "schedule": None}
