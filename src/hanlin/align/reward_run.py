"""`hanlin train` of a reward model: what the loop gets, and the report that the run ends with."""

from hanlin.align.health import watch_of
from hanlin.align.method import Parts, Wiring
from hanlin.align.reward import add_reward_head
from hanlin.align.reward_export import load_reward_model
from hanlin.align.reward_objective import Reward
from hanlin.align.reward_recipe import RewardObjective
from hanlin.align.reward_report import figures, judge, sizes, write_reward_report
from hanlin.core.errors import HanlinError
from hanlin.models.transformer import Transformer
from hanlin.parallel.settings import Layout


def wire_reward(parts: Parts) -> Wiring:
    """A head on the model, the objective, and held-out judgements while it learns and at its end."""
    choice, run = parts.recipe.objective, parts.run
    assert isinstance(choice, RewardObjective)
    _refuse_cut(parts.recipe.parallel)
    if parts.settings.mup_base_width is not None:
        raise HanlinError("train.mup_base_width has no factor for a reward head; leave it out and give `train.lr`.")
    add_reward_head(parts.model, steps=choice.form == "process", seed=parts.recipe.seed)
    objective, held_out = Reward.of(choice), parts.data.held_out

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        values = {}
        for name, source in held_out.items():
            found = figures(judge(model, objective, source, rows=choice.held_out_rows))
            values |= {f"{name}/{key}": value for key, value in found.items()}
        return values

    def finish() -> None:
        if run is None or not held_out:
            return
        model = load_reward_model(run.model, device=parts.model.device)
        about = [f"Form {choice.form}, learnt from {', '.join(file.name for file in choice.files)}."]
        judged = judge(model, objective, next(iter(held_out.values())))
        write_reward_report(run.path, judged, [*about, *sizes(model, choice.actor)])

    return Wiring(
        objective, parts.data.source, evaluate if held_out else None, watch=watch_of(parts.run), finish=finish
    )


def _refuse_cut(layout: Layout) -> None:
    """A model that no process holds whole is put together without its head."""
    if layout.shard == "zero3" or not layout.tensor == layout.expert == layout.pipeline == layout.context == 1:
        raise HanlinError(
            "A reward model is trained whole in every process: set parallel.shard none, zero1 or zero2, and leave "
            "parallel.tensor, expert, pipeline and context at 1."
        )
