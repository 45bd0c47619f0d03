"""Reward models are learnt from judged answers: data, losses over packed rows, runs that go on, the report."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from hanlin.align import best_of_n, hacking, judge, reward_model
from hanlin.align.build import build_model, train
from hanlin.align.methods import open_data
from hanlin.align.recipe import NewModel, SavedModel, TrainChoices, TrainRecipe
from hanlin.align.reward import add_reward_head, answer_rewards
from hanlin.align.reward_data import LENGTH, read_judgements
from hanlin.align.reward_export import load_reward_model
from hanlin.align.reward_objective import Reward
from hanlin.align.reward_recipe import RewardObjective
from hanlin.align.sources import open_tokenizer
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.models import load_model
from hanlin.train.objective import step_loss

ROOT = Path(__file__).parents[2]
SMALL = NewModel(family="llama", depth=2, width=32, heads=2, kv_heads=1, hidden=48, max_positions=128)
WORDS = ["add", "four", "who", "small", "model", "two", "plus", "word"]


def pairs(count: int, start: int = 0) -> list[dict]:
    """The better answer thanks; which is longer is chance."""
    rows = []
    for number in range(start, start + count):
        word = WORDS[number % len(WORDS)]
        more = " ".join([word] * (number % 5))
        rows.append(
            {"prompt": f"What is {word} {number}?", "chosen": f"{word} 谢谢", "rejected": f"{word} {more} 不客气"}
        )
    return rows


def ranked(count: int) -> list[dict]:
    endings = ["谢谢", "add", "不客气"]
    return [
        {
            "prompt": f"What is {n}?",
            "completions": [f"{WORDS[n % 8]} {e}" for e in endings][: 2 + n % 2],
            "scores": [3, 2, 1][: 2 + n % 2],
        }
        for n in range(count)
    ]


def points(count: int, *, labelled: bool = False) -> list[dict]:
    rows = []
    for n in range(count):
        good = n % 2
        number = {"label": bool(good)} if labelled else {"score": 1.5 * good - 0.5}
        rows.append(
            {"prompt": f"What is {n}?", "completion": f"{'add ' * (n % 7)}{'谢谢' if good else '不客气'}", **number}
        )
    return rows


def process(count: int) -> list[dict]:
    rows = []
    for n in range(count):
        labels = [(n + k) % 3 > 0 for k in range(1 + n % 3)]
        steps = [f"{WORDS[(n + k) % 8] * (n % 4)} {'谢谢' if good else '不客气'}" for k, good in enumerate(labels)]
        rows.append({"prompt": f"What is {n}?", "steps": steps, "labels": [int(good) for good in labels]})
    return rows


DATA = {
    "pairwise": (pairs(24), {}),
    "centred": (pairs(24), {"centre": 0.01}),
    "margin": ([{**row, "margin": 0.1 * n} for n, row in enumerate(pairs(24))], {"margin": True}),
    "kwise": (ranked(24), {}),
    "listwise": (ranked(24), {}),
    "pointwise": (points(24), {}),
    "yes_no": (points(24, labelled=True), {"target": "yes_no"}),
    "process": (process(24), {}),
}
FORM = {"centred": "pairwise", "margin": "pairwise", "yes_no": "pointwise"}


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    """A recipe over rows of one kind."""

    def recipe(kind: str = "pairwise", rows: list[dict] | None = None, **changes) -> TrainRecipe:
        data, options = DATA[kind]
        file = write(tmp_path / f"{kind}.jsonl", data if rows is None else rows)
        raw = {
            "name": kind, "runs": tmp_path / "runs", "tokenizer": tokenizer_folder, "model": SMALL,
            "objective": {"kind": "reward", "form": FORM.get(kind, kind), "files": [file], **options},
            "train": TrainChoices(steps=6, lr=3e-3, batch_size=4, precision="fp32", device="cpu").model_dump(),
        }  # fmt: skip
        for path, value in changes.items():
            node = raw
            *sections, last = path.split("__")
            for section in sections:
                node = node[section]
            node[last] = value
        return TrainRecipe.model_validate(raw)

    return recipe


def wired(recipe: TrainRecipe, *, noise: float = 0.1):
    """Objective, source and an fp64 model with its head."""
    tokenizer = open_tokenizer(recipe)
    data = open_data(recipe, tokenizer)
    torch.manual_seed(1)
    model = build_model(recipe, tokenizer, data.seq_len).double()
    add_reward_head(model, steps=recipe.objective.form == "process", seed=0)
    for parameter in model.parameters():
        parameter.data.add_(noise * torch.randn_like(parameter))
    return Reward.of(recipe.objective), data.source, model


def gradient(objective, parts, model) -> tuple[float, dict[str, torch.Tensor]]:
    totals: dict[str, float] = {}
    for part in parts:
        for name, number in objective.count(part).items():
            totals[name] = totals.get(name, 0) + number
    model.zero_grad()
    losses = []
    for part in parts:
        share = step_loss(objective.loss(model, part)[0], totals)
        share.backward()
        losses.append(share.item())
    return sum(losses), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors") | load_file(folder / "heads.safetensors")


@pytest.mark.parametrize("kind", list(DATA))
def test_micro_batches_and_packing_change_no_gradient(make, kind):
    """fp64, 1e-12: 1, 2, 4 micro-batches of the same rows; the rows packed or one judgement each."""
    objective, source, model = wired(make(kind))
    batch = source.batch(0)
    loss, whole = gradient(objective, [batch], model)
    for size in (1, 2):
        again, parts = gradient(objective, [batch.rows(at, at + size) for at in range(0, len(batch), size)], model)
        assert again == pytest.approx(loss, abs=1e-12)
        assert whole.keys() == parts.keys()
        assert all(torch.allclose(whole[n], parts[n], rtol=0, atol=1e-12) for n in whole)
    every = [source.batch(step) for step in range(source.steps_per_epoch)]
    rows = [batch.rows(at, at + 1) for batch in every for at in range(len(batch))][: source.rows_per_epoch]
    _, alone, _ = wired(make(kind, objective__packing=False))
    lone = [alone.batch(step) for step in range(alone.steps_per_epoch)]
    single = [batch.rows(at, at + 1) for batch in lone for at in range(len(batch))][: alone.rows_per_epoch]
    assert len(single) > len(rows)
    (one, packed), (other, unpacked) = gradient(objective, rows, model), gradient(objective, single, model)
    assert one == pytest.approx(other, abs=1e-12)
    assert all(torch.allclose(packed[n], unpacked[n], rtol=0, atol=1e-12) for n in packed)
    assert max(float(g.abs().max()) for g in packed.values()) > 1e-4


def test_the_pairwise_loss_is_that_of_each_answer_read_alone(make):
    """A twin without packing: every text by itself, -log sigmoid of the difference, fp64 1e-12."""
    recipe = make("margin", objective__centre=0.02)
    objective, source, model = wired(recipe)
    found = read_judgements(recipe.objective, recipe.objective.files, open_tokenizer(recipe), None, 128)
    batches = [source.batch(step) for step in range(source.steps_per_epoch)]
    rows = [batch.rows(at, at + 1) for batch in batches for at in range(len(batch))][: source.rows_per_epoch]
    loss, _ = gradient(objective, rows, model)

    def reward(ids: list[int]) -> torch.Tensor:
        return model.reward.classifier(model(torch.tensor([ids]), logits=None).hidden[0, -1])[0]

    with torch.no_grad():
        total = 0.0
        for chosen, rejected in found.groups:
            r, s = reward(chosen.ids), reward(rejected.ids)
            margin = torch.tensor(chosen.numbers["margin"], dtype=torch.float32).double()  # batches carry fp32
            total += float(-F.logsigmoid(r - s - margin) + 0.02 * (r + s) ** 2)
    assert loss == pytest.approx(total / len(found.groups), abs=1e-12)


@pytest.mark.parametrize("kind", ["kwise", "listwise", "process", "pointwise", "yes_no"])
def test_the_other_losses_are_those_of_their_definitions(make, kind):
    """Brute force over the packed rows' own rewards, which the tests of `reward_model` hold to each text alone."""
    objective, source, model = wired(make(kind))
    batch = source.batch(0)
    loss, _ = gradient(objective, [batch], model)
    with torch.no_grad():
        said = objective.say(model, batch)
    if kind == "process":
        labels = batch.of_trained("label").long().tolist()
        expected = [-float(torch.log_softmax(row, -1)[label]) for row, label in zip(said, labels, strict=True)]
        assert {0, 1} == set(labels)
    elif kind in ("pointwise", "yes_no"):
        truth = batch.of_sequences(objective.truth).tolist()
        expected = [
            (float(r) - t) ** 2 if kind == "pointwise" else -float(F.logsigmoid(r if t else -r))
            for r, t in zip(said, truth, strict=True)
        ]
    else:
        first, scores = batch.of_sequences("first").tolist(), batch.of_sequences("score").tolist()
        groups: list[list[tuple[float, float]]] = []
        for start, score, reward in zip(first, scores, said.tolist(), strict=True):
            groups += [[]] if start else []
            groups[-1].append((score, reward))
        expected = [_kwise(group) if kind == "kwise" else _plackett_luce(group) for group in groups]
        assert {len(group) for group in groups} == {2, 3}
    assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def _kwise(group) -> float:
    each = [-float(F.logsigmoid(torch.tensor(r - q, dtype=torch.float64))) for s, r in group for t, q in group if s > t]
    return sum(each) / len(each)


def _plackett_luce(group) -> float:
    rewards = torch.tensor([r for _, r in sorted(group, reverse=True)], dtype=torch.float64)
    return sum(float(rewards[k:].logsumexp(0) - rewards[k]) for k in range(len(rewards)))


def test_an_answer_ends_with_the_token_at_which_generation_stops(make):
    recipe = make("pairwise")
    tokenizer = open_tokenizer(recipe)
    found = read_judgements(recipe.objective, recipe.objective.files, tokenizer, None, 128)
    for group in found.groups:
        for example in group:
            assert example.ids[-1] in tokenizer.stop_ids and example.trained[-1]
            assert example.numbers[LENGTH] == sum(example.trained) > 1


def test_a_head_is_made_the_same_whoever_makes_it_and_words_are_no_longer_learnt(make):
    recipe = make("pairwise", model=SMALL.model_copy(update={"tied": False}))
    first, second, other = (build_model(recipe, open_tokenizer(recipe), 64) for _ in range(3))
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        torch.manual_seed(torch.seed() % 1000)
        add_reward_head(model, seed=seed)
    weight = first.reward.classifier.weight
    assert torch.equal(weight, second.reward.classifier.weight)
    assert not torch.equal(weight, other.reward.classifier.weight)
    assert not first.lm_head.weight.requires_grad and weight.requires_grad
    assert 0.5 < float(weight.detach().std()) * 33**0.5 < 1.5


@pytest.mark.parametrize("kind", ["pairwise", "process"])
def test_a_stopped_run_goes_on_to_the_same_weights(make, kind):
    """Two of six steps, as a killed run leaves them; the same recipe finishes it, bit for bit (CPU)."""
    saving = {"train__save_every": 2, "train__keep_last": 9}
    train(make(kind, name="whole", **saving), quiet=True)
    recipe = make(kind, **saving)
    train(recipe, quiet=True)
    for folder in ("checkpoints/step-4", "checkpoints/step-6", "model"):
        shutil.rmtree(recipe.out / folder)
    train(recipe, quiet=True)
    whole, resumed = weights(recipe.runs / "whole" / "model"), weights(recipe.out / "model")
    assert whole.keys() == resumed.keys() and any(name.startswith("reward.") for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_it_learns_what_is_liked_and_reports_it(make, tmp_path):
    held_out = write(tmp_path / "held.jsonl", pairs(16, start=100))
    train(make("pairwise", name="actor", train__steps=1), quiet=True)
    recipe = make(
        "pairwise", name="learns", train__steps=40, objective__held_out=[held_out],
        objective__actor=tmp_path / "runs" / "actor" / "model", train__eval_every=20,
    )  # fmt: skip
    train(recipe, quiet=True)
    rows = read_metrics(recipe.out / "metrics.jsonl")
    last = [row for row in rows if "eval/accuracy" in row][-1]
    assert last["eval/accuracy"] > 0.9 and last["eval/loss"] < 0.4
    assert {"eval/margin", "eval/calibration_error", "eval/length_correlation", "eval/reward_mean"} <= last.keys()
    assert {"loss", "accuracy", "margin", "reward"} <= rows[-2].keys() | rows[-1].keys() | rows[0].keys()
    report = (recipe.out / "report.md").read_text()
    assert "1.00 times as many" in report or "0.9" in report
    assert "| accuracy |" in report and "## Calibration" in report and "## Length" in report
    assert (recipe.out / "reward.png").stat().st_size > 10_000
    model = load_reward_model(recipe.out / "model")
    assert model.reward.classifier.out_features == 1
    again = make("pairwise", name="again", model=SavedModel(path=recipe.out / "model"), train__steps=1, train__lr=1e-9)
    train(again, quiet=True)  # a reward model is trained on, with the head that it has
    other = load_model(again.out / "model")
    assert torch.allclose(other.reward.classifier.weight, model.reward.classifier.weight, atol=1e-6)


@pytest.mark.parametrize("kind", ["kwise", "listwise", "pointwise", "yes_no", "process"])
def test_every_form_learns_and_reports(make, kind, tmp_path):
    recipe = make(
        kind, objective__held_out=[tmp_path / f"{kind}.jsonl"], train__steps=30, train__lr=5e-3, train__eval_every=15
    )
    train(recipe, quiet=True)
    losses = [row["eval/loss"] for row in read_metrics(recipe.out / "metrics.jsonl") if "eval/loss" in row]
    assert losses[-1] < 0.5 * losses[0] or losses[-1] < 0.2
    last = [row for row in read_metrics(recipe.out / "metrics.jsonl") if "eval/loss" in row][-1]
    assert last["eval/correlation" if kind == "pointwise" else "eval/accuracy"] > 0.8
    assert (recipe.out / "report.md").exists() and (recipe.out / "reward.png").exists()


def test_with_lora_the_trunk_stays_and_the_head_learns(make, tmp_path):
    train(make("pairwise", name="base", train__steps=1), quiet=True)
    base = load_model(tmp_path / "runs" / "base" / "model")
    saved = SavedModel(path=tmp_path / "runs" / "base" / "model")
    recipe = make(
        "pairwise", name="lora", model=saved, adapter={"rank": 4, "alpha": 8}, train__steps=20, train__lr=1e-2
    )
    train(recipe, quiet=True)
    model = load_reward_model(recipe.out / "model")
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert not torch.equal(model.model.layers[0].self_attn.o_proj.weight, base.model.layers[0].self_attn.o_proj.weight)
    assert not torch.equal(model.reward.classifier.weight, base.reward.classifier.weight)
    from safetensors.torch import load_file

    names = load_file(recipe.out / "adapter" / "adapter_model.safetensors").keys()
    assert names and not any("reward" in name for name in names)
    assert read_metrics(recipe.out / "metrics.jsonl")[-1]["loss"] < 0.6


def test_a_reward_model_is_trained_on_with_lora_and_its_head_stays_whole(make, tmp_path):
    train(make("pairwise", name="base", train__steps=2), quiet=True)
    saved = SavedModel(path=tmp_path / "runs" / "base" / "model")
    recipe = make("pairwise", name="more", model=saved, adapter={"rank": 2}, train__steps=2)
    train(recipe, quiet=True)
    before, after = load_reward_model(saved.path), load_reward_model(recipe.out / "model")
    assert not torch.equal(before.reward.classifier.weight, after.reward.classifier.weight)
    assert [name for name, _ in after.reward.named_parameters()] == ["classifier.weight"]
    from safetensors.torch import load_file

    assert not any("reward" in n for n in load_file(recipe.out / "adapter" / "adapter_model.safetensors"))
    with pytest.raises(HanlinError, match="one of whole answers"):
        train(make("process", name="other", model=saved), quiet=True)


def test_options_that_do_nothing_are_refused(make):
    for kind, option, value in [
        ("kwise", "margin", True),
        ("listwise", "centre", 0.1),
        ("pairwise", "target", "yes_no"),
        ("pairwise", "separator", "\n"),
        ("process", "margin", False),
    ]:
        with pytest.raises(ValueError, match=f"`{option}` does nothing in the form {kind}"):
            make(kind, **{f"objective__{option}": value})
    with pytest.raises(HanlinError, match="no factor for a reward head"):
        train(make("pairwise", train__mup_base_width=16), quiet=True)
    with pytest.raises(HanlinError, match="no row has a `margin`"):
        open_data(make("pairwise", objective__margin=True), open_tokenizer(make("pairwise")))


def test_the_recipe_and_the_page_of_the_repository_say_what_a_recipe_says():
    recipe = TrainRecipe.load(ROOT / "recipes" / "align" / "reward-tiny.yaml", [])
    assert recipe.name == "reward-tiny" and isinstance(recipe.objective, RewardObjective)
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    told = RewardObjective.model_validate(yaml.safe_load(block)["objective"])
    assert told.centre == 0.01 and told.form == "pairwise"
    for name in ("ModelReward", "ProcessReward", "step_ends", "Judge", "best_of_n", "hacking_alarm"):
        assert f"`{name}" in page
        assert any(hasattr(module, name) for module in (reward_model, judge, best_of_n, hacking))


def test_bad_rows_are_named_or_counted(make):
    good = {kind: DATA[kind][0][:3] for kind in DATA}
    for kind, row, words in [
        ("pairwise", {"prompt": "q", "chosen": "a"}, "row 4 has no `rejected`"),
        ("pointwise", {"prompt": "q", "completion": "a", "score": float("nan")}, "row 4: `score` has nan"),
        ("pointwise", {"prompt": "q", "completion": "a", "score": None}, "row 4: `score` has None"),
        ("yes_no", {"prompt": "q", "completion": "a", "label": 2}, "row 4: `label` is 2"),
        ("kwise", {"prompt": "q", "completions": ["a", "b"], "scores": [1]}, "2 `completions` and 1 `scores`"),
        ("listwise", {"prompt": "q", "completions": ["a", "b"], "scores": [1, float("inf")]}, "`scores` has inf"),
        ("process", {"prompt": "q", "steps": ["a", "b"], "labels": [1, 0.5]}, "label of step 2 is 0.5"),
        ("process", {"prompt": "q", "steps": ["a"], "labels": [1, 0]}, "1 `steps` and 2 `labels`"),
        ("process", {"prompt": "q", "steps": ["a", " "], "labels": [1, 0]}, "step 2 is ' '"),
        ("process", {"prompt": "q", "labels": []}, "expected .*steps"),
    ]:
        recipe = make(kind, rows=[*good[kind], row])
        with pytest.raises(HanlinError, match=words):
            open_data(recipe, open_tokenizer(recipe))
        told = open_data(make(kind, rows=[*good[kind], row], objective__bad_rows="skip"), open_tokenizer(recipe)).notes
        assert any("1 rows are skipped" in note for note in told), (kind, told)
    same = [*good["pairwise"], {"prompt": "q", "chosen": "a", "rejected": "a"}]
    recipe = make("pairwise", rows=same)
    assert any(
        "1 rows are left out, their answers are" in note for note in open_data(recipe, open_tokenizer(recipe)).notes
    )
    tied = [*good["kwise"], {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1]}]
    recipe = make("kwise", rows=tied)
    assert any("all their scores are equal" in note for note in open_data(recipe, open_tokenizer(recipe)).notes)
    recipe = make("kwise", rows=tied[-1:])
    with pytest.raises(HanlinError, match="no order to learn"):
        open_data(recipe, open_tokenizer(recipe))


def test_steps_that_do_not_fit_are_left_out_or_cut_and_told(make):
    long = {"prompt": "q", "steps": ["four " * 20, "谢谢 " * 20, "add"], "labels": [1, 0, 1]}
    for overlong, words in (("drop", "1 are left out, longer than 64"), ("cut", "1 are cut, longer than 64")):
        recipe = make("process", rows=[*process(5), long], objective__seq_len=64, objective__overlong=overlong)
        data = open_data(recipe, open_tokenizer(recipe))
        assert any(words in note for note in data.notes), data.notes
        batch = data.source.batch(0)
        assert len(batch.of_trained("label")) == Reward("process").count(batch)["steps"]
    with pytest.raises(HanlinError, match="None of 1 rows fits 8 tokens"):
        recipe = make("process", rows=[long], objective__seq_len=8)
        open_data(recipe, open_tokenizer(recipe))


def test_the_step_labels_stand_at_the_last_token_of_each_step(make):
    recipe = make("process")
    tokenizer = open_tokenizer(recipe)
    batch = open_data(recipe, tokenizer).source.batch(0)
    own = batch.lay_trained(torch.ones(len(batch.trained.ids))) > 0
    labels, at = batch.of_trained("label").tolist(), 0
    rows = {f"process.jsonl:{n}": row for n, row in enumerate(process(24), start=1)}
    for row in range(len(batch)):
        for number, name in enumerate(batch.names[row]):
            here = batch.documents[row] == number
            ids, ends = batch.ids[row][here].tolist(), own[row][here].nonzero().squeeze(-1).tolist()
            start = len(tokenizer.chat([{"role": "user", "content": rows[name]["prompt"]}]))
            for step, label, end in zip(rows[name]["steps"], rows[name]["labels"], ends, strict=True):
                assert tokenizer.decode(ids[start : end + 1]) == step + "\n"
                assert labels[at] == label
                start, at = end + 1, at + 1
    assert at == len(labels)


def test_rewards_of_a_batch_are_in_the_order_of_its_documents(make):
    _, source, model = wired(make("pairwise"))
    batch = source.batch(0)
    with torch.no_grad():
        rewards = answer_rewards(model, batch)
        swapped = replace(batch, documents=batch.documents.clone())
        assert torch.equal(rewards, answer_rewards(model, swapped))
        hidden = model(batch.ids[:1, : int((batch.documents[0] == 0).sum())], logits=None).hidden[0, -1]
        first = float(hidden @ model.reward.classifier.weight[0])
    assert rewards.shape == (batch.sequences,)
    assert float(rewards[0]) == pytest.approx(first, abs=1e-12)
