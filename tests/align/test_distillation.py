"""Distillation through the one `Trainer`: the teacher's distributions, whoever wrote the text."""

import json

import pytest
import torch
from tests.align.on_policy_cases import model_folder

from hanlin.align.build import build_model, resolve_settings, save_model_folder, train
from hanlin.align.distillation_recipe import DistillObjective
from hanlin.align.method import Parts
from hanlin.align.methods import method_of, open_data
from hanlin.align.recipe import SavedModel, TrainChoices, TrainRecipe
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.models import load_model
from hanlin.nn.losses import IGNORE
from hanlin.tokens import Tokenizer
from hanlin.train.objective import document_mask
from hanlin.train.reader import open_checkpoint

ROWS = [
    {"instruction": f"two plus {word}?", "output": f"{word} and two"} for word in ("two", "five", "ten", "none")
] + [{"instruction": "二加二等于几？", "output": "四。"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """(student, teacher, conversations)."""
    root = tmp_path_factory.mktemp("distillation")
    student = model_folder(root / "student", tokenizer)
    torch.manual_seed(9)
    teacher = load_model(student, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model_folder(teacher, tokenizer, root / "teacher")
    file = root / "chats.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return student, root / "teacher", file


def recipe_of(folders, runs, *, name="distilled", train=None, **objective) -> TrainRecipe:
    student, teacher, file = folders
    settings = {"steps": 4, "lr": 3e-3, "batch_size": 2, "precision": "fp32", "device": "cpu", "log_every": 1}
    return TrainRecipe(
        name=name, runs=runs, model=SavedModel(path=student),
        objective=DistillObjective(teacher=teacher, files=[file], seq_len=64, **objective),
        train=TrainChoices(**(settings | (train or {}))),
    )  # fmt: skip


def divergence_by_hand(kind, p, q, *, beta=0.5):
    """(n, vocabulary) log-probabilities of teacher and student."""

    def kl(a, b):
        return (a.exp() * (a - b)).sum()

    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    mixed = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("forward_kl", {}),
        ("reverse_kl", {"temperature": 2.0}),
        ("jsd", {"beta": 0.3}),
        ("forward_kl", {"data_loss": 0.5}),
    ],
)
def test_loss_and_gradient_are_those_of_whole_distributions(folders, tmp_path, tokenizer, kind, more):
    """fp64, 1e-10: every trained token's whole distribution, by the definition."""
    recipe = recipe_of(folders, tmp_path, divergence=kind, **more)
    data = open_data(recipe, tokenizer)
    settings, _ = resolve_settings(recipe, data)
    model = build_model(recipe, tokenizer, data.seq_len).double()
    wiring = method_of(recipe).wire(Parts(recipe, tokenizer, data, settings, model, None))
    wiring.objective.teacher.double()
    batch = wiring.source.batch(0)
    terms, _ = wiring.objective.loss(model, batch)
    total = torch.stack([value for value, _ in terms]).sum()
    slopes = torch.autograd.grad(total, list(model.parameters()))

    at, t = batch.targets != IGNORE, more.get("temperature", 1.0)
    read = {"positions": batch.positions, "mask": document_mask(batch)}
    logits = model(batch.ids, **read).logits[at]
    with torch.no_grad():
        told = wiring.objective.teacher(batch.ids, **read).logits[at]
    beta = {"beta": more["beta"]} if "beta" in more else {}
    expected = t**2 * divergence_by_hand(kind, (told / t).log_softmax(-1), (logits / t).log_softmax(-1), **beta)
    if "data_loss" in more:
        expected = expected + 0.5 * torch.nn.functional.cross_entropy(logits, batch.targets[at], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)
    for found, wanted in zip(slopes, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("writer", ["data", "student", "teacher"])
def test_the_student_comes_nearer_to_its_teacher(folders, tmp_path, writer):
    more = {} if writer == "data" else {"writer": writer, "max_tokens": 12}
    recipe = recipe_of(folders, tmp_path, train={"steps": 40}, **more)
    assert train(recipe, quiet=True).finished
    apart = [row["divergence"] for row in read_metrics(recipe.out / "metrics.jsonl")]
    assert sum(apart[-5:]) < 0.7 * sum(apart[:5])
    assert Tokenizer.load(recipe.out / "model").fingerprint


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(folders, tmp_path):
    """The student writes in half of the steps: bit for bit."""
    more = {"writer": "student", "max_tokens": 8, "written": 0.5}
    chosen = {"schedule": {"kind": "constant"}, "save_every": 1}
    for name, stops in (("whole", [6]), ("cut", [2, 6])):
        for steps in stops:
            train(recipe_of(folders, tmp_path, name=name, train={**chosen, "steps": steps}, **more), quiet=True)
    one, other = (open_checkpoint(Run(tmp_path / name).checkpoints()[-1][1]) for name in ("whole", "cut"))
    for name in one.names():
        assert torch.equal(one.whole(name), other.whole(name)), name


def test_another_teacher_is_another_run(folders, tmp_path):
    train(recipe_of(folders, tmp_path), quiet=True)
    student, _, file = folders
    with pytest.raises(HanlinError, match="made by another run"):
        train(recipe_of((student, student, file), tmp_path), quiet=True)


def test_what_cannot_be_compared_or_cannot_act_is_refused(folders, tmp_path):
    student, _, file = folders
    (tmp_path / "lines.txt").write_text("quite other words " * 30)
    Tokenizer.train([tmp_path / "lines.txt"], vocab_size=300).save(tmp_path / "other")
    model_folder(tmp_path / "model", Tokenizer.load(tmp_path / "other"))
    with pytest.raises(HanlinError, match="another tokenizer"):
        train(recipe_of((student, tmp_path / "model", file), tmp_path), quiet=True)
    for wrong in ({"beta": 0.2}, {"max_tokens": 9}, {"writer": "teacher", "data_loss": 1.0}):
        with pytest.raises(ValueError, match="leave it out"):
            recipe_of(folders, tmp_path, **wrong)
