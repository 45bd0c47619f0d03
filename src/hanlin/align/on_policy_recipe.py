"""`objective:` of the on-policy methods: prompts, rewards, and what the algorithm's row (`align.algorithms`) leaves
open."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanlin.core.recipe import Section


class ExactReward(Section):
    """1 where the answer is the text in `column` of the prompt's row."""

    kind: Literal["exact"] = "exact"
    column: str = "answer"
    weight: float = 1.0


class NumberReward(Section):
    """1 where the answer's last number equals the one in `column`."""

    kind: Literal["number"] = "number"
    column: str = "answer"
    weight: float = 1.0


class PatternReward(Section):
    """1 where the whole answer matches the regular expression."""

    kind: Literal["pattern"] = "pattern"
    pattern: Annotated[str, Field(min_length=1)]
    weight: float = 1.0


class OverlongReward(Section):
    """0 for short answers, falling to -1 over the last `margin` tokens before max_tokens (DAPO)."""

    kind: Literal["overlong"] = "overlong"
    margin: Annotated[int, Field(ge=0)] = 32
    weight: float = 1.0


class FunctionReward(Section):
    """A function of yours, module:function: samples in, a number (or None) for each out."""

    kind: Literal["function"] = "function"
    function: str
    weight: float = 1.0


class ModelReward(Section):
    """The score of a reward model (objective `reward`)."""

    kind: Literal["model"] = "model"
    path: Annotated[Path, Field(description="model folder")]
    weight: float = 1.0


class ProcessReward(Section):
    """The chance that each step of an answer is right, by a process reward model (objective `reward`, form process)."""

    kind: Literal["process"] = "process"
    path: Annotated[Path, Field(description="model folder")]
    separator: Annotated[str, Field(min_length=1, description="what ends a step, as that model learnt it")] = "\n"
    weight: float = 1.0


RewardChoice = Annotated[
    ExactReward | NumberReward | PatternReward | OverlongReward | FunctionReward | ModelReward | ProcessReward,
    Field(discriminator="kind"),
]


class AdaptiveKl(Section):
    """beta follows the measured divergence: beta *= 1 + clip(kl / target - 1, ±0.2) * answers / horizon
    (arXiv:1909.08593)."""

    target: Annotated[float, Field(gt=0, description="nats an answer")] = 6.0
    horizon: Annotated[int, Field(gt=0, description="answers")] = 10_000


class Correction(Section):
    """Weights for answers that were drawn from a somewhat different distribution: older weights, other precision,
    filters. tis: min(ratio, cap); mask: 0 outside [low, cap]."""

    mode: Literal["tis", "mask"] = "tis"
    cap: Annotated[float, Field(gt=0)] = 2.0
    low: Annotated[float, Field(ge=0)] = 0.0
    level: Literal["token", "sequence", "geometric"] = "token"


class LocalRollouts(Section):
    """Answers come from an engine in the training process."""

    kind: Literal["local"] = "local"


class RayRollouts(Section):
    """Answers come from processes of their own (extra `ray`), and may be written ahead."""

    kind: Literal["ray"] = "ray"
    actors: Annotated[int, Field(gt=0, description="processes, each with a copy of the weights")] = 2
    lag: Annotated[int, Field(ge=0, description="rounds written ahead, with weights as many rounds old")] = 0


RolloutChoice = Annotated[LocalRollouts | RayRollouts, Field(discriminator="kind")]


class OnPolicyObjective(Section):
    """The model answers prompts, rewards score the answers, and what was better than expected becomes likelier.

    `train.batch_size` counts answers: the whole round, unless a smaller one makes several steps of a round;
    `train.micro_batch_size` counts packed rows.
    """

    kind: Literal[
        "reinforce", "ppo", "rloo", "remax", "grpo", "grpo_process", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp",
        "reinforce_pp_baseline", "on_policy",
    ] = "grpo"  # fmt: skip
    algorithm: Annotated[
        str | None, Field(description="kind `on_policy`: a row of align.algorithms.ALGORITHMS by name")
    ] = None
    prompts: Annotated[list[Path], Field(min_length=1, description="rows with `prompt` or `messages`, and an `answer`")]
    held_out: Annotated[list[Path], Field(default_factory=list, description="such rows, never trained")]
    held_out_rows: Annotated[int, Field(gt=0, description="prompts of an evaluation")] = 200
    held_out_text: Annotated[
        list[Path], Field(default_factory=list, description="token shards whose loss shows what is forgotten")
    ]
    plain: Annotated[bool, Field(description="a `prompt` goes in as it is, not through the chat template")] = False
    rewards: Annotated[list[RewardChoice], Field(min_length=1, description="added up by weight; the first evaluates")]
    prompts_a_round: Annotated[int, Field(gt=0)] = 16
    answers: Annotated[int, Field(gt=0, description="to each prompt (G)")] = 8
    max_tokens: Annotated[int, Field(gt=0, description="of an answer")] = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seq_len: Annotated[int | None, Field(gt=1, description="tokens of a packed row; None: what fits")] = None
    epochs: Annotated[int | None, Field(gt=0, description="passes over a round; None: the algorithm's")] = None
    beta: Annotated[float | None, Field(ge=0, description="weight of the divergence from the reference")] = None
    kl_in_loss: Literal["k1", "k2", "k3", "k3+"] | None = None
    clip: Annotated[tuple[float, float] | None, Field(description="ratio's room below and above 1")] = None
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1, description="GAE")] = 0.95
    adaptive_kl: AdaptiveKl | None = None
    correction: Correction | None = None
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0
    value_weight: Annotated[float, Field(gt=0, description="of the critic's loss")] = 0.5
    value_clip: Annotated[float | None, Field(gt=0)] = 0.2
    critic: Annotated[Path | None, Field(description="reward model that the critic begins as; None: the policy")] = None
    critic_rate: Annotated[float, Field(gt=0, description="times the policy's learning rate")] = 10.0
    critic_warmup: Annotated[
        int, Field(ge=0, description="first rounds in which only the critic learns (weight decay acts all the same)")
    ] = 0
    reward_clip: Annotated[float | None, Field(gt=0, description="scores beyond ± this are cut")] = None
    drop_truncated: Annotated[bool, Field(description="answers cut at max_tokens are not trained")] = False
    refills: Annotated[int, Field(ge=0, description="dapo: further draws for groups that say nothing")] = 3
    environment: Annotated[str | None, Field(description="module:function, speaks between turns")] = None
    turns: Annotated[int, Field(gt=0, description="answers of one sample, with an environment")] = 1
    weights: Annotated[
        Literal["shared", "packed"], Field(description="what the engine reads: the trained weights, or a packed copy")
    ] = "shared"
    rollout: Annotated[RolloutChoice, Field(default_factory=LocalRollouts, description="who writes the answers")]
    shown: Annotated[int, Field(ge=0, description="samples of each round in samples.jsonl")] = 4

    @property
    def name(self) -> str:
        """Of the algorithm."""
        return self.algorithm or self.kind

    @property
    def lag(self) -> int:
        """Rounds that are begun before this one is learnt."""
        return self.rollout.lag if isinstance(self.rollout, RayRollouts) else 0

    @model_validator(mode="after")
    def _acts(self) -> "OnPolicyObjective":
        if (self.kind == "on_policy") != (self.algorithm is not None):
            raise ValueError("`algorithm` goes together with kind on_policy, and only with that")
        if (self.environment is not None) != (self.turns > 1):
            raise ValueError("`environment` and `turns` (more than 1) belong together")
        from hanlin.align.algorithms import ALGORITHMS

        row = ALGORITHMS.get(self.name)
        if row is None:
            raise ValueError(f"there is no algorithm {self.name!r}; known are {', '.join(ALGORITHMS)}")
        defaults = type(self).model_fields
        given = {name for name, field in defaults.items() if getattr(self, name) != field.get_default()}
        beta = row.beta if self.beta is None else self.beta
        if self.name == "grpo_process" and len(self.rewards) > 1:
            raise ValueError("grpo_process learns from the rewards of steps alone: give that one reward")
        if row.groups and self.answers < 2:
            raise ValueError(f"{self.name} compares answers to one prompt: `answers` must be at least 2, found 1")
        for field, acts in (
            ("value_weight", row.critic), ("value_clip", row.critic), ("critic", row.critic),
            ("critic_warmup", row.critic), ("critic_rate", row.critic), ("lam", row.critic), ("refills", row.refill),
            ("clip", row.form != "none"), ("adaptive_kl", row.kl_in_reward is not None and beta > 0),
            ("kl_in_loss", row.kl_in_reward is None and beta > 0), ("gamma", row.discounts),
            ("reward_clip", self.name != "grpo_process"),
        ):  # fmt: skip
            if field in given and not acts:
                raise ValueError(f"`{field}` has no effect with {self.name}; leave it out")
        if self.lag and row.refill:
            raise ValueError(
                f"`rollout.lag` is {self.lag}, but {self.name} draws more prompts when it has seen the answers, so no "
                "round can begin before the one in front of it has ended: take lag 0, or another kind"
            )
        return self
