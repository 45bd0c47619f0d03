"""On-policy methods through the one `Trainer`: every algorithm, gradients, what a rollout says, resuming, bad input."""

import dataclasses
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.align.on_policy_cases import halves, model_folder, prompt_file, rl_recipe

from hanlin.align.adapter_choice import LoraChoice
from hanlin.align.algorithms import ALGORITHMS, Algorithm, Scored, of_answer
from hanlin.align.build import save_model_folder, train
from hanlin.align.method import Parts
from hanlin.align.methods import open_data
from hanlin.align.on_policy import OnPolicy, Weights
from hanlin.align.on_policy_recipe import FunctionReward, ProcessReward
from hanlin.align.on_policy_run import wire_on_policy
from hanlin.align.reference import trained_logprobs
from hanlin.align.reward import add_reward_head
from hanlin.align.rollout import LocalRollout, Turns
from hanlin.align.samples import Prompt
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.engine import SamplingParams
from hanlin.models import load_model
from hanlin.train.objective import step_loss
from hanlin.train.reader import open_checkpoint
from hanlin.tune.lora import add_lora
from hanlin.tune.peft_files import load_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return model_folder(tmp_path_factory.mktemp("policy") / "model", tokenizer)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return prompt_file(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


def wired(recipe, tokenizer):
    """(model, wiring) of a recipe, as `train` makes them."""
    from hanlin.align.build import build_model, resolve_settings

    data = open_data(recipe, tokenizer)
    settings, _ = resolve_settings(recipe, data)
    model = build_model(recipe, tokenizer, data.seq_len)
    return model, wire_on_policy(Parts(recipe, tokenizer, data, settings, model, None))


def gradient(model, objective, parts):
    """Of a step cut into parts, as the trainer computes it."""
    model.zero_grad()
    totals: dict[str, float] = {}
    for part in parts:
        for name, count in objective.count(part).items():
            totals[name] = totals.get(name, 0.0) + count
    for part in parts:
        step_loss(objective.loss(model, part)[0], totals).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [name for name in ALGORITHMS if name != "grpo_process"])
def test_every_algorithm_makes_its_steps(folder, prompts, tmp_path, kind):
    recipe = rl_recipe(folder, prompts, tmp_path, kind=kind, held_out=[prompts], train={"steps": 3, "eval_every": 3})
    assert train(recipe, quiet=True).finished
    rows = read_metrics(recipe.out / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps[:2])
    assert {"reward", "entropy", "groups/silent", "answer/truncated", "seconds/rollout"} <= steps[0].keys()
    assert {"eval/sampled", "eval/greedy"} <= rows[-1].keys()
    assert (recipe.out / "model" / "model.safetensors").exists()
    assert len((recipe.out / "samples.jsonl").read_text().splitlines()) == 3 * 4


def test_rewards_of_steps_give_every_token_what_follows_it(folder, prompts, tmp_path, tokenizer):
    """Process-supervised GRPO: tokens of the first half get both halves' normalised rewards, of the second its own."""
    reward = FunctionReward(function="tests.align.on_policy_cases:halves")
    recipe = rl_recipe(folder, prompts, tmp_path, kind="grpo_process", rewards=[reward])
    model, wiring = wired(recipe, tokenizer)
    wiring.source.batch(0)
    made = wiring.source._round
    rewards = [halves([sample])[0] for sample in made.samples]
    for group in {sample.group for sample in made.samples}:
        own = [i for i, sample in enumerate(made.samples) if sample.group == group]
        every = torch.tensor([value for i in own for value in rewards[i]], dtype=torch.float64)
        for i in own:
            even = [(value - float(every.mean())) / (float(every.std()) + 1e-6) for value in rewards[i]]
            ends = [max(0, round(made.samples[i].length / 2) - 1), made.samples[i].length - 1]
            expected = [sum(e for e, end in zip(even, ends, strict=True) if end >= t) for t in range(ends[1] + 1)]
            assert made.tokens["advantage"][i] == pytest.approx(expected, abs=1e-6)
    assert gradient(model, wiring.objective, [wiring.source.batch(0)])
    wiring.close()


def test_a_process_reward_model_says_where_steps_end(folder, prompts, tmp_path, tokenizer):
    model = load_model(folder, dtype=torch.float32, device="cpu")
    add_reward_head(model, steps=True)
    save_model_folder(model, tokenizer, tmp_path / "judge")
    reward = ProcessReward(path=tmp_path / "judge", separator="t")
    recipe = rl_recipe(folder, prompts, tmp_path, kind="grpo_process", rewards=[reward], max_tokens=20, seq_len=64)
    _, wiring = wired(recipe, tokenizer)
    wiring.source.batch(0)
    made = wiring.source._round
    scored = wiring.source.rewards(made.samples)
    assert scored.steps and [len(steps) for steps in scored.steps] == [len(ends) for ends in scored.ends]
    assert any(len(steps) > 1 for steps in scored.steps)
    for place, ends in enumerate(scored.ends):  # an advantage changes behind the end of a step, nowhere else
        values = made.tokens["advantage"][place]
        changes = [t for t, (a, b) in enumerate(pairwise(values)) if abs(a - b) > 1e-9]
        assert set(changes) <= set(ends)
    wiring.close()


def test_rewards_rise(folder, prompts, tmp_path):
    recipe = rl_recipe(folder, prompts, tmp_path, train={"steps": 25}, answers=8)
    train(recipe, quiet=True)
    rewards = [row["reward"] for row in read_metrics(recipe.out / "metrics.jsonl") if "reward" in row]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


def test_a_rollouts_log_probabilities_are_the_trainers(folder, prompts, tmp_path, tokenizer):
    """Within 1e-5 in fp32, at temperatures, and under filters by the mass that they kept."""
    recipe = rl_recipe(folder, prompts, tmp_path, kind="dr_grpo", temperature=0.7)
    model, wiring = wired(recipe, tokenizer)
    batch = wiring.source.batch(0)
    with torch.no_grad():
        ours = trained_logprobs(model, batch, temperature=0.7)
    assert (ours - batch.of_trained("drawn")).abs().max() < 1e-5
    wiring.close()


@pytest.mark.parametrize("filters", [{"top_p": 0.6}, {"top_k": 7}])
def test_under_filters_a_log_probability_is_that_of_the_cut_distribution(folder, prompts, tokenizer, filters):
    model = load_model(folder, dtype=torch.float32, device="cpu")
    rollout = LocalRollout(model, tokenizer, max_batch=8)
    rollout.refresh(0)
    asked = [Prompt(tuple(tokenizer.encode("one two three")), "one two three", {}, 0)]
    [sample] = rollout.write(asked, SamplingParams(max_tokens=6, temperature=0.9, **filters), copies=1, seed=1)
    ids = torch.tensor([[*asked[0].ids, *sample.ids]])
    with torch.no_grad():
        log_p = (model(ids).logits[0, len(asked[0].ids) - 1 : -1] / 0.9).log_softmax(-1)
    for t, token in enumerate(sample.ids):
        p, order = log_p[t].exp().sort(descending=True)
        kept = order[: filters["top_k"]] if "top_k" in filters else order[: int((p.cumsum(0) - p < 0.6).sum())]
        assert token in kept.tolist()
        expected = log_p[t, token] - log_p[t, kept].logsumexp(0)
        assert abs(float(expected) - sample.logp[t]) < 1e-5
    rollout.close()


def test_on_policy_the_gradient_is_reinforces(folder, prompts, tmp_path, tokenizer):
    """GRPO at its first pass: the ratio is 1 and only its slope acts."""
    model, wiring = wired(rl_recipe(folder, prompts, tmp_path, beta=0.0), tokenizer)
    batch, model = wiring.source.batch(0), model.double()
    grpo = ALGORITHMS["grpo"]
    found = gradient(model, OnPolicy(grpo, Weights()), [batch])
    plain = gradient(model, OnPolicy(replace(grpo, form="none"), Weights()), [batch])
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    assert max(float(value.abs().max()) for value in plain.values()) > 1e-4
    wiring.close()


@pytest.mark.parametrize("kind", ["grpo", "dapo", "rloo", "gspo", "dr_grpo", "reinforce_pp_baseline", "ppo"])
def test_micro_batches_change_nothing(folder, prompts, tmp_path, tokenizer, kind):
    """1, 2 and 4 parts: fp64, 1e-12."""
    recipe = rl_recipe(folder, prompts, tmp_path, kind=kind, answers=4, prompts_a_round=4)
    model, wiring = wired(recipe, tokenizer)
    batch, model = wiring.source.batch(0), model.double()
    assert len(batch) >= 4
    whole = gradient(model, wiring.objective, [batch])
    for cuts in ([0, 2, len(batch)], [0, 1, 2, 3, len(batch)]):
        parts = [batch.rows(a, b) for a, b in pairwise(cuts)]
        for name, value in gradient(model, wiring.objective, parts).items():
            torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-12)
    wiring.close()


def longest(scored: Scored) -> torch.Tensor:
    """An idea of a test: longer answers than the others' mean are better."""
    return scored.mask.sum(1).double() - scored.mask.sum(1).double().mean()


def test_a_new_algorithm_is_a_row(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setitem(ALGORITHMS, "longest", Algorithm(of_answer(longest), whiten=True, groups=False))
    recipe = rl_recipe(folder, prompts, tmp_path, kind="on_policy", algorithm="longest", train={"steps": 12})
    train(recipe, quiet=True)
    lengths = [row["answer/length"] for row in read_metrics(recipe.out / "metrics.jsonl")]
    assert lengths[-1] >= lengths[0]


@pytest.mark.parametrize(
    ("kind", "more", "steps"),
    [
        ("grpo", {}, {}),
        ("ppo", {"epochs": 2}, {"batch_size": 3}),
        ("dapo", {}, {}),
        ("reinforce_pp", {"adaptive_kl": {"target": 0.01, "horizon": 50}}, {}),
    ],
)
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(folder, prompts, tmp_path, kind, more, steps):
    """Bit for bit, also where a checkpoint stands in the middle of a round (PPO: 4 steps a round)."""
    chosen = {"schedule": {"kind": "constant"}, "save_every": 1, "keep_last": 9} | steps
    whole = rl_recipe(folder, prompts, tmp_path, name="whole", kind=kind, train={**chosen, "steps": 7}, **more)
    train(whole, quiet=True)
    cut = rl_recipe(folder, prompts, tmp_path, name="cut", kind=kind, train={**chosen, "steps": 3}, **more)
    train(cut, quiet=True)
    cut = rl_recipe(folder, prompts, tmp_path, name="cut", kind=kind, train={**chosen, "steps": 7}, **more)
    train(cut, quiet=True)
    one, other = (open_checkpoint(Run(recipe.out).checkpoints()[-1][1]) for recipe in (whole, cut))
    assert one.state["source"] == other.state["source"]
    for name in one.names():
        assert torch.equal(one.whole(name), other.whole(name)), name


def test_a_critic_has_a_rate_of_its_own(folder, prompts, tmp_path):
    """One step of AdamW moves a weight by the rate: the critic's new head ten times as far as the policy."""
    recipe = rl_recipe(folder, prompts, tmp_path, kind="ppo", train={"steps": 1, "lr": 1e-4, "clip": None})
    train(recipe, quiet=True)
    saved, before = open_checkpoint(Run(recipe.out).checkpoints()[-1][1]), load_model(folder, device="cpu")
    name = "model.layers.0.mlp.down_proj.weight"
    moved = (saved.whole(f"weights/{name}") - before.get_parameter(name).detach()).abs().median()
    assert float(moved) == pytest.approx(1e-4, rel=0.1)
    assert float(saved.whole("weights/critic.head.value.weight").abs().median()) == pytest.approx(1e-3, rel=0.1)
    with pytest.raises(HanlinError, match="adamw"):
        train(
            rl_recipe(folder, prompts, tmp_path, name="muon", kind="ppo", train={"optimizer": {"kind": "muon"}}),
            quiet=True,
        )


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_an_adapter_is_the_policy_and_switched_off_the_reference(folder, prompts, tmp_path, tokenizer, kind):
    """Only the adapter (and a critic) moves; the divergence is from the model without it; both come out as folders."""
    recipe = rl_recipe(folder, prompts, tmp_path, kind=kind, train={"steps": 4})
    recipe = recipe.model_copy(update={"adapter": LoraChoice(rank=4, alpha=8.0)})
    train(recipe, quiet=True)
    rows = read_metrics(recipe.out / "metrics.jsonl")
    assert rows[0]["kl/k1"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl/k3"] > 1e-6
    saved, base = open_checkpoint(Run(recipe.out).checkpoints()[-1][1]), load_model(folder, device="cpu")
    for name, parameter in base.named_parameters():
        assert torch.equal(saved.whole(f"weights/{name}"), parameter.detach().float()), name
    merged = load_model(recipe.out / "model", dtype=torch.float32, device="cpu")
    again = load_model(folder, dtype=torch.float32, device="cpu")
    load_lora(again, recipe.out / "adapter")
    ids = torch.tensor([tokenizer.encode("one two three 二加二")])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, again(ids).logits, rtol=0, atol=1e-4)
        assert (merged(ids).logits - base.float()(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["rloo", "remax", "reinforce_pp", "ppo"])
def test_advantages_are_scores_less_what_the_reference_costs(folder, prompts, tmp_path, tokenizer, kind):
    """Against the definitions, from the numbers of a round whose policy is not its reference; top_p below 1, where the
    distribution that was drawn from is cut and the reference's is not."""
    recipe = rl_recipe(folder, prompts, tmp_path, kind=kind, beta=0.3, top_p=0.8, reward_clip=0.5)
    recipe = recipe.model_copy(update={"adapter": LoraChoice(rank=4)})
    model, wiring = wired(recipe, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    wiring.source.batch(0)
    made = wiring.source._round
    assert abs(made.notes["kl/answer"][0]) > 0.01
    scores = [min(score, 0.5) for score in made.numbers["score"]]
    kl = [
        [a - b for a, b in zip(old, ref, strict=True)]
        for old, ref in zip(made.tokens["old"], made.tokens["reference"], strict=True)
    ]
    answers, found = range(len(scores)), made.tokens["advantage"]
    if kind in ("rloo", "remax"):
        worth = [scores[i] - 0.3 * sum(kl[i]) for i in answers]
        for i in answers:
            others = [worth[j] for j in answers if j != i and made.samples[j].group == made.samples[i].group]
            greedy = min(made.samples[i].notes.get("greedy", 0.0), 0.5)
            expected = worth[i] - (sum(others) / len(others) if kind == "rloo" else greedy)
            assert found[i] == pytest.approx([expected] * len(found[i]), abs=1e-5)
        return
    rewards = [[-0.3 * d + (scores[i] if t == len(kl[i]) - 1 else 0.0) for t, d in enumerate(kl[i])] for i in answers]
    if kind == "reinforce_pp":
        plain = [[sum(own[t:]) for t in range(len(own))] for own in rewards]
    else:
        plain = []
        for own, values in zip(rewards, made.tokens["value"], strict=True):
            after = [*values[1:], 0.0]
            delta = [r + v1 - v0 for r, v1, v0 in zip(own, after, values, strict=True)]
            plain.append([sum(0.95 ** (k - t) * delta[k] for k in range(t, len(own))) for t in range(len(own))])
    flat = torch.tensor([value for own in plain for value in own], dtype=torch.float64)
    even = (flat - flat.mean()) / (flat.var() + 1e-8).sqrt()
    assert [value for own in found for value in own] == pytest.approx(even.tolist(), abs=1e-4)
    wiring.close()


def test_equal_scores_teach_nothing(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.align.on_policy_cases.digits", lambda samples: [1.0] * len(samples))
    recipe = rl_recipe(folder, prompts, tmp_path, kind="gspo", train={"steps": 1})
    train(recipe, quiet=True)
    [row] = read_metrics(recipe.out / "metrics.jsonl")
    assert row["groups/silent"] == 1.0 and row["grad_norm"] == 0.0 and row["reward"] > 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda samples: [float("nan")] * len(samples), "returned nan for the answer"),
        (lambda samples: [1.0], "returned 1 values"),
        (lambda samples: 1 / 0, "failed on 6 samples: ZeroDivisionError"),
        (lambda samples: ["good"] * len(samples), "no number"),
    ],
)
def test_a_bad_reward_is_named(folder, prompts, tmp_path, monkeypatch, reward, message):
    monkeypatch.setattr("tests.align.on_policy_cases.digits", reward)
    with pytest.raises(HanlinError, match=f"The reward 'function' .*{message}"):
        train(rl_recipe(folder, prompts, tmp_path), quiet=True)


def test_a_group_of_one_is_refused(folder, prompts, tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        rl_recipe(folder, prompts, tmp_path, answers=1)


def test_what_cannot_act_is_refused(folder, prompts, tmp_path):
    with pytest.raises(ValueError, match="`value_clip` has no effect with grpo"):
        rl_recipe(folder, prompts, tmp_path, value_clip=0.5)
    with pytest.raises(HanlinError, match="give a divisor"):
        train(rl_recipe(folder, prompts, tmp_path, train={"batch_size": 4}), quiet=True)
    for kind, more in (
        ("dapo", {"kl_in_loss": "k2"}), ("ppo", {"kl_in_loss": "k2"}), ("reinforce", {"adaptive_kl": {}}),
        ("grpo", {"gamma": 0.9}), ("grpo_process", {"reward_clip": 1.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="has no effect"):
            rl_recipe(folder, prompts, tmp_path, kind=kind, **more)
    with pytest.raises(HanlinError, match="a reward for each step"):
        train(rl_recipe(folder, prompts, tmp_path, kind="grpo_process"), quiet=True)


def test_a_prompt_without_room_for_an_answer_is_left_out_and_counted(folder, prompts, tmp_path, tokenizer):
    file = prompt_file(tmp_path / "prompts.jsonl", 3)
    with file.open("a") as stream:
        stream.write(json.dumps({"prompt": "two plus two " * 60, "answer": "4"}) + "\n")
    data = open_data(rl_recipe(folder, file, tmp_path, seq_len=None), tokenizer)
    assert len(data.more.prompts) == 3
    assert any("1 prompts are left out" in note and "row 4" in note for note in data.notes)
    with pytest.raises(HanlinError, match="no prompt"):
        open_data(rl_recipe(folder, prompts, tmp_path, max_tokens=127), tokenizer)


def test_observations_are_read_and_not_trained(folder, tokenizer):
    """Three turns: what the environment says has no log-probability, no loss, and stands in the text that is read."""
    model = load_model(folder, dtype=torch.float32, device="cpu")

    def environment(sample):
        return " = 12345;" if sample.length < 12 else None

    rollout = LocalRollout(model, tokenizer, turns=Turns(environment, 3), max_batch=8)
    rollout.refresh(0)
    asked = [Prompt(tuple(tokenizer.encode(text)), text, {}, i) for i, text in enumerate(("one", "二加二"))]
    stops = tuple(range(350))
    samples = rollout.write(asked, SamplingParams(max_tokens=4, stop_token_ids=stops), copies=2, seed=5)
    told = tokenizer.encode(" = 12345;")
    seen = [sample for sample in samples if not all(sample.written)]
    assert seen, "at least one of them went on"
    for sample in seen:
        first = list(sample.written).index(False)
        assert list(sample.ids[first : first + len(told)]) == told
        assert not any(sample.written[first : first + len(told)]) and set(sample.logp[first : first + len(told)]) == {
            0.0
        }
        ids = torch.tensor([[*sample.prompt.ids, *sample.ids]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(sample.prompt.ids) - 1 : -1].log_softmax(-1)
        for t, (token, written) in enumerate(zip(sample.ids, sample.written, strict=True)):
            if written:
                assert abs(float(log_p[t, token]) - sample.logp[t]) < 1e-5
    rollout.close()


def test_an_observation_without_room_is_not_read(folder, tokenizer):
    model = load_model(folder, dtype=torch.float32, device="cpu")
    rollout = LocalRollout(model, tokenizer, turns=Turns(lambda sample: " 12345" * 40, 3), max_batch=8, max_context=40)
    rollout.refresh(0)
    asked = [Prompt(tuple(tokenizer.encode("one")), "one", {}, 0)]
    params = SamplingParams(max_tokens=4, stop_token_ids=tuple(range(350)))
    for sample in rollout.write(asked, params, copies=4, seed=5):
        assert all(sample.written) and sample.length <= 4
    rollout.close()


def test_the_same_version_of_other_weights_is_not_the_same(folder, tokenizer):
    """As after a rollback: a round comes again under its number, with other weights."""
    model = load_model(folder, dtype=torch.float32, device="cpu")
    rollout = LocalRollout(model, tokenizer, max_batch=8)
    asked = [Prompt(tuple(tokenizer.encode("one two three " * 12)), "one", {}, 0)]
    for change in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * change)
        rollout.refresh(7)
        [sample] = rollout.write(asked, SamplingParams(max_tokens=4), copies=1, seed=0)
        ids = torch.tensor([[*asked[0].ids, *sample.ids]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(asked[0].ids) - 1 : -1].log_softmax(-1)
        assert max(abs(float(log_p[t, token]) - sample.logp[t]) for t, token in enumerate(sample.ids)) < 1e-4
    rollout.close()


def test_old_answers_are_never_taken_for_new_ones(folder, tokenizer):
    """After an update of the shared weights the engine's pages of before are not read again."""
    model = load_model(folder, dtype=torch.float32, device="cpu")
    rollout = LocalRollout(model, tokenizer, max_batch=8)
    asked = [Prompt(tuple(tokenizer.encode("one two three four five six seven")), "one", {}, 0)]
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    rollout.refresh(0)
    rollout.write(asked, greedy, copies=1, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    rollout.refresh(1)
    [sample] = rollout.write(asked, greedy, copies=1, seed=0)
    ids = list(asked[0].ids)
    for token in sample.ids:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    rollout.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_answer_as_the_trained_ones_and_never_as_older_ones(folder, tokenizer, dtype):
    """With an adapter: fp32 within 1e-5 of the plain forward, bf16 within 0.2 nats; written to, they are refused."""
    model = load_model(folder, dtype=torch.float32, device="cpu")
    add_lora(model, 4, targets="all")
    asked = [Prompt(tuple(tokenizer.encode("one two three")), "one two three", {}, 0)]
    rollout = LocalRollout(model, tokenizer, packed=dtype, max_batch=8)
    for version in range(3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(version)))
        if version:
            with pytest.raises(HanlinError, match=f"those of version {version - 1}"):
                rollout.write(asked, SamplingParams(max_tokens=6), copies=1, seed=0)
        assert rollout.refresh(version) > 0
        [sample] = rollout.write(asked, SamplingParams(max_tokens=6), copies=1, seed=version)
        ids = torch.tensor([[*asked[0].ids, *sample.ids]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(asked[0].ids) - 1 : -1].log_softmax(-1)
        gaps = [abs(float(log_p[t, token]) - sample.logp[t]) for t, token in enumerate(sample.ids)]
        assert max(gaps) < (1e-5 if dtype == torch.float32 else 0.2)
    rollout.close()


def test_a_run_with_packed_weights_learns(folder, prompts, tmp_path):
    recipe = rl_recipe(folder, prompts, tmp_path, weights="packed", train={"steps": 3})
    train(recipe, quiet=True)
    rows = read_metrics(recipe.out / "metrics.jsonl")
    assert all(row["seconds/refresh"] > 0 and row["rollout/mismatch"] < 0.1 for row in rows)


def test_a_row_says_all_of_an_algorithm():
    assert all(dataclasses.is_dataclass(row) for row in ALGORITHMS.values())
