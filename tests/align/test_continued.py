"""Continued pretraining: replay, conversations mixed in, new tokens' rows first, both held-out losses side by side."""

import json
import shutil

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

from hanlin.align.build import train
from hanlin.align.methods import open_data
from hanlin.align.recipe import ContinuedObjective, NewModel, SavedModel, Shards, TrainChoices, TrainRecipe
from hanlin.align.sources import open_tokenizer
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.data.build import build
from hanlin.data.recipe import DataRecipe
from hanlin.tokens import Tokenizer

GENERAL = ["Two plus two is four, three plus three is six.", "A small model answers in one word."]
DOMAIN = ["二加二等于四，三加三等于六。", "def add(a, b): return a + b"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_folder):
    """A folder with shards of both kinds of text, held-out ones, and a model that was pretrained on the general one."""
    folder = tmp_path_factory.mktemp("continued")
    for name, lines in (("general", GENERAL), ("domain", DOMAIN)):
        for part, count in (("", 60), ("-held-out", 12)):
            text = folder / f"{name}{part}.jsonl"
            rows = [{"text": " ".join(lines[(n + i) % 2] for i in range(6))} for n in range(count)]
            text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sources = [{"paths": [str(text)]}]
            out = folder / "shards" / f"{name}{part}"
            build(DataRecipe(out=out, tokenizer=tokenizer_folder, sources=sources), quiet=True)
    base = TrainRecipe(
        name="base", runs=folder, tokenizer=tokenizer_folder,
        model=NewModel(depth=2, width=64, heads=2, kv_heads=1, hidden=128),
        objective={"kind": "causal_lm", "seq_len": 64, "shards": [{"path": folder / "shards/general"}]},
        train=TrainChoices(steps=60, batch_size=4, lr=3e-3, precision="fp32", device="cpu"),
    )  # fmt: skip
    train(base, quiet=True)
    return folder


def recipe_of(made, name: str, *, steps: int = 40, tokenizer=None, **objective) -> TrainRecipe:
    shards = made / "shards"
    return TrainRecipe(
        name=name, runs=made, tokenizer=tokenizer, model=SavedModel(path=made / "base/model"),
        objective=ContinuedObjective(
            domain=[Shards(path=shards / "domain")], held_out=[shards / "domain-held-out"],
            held_out_general=[shards / "general-held-out"], held_out_rows=8, seq_len=64, **objective,
        ),
        train=TrainChoices(steps=steps, batch_size=8, lr=3e-3, precision="fp32", device="cpu"),
    )  # fmt: skip


def curves(recipe: TrainRecipe) -> tuple[list[float], list[float]]:
    rows = [row for row in read_metrics(recipe.out / "metrics.jsonl") if "eval/loss" in row]
    return [row["eval/loss"] for row in rows], [row["eval_general/loss"] for row in rows]


def test_replay_forgets_less_and_both_losses_stand_side_by_side_from_before_the_first_step(made):
    general = [Shards(path=made / "shards/general")]
    without, with_replay = recipe_of(made, "alone", ratio=0), recipe_of(made, "replay", ratio=1, general=general)
    forgotten = {}
    for recipe in (without, with_replay):
        assert train(recipe, quiet=True).finished
        domain, kept = curves(recipe)
        assert domain[-1] < domain[0] - 0.5, "the domain is learnt"
        forgotten[recipe.name] = kept[-1] - kept[0]
        report = (recipe.out / "report.md").read_text()
        assert f"{kept[0]:.4f} | {kept[-1]:.4f}" in report and (recipe.out / "forgetting.png").stat().st_size > 5000
    assert forgotten["alone"] > 0.2 and forgotten["replay"] < 0.5 * forgotten["alone"]


def test_rows_are_shared_out_as_the_recipe_says(made, tmp_path):
    """Ratio 3 and a tenth of conversations: 4,096 rows hold 921.6 of the domain, 2764.8, 409.6, to a row."""
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"instruction": "Who are you?", "output": "A small model."}) + "\n")
    general = [Shards(path=made / "shards/general")]
    recipe = recipe_of(made, "shares", ratio=3, general=general, sft=[chat], sft_share=0.1)
    data = open_data(recipe, open_tokenizer(recipe))
    source = data.source
    kinds = [source.weights[i] for i in range(3)]
    assert kinds == pytest.approx([0.225, 0.675, 0.1])
    names = [name for step in range(512) for row in source.batch(step).names for name in row[:1]]
    counts = [sum(part in str(name) for name in names) for part in ("domain", "general", "chat")]
    assert sum(counts) == len(names) == 4096
    assert counts == pytest.approx([921.6, 2764.8, 409.6], abs=1.01)


def test_rows_of_new_tokens_are_trained_first_and_alone(made, tokenizer_folder, tmp_path):
    larger = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, larger)
    engine = tokenizers.Tokenizer.from_file(str(larger / "tokenizer.json"))
    engine.add_tokens(["二加二", "return"])
    engine.save(str(larger / "tokenizer.json"))
    tokenizer = Tokenizer.load(larger)
    assert tokenizer.size == 402
    shards = tmp_path / "domain"
    sources = [{"paths": [str(made / "domain.jsonl")]}]
    build(DataRecipe(out=shards, tokenizer=larger, sources=sources), quiet=True)
    recipe = TrainRecipe(
        name="grown", runs=tmp_path, tokenizer=larger, model=SavedModel(path=made / "base/model"),
        objective=ContinuedObjective(domain=[Shards(path=shards)], ratio=0, seq_len=64, new_rows_first=0.5),
        train=TrainChoices(steps=20, batch_size=8, lr=3e-3, precision="fp32", device="cpu"),
    )  # fmt: skip
    assert train(recipe, quiet=True).finished
    base = load_file(made / "base/model/model.safetensors")
    alone = load_file(recipe.out / "new-rows/checkpoints/step-10/model.safetensors")
    for name, tensor in base.items():
        assert torch.equal(alone[name][: len(tensor)], tensor), f"{name}: what was there is not touched"
    table = "model.embed_tokens.weight"
    pieces = Tokenizer.load(tokenizer_folder).encode_bytes(b"return")
    began = base[table][pieces].mean(0)
    assert not torch.allclose(alone[table][401], began, atol=1e-3), "the new row has learnt"
    final = load_file(recipe.out / "model/model.safetensors")
    assert final[table].shape[0] == 402 and not torch.equal(final[table][:400], base[table])


def test_a_tokenizer_that_is_no_extension_is_refused(made, tokenizer_folder, tmp_path):
    """Two ordinary tokens have changed places, and one was added behind."""
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[40:42]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    engine = tokenizers.Tokenizer.from_file(str(other / "tokenizer.json"))
    engine.add_tokens(["return"])
    engine.save(str(other / "tokenizer.json"))
    sources = [{"paths": [str(made / "domain.jsonl")]}]
    build(DataRecipe(out=tmp_path / "s", tokenizer=other, sources=sources), quiet=True)
    recipe = TrainRecipe(
        name="wrong", runs=tmp_path, tokenizer=tmp_path / "other", model=SavedModel(path=made / "base/model"),
        objective=ContinuedObjective(domain=[Shards(path=tmp_path / "s")], ratio=0, seq_len=64),
        train=TrainChoices(steps=2, batch_size=4, lr=1e-3, precision="fp32"),
    )  # fmt: skip
    with pytest.raises(HanlinError, match="no extension of the model's own"):
        train(recipe, quiet=True)


def test_general_text_and_ratio_belong_together(made):
    for wrong in ({"ratio": 5}, {"ratio": 0, "general": [Shards(path=made)]}):
        with pytest.raises(ValueError, match="belong together"):
            ContinuedObjective(domain=[Shards(path=made)], **wrong)
