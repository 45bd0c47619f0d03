"""What can go wrong in an alignment run, a rule a row: a metric, how many of its newest lines, a condition, a sentence.

    entropy     fell to less than a fifth within 20 lines             collapse (arXiv:2505.22617)
    groups      more than 80 % all right or all wrong                 no gradient (DAPO, arXiv:2503.14476)
    answers     cut off, without an end, empty, three times as long for nothing
    distance    large and growing; rollout and trainer disagree; many tokens clipped
    held out    falls while the reward rises (`align.hacking`), or is below where it began
    pairs       chosen answers get unlikelier too (arXiv:2402.13228); told apart within a few steps

A rule of your own is one more row: `Health(rules=(*RULES, Rule(...)))`.
"""

from dataclasses import dataclass

from hanlin.align.health_conditions import (
    Condition,
    above,
    at_once,
    both_fall,
    clipped,
    drifts,
    explains_nothing,
    fell,
    forgets,
    grew_alone,
    hacked,
    leaps,
    never,
    overfits,
    silent,
    stands_still,
    worse_than_at_first,
)


@dataclass(frozen=True)
class Rule:
    """name: of the alarm; metric: a new value of it is what the rule looks at; rows: how many of its newest;
    sentence: what is wrong and what to do, with places {...} for the metric and the figures of what was found."""

    name: str
    metric: str
    rows: int
    condition: Condition
    sentence: str


RULES: tuple[Rule, ...] = (
    Rule(
        "entropy", "entropy", 20, fell(0.8, least=0.05),
        "entropy fell by {percent:.0f} % within 20 lines ({before:.3g} to {now:.3g} nats a token): soon every answer "
        "to a prompt is the same and nothing is left to learn from. Lower train.lr, give objective.entropy_bonus, "
        "draw at a higher temperature, or hold the policy nearer to the reference (objective.beta).",
    ),
    Rule(
        "too easy", "groups/silent", 10, silent(0.8, easy=True),
        "{percent:.0f} % of the groups say nothing, at a mean reward of {reward:.2f}: the prompts are too easy, all "
        "answers are right. Take harder prompts, or leave out those that are always solved.",
    ),
    Rule(
        "too hard", "groups/silent", 10, silent(0.8, easy=False),
        "{percent:.0f} % of the groups say nothing, at a mean reward of {reward:.2f}: the prompts are too hard, no "
        "answer is right. Take easier prompts, more answers to each, fine-tune first, or reward a part of the way.",
    ),
    Rule(
        "truncated", "answer/truncated", 5, above(0.5, below=1.0),
        "{percent:.0f} % of the answers are cut off at objective.max_tokens and never reach what is rewarded. Raise "
        "it, or add the reward `overlong`.",
    ),
    Rule(
        "no end", "answer/ended", 5, never,
        "no answer ends by itself: the end token is never written. Train it first (instruction tuning whose template "
        "trains the end of a turn), or check that the chat template and the tokenizer's end token agree.",
    ),
    Rule(
        "empty", "answer/empty", 5, above(0.3),
        "{percent:.0f} % of the answers are empty: the model ends at once. Check the chat template's generation "
        "prompt, and that an empty answer gets no reward.",
    ),
    Rule(
        "length", "answer/length", 100, grew_alone(3.0),
        "answers grew {times:.1f} times as long ({before:.0f} to {now:.0f} tokens) while the reward did not rise. Use "
        "`kind: dr_grpo` or `dapo`, whose loss has no length in it, or add the reward `overlong`.",
    ),
    *(
        Rule(
            "reference", metric, 20, drifts(10.0, 0.1),
            "the policy is {now:.1f} nats an answer ({token:.2g} a token) from the reference, {before:.1f} some lines "
            "ago: it forgets what it could say. Raise objective.beta or lower train.lr.",
        )
        for metric in ("kl/answer", "kl/k1")
    ),
    Rule(
        "mismatch", "rollout/mismatch_p95", 5, above(0.1),
        "the probabilities that answers were drawn with and the trainer's differ by {now:.2g} nats (95th percentile): "
        "the gradient is of another policy. Use objective.weights: shared, train.precision: fp32, or "
        "objective.correction; filters (objective.top_p, objective.top_k) do it, too.",
    ),
    Rule(
        "clipped", "clip_high", 5, clipped(0.3),
        "{percent:.0f} % of the tokens are clipped and teach nothing. Lower train.lr, make fewer passes over a round "
        "(objective.epochs), or larger steps of it (train.batch_size).",
    ),
    Rule(
        "gradient", "grad_norm", 50, leaps(10.0),
        "the gradient norm is {now:.3g}, {times:.0f} times its median ({usual:.3g}). Look at this round in "
        "samples.jsonl; train.clip bounds what one step can do.",
    ),
    Rule(
        "no progress", "reward", 50, stands_still,
        "the reward has not moved for 50 lines (mean {reward:.3g}), though only {percent:.0f} % of the groups say "
        "nothing. Raise train.lr, ask more answers a round, or look whether the reward can tell the answers apart.",
    ),
    Rule(
        "critic", "explained_variance", 10, explains_nothing,
        "the critic explains less than nothing (explained variance {now:.2f}): its values make advantages noisier. "
        "Give objective.critic_warmup, begin as a reward model (objective.critic), or raise objective.value_weight.",
    ),
    Rule(
        "forgetting", "eval_text/loss", 10, forgets(0.05),
        "the loss on held-out text rose by {percent:.0f} % ({before:.3f} to {now:.3f}): the model forgets its "
        "language. Raise objective.beta, lower train.lr, or train an adapter.",
    ),
    *(
        Rule(
            "hacking", metric, 20, hacked,
            "the reward rose from {reward_before:.3g} to {reward:.3g} while {metric} fell from {before:.3g} to "
            "{now:.3g}: the policy learns to please the reward, not what it stands for. Go back to step {best:.0f}, "
            "and lower train.lr, raise objective.beta, or learn a new reward from answers of now.",
        )
        for metric in ("eval/sampled", "eval/greedy")
    ),
    *(
        Rule(
            "held out", metric, 20, worse_than_at_first(0.05),
            "{metric} is {now:.3g}, below the {first:.3g} of the beginning (the training reward: {reward_before:.3g} "
            "to {reward:.3g}): what is learnt does not hold for other prompts. Lower train.lr, give more different "
            "prompts, or hold the policy nearer to the reference (objective.beta).",
        )
        for metric in ("eval/sampled", "eval/greedy")
    ),
    Rule(
        "both fall", "rewards/chosen", 20, both_fall,
        "chosen answers get unlikelier together with rejected ones (their rewards fell by {chosen:.2g} and "
        "{rejected:.2g}): DPO's known drift. Give objective.sft, use `kind: dpop`, or lower train.lr.",
    ),
    Rule(
        "at once", "rewards/accuracy", 5, at_once(0.999, within=20),
        "every pair is told apart after {lines:.0f} lines: something shallow separates them (length, format, the "
        "source), or the rate is too high. Look with `hanlin data preview`, and compare the lengths of chosen and "
        "rejected answers.",
    ),
    Rule(
        "overfitting", "eval/loss", 20, overfits(0.1),
        "the held-out loss is {now:.3f}, its lowest was {best:.3f}: from there on the run learns its data by heart. "
        "Stop earlier, lower train.lr, or set train.keep_best.",
    ),
)  # fmt: skip
