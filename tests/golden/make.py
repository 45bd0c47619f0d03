"""What the field's libraries compute, on inputs written beside it: makes `golden.json`.

Run by hand when a reference moves, in an environment of its own (the pins are `PINS`; no GPU, no trainer is started):

    python -m venv side && side/bin/pip install torch==2.13.0
    side/bin/pip install --no-deps trl==1.16.0 verl==0.9.1 openrlhf==0.11.2 torchtune==0.6.1 tensordict==0.10.0
    side/bin/pip install transformers accelerate datasets omegaconf hydra-core codetiming cloudpickle pyvers orjson
    side/bin/pip install --no-deps --target side/trl112 trl==1.12.0
    side/bin/python tests/golden/make.py side/trl112

trl 1.12.0 still has a PPO; its loss and its advantages stand in the middle of `train` and are run from there.
"""

import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import references
import torch
from torch import Tensor

PINS = {
    "trl": "1.16.0",
    "verl": "0.9.1",
    "openrlhf": "0.11.2",
    "torchtune": "0.6.1",
    "transformers": "5.23.0",
    "torch": "2.13.0",
}
LOW, HIGH = 0.2, 0.28
Case = dict[str, Any]


def make_inputs() -> dict[str, Tensor]:
    """Six answers, two groups of three; ragged, with observations in the middle and padding on both sides."""
    torch.manual_seed(7)
    rows, width, pairs = 6, 8, 5

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    logp = -2 * torch.rand(rows, width, dtype=torch.float64) - 0.05
    old = logp - 0.3 * noise(rows, width)
    old[0, 1], old[3, 2], old[4, 0] = logp[0, 1] - 1.5, logp[3, 2] - 1.6, logp[4, 0] + 1.4  # far outside any clip
    old[1, 0] = logp[1, 0] - 0.215  # a ratio of 1.24, between the two upper clips
    lengths = torch.tensor([8, 3, 5, 7, 1, 6])
    mask = torch.arange(width) < lengths[:, None]
    holes = mask.clone()
    holes[0, 2:4], holes[3, 0], holes[5, 4] = False, False, False

    def said(most: float, least: float) -> Tensor:
        return -most * torch.rand(pairs, dtype=torch.float64) - least

    return {
        "logp": logp, "old": old, "ref": logp + 0.5 * noise(rows, width), "rollout": old + 0.4 * noise(rows, width),
        "mask": mask, "holes": holes, "group": torch.tensor([0, 0, 0, 1, 1, 1]),
        "scores": torch.tensor([-0.4, 1.1, 0.2, -0.5, 2.0, 0.7], dtype=torch.float64),
        "rewards": 0.3 * noise(rows, width), "values": noise(rows, width), "old_values": noise(rows, width),
        "returns": noise(rows, width), "greedy": 0.5 * noise(rows),
        "chosen": said(9, 2), "rejected": said(9, 2), "ref_chosen": said(9, 2), "ref_rejected": said(9, 2),
        "chosen_tokens": torch.tensor([4, 7, 2, 5, 3]), "rejected_tokens": torch.tensor([6, 2, 3, 5, 7]),
        "chosen_mean": said(0.9, 0.05), "rejected_mean": said(0.9, 0.05),
        "margin": torch.rand(pairs, dtype=torch.float64), "kl_change": noise(pairs) + 0.6,
        "good": torch.tensor([True, False, True, True, False]), "step_logits": noise(7, 2),
        "step_labels": torch.tensor([1, 0, 1, 1, 0, 1, 0]),
    }  # fmt: skip


def graded(run: Callable[[Tensor], Tensor], x: Tensor) -> Case:
    """A loss and its gradient."""
    x = x.clone().requires_grad_()
    value = run(x)
    value.backward()
    return {"value": float(value), "gradient": x.grad.tolist()}


def plain(x: Tensor) -> Case:
    return {"value": x.tolist()}


def verl_cases(given: dict[str, Tensor]) -> dict[str, Case]:
    import verl.trainer.ppo.core_algos as core
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
    from verl.workers.config import ActorConfig

    mask, advantage = given["holes"].double(), given["scores"][:, None].expand_as(given["logp"])
    groups = given["group"].numpy()

    def config(dual: float = 1e6, low: float = LOW, high: float = HIGH) -> ActorConfig:
        return ActorConfig(
            strategy="fsdp", clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual,
            rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        )  # fmt: skip

    def policy(loss: Callable[..., Any], how: str, settings: ActorConfig, **more: Any) -> Case:
        return graded(
            lambda x: loss(given["old"], x, advantage, mask, loss_agg_mode=how, config=settings, **more)[0],
            given["logp"],
        )

    def norm(x: Tensor) -> Tensor:  # verl's Dr. GRPO divides by a constant that its config carries
        return core.agg_loss(x, mask, "seq-mean-token-sum-norm", loss_scale_factor=16)

    token, answer = "token-mean", "seq-mean-token-mean"
    outcome = given["scores"][:, None] * torch.nn.functional.one_hot(torch.tensor(7), 8)
    ones = torch.ones_like(mask)
    found = {
        "policy/token": policy(core.compute_policy_loss_vanilla, token, config()),
        "policy/sequence": policy(core.compute_policy_loss_vanilla, answer, config()),
        "policy/dual": policy(core.compute_policy_loss_vanilla, token, config(dual=3.0)),
        "policy/gspo": policy(core.compute_policy_loss_gspo, answer, config()),
        "policy/gspo_token": policy(core.compute_policy_loss_gspo, token, config()),
        "policy/cispo": policy(core.compute_policy_loss_cispo, token, config()),
        "policy/dppo": policy(core.compute_policy_loss_dppo_tv, token, config(dual=3.0, low=0.05, high=0.1)),
        "policy/weighted": policy(
            core.compute_policy_loss_vanilla, token, config(), rollout_is_weights=given["rollout"].exp()
        ),
        "aggregate/constant": plain(norm(given["rewards"])),
        "value/clip": graded(
            lambda x: core.compute_value_loss(x, given["returns"], given["old_values"], mask, 0.2, token)[0],
            given["values"],
        ),
        "gae/holes": plain(core.compute_gae_advantage_return(given["rewards"], given["values"], mask, 0.97, 0.9)[1]),
        "gae/whitened": plain(core.compute_gae_advantage_return(given["rewards"], given["values"], mask, 0.97, 0.9)[0]),
        "gae/full": plain(core.compute_gae_advantage_return(given["rewards"], given["values"], ones, 0.97, 0.9)[1]),
        "group/std": plain(core.compute_grpo_outcome_advantage(outcome.clone(), ones, groups)[0][:, 0]),
        "group/none": plain(
            core.compute_grpo_outcome_advantage(outcome.clone(), ones, groups, norm_adv_by_std_in_grpo=False)[0][:, 0]
        ),
        "group/leave_one_out": plain(core.compute_rloo_outcome_advantage(outcome.clone(), ones, groups)[0][:, 0]),
        "reinforce_pp": plain(
            core.compute_reinforce_plus_plus_outcome_advantage(given["rewards"], mask, SimpleNamespace(gamma=0.97))[0]
        ),
        "reinforce_pp/returns": plain(
            core.compute_reinforce_plus_plus_outcome_advantage(given["rewards"], mask, SimpleNamespace(gamma=0.97))[1]
        ),
        "reinforce_pp_baseline": plain(
            core.compute_reinforce_plus_plus_baseline_outcome_advantage(outcome.clone(), mask, groups)[0]
        ),
        "remax": plain(core.compute_remax_outcome_advantage(given["rewards"], given["greedy"], mask)[0]),
    }
    for kind in ("k1", "k2", "k3", "k3+"):
        found[f"kl/{kind}"] = graded(
            lambda x, k=kind: (core.kl_penalty(x, given["ref"], k) * mask).sum(), given["logp"]
        )
    for level, bound in (("token", 1.3), ("sequence", 1.5), ("token", "0.7_1.3"), ("sequence", "0.5_1.5")):
        weights, _ = compute_rollout_correction_weights(given["old"] - given["rollout"], mask, level, bound)
        found[f"rollout/{level}/{'mask' if isinstance(bound, str) else 'tis'}"] = plain(weights)
    return found


def openrlhf_cases(given: dict[str, Tensor]) -> dict[str, Case]:
    from openrlhf.models.loss import DPOLoss, LogExpLoss, PairWiseLoss, PolicyLoss, ValueLoss
    from openrlhf.models.utils import compute_approx_kl, compute_reward
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker as Maker

    mask, advantage = given["holes"].double(), given["scores"][:, None].expand_as(given["logp"])
    right = given["mask"].double()  # its GAE knows no observations

    def policy(**settings: Any) -> Case:
        loss = PolicyLoss(LOW, HIGH, **settings)
        return graded(lambda x: loss(x, given["old"], advantage, mask, given["rollout"])[0], given["logp"])

    def advantages(estimator: str) -> Case:
        experience = SimpleNamespace(
            rewards=given["scores"].clone(), index=list(range(6)), kl=torch.zeros_like(right), action_mask=right,
            values=given["values"], info={},
        )  # fmt: skip
        args = SimpleNamespace(
            rollout=SimpleNamespace(n_samples_per_prompt=3), reward=SimpleNamespace(clip_range=None),
            algo=SimpleNamespace(
                advantage=SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.9, no_std_norm=False)
            ),
        )  # fmt: skip
        maker = SimpleNamespace(
            strategy=SimpleNamespace(args=args), kl_ctl=SimpleNamespace(value=0.0), advantage_estimator=estimator,
            get_advantages_and_returns=lambda *a: Maker.get_advantages_and_returns(maker, *a),
            get_cumulative_returns=lambda *a: Maker.get_cumulative_returns(maker, *a),
        )  # fmt: skip
        with patch.dict(Maker.compute_advantages_and_returns.__wrapped__.__globals__, apply_length_penalties=_nothing):
            return plain(Maker.compute_advantages_and_returns(maker, [experience])[0].advantages)

    found = {
        "policy/token": policy(),
        "policy/sequence": policy(token_level_loss=False),
        "policy/dual": policy(dual_clip=3.0),
        "policy/gspo": policy(policy_loss_type="gspo"),
        "policy/tis": policy(
            is_correction_level="token", is_correction_mode="clip", is_correction_threshold=[0.5, 1.3]
        ),
        "policy/mask": policy(is_correction_level="token", is_correction_threshold=[0.7, 1.3]),
        "policy/geometric": policy(is_correction_level="seq", is_correction_threshold=[0.8, 1.2]),
        "value/clip": graded(lambda x: ValueLoss(0.2)(x, given["old_values"], given["returns"], mask), given["values"]),
        "value/none": graded(lambda x: ValueLoss()(x, given["old_values"], given["returns"], mask), given["values"]),
        "gae/right": plain(
            Maker.get_advantages_and_returns(None, given["values"], given["rewards"], right, 0.97, 0.9)[0] * right
        ),
        "to_go/right": plain(Maker.get_cumulative_returns(None, given["rewards"], right, 0.97)),
        "terminal": plain(compute_reward(given["scores"], 0.1, given["rewards"] * right, right)),
        **{f"advantages/{name}": advantages(name) for name in ("group_norm", "rloo", "dr_grpo", "reinforce_baseline")},
        **{f"advantages/{name}": advantages(name) for name in ("reinforce", "gae")},
        "reward/pairwise": graded(lambda x: PairWiseLoss()(x, given["rejected"], given["margin"]), given["chosen"]),
        "reward/logexp": graded(lambda x: LogExpLoss()(x, given["rejected"]), given["chosen"]),
    }
    for kind in ("k1", "k2", "k3"):
        found[f"kl/{kind}"] = plain((compute_approx_kl(given["logp"], given["ref"], kl_estimator=kind) * mask).sum())
    for name, settings in (("dpo", {}), ("cdpo", {"label_smoothing": 0.2}), ("ipo_sum", {"ipo": True})):
        loss = DPOLoss(0.3, **settings)
        found[f"preference/{name}"] = graded(
            lambda x, f=loss: f(x, given["rejected"], given["ref_chosen"], given["ref_rejected"])[0], given["chosen"]
        )
    return found


def _nothing(*_: Any) -> None:
    pass


def torchtune_cases(given: dict[str, Tensor]) -> dict[str, Case]:
    from torchtune import rlhf
    from torchtune.rlhf.loss import DPOLoss, PPOLoss, RSOLoss

    mask, advantage = given["holes"], given["scores"][:, None].expand_as(given["logp"])
    sides = (given["rejected"], given["ref_chosen"], given["ref_rejected"])
    kl, ends = given["rewards"] * given["mask"], given["mask"].sum(1) - 1

    def ppo(part: str) -> Case:
        loss = PPOLoss(epsilon=LOW, value_clip_range=0.2, value_coeff=1.0)
        before = (given["old_values"], given["returns"])
        run = {
            "policy": lambda x: loss(given["old"], x, advantage, before[0], before[0], before[1], mask, mask)[0],
            "value": lambda x: loss(given["old"], given["old"], advantage, before[0], x, before[1], mask, mask)[0],
        }[part]
        found = graded(run, given["logp" if part == "policy" else "values"])
        return {"gradient": found["gradient"]}  # its value is the sum of both losses

    return {
        "gae/full": plain(rlhf.estimate_advantages(given["values"], given["rewards"], 0.97, 0.9)[1]),
        "terminal": plain(rlhf.get_rewards_ppo(given["scores"], kl, torch.zeros_like(kl), 0.1, ends)[0]),
        "policy/symmetric": ppo("policy"),
        "value/clip": ppo("value"),
        "preference/dpo": graded(lambda x: DPOLoss(0.3)(x, *sides)[0].mean(), given["chosen"]),
        "preference/cdpo": graded(lambda x: DPOLoss(0.3, 0.2)(x, *sides)[0].mean(), given["chosen"]),
        "preference/hinge": graded(lambda x: RSOLoss(0.3)(x, *sides)[0].mean(), given["chosen"]),
    }


def trl_cases(given: dict[str, Tensor]) -> dict[str, Case]:
    mask = given["holes"].double()
    return {**_trl_policy(given, mask), **_trl_preferences(given), **_trl_advantages(given)}


def _trl_policy(given: dict[str, Tensor], mask: Tensor) -> dict[str, Case]:
    from trl import GRPOTrainer, RLOOTrainer

    ids = torch.zeros_like(given["logp"], dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": given["scores"], "old_per_token_logps": given["old"], "ref_per_token_logps": given["ref"],
        "num_items_in_batch": mask.sum(), "old_logps": (given["old"] * mask).sum(1),
    }  # fmt: skip

    def run(trainer: Any, loss_type: str = "", level: str = "token", high: float = HIGH, **more: Any) -> Case:
        args = SimpleNamespace(delta=more.get("delta"), use_bias_correction_kl=False, steps_per_generation=1)
        this = references.stand_in(
            loss_type=loss_type, importance_sampling_level=level, beta=more.get("beta", 0.0), epsilon_low=LOW,
            epsilon_high=high, args=args, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            max_completion_length=16, _entropy_bonus_enabled=False,
        )  # fmt: skip

        def loss(x: Tensor) -> Tensor:
            this._get_per_token_logps_and_entropies = lambda *a, **k: (x, torch.zeros_like(x), None)
            return trainer._compute_loss(this, None, dict(inputs))

        return graded(loss, given["logp"])

    return {
        "policy/sequence": run(GRPOTrainer, "grpo"),
        "policy/token": run(GRPOTrainer, "dapo"),
        "policy/constant": run(GRPOTrainer, "dr_grpo"),
        "policy/gspo": run(GRPOTrainer, "grpo", "sequence"),
        "policy/dual": run(GRPOTrainer, "dapo", delta=3.0),
        "policy/cispo_open": run(GRPOTrainer, "cispo", high=1.4),
        "policy/sequence_k3": run(GRPOTrainer, "grpo", beta=0.04),
        "policy/rloo": run(RLOOTrainer),
    }


def _trl_preferences(given: dict[str, Tensor]) -> dict[str, Case]:
    from trl import DPOTrainer, KTOTrainer, RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    tokens = torch.cat([given["chosen_tokens"], given["rejected_tokens"]])
    mask = (torch.arange(9) > 0) & (torch.arange(9) <= tokens[:, None])  # the first place is a prompt's
    spread = mask[:, 1:] / tokens[:, None].double()  # of an answer's log-probability over its tokens
    batch = {"input_ids": torch.zeros_like(mask, dtype=torch.int64), "attention_mask": torch.ones_like(mask)}

    def dpo(kind: str, smoothing: float = 0.0) -> Case:
        this = references.stand_in(
            ld_alpha=None, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0], beta=0.3,
            label_smoothing=smoothing, use_weighting=False,
        )  # fmt: skip
        inputs = batch | {"completion_mask": mask.long()}
        inputs |= {"ref_chosen_logps": given["ref_chosen"], "ref_rejected_logps": given["ref_rejected"]}

        def loss(x: Tensor) -> Tensor:
            said = torch.cat([x, given["rejected"]])[:, None] * spread
            return DPOTrainer._compute_loss(this, references.speaking(said), inputs, False)

        return graded(loss, given["chosen"])

    def kto(good_weight: float, bad_weight: float) -> Case:
        this = references.stand_in(
            calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=good_weight, undesirable_weight=bad_weight,
        )  # fmt: skip
        this._compute_kl_logps = lambda model, inputs: given["kl_change"]
        half = mask[:5]
        inputs = {name: value[:5] for name, value in batch.items()} | {
            "completion_mask": half.long(), "label": given["good"], "ref_logps": given["ref_chosen"],
            "ref_KL_logps": torch.zeros_like(given["kl_change"]),
        }  # fmt: skip
        return graded(
            lambda x: KTOTrainer._compute_loss(this, references.speaking(x[:, None] * spread[:5]), inputs, False),
            given["chosen"],
        )

    def reward(centre: float | None, with_margin: bool) -> Case:
        this = references.stand_in(args=SimpleNamespace(center_rewards_coefficient=centre))
        inputs = dict(batch) | ({"margin": given["margin"]} if with_margin else {})

        def loss(x: Tensor) -> Tensor:
            said = SimpleNamespace(logits=torch.cat([x, given["rejected"]])[:, None])
            return RewardTrainer.compute_loss(this, lambda **_: said, inputs)

        return graded(loss, given["chosen"])

    simpo = references.stand_in(beta=2.0, simpo_gamma=1.0, label_smoothing=0.0, loss_type="simpo", alpha=0.0)
    orpo = references.stand_in(beta=0.3)
    return {
        "preference/dpo": dpo("sigmoid"), "preference/hinge": dpo("hinge"), "preference/ipo_mean": dpo("ipo"),
        "preference/robust": dpo("robust", 0.2),
        "preference/kto": kto(1.0, 1.0), "preference/kto_weighted": kto(1.3, 0.7),
        "preference/simpo": graded(
            lambda x: CPOTrainer.cpo_loss(simpo, x, given["rejected_mean"])[0].mean(), given["chosen_mean"]
        ),
        "preference/orpo": graded(
            lambda x: -ORPOTrainer.odds_ratio_loss(orpo, x, given["rejected_mean"])[0].mean(), given["chosen_mean"]
        ),
        "reward/pairwise": reward(None, True), "reward/centred": reward(0.01, False),
    }  # fmt: skip


def _trl_advantages(given: dict[str, Tensor]) -> dict[str, Case]:
    from trl.trainer.utils import nanstd

    folder = references.folder_of("trl") / "trainer"
    common = {"rewards": given["scores"], "num_generations": 3, "nanstd": nanstd}
    grpo = references.run_lines(
        folder / "grpo_trainer.py", "mean_grouped_rewards = torch.nanmean(rewards.view", "advantages = advantages /",
        self=SimpleNamespace(scale_rewards="group"), **common,
    )  # fmt: skip
    rloo = references.run_lines(
        folder / "rloo_trainer.py", "grouped_rewards = rewards.view", "advantages = rewards - baselines", **common
    )
    return {"group/std_1e-4": plain(grpo["advantages"]), "group/leave_one_out": plain(rloo["advantages"])}


def old_trl_cases(given: dict[str, Tensor], folder: Path) -> dict[str, Case]:
    """PPO of trl 1.12.0, from the middle of its `train`."""
    file, mask = folder / "trl/experimental/ppo/ppo_trainer.py", given["mask"]
    tools = references.run_lines(file, "def masked_mean", "return whitened", Tensor=Tensor)
    args = SimpleNamespace(gamma=0.97, lam=0.9, cliprange=LOW, cliprange_value=0.2, vf_coef=0.0)

    def losses(x: Tensor, v: Tensor) -> dict[str, Any]:
        return references.run_lines(
            file, "vpredclipped = torch.clamp(", "loss = pg_loss", masked_mean=tools["masked_mean"], args=args,
            vpred=v, mb_values=given["old_values"], mb_return=given["returns"], padding_mask=~mask,
            padding_mask_p1=~mask, micro_batch_inds=slice(None), new_logprobs=x, mb_logprobs=given["old"],
            mb_advantage=given["scores"][:, None].expand_as(x),
        )  # fmt: skip

    advantages = references.run_lines(
        file, "lastgaelam = 0", "advantages = torch.masked_fill", args=args, masked_whiten=tools["masked_whiten"],
        responses=given["rewards"], rewards=given["rewards"] * mask, values=given["values"] * mask, padding_mask=~mask,
    )  # fmt: skip
    return {
        "ppo/policy": graded(lambda x: losses(x, given["values"])["pg_loss"], given["logp"]),
        "ppo/value": graded(lambda v: losses(given["logp"], v)["vf_loss"], given["values"]),
        "ppo/returns": plain(advantages["returns"] * mask),
        "ppo/advantages": plain(advantages["advantages"]),
        "whiten/keep_mean": plain(tools["masked_whiten"](given["rewards"], mask, shift_mean=False) * mask),
    }


def transformers_cases(given: dict[str, Tensor]) -> dict[str, Case]:
    """What the process reward trainer of trl 1.12.0 minimises: the loss of a model for token classification."""
    from transformers.loss.loss_utils import ForTokenClassification

    config = SimpleNamespace(num_labels=2)
    return {
        "reward/process": graded(
            lambda x: ForTokenClassification(x, given["step_labels"], config), given["step_logits"]
        )
    }


def main() -> None:
    torch.set_num_threads(1)
    references.prepare()
    for library, pin in PINS.items():
        assert version(library).split("+")[0] == pin, f"{library} is {version(library)}, the pin is {pin}"
    given = make_inputs()
    found = {
        "verl": verl_cases(given), "openrlhf": openrlhf_cases(given), "torchtune": torchtune_cases(given),
        "trl": trl_cases(given), "transformers": transformers_cases(given),
    }  # fmt: skip
    versions = {**PINS, "python": platform.python_version(), "numpy": np.__version__}
    if len(sys.argv) > 1:
        found["trl-1.12"] = old_trl_cases(given, Path(sys.argv[1]))
        versions["trl-1.12"] = "1.12.0"
    inputs = {name: value.tolist() for name, value in given.items()}
    data = {"versions": versions, "clip": [LOW, HIGH], "inputs": inputs, "found": found}
    file = Path(__file__).with_name("golden.json")
    file.write_text(json.dumps(data, indent=None, separators=(",", ":")) + "\n")
    print(f"{sum(map(len, found.values()))} cases of {', '.join(found)} in {file}")


if __name__ == "__main__":
    main()
