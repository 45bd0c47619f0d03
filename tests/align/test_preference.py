"""DPO and its family through the one loop: packed pairs equal padded pairs written by hand, kind by kind; the reference
is the model as it was; runs resume, split and share as every run does."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tests.align.judged_runs import (
    assert_close,
    assert_same,
    changed,
    gradient,
    gradients,
    save_base,
    saved_weights,
    tiny_recipe,
    wired,
    written,
)  # fmt: skip

from hanlin.align.adapter_choice import LoraChoice
from hanlin.align.build import find_lr, train
from hanlin.align.methods import open_data
from hanlin.align.pairs import preference_examples, read_preferences
from hanlin.align.preference_data import usual_rate
from hanlin.align.preference_recipe import DEFAULTS, PreferenceObjective
from hanlin.align.preview import preview
from hanlin.align.recipe import TrainRecipe
from hanlin.align.tdpo import logprobs_and_divergence
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.models import load_model
from hanlin.tokens import Tokenizer
from hanlin.train.token_loss import head_of

ROWS = [
    {
        "prompt": f"What is {i}?",
        "chosen": f"It is {i}." if i % 3 else f"It is the number {i}. ",
        "rejected": "No." * (1 + i % 4),
    }
    for i in range(14)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer_folder)


def recipe_of(folder: Path, base: Path, *, adapter=None, rows=ROWS, **objective) -> TrainRecipe:
    file = written(folder, rows)
    return tiny_recipe(folder, base, PreferenceObjective(**{"files": [file], **objective}), adapter=adapter)


def test_a_run_makes_the_chosen_answers_likelier(tmp_path, base):
    recipe = recipe_of(tmp_path, base, held_out=[written(tmp_path, ROWS)])
    result = train(changed(recipe, steps=20), quiet=True)
    assert result.finished
    rows = read_metrics(recipe.out / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    assert first["eval/loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert last["eval/loss"] < 0.5 and last["eval/rewards/accuracy"] > 0.9


KINDS = list(DEFAULTS["beta"])


def padded_loss(choice: PreferenceObjective, policy, reference, groups) -> torch.Tensor:
    """The mean loss over pairs, each answer alone in a row of its own, from whole logits."""
    losses, nll, count = [], 0.0, 0
    for chosen, rejected in groups:
        says = [tokens(policy, chosen), tokens(policy, rejected)]
        with torch.no_grad():
            before = [tokens(reference, chosen), tokens(reference, rejected)]
        losses.append(papers_loss(choice, says, before))
        nll, count = nll - says[0][0].sum(), count + len(says[0][0])
    return torch.stack(losses).mean() + choice.value("sft") * nll / count


def tokens(model, example) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the answer's tokens, and the distributions that they were drawn from."""
    log_p = model(torch.tensor([example.ids])).logits[0, :-1].log_softmax(-1)
    on = torch.tensor(example.trained[1:])
    return log_p.gather(-1, torch.tensor(example.ids[1:])[:, None])[on, 0], log_p[on]


def papers_loss(choice: PreferenceObjective, says, before) -> torch.Tensor:
    """One pair's loss as the kind's paper writes it."""
    (lw, pw), (ll, pl), (rw, qw), (rl, ql) = *says, *before
    b, s, value = choice.value("beta"), choice.value("smoothing"), choice.value
    d = (lw.sum() - rw.sum()) - (ll.sum() - rl.sum())
    kl_w, kl_l = ((q.exp() * (q - p)).sum() for q, p in ((qw, pw), (ql, pl)))

    def nls(x):
        return torch.log1p(torch.exp(-x))

    def log_odds(x):
        return x.mean() - torch.log(1 - torch.exp(x.mean()))

    return {
        "dpo": lambda: nls(b * d),
        "cdpo": lambda: (1 - s) * nls(b * d) + s * nls(-b * d),
        "robust": lambda: ((1 - s) * nls(b * d) - s * nls(-b * d)) / (1 - 2 * s),
        "hinge": lambda: torch.relu(1 - b * d),
        "ipo": lambda: ((lw - rw).mean() - (ll - rl).mean() - 1 / (2 * b)) ** 2,
        "dpop": lambda: nls(b * (d - value("penalty") * torch.relu(rw.sum() - lw.sum()))),
        "tdpo1": lambda: nls(b * (d - (kl_l - kl_w))),
        "tdpo2": lambda: nls(b * (d - value("alpha") * (kl_l - kl_w.detach()))),
        "simpo": lambda: nls(b * (lw.mean() - ll.mean()) - value("gamma")),
        "orpo": lambda: b * nls(log_odds(lw) - log_odds(ll)),
    }[choice.kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_packed_pairs_is_that_of_padded_ones(tmp_path, base, kind):
    """fp64, all weights: loss and every gradient within 1e-12 of whole logits over answers that stand alone."""
    options = {"penalty": 5.0} if kind == "dpop" else {}
    recipe = recipe_of(tmp_path, base, kind=kind, **options)
    recipe = changed(recipe, batch_size=9)
    model, wiring, data = wired(recipe)
    batch = wiring.source.batch(0, 0, data.source.rows_per_epoch)
    loss, packed = gradient(model, wiring.objective, [batch])
    assert batch.sequences == 2 * len(ROWS) and not batch.one_document_a_row
    reference = load_model(base, dtype=torch.float64, device="cpu")
    reading = read_preferences(recipe.objective.files, "pairs")
    groups, _ = preference_examples(reading, Tokenizer.load(base))
    model.zero_grad()
    plain = padded_loss(recipe.objective, model, reference, groups)
    plain.backward()
    assert float(abs(loss - plain.detach())) <= 1e-12 * max(1.0, float(plain.detach()))
    assert_close(packed, gradients(model))


@pytest.mark.parametrize("kind", ["dpo", "tdpo2", "orpo"])
def test_micro_batches_give_one_gradient(tmp_path, base, kind):
    """1, 2 and 4 rows at a time, fp64 1e-12; the reference is asked so many at a time too."""
    recipe = changed(recipe_of(tmp_path, base, kind=kind), batch_size=4)
    found = []
    for rows in (4, 2, 1):
        model, wiring, _ = wired(changed(recipe, micro_batch_size=rows))
        batch = wiring.source.batch(0)
        found.append(gradient(model, wiring.objective, [batch.rows(at, at + rows) for at in range(0, 4, rows)]))
    for loss, grads in found[1:]:
        assert float(abs(loss - found[0][0])) <= 1e-12
        assert_close(grads, found[0][1])


LOG_2 = ["dpo", "cdpo", "dpop", "tdpo1", "tdpo2"]


@pytest.mark.parametrize("adapter", [None, LoraChoice(rank=4)], ids=["all weights", "lora"])
@pytest.mark.parametrize("kind", LOG_2)
def test_before_the_first_step_the_loss_is_log_2(tmp_path, base, kind, adapter):
    model, wiring, _ = wired(recipe_of(tmp_path, base, kind=kind, adapter=adapter), scale=0.0)
    with torch.no_grad():
        batch = wiring.source.batch(0)
        (total, _), *_ = wiring.objective.loss(model, batch)[0]
    assert float(total) / wiring.objective.count(batch)["pairs"] == pytest.approx(0.6931471805599453, abs=1e-12)


@pytest.mark.parametrize("kind", ["dpo", "tdpo2"])
def test_an_adapter_switched_off_is_a_frozen_copy(tmp_path, base, kind):
    """The reference of a LoRA run and a copy of the saved model say the same of every answer, bit for bit."""
    recipe = recipe_of(tmp_path, base, kind=kind, adapter=LoraChoice(rank=4))
    model, wiring, _ = wired(recipe)
    assert wiring.objective.reference._copy is None
    off = wiring.source.batch(0)
    named = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"reference": base})})
    _, other, _ = wired(named)
    other.objective.reference._copy.double()
    copy = other.source.batch(0)
    assert torch.equal(off.of_sequences("reference"), copy.of_sequences("reference"))
    assert model.adapter.on and any(p.requires_grad for p in model.parameters())
    one, two = (gradient(m, w.objective, [b]) for m, w, b in ((model, wiring, off), (model, other, copy)))
    assert torch.equal(one[0], two[0])


def test_alpha_and_penalty_of_0_are_dpo(tmp_path, base):
    """TDPO with alpha 0 and DPOP with lambda 0 give DPO's gradient: fp64, 1e-12."""
    found = []
    for kind, options in (
        ("dpo", {}),
        ("tdpo1", {"alpha": 0.0}),
        ("tdpo2", {"alpha": 0.0}),
        ("dpop", {"penalty": 0.0}),
    ):
        model, wiring, _ = wired(recipe_of(tmp_path, base, kind=kind, beta=0.1, **options))
        found.append(gradient(model, wiring.objective, [wiring.source.batch(0)])[1])
    for grads in found[1:]:
        assert_close(grads, found[0])


def test_margins_of_the_rows_are_wanted_or_left_aside(tmp_path, base):
    rows = [{**row, "margin": float(number)} for number, row in enumerate(ROWS)]
    recipe = recipe_of(tmp_path, base, rows=rows, margin=True)
    model, wiring, data = wired(recipe, scale=0.0)
    batch = wiring.source.batch(0)
    loss = float(wiring.objective.loss(model, batch)[0][0][0].detach())
    margins = batch.of_sequences("margin")[0::2]
    assert loss == pytest.approx(float(torch.nn.functional.softplus(margins).sum()), rel=1e-6)
    data = open_data(recipe_of(tmp_path, base, rows=rows), Tokenizer.load(base))
    assert any("margin" in note and "left aside" in note for note in data.notes)
    with pytest.raises(HanlinError, match="no row has a `margin`"):
        open_data(recipe_of(tmp_path, base, margin=True), Tokenizer.load(base))


@pytest.mark.parametrize("adapter", [None, LoraChoice(rank=4)], ids=["all weights", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "tdpo1"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, base, kind, adapter):
    recipe = changed(
        recipe_of(tmp_path, base, kind=kind, adapter=adapter, held_out=[written(tmp_path, ROWS)]),
        save_every=2,
        keep_last=9,
    )
    whole = recipe.model_copy(update={"name": "whole"})
    train(whole, quiet=True)
    train(recipe, quiet=True)
    for folder in ("checkpoints/step-4", "model"):
        shutil.rmtree(recipe.out / folder)
    train(recipe, quiet=True)
    one, other = saved_weights(whole.out), saved_weights(recipe.out)
    assert_same(one, other)
    assert (recipe.out / "adapter").exists() == (adapter is not None)


def test_another_beta_is_another_run(tmp_path, base):
    recipe = changed(recipe_of(tmp_path, base), steps=1)
    train(recipe, quiet=True)
    with pytest.raises(HanlinError, match=r"beta was 0\.1, now 0\.2"):
        train(changed(recipe_of(tmp_path, base, beta=0.2), steps=2), quiet=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "dpo", "gamma": 1.0}, "`gamma` does nothing in kind dpo, only in simpo"),
        ({"kind": "simpo", "smoothing": 0.1}, "`smoothing` does nothing in kind simpo"),
        ({"kind": "orpo", "reference": "x"}, "`reference` does nothing in kind orpo"),
        ({"kind": "cdpo", "smoothing": 0.5}, "less than 0.5"),
        ({"kind": "dpo", "beta": 0.0}, "greater than 0"),
    ],
)
def test_options_that_do_not_act_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        PreferenceObjective(files=["pairs.jsonl"], **options)


def test_pairs_that_cannot_teach_are_said(tmp_path, base, capsys):
    rows = [
        *ROWS,
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "A " * 90, "rejected": "B"},
    ]
    train(changed(recipe_of(tmp_path, base, rows=rows, seq_len=64), steps=1))
    told = capsys.readouterr().err
    assert "their answers are equal" in told and "an answer does not fit 64 tokens" in told


def test_the_preview_shows_pairs_side_by_side(tmp_path, base):
    """Only answers stand between the marks of what is trained."""
    console = Console(file=io.StringIO(), width=200)
    preview(recipe_of(tmp_path, base), rows=1, console=console)
    told = console.file.getvalue()
    assert "(chosen)" in told and "(rejected)" in told and "⟦No." in told and "⟦What is" not in told


@pytest.mark.slow
def test_a_range_test_of_the_rate_leaves_the_model_alone(tmp_path, base):
    found = find_lr(recipe_of(tmp_path, base, kind="tdpo2"), quiet=True)
    assert found.best > 0 and not (tmp_path / "runs" / "run" / "model").exists()


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_kinds_without_a_reference_hold_no_second_model(tmp_path, base, kind):
    _, wiring, data = wired(recipe_of(tmp_path, base, kind=kind))
    assert wiring.objective.reference is None and wiring.source is data.source


def test_the_chosen_answers_loss_joins_by_its_weight(tmp_path, base):
    """`sft` adds the mean loss over the chosen answers' tokens to any kind."""
    plain, wiring, _ = wired(recipe_of(tmp_path, base, beta=0.1))
    more, other, _ = wired(recipe_of(tmp_path, base, beta=0.1, sft=0.5))
    batch = wiring.source.batch(0)
    (one, _), (two, _) = gradient(plain, wiring.objective, [batch]), gradient(more, other.objective, [batch])
    with torch.no_grad():
        _, metrics = other.objective.loss(more, batch)
    total, tokens = metrics["sft_loss"]
    assert float(two - one) == pytest.approx(0.5 * total / tokens, rel=1e-12)


def test_a_reference_with_another_vocabulary_is_refused(tmp_path, base, tokenizer):
    small = Tokenizer.train([written(tmp_path, ROWS, "text.txt")], vocab_size=300)
    small.save(tmp_path / "tokenizer")
    other = save_base(tmp_path / "other", tmp_path / "tokenizer")
    with pytest.raises(HanlinError, match="the same tokenizer"):
        train(recipe_of(tmp_path, base, reference=other), quiet=True)


def test_the_divergence_sees_the_whole_head(base):
    """Soft-cap and scale included: value and gradients against whole logits and autograd, fp64 1e-12."""
    model, reference = (load_model(base, dtype=torch.float64, device="cpu") for _ in range(2))
    torch.manual_seed(0)
    for each in (model, reference):
        each.config = replace(each.config, head=replace(each.config.head, softcap=2.0, scale=0.7))
        each.lm_head.weight.data.add_(torch.randn_like(each.lm_head.weight) * 0.3)
    hidden, other = torch.randn(2, 9, 32, dtype=torch.float64)
    hidden.requires_grad_()
    ids, slopes = torch.randint(0, 400, (9,)), torch.randn(2, 9, dtype=torch.float64)
    states, head = head_of(reference, other)
    found = logprobs_and_divergence(model, hidden, ids, states.detach(), head)
    log_p, log_q = model.logits(hidden).log_softmax(-1), reference.logits(other).log_softmax(-1).detach()
    wanted = (log_p.gather(-1, ids[:, None])[:, 0], (log_q.exp() * (log_q - log_p)).sum(-1))
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)
    leaves = (hidden, model.lm_head.weight)
    one, two = (torch.autograd.grad((torch.stack(pair) * slopes).sum(), leaves) for pair in (found, wanted))
    assert all(torch.allclose(a, b, rtol=1e-11, atol=1e-12) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["dpo-tiny", "kto-tiny", "rrhf-tiny", "spin-tiny", "rft-tiny", "rahf-tiny"])
def test_the_example_recipes_load(name):
    assert TrainRecipe.load(Path(__file__).parents[2] / "recipes" / "align" / f"{name}.yaml").name == name


@pytest.mark.parametrize(
    ("kind", "parameters", "adapter", "rate"),
    [
        ("dpo", 10**6, False, 1e-4),
        ("dpo", 7 * 10**9, False, 1.2e-6),
        ("orpo", 10**6, False, 3e-4),
        ("orpo", 100, True, 1e-3),
    ],
)
def test_the_usual_rate_falls_with_the_size(kind, parameters, adapter, rate):
    assert usual_rate(kind, parameters, adapter=adapter) == pytest.approx(rate)
