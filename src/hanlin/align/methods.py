"""The methods of training, one row each: where the data comes from and how it is wired to the loop."""

from dataclasses import replace

from hanlin.align.continued import train_new_rows, write_report
from hanlin.align.distillation import distill_data, wire_distillation
from hanlin.align.distillation_recipe import DistillObjective
from hanlin.align.held_out import held_out_loss
from hanlin.align.iterate import iterate, no_single_run, open_questions
from hanlin.align.iterate_recipe import IteratedObjective
from hanlin.align.kto import wire_kto
from hanlin.align.method import Data, Method, Parts, Wiring
from hanlin.align.on_policy_recipe import OnPolicyObjective
from hanlin.align.on_policy_run import open_prompts, wire_on_policy
from hanlin.align.preference import wire_preferences
from hanlin.align.preference_data import preference_data
from hanlin.align.preference_recipe import KtoObjective, PreferenceObjective, RrhfObjective
from hanlin.align.rahf import first_models, wire_rahf
from hanlin.align.rahf_recipe import RahfObjective
from hanlin.align.recipe import (
    CausalLmObjective,
    ContinuedObjective,
    NewModel,
    SftObjective,
    TrainRecipe,
)
from hanlin.align.reward_data import reward_data
from hanlin.align.reward_recipe import RewardObjective
from hanlin.align.reward_run import wire_reward
from hanlin.align.rrhf import wire_rrhf
from hanlin.align.sft import sft_objective
from hanlin.align.sources import causal_lm_data, continued_data, sft_data
from hanlin.core.errors import HanlinError
from hanlin.models import load_config
from hanlin.tokens import Tokenizer
from hanlin.train import CausalLM


def method_of(recipe: TrainRecipe) -> Method:
    """The method of the recipe's objective."""
    return METHODS[type(recipe.objective)]


def open_data(recipe: TrainRecipe, tokenizer: Tokenizer, *, quiet: bool = True) -> Data:
    """The recipe's data as batches; needs no weights."""
    if isinstance(recipe.model, NewModel):
        positions = recipe.model.max_positions
    else:
        positions = load_config(recipe.model.path).max_positions
    objective = recipe.objective
    if objective.seq_len is not None and positions is not None and objective.seq_len > positions:
        raise HanlinError(
            f"objective.seq_len is {objective.seq_len}, but the model knows only {positions} positions. "
            f"Give at most {positions}, or a model with more."
        )
    return method_of(recipe).open(recipe, tokenizer, positions, quiet)


def wire_text(parts: Parts) -> Wiring:
    """Next-token prediction over whatever the data is."""
    model, settings = parts.model, parts.settings
    objective = CausalLM(ahead=model.config.predict_ahead, z_loss=settings.z_loss)
    rows = parts.recipe.objective.held_out_rows
    return Wiring(objective, parts.data.source, held_out_loss(parts.data.held_out, parts.tokenizer, rows))


def wire_sft(parts: Parts) -> Wiring:
    """As text; noise and another loss where the recipe asks for them."""
    choice = parts.recipe.objective
    assert isinstance(choice, SftObjective)
    objective = sft_objective(choice, ahead=parts.model.config.predict_ahead, z_loss=parts.settings.z_loss)
    return replace(wire_text(parts), objective=objective)


def wire_continued(parts: Parts) -> Wiring:
    """The rows of new tokens alone at first; losses of both held-out texts from before the first step."""
    plain, run = wire_text(parts), parts.run
    if run is None:
        return plain

    def before() -> None:
        train_new_rows(parts.model, parts.recipe, parts.data.source, parts.settings, run, quiet=parts.quiet)

    def finish() -> None:
        if parts.data.held_out:
            write_report(run)

    first = plain.evaluate is not None
    return Wiring(plain.objective, plain.source, plain.evaluate, first, before=before, finish=finish)


METHODS: dict[type, Method] = {
    RewardObjective: Method(reward_data, wire_reward, verb=""),
    CausalLmObjective: Method(causal_lm_data, wire_text),
    ContinuedObjective: Method(continued_data, wire_continued),
    SftObjective: Method(sft_data, wire_sft, verb="chat"),
    OnPolicyObjective: Method(open_prompts, wire_on_policy, verb="chat"),
    PreferenceObjective: Method(preference_data, wire_preferences, verb="chat"),
    KtoObjective: Method(preference_data, wire_kto, verb="chat"),
    RrhfObjective: Method(preference_data, wire_rrhf, verb="chat"),
    RahfObjective: Method(preference_data, wire_rahf, verb="chat", run=first_models),
    DistillObjective: Method(distill_data, wire_distillation, verb="chat"),
    IteratedObjective: Method(open_questions, no_single_run, verb="chat", run=iterate),
}
