"""RAHF: the states to follow and the gradient against hooks on answers that stand alone; whole runs in both forms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
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
)

from hanlin.align.adapter_choice import LoraChoice
from hanlin.align.build import train
from hanlin.align.messages import Conversation, Message
from hanlin.align.pairs import read_preferences
from hanlin.align.rahf import last_of_each, with_instruction
from hanlin.align.rahf_recipe import BAD, GOOD, RahfObjective
from hanlin.align.template import TrainingTemplate
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.models import load_model
from hanlin.tokens import Tokenizer

ROWS = [
    {"prompt": f"What is {i}?", "chosen": f"It is {i}, I think." if i % 3 else f"It is the {i}.", "rejected": "No."}
    for i in range(7)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_folder) -> dict[str, Path]:
    """A base and two models that have gone other ways."""
    folder = tmp_path_factory.mktemp("models")
    found = {"base": save_base(folder / "base", tokenizer_folder)}
    for seed, name in enumerate(("good", "bad"), start=5):
        model = load_model(found["base"], dtype=torch.float32, device="cpu")
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        from hanlin.align.build import save_model_folder

        save_model_folder(model, Tokenizer.load(found["base"]), folder / name)
        found[name] = folder / name
    return found


def recipe_of(folder: Path, models, *, adapter=None, **options):
    objective = RahfObjective(files=[written(folder, ROWS)], **options)
    return tiny_recipe(folder, models["base"], objective, adapter=adapter)


def hooked(model, example, layers) -> torch.Tensor:
    """(trained, layers, width): what the layers give where an answer's tokens are predicted, found by hooks."""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        model.model.layers[number].register_forward_hook(lambda _, __, out, number=number: found.update({number: out}))
        for number in layers
    ]
    model(torch.tensor([example.ids]), logits=None)
    for hook in hooks:
        hook.remove()
    on = torch.tensor(example.trained[1:])
    return torch.stack([found[number][0, :-1][on] for number in layers], 1)


@pytest.mark.parametrize("adapter", [None, LoraChoice(rank=4)], ids=["all weights", "lora"])
@pytest.mark.parametrize("form", ["dual", "scit"])
def test_the_gradient_is_that_of_answers_that_stand_alone(tmp_path, models, form, adapter):
    """fp64, 1e-12; the last 4 tokens of each answer, two layers."""
    shown = {"good": models["good"], "bad": models["bad"]} if form == "dual" else {"hindsight": models["good"]}
    recipe = recipe_of(tmp_path, models, form=form, layers=[0, 1], last_tokens=4, adapter=adapter, **shown)
    model, wiring, data = wired(recipe)
    for other in wiring.source._models.values():
        other.double()
    batch = wiring.source.batch(0, 0, data.source.rows_per_epoch)
    loss, packed = gradient(model, wiring.objective, [batch])
    template = TrainingTemplate(Tokenizer.load(models["base"]))
    twins = {name: load_model(path, dtype=torch.float64, device="cpu") for name, path in models.items()}
    model.zero_grad()
    total, count = 0.0, 0
    for row in read_preferences(recipe.objective.files, "pairs").rows:
        for talk in row.conversations:
            example = template.encode(talk)
            with torch.no_grad():
                base = hooked(twins["base"], example, [0, 1])
                if form == "dual":
                    good, bad = (hooked(twins[side], example, [0, 1]) for side in ("good", "bad"))
                else:
                    told = [template.encode(with_instruction(talk, prompt)) for prompt in (GOOD, BAD)]
                    good, bad = (hooked(twins["good"], each, [0, 1]) for each in told)
            apart = hooked(model, example, [0, 1]) - (base + 5.0 * (good - bad))
            total, count = total + apart[-4:].norm(dim=-1).mean(1).sum(), count + len(apart[-4:])
    plain = total / count
    plain.backward()
    assert float(abs(loss - plain.detach())) <= 1e-12 * float(plain.detach())
    assert_close(packed, gradients(model))


@pytest.mark.parametrize("form", ["dual", "scit"])
def test_a_whole_run_makes_its_models_first_and_goes_on_after_a_stop(tmp_path, models, form):
    held = written(tmp_path, ROWS, "held.jsonl")
    options = {"layers": [1], "first_lr": 1e-2, "held_out": [held]}
    recipe = recipe_of(tmp_path, models, form=form, adapter=LoraChoice(rank=4), **options)
    recipe = changed(recipe, steps=8, save_every=4, keep_last=9, lr=3e-3)
    whole = recipe.model_copy(update={"name": "whole"})
    assert train(whole, quiet=True).finished
    first = ["good", "bad"] if form == "dual" else ["hindsight"]
    chats = [json.loads(line) for name in first for line in (whole.out / name / "chats.jsonl").read_text().splitlines()]
    assert len(chats) == 14 and all((whole.out / name / "model").is_dir() for name in first)
    assert sum(chat["messages"][0]["role"] == "system" for chat in chats) == (0 if form == "dual" else 14)
    losses = [row["eval/loss"] for row in read_metrics(whole.out / "metrics.jsonl") if "eval/loss" in row]
    assert losses[-1] < losses[0]
    train(recipe, quiet=True)
    before = {name: (recipe.out / name / "model" / "model.safetensors").stat().st_mtime_ns for name in first}
    for folder in ("checkpoints/step-8", "model"):
        shutil.rmtree(recipe.out / folder)
    train(recipe, quiet=True)
    assert before == {name: (recipe.out / name / "model" / "model.safetensors").stat().st_mtime_ns for name in first}
    assert_same(saved_weights(whole.out), saved_weights(recipe.out))


def test_the_last_tokens_of_each_sequence():
    found = last_of_each(torch.tensor([0, 0, 0, 1, 3, 3]), 2)
    assert found.tolist() == [False, True, True, True, True, True]


def test_an_instruction_stands_before_the_conversations_own():
    talk = Conversation((Message("system", "Short."), Message("user", "Q"), Message("assistant", "A")), "x")
    assert with_instruction(talk, "Be good.").messages[0].content == "Be good.\n\nShort."
    assert len(with_instruction(talk, "Be good.").messages) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "dual", "hindsight": "x"}, "`hindsight` does nothing in the form dual"),
        ({"form": "scit", "good": "x", "bad": "y"}, "`good` does nothing in the form scit"),
        ({"good": "x"}, "give both `good` and `bad`"),
        ({"overlong": "cut"}, "use drop"),
    ],
)
def test_options_that_do_not_act_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RahfObjective(files=["x"], **options)


def test_layers_that_are_not_there_are_refused(tmp_path, models):
    recipe = recipe_of(tmp_path, models, layers=[2], good=models["good"], bad=models["bad"])
    with pytest.raises(HanlinError, match="the model has the layers 0 to 1"):
        train(recipe, quiet=True)
