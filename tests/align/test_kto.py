"""KTO and RRHF: gradients as the papers write them; KTO's anchor belongs to the whole step, whatever it is cut into."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.align.judged_runs import (
    answer_logprobs,
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

from hanlin.align.build import train
from hanlin.align.methods import open_data
from hanlin.align.pairs import preference_examples, read_preferences
from hanlin.align.preference_recipe import KtoObjective, RrhfObjective
from hanlin.align.rrhf import first_highest
from hanlin.core.metrics import read_metrics
from hanlin.models import load_model
from hanlin.tokens import Tokenizer

UNPAIRED = [
    {"prompt": f"What is {i}?", "completion": f"It is {i}." if i % 3 else "No." * (1 + i % 4), "label": bool(i % 3)}
    for i in range(15)
]
RANKED = [
    {"prompt": f"What is {i}?", "completions": [f"It is {i}.", "No.", "No. " * (2 + i % 3)][: 2 + i % 2],
     "scores": [1.0, float(i % 4), -1.0][: 2 + i % 2]}
    for i in range(10)
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer_folder)


def kto_recipe(folder: Path, base: Path, **options):
    return tiny_recipe(folder, base, KtoObjective(files=[written(folder, UNPAIRED)], beta=0.5, **options))


def rrhf_recipe(folder: Path, base: Path, **options):
    return tiny_recipe(folder, base, RrhfObjective(files=[written(folder, RANKED)], **options))


def test_ktos_gradient_is_the_papers(tmp_path, base):
    """fp64 1e-12, against answers alone in their rows, and prompts with the next prompt's answer for z."""
    recipe = kto_recipe(tmp_path, base, good_weight=1.0, bad_weight=1.5)
    model, wiring, data = wired(recipe, seed=3)
    rows = data.source.rows_per_epoch
    batch = wiring.source.batch(0, 0, rows)
    assert batch.sequences == len(UNPAIRED) and data.more["data"].rows_per_epoch == rows
    loss, packed = gradient(model, wiring.objective, [batch])
    tokenizer, reference = Tokenizer.load(base), load_model(base, dtype=torch.float64, device="cpu")

    def changes(rows) -> list[torch.Tensor]:
        file = written(tmp_path, rows, "twin.jsonl")
        examples = [e for (e,) in preference_examples(read_preferences([file], "unpaired"), tokenizer)[0]]
        with torch.no_grad():
            before = [answer_logprobs(reference, example).sum() for example in examples]
        return [answer_logprobs(model, example).sum() - b for example, b in zip(examples, before, strict=True)]

    others = [
        {**row, "completion": other["completion"]}
        for row, other in zip(UNPAIRED, [*UNPAIRED[1:], UNPAIRED[0]], strict=True)
    ]
    with torch.no_grad():
        anchor = torch.stack(changes(others)).mean().clamp_min(0)
    assert torch.allclose(batch.of_sequences("anchor"), anchor.expand(len(UNPAIRED)), rtol=1e-12, atol=0)
    assert float(anchor) > 0, "a test whose anchor is 0 would not see it"
    model.zero_grad()
    total = 0.0
    for row, change in zip(UNPAIRED, changes(UNPAIRED), strict=True):
        lead = change - anchor if row["label"] else anchor - change
        total = total + (1.0 if row["label"] else 1.5) * (1 - torch.sigmoid(0.5 * lead))
    total = total / len(UNPAIRED)
    total.backward()
    assert float(abs(loss - total.detach())) <= 1e-12
    assert_close(packed, gradients(model))


def test_rrhfs_gradient_is_the_papers(tmp_path, base):
    recipe = rrhf_recipe(tmp_path, base, length_power=0.7, rank_weight=2.0)
    model, wiring, data = wired(recipe)
    batch = wiring.source.batch(0, 0, data.source.rows_per_epoch)
    loss, packed = gradient(model, wiring.objective, [batch])
    groups, _ = preference_examples(read_preferences(recipe.objective.files, "ranked"), Tokenizer.load(base))
    model.zero_grad()
    ranking, nll, tokens = 0.0, 0.0, 0
    for group in groups:
        said = [answer_logprobs(model, example) for example in group]
        p = [s.sum() / len(s) ** 0.7 for s in said]
        scores = [example.numbers["score"] for example in group]
        best = scores.index(max(scores))
        nll, tokens = nll - said[best].sum(), tokens + len(said[best])
        for i in range(len(group)):
            for j in range(len(group)):
                if scores[i] < scores[j]:
                    ranking = ranking + torch.relu(p[i] - p[j])
    plain = 2.0 * ranking / len(groups) + nll / tokens
    plain.backward()
    assert float(abs(loss - plain.detach())) <= 1e-12 * float(plain.detach())
    assert_close(packed, gradients(model))


@pytest.mark.parametrize("recipe_of", [kto_recipe, rrhf_recipe])
def test_micro_batches_give_one_gradient(tmp_path, base, recipe_of):
    """4, 2 and 1 rows at a time, fp64 1e-12."""
    found = []
    for rows in (4, 2, 1):
        model, wiring, _ = wired(changed(recipe_of(tmp_path, base), micro_batch_size=rows))
        batch = wiring.source.batch(0)
        found.append(gradient(model, wiring.objective, [batch.rows(at, at + rows) for at in range(0, 4, rows)]))
    for loss, grads in found[1:]:
        assert float(abs(loss - found[0][0])) <= 1e-12
        assert_close(grads, found[0][1])


@pytest.mark.parametrize("recipe_of", [kto_recipe, rrhf_recipe])
def test_a_run_learns_and_goes_on_to_the_same_weights(tmp_path, base, recipe_of):
    held = written(tmp_path, UNPAIRED if recipe_of is kto_recipe else RANKED, "held.jsonl")
    recipe = changed(recipe_of(tmp_path, base, held_out=[held]), steps=6, save_every=3, keep_last=9)
    whole = recipe.model_copy(update={"name": "whole"})
    train(whole, quiet=True)
    rows = [row["eval/loss"] for row in read_metrics(whole.out / "metrics.jsonl") if "eval/loss" in row]
    assert rows[-1] < rows[0]
    train(recipe, quiet=True)
    for folder in ("checkpoints/step-6", "model"):
        shutil.rmtree(recipe.out / folder)
    train(recipe, quiet=True)
    assert_same(saved_weights(whole.out), saved_weights(recipe.out))


def test_ktos_weights_out_of_balance_are_said(tmp_path, base):
    notes = open_data(kto_recipe(tmp_path, base), Tokenizer.load(base)).notes
    assert any("10 good and 5 bad answers, weighed 2.00 to 1; the paper keeps" in note for note in notes)
    notes = open_data(kto_recipe(tmp_path, base, bad_weight=2.0), Tokenizer.load(base)).notes
    assert any("weighed 1.00 to 1" in note and "keeps" not in note for note in notes)


def test_the_first_of_the_highest_is_found():
    values, group = torch.tensor([1.0, 3, 3, 0, 0, 5, 2]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    assert first_highest(values, group).tolist() == [False, True, False, True, False, True, False]
