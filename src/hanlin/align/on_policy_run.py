"""On-policy methods in the one loop: the recipe's prompts, rewards, engine, reference and critic, wired together."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hanlin.align.algorithms import ALGORITHMS, Algorithm
from hanlin.align.callables import load_callable
from hanlin.align.experience import Asking, Experience
from hanlin.align.health import watch_of
from hanlin.align.health_report import write_health
from hanlin.align.held_out import held_out_loss
from hanlin.align.method import Data, Parts, Wiring
from hanlin.align.on_policy import OnPolicy, Weights
from hanlin.align.on_policy_recipe import AdaptiveKl, Correction, OnPolicyObjective, RayRollouts, RewardChoice
from hanlin.align.prompts import PromptRows, read_prompts
from hanlin.align.recipe import NewModel, TrainRecipe
from hanlin.align.reference import Reference
from hanlin.align.rewards import Exact, Number, Overlong, Pattern, RewardSet
from hanlin.align.rollout import LocalRollout, Rollout, Turns
from hanlin.align.round_file import Round
from hanlin.align.samples import Prompt, Reward
from hanlin.align.sources import ShardRows
from hanlin.core.device import choose_device
from hanlin.core.errors import HanlinError
from hanlin.core.seeds import derive
from hanlin.engine import SamplingParams
from hanlin.models import Transformer, load_config
from hanlin.parallel.processes import Processes, over_all
from hanlin.tokens import Tokenizer
from hanlin.train.trainer import Evaluate

ROW = 512  # tokens of a packed row, where answers are shorter
SAMPLES = "samples.jsonl"
EVALUATION = 10**9  # versions of the weights in evaluations count from here


@dataclass(frozen=True)
class Asked:
    """The prompts of a recipe. row: tokens of a packed row."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    row: int


def open_prompts(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """Prompts, those held out, and what a round of answers will need."""
    objective = recipe.objective
    assert isinstance(objective, OnPolicyObjective)
    if isinstance(recipe.model, NewModel):
        raise HanlinError(f"{objective.name} goes on with a model that answers: give model {{kind: saved, path: ...}}.")
    room = (positions or 2**30) - objective.max_tokens
    if room < 1:
        raise HanlinError(
            f"objective.max_tokens is {objective.max_tokens}; the model knows {positions} positions, prompt and answer "
            "together."
        )
    prompts, left = read_prompts(objective.prompts, tokenizer, longest=room, plain=objective.plain)
    notes = [f"{len(prompts):,} prompts, {objective.answers} answers to each of {objective.prompts_a_round} a round"]
    if left:
        notes.append(f"{len(left):,} prompts are left out, the first: {left[0]}")
    if objective.lag:
        notes.append(lag_note(objective))
    round_size = objective.prompts_a_round * objective.answers
    rows = recipe.train.batch_size if "batch_size" in recipe.train.model_fields_set else round_size
    if round_size % rows:
        raise HanlinError(
            f"train.batch_size is {rows}, but a round has {objective.prompts_a_round} prompts x {objective.answers} "
            f"answers = {round_size}: give a divisor of that, or leave it out."
        )
    epochs = objective.epochs or ALGORITHMS[objective.name].epochs
    steps = max(1, len(prompts) // objective.prompts_a_round) * epochs * (round_size // rows)
    held: list[Prompt] = []
    held_out = {}
    if objective.held_out:
        held, left = read_prompts(objective.held_out, tokenizer, longest=room, plain=objective.plain)
        if left:
            notes.append(f"{len(left):,} held-out prompts are left out, the first: {left[0]}")
        chance = torch.Generator().manual_seed(0)
        order = torch.randperm(len(held), generator=chance).tolist()[: objective.held_out_rows]
        held = [held[i] for i in order]
        notes.append(f"held out: {len(held):,} prompts")
        held_out["eval"] = PromptRows(held, rows=len(held), steps=1, pad_id=tokenizer.pad_id)
    if objective.held_out_text:
        shards = ShardRows(recipe, tokenizer, min(ROW, positions or ROW))
        held_out["eval_text"], about = shards.held_out(objective.held_out_text, "held-out-text")
        notes.append(f"held-out text: {about}")
    longest = max(len(prompt.ids) for prompt in [*prompts, *held]) + objective.max_tokens * objective.turns
    row = objective.seq_len or max(ROW, 2 ** math.ceil(math.log2(longest)))
    if objective.seq_len is None and positions is not None and longest <= positions:
        row = max(min(row, positions), longest)
    if row < longest:
        raise HanlinError(
            f"objective.seq_len is {row}; the longest prompt and an answer of max_tokens need {longest} tokens."
        )
    size = load_config(recipe.model.path).parameters().total
    source = PromptRows(prompts, rows=rows, steps=steps, pad_id=tokenizer.pad_id)
    rate = usual_rate(size, recipe.adapter is not None)
    return Data(source, held_out, row, 1.0, notes, lr=rate, more=Asked(prompts, held, row))


def lag_note(objective: OnPolicyObjective) -> str:
    """What writing ahead means for this run."""
    correction = chosen_correction(objective)
    assert correction is not None
    given = "" if objective.correction is not None else " (objective.correction is not given)"
    rounds = "a round" if objective.lag == 1 else f"{objective.lag} rounds"
    return (
        f"answers are written {rounds} ahead with older weights; each token counts by its importance, "
        f"{correction.mode} up to {correction.cap:g}{given}"
    )


def chosen_correction(objective: OnPolicyObjective) -> Correction | None:
    """The recipe's; with answers of older weights there always is one."""
    return objective.correction or (Correction() if objective.lag else None)


def usual_rate(parameters: int, adapter: bool) -> float:
    """2e-5 for ten million parameters, falling with the root of their number; ten times that for an adapter."""
    return float(f"{(10 if adapter else 1) * 2e-5 * min(1.0, math.sqrt(1e7 / parameters)):.2g}")


def wire_on_policy(parts: Parts) -> Wiring:
    """Engine, rewards, reference and critic around the model."""
    objective, model, settings, run = parts.recipe.objective, parts.model, parts.settings, parts.run
    assert isinstance(objective, OnPolicyObjective)
    asked: Asked = parts.data.more
    layout = parts.recipe.parallel
    if layout.shard == "zero3" or layout.tensor > 1 or layout.expert > 1:
        raise HanlinError(
            f"{objective.name} answers with the weights that it trains, so every process needs them whole: take "
            "parallel.shard none, zero1 or zero2, and leave parallel.tensor and expert at 1."
        )
    if layout.shard == "zero2" and settings.micro_batch_size is not None:
        raise HanlinError(
            f"{objective.name} packs as many rows as its answers need, on each process its own number, and zero2 sends "
            "gradients after each micro-batch: leave train.micro_batch_size out, or take parallel.shard zero1."
        )
    row = chosen_row(objective)
    beta = row.beta
    wants_reference = beta > 0 and (row.kl_in_reward is not None or row.kl_in_loss is not None)
    reference = Reference(model) if wants_reference else None
    if row.critic:  # after the reference, which wants no copy of it
        attach_critic(model, objective.critic)
    rollout = open_rollout(objective, model, parts.tokenizer, asked, device=settings.device)
    rewards = open_rewards(objective, parts.tokenizer)
    params = SamplingParams(
        max_tokens=objective.max_tokens, temperature=objective.temperature, top_p=objective.top_p, top_k=objective.top_k
    )
    asking = Asking(
        objective.prompts_a_round, objective.answers, params, row.epochs, settings.batch_size, asked.row,
        settings.micro_batch_size, objective.refills, objective.reward_clip, objective.drop_truncated, objective.gamma,
        objective.lam, objective.critic_warmup, objective.lag,
    )  # fmt: skip
    free = {"shown", "held_out", "held_out_rows", "held_out_text", "rollout"}  # a run may go on with others
    about = {
        "prompts": parts.data.source.fingerprint(),
        "objective": objective.model_dump(mode="json", exclude=free),
        "algorithm": row.described(),
    } | ({"lag": objective.lag} if objective.lag else {})
    source = Experience(
        asked.prompts, asking, row, model=model, rollout=rollout, rewards=rewards, seed=derive(parts.recipe.seed, "rl"),
        pad_id=parts.tokenizer.pad_id, beta=beta, reference=reference,
        adapt=None if objective.adaptive_kl is None else adapted(objective.adaptive_kl), run=run,
        show=None if run is None else sample_writer(run.path / SAMPLES, objective.shown), about=about,
    )  # fmt: skip
    correction = chosen_correction(objective)
    weights = Weights(
        beta, objective.temperature, objective.entropy_bonus, objective.value_weight, objective.value_clip,
        objective.max_tokens * objective.turns, None if correction is None else correction.model_dump(),
    )  # fmt: skip
    judged = [answer_evaluation(asked.held_out, rollout, rewards, params)] if asked.held_out else []
    text = {name: part for name, part in parts.data.held_out.items() if name == "eval_text"}
    if (read := held_out_loss(text, parts.tokenizer, TEXT_ROWS)) is not None:
        judged.append(read)
    evaluate = together(judged) if judged else None
    rates = {"critic.": objective.critic_rate} if row.critic else {}
    return Wiring(
        OnPolicy(row, weights), source, evaluate, evaluate is not None, watch=watch_of(run), rates=rates,
        finish=None if run is None else partial(write_health, run), close=rollout.close,
    )  # fmt: skip


def chosen_row(objective: OnPolicyObjective) -> Algorithm:
    """The algorithm's row with what the recipe changes of it."""
    row = ALGORITHMS[objective.name]
    changes: dict[str, Any] = {
        name: value
        for name in ("epochs", "beta", "kl_in_loss", "clip")
        if (value := getattr(objective, name)) is not None
    }
    row = replace(row, **changes)
    if row.beta and row.kl_in_loss is None and row.kl_in_reward is None:
        row = replace(row, kl_in_loss="k2")  # its gradient is that of the divergence; k3's is that of its reverse
    return row


def open_rollout(
    objective: OnPolicyObjective, model: Transformer, tokenizer: Tokenizer, asked: Asked, *, device: str
) -> Rollout:
    """What writes the answers: an engine in this process, or several in others."""
    turns = None
    if objective.environment is not None:
        turns = Turns(load_callable(objective.environment), objective.turns)
    together = objective.prompts_a_round * objective.answers
    longest = max(len(p.ids) for p in [*asked.prompts, *asked.held_out]) + objective.max_tokens * objective.turns
    packed = torch.bfloat16 if objective.weights == "packed" else None
    if turns is not None:  # and room for what the environment says
        longest = asked.row
    limits = {"max_batch": min(together, 256), "max_context": min(longest, model.config.max_positions)}
    if isinstance(objective.rollout, RayRollouts):
        from hanlin.align.ray_rollout import RayRollout

        where = choose_device(device).type
        return RayRollout(
            model, tokenizer, actors=objective.rollout.actors, device=where, packed=packed, turns=turns, **limits
        )
    return LocalRollout(model, tokenizer, packed=packed, turns=turns, **limits)


def open_rewards(objective: OnPolicyObjective, tokenizer: Tokenizer) -> RewardSet:
    """The rewards of an on-policy recipe; an algorithm that shapes lengths adds its own."""
    found = reward_set(objective.rewards, tokenizer, max_tokens=objective.max_tokens)
    if ALGORITHMS[objective.name].overlong and "overlong" not in found.rewards:
        shaped = Overlong(objective.max_tokens, max(1, objective.max_tokens // 5))
        return RewardSet({**found.rewards, "overlong": shaped}, found.weights)
    return found


def reward_set(choices: Sequence[RewardChoice], tokenizer: Tokenizer, *, max_tokens: int) -> RewardSet:
    """The rewards that a recipe names; a second one of a kind gets a number. max_tokens: of an answer."""
    found: dict[str, Reward] = {}
    weights: dict[str, float] = {}
    for choice in choices:
        name = choice.kind
        while name in found:
            name = f"{choice.kind}_{len(found) + 1}"
        found[name] = _reward(choice, tokenizer, max_tokens)
        weights[name] = choice.weight
    return RewardSet(found, weights)


def _reward(choice: Any, tokenizer: Tokenizer, max_tokens: int) -> Reward:
    if choice.kind == "exact":
        return Exact(choice.column)
    if choice.kind == "number":
        return Number(choice.column)
    if choice.kind == "pattern":
        return Pattern(choice.pattern)
    if choice.kind == "overlong":
        return Overlong(max_tokens, choice.margin)
    if choice.kind == "function":
        return load_callable(choice.function)
    from hanlin.align.reward_model import ModelReward, ProcessReward

    if choice.kind == "process":
        return ProcessReward(choice.path, tokenizer, separator=choice.separator)
    return ModelReward(choice.path, tokenizer)


def attach_critic(model: Transformer, path: Path | None) -> None:
    """`model.critic`: from a reward model, or a copy of the policy that expects nothing yet."""
    from hanlin.align.critic import Critic, check_critic

    critic = Critic.from_reward_model(path) if path is not None else Critic.from_policy(model)
    check_critic(model, critic)
    model.critic = critic


def adapted(choice: AdaptiveKl) -> Callable[[float, float, int], float]:
    """(beta, nats an answer, answers) -> the next beta (arXiv:1909.08593, section 2.2)."""

    def adapt(beta: float, kl: float, answers: int) -> float:
        error = min(max(kl / choice.target - 1, -0.2), 0.2)
        return beta * (1 + error * answers / choice.horizon)

    return adapt


def sample_writer(file: Path, shown: int) -> Callable[[int, Round], None]:
    """Appends some samples of each round: what was asked, answered, and what it was worth."""

    def show(number: int, made: Round) -> None:
        with file.open("a", encoding="utf-8") as stream:
            for place in range(min(shown, len(made.samples))):
                sample = made.samples[place]
                values = made.tokens["advantage"][place]
                row = {
                    "round": number, "prompt": sample.prompt.text, "answer": sample.text, "finish": sample.finish,
                    "score": made.numbers["score"][place], "advantage": sum(values) / max(len(values), 1),
                    "tokens": sample.length,
                }  # fmt: skip
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    return show


def answer_evaluation(prompts: list[Prompt], rollout: Rollout, rewards: RewardSet, params: SamplingParams) -> Evaluate:
    """What the first reward says of answers to held-out prompts, drawn and greedy; every rank asks its share."""
    ranks = Processes.here()
    main = RewardSet({rewards.main: rewards.rewards[rewards.main]})

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        rollout.refresh(EVALUATION + step)
        own = prompts[ranks.rank :: ranks.world]
        sums = torch.zeros(4, dtype=torch.float64)
        greedy = replace(params, temperature=0.0, top_p=1.0, top_k=0)
        for place, (chosen, copies) in enumerate(((params, DRAWN), (greedy, 1))):
            samples = rollout.write(own, chosen, copies=copies, seed=step) if own else []
            sums[place] = sum(main(samples).total) / copies if samples else 0.0
            sums[2] += sum(sample.length for sample in samples) / (DRAWN + 1)
        sums[3] = len(own)
        drawn, best, length, count = over_all(sums).tolist()
        return {"eval/sampled": drawn / count, "eval/greedy": best / count, "eval/length": length / count}

    return evaluate


def together(evaluations: list[Evaluate]) -> Evaluate:
    """Several evaluations as one."""

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        return {name: value for one in evaluations for name, value in one(model, step).items()}

    return evaluate


DRAWN = 4  # answers to each held-out prompt
TEXT_ROWS = 32  # of held-out text in an evaluation
