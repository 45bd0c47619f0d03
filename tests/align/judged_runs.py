"""A tiny saved model and the parts of a run on it, for the tests of methods that learn from judged answers."""

import json
from pathlib import Path

import torch

from hanlin.align.build import build_model, save_model_folder
from hanlin.align.method import Data, Parts, Wiring
from hanlin.align.methods import METHODS, open_data
from hanlin.align.preference_recipe import PreferenceObjective
from hanlin.align.recipe import NewModel, SavedModel, TrainChoices, TrainRecipe
from hanlin.models import Transformer
from hanlin.tokens import Tokenizer
from hanlin.train.objective import step_loss

Gradients = dict[str, torch.Tensor]


def written(folder: Path, rows, name: str = "rows.jsonl") -> Path:
    """Rows as JSON lines."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def save_base(folder: Path, tokenizer_folder: Path) -> Path:
    """A model folder with weights far from zero."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    recipe = TrainRecipe(
        name="x", tokenizer=tokenizer_folder, objective=PreferenceObjective(files=[Path("none")]),
        model=NewModel(depth=2, width=32, heads=2, kv_heads=1, hidden=64, max_positions=128),
    )  # fmt: skip
    torch.manual_seed(0)
    model = build_model(recipe, tokenizer, 128)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    save_model_folder(model, tokenizer, folder / "model")
    return folder / "model"


def tiny_recipe(folder: Path, base: Path, objective, *, name: str = "run", adapter=None, **choices) -> TrainRecipe:
    """Four steps of four rows on a CPU, unless `choices` say otherwise."""
    usual = {"steps": 4, "lr": 1e-2, "batch_size": 4, "precision": "fp32", "device": "cpu"}
    return TrainRecipe(
        name=name, runs=folder / "runs", model=SavedModel(path=base), adapter=adapter, objective=objective,
        train=TrainChoices(**{**usual, **choices}),
    )  # fmt: skip


def changed(recipe: TrainRecipe, **choices) -> TrainRecipe:
    """The recipe with other choices of `train`."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=choices)})


def wired(recipe: TrainRecipe, *, scale: float = 0.05, seed: int = 1) -> tuple[Transformer, Wiring, Data]:
    """A policy that has moved away from its reference by `scale`, wired as `train` wires it, in fp64."""
    tokenizer = Tokenizer.load(recipe.model.path)
    data = open_data(recipe, tokenizer)
    model = build_model(recipe, tokenizer, data.seq_len).double()
    wiring = METHODS[type(recipe.objective)].wire(Parts(recipe, tokenizer, data, recipe.train, model, None))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * scale)
    return model, wiring, data


def gradient(model: Transformer, objective, parts) -> tuple[torch.Tensor, Gradients]:
    """The loss of a step and its gradients, micro-batch by micro-batch, as the trainer sums them."""
    totals: dict[str, float] = {}
    for part in parts:
        for name, value in objective.count(part).items():
            totals[name] = totals.get(name, 0.0) + value
    model.zero_grad()
    loss = sum(step_loss(objective.loss(model, part)[0], totals) for part in parts)
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: Transformer) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(one: Gradients, other: Gradients, tolerance: float = 1e-12) -> None:
    assert one.keys() == other.keys() and len(one)
    for name in one:
        assert (one[name] - other[name]).norm() <= tolerance * max(1.0, float(other[name].norm())), name


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of RUN/model."""
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def answer_logprobs(model: Transformer, example) -> torch.Tensor:
    """log p of an answer's trained tokens, from whole logits of it alone."""
    log_p = model(torch.tensor([example.ids])).logits[0, :-1].log_softmax(-1)
    on = torch.tensor(example.trained[1:])
    return log_p.gather(-1, torch.tensor(example.ids[1:])[:, None])[:, 0][on]
