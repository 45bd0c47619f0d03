"""A recipe becomes a model folder: learnt by heart, loaded by transformers, continued or refused after a stop."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from hanlin.align.build import build_model, resolve_settings, train
from hanlin.align.conversations import read_conversations
from hanlin.align.methods import open_data
from hanlin.align.recipe import NewModel, SavedModel, SftObjective, TrainChoices, TrainRecipe
from hanlin.align.sft import sft_examples
from hanlin.align.sources import open_tokenizer
from hanlin.core.errors import HanlinError
from hanlin.core.metrics import read_metrics
from hanlin.data.packing import PackedExamples
from hanlin.tokens import Tokenizer
from hanlin.train import CausalLM, TrainSettings

ROWS = [
    {"instruction": f"What is the code of item {i}?", "output": f"The code is {i * 37 % 101}."}
    if i % 2
    else {"instruction": f"第{i}号物品的代码是什么？", "output": f"代码是{i * 53 % 97}。"}
    for i in range(20)
]
SMALL = NewModel(depth=2, width=64, heads=2, kv_heads=1, hidden=128, max_positions=128)


@pytest.fixture
def recipe(tmp_path, tokenizer_folder) -> TrainRecipe:
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return TrainRecipe(
        name="sft",
        runs=tmp_path / "runs",
        tokenizer=tokenizer_folder,
        model=SMALL,
        objective=SftObjective(files=[file]),
        train=TrainChoices(steps=8, lr=3e-3, batch_size=4, precision="fp32", device="cpu"),
    )


def changed(recipe: TrainRecipe, **updates) -> TrainRecipe:
    """The recipe with `train__lr=...` and the like changed, checked again."""
    raw = recipe.model_dump()
    for path, value in updates.items():
        *sections, last = path.split("__")
        node = raw
        for section in sections:
            node = node[section]
        node[last] = value
    return TrainRecipe.model_validate(raw)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_twenty_rows_are_learnt_by_heart_and_transformers_says_them(recipe):
    result = train(changed(recipe, train__steps=300), quiet=True)
    assert result.finished
    assert read_metrics(recipe.out / "metrics.jsonl")[-1]["loss"] < 0.05

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipe.out / "model")
    model = AutoModelForCausalLM.from_pretrained(recipe.out / "model")
    for row in ROWS:
        question = [{"role": "user", "content": row["instruction"]}]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        told = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert told[-1] in model.generation_config.eos_token_id, "it must know where its turn ends"
        assert tokenizer.decode(told, skip_special_tokens=True) == row["output"]


def test_packed_conversations_have_the_loss_that_they_have_alone(recipe):
    """Sums over the same conversations, packed several a row and one a row, fp64: relative difference <= 1e-12."""
    tokenizer = open_tokenizer(recipe)
    conversations = read_conversations(recipe.objective.files).conversations
    examples, _ = sft_examples(conversations, tokenizer)
    torch.manual_seed(1)
    model = build_model(recipe, tokenizer, 128).double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)

    def loss(*, pack: bool) -> tuple[float, float]:
        source = PackedExamples(examples, seq_len=128, rows_per_step=1, seed=3, pad_id=tokenizer.pad_id, pack=pack)
        batches = [source.batch(step) for step in range(source.rows_per_epoch)]
        assert any(not batch.one_document_a_row for batch in batches) == pack
        with torch.no_grad():
            total = sum(float(CausalLM().loss(model, batch)[0][0][0]) for batch in batches)
        return total, sum(CausalLM().count(batch)["tokens"] for batch in batches)

    (together, count), (alone, count_alone) = loss(pack=True), loss(pack=False)
    assert count == count_alone == sum(sum(e.trained[1:]) for e in examples)
    assert abs(together - alone) <= 1e-12 * alone


def test_what_is_left_open_is_decided_said_and_written_down(recipe, capsys):
    falling = {"kind": "cosine", "floor": 0.02, "warmup": 0.0}
    first = changed(recipe, name="base", train__lr=1e-3, train__schedule=falling)
    train(first, quiet=True)
    open_recipe = TrainRecipe(
        name="open",
        runs=recipe.runs,
        model=SavedModel(path=recipe.runs / "base" / "model"),
        objective=SftObjective(files=recipe.objective.files, held_out=recipe.objective.files, packing=False),
        train=TrainChoices(batch_size=5, precision="fp32", device="cpu"),
    )
    train(open_recipe)
    rates = [row["lr"] for row in read_metrics(recipe.runs / "base" / "metrics.jsonl")]
    written = TrainRecipe.load(recipe.runs / "open" / "recipe.yaml")
    assert written.train.epochs == 3 and written.train.steps is None
    assert written.train.lr == pytest.approx(10 * rates[-1]) and rates[-1] < 1e-3 / 10
    assert written.objective.seq_len == 64
    assert written.train.eval_every == 1  # 12 steps, ten evaluations
    told = capsys.readouterr().err
    assert "20 conversations" in told and "epochs: 3" in told and "ten times" in told
    rows = read_metrics(recipe.runs / "open" / "metrics.jsonl")
    assert rows[-1]["step"] == 12
    assert [row["eval/loss"] for row in rows if "eval/loss" in row][-1] > 0
    assert (recipe.runs / "open" / "model" / "chat_template.jinja").exists()
    again = train(written, quiet=True)  # the resolved recipe is the same run: nothing is left to do
    assert again.step == 12


def test_a_stopped_run_goes_on_to_the_same_weights(recipe):
    """Three of eight steps, as a killed run leaves them; the same recipe finishes it, bit for bit (CPU)."""
    saving = changed(recipe, train__save_every=3, train__keep_last=9)
    train(changed(saving, name="whole"), quiet=True)
    train(saving, quiet=True)
    for folder in ("checkpoints/step-6", "checkpoints/step-8", "model"):
        shutil.rmtree(recipe.out / folder)
    train(saving, quiet=True)
    whole, resumed = weights(recipe.runs / "whole" / "model"), weights(recipe.out / "model")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    steps = [row["step"] for row in read_metrics(recipe.out / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_a_run_begun_otherwise_is_refused_by_the_name_of_what_differs(recipe):
    train(changed(recipe, train__steps=1), quiet=True)
    for change, named in [
        ({"train__lr": 1e-4}, "lr"),
        ({"objective__packing": False}, "pack"),
        ({"model": {"kind": "saved", "path": recipe.out / "model"}}, "another model"),
    ]:
        with pytest.raises(HanlinError, match=named):
            train(changed(recipe, train__steps=1, **change), quiet=True)
        assert yaml.safe_load((recipe.out / "recipe.yaml").read_text())["train"]["lr"] == 3e-3


def test_mistakes_in_a_recipe_are_explained(recipe, tmp_path):
    tokenizer = open_tokenizer(recipe)
    with pytest.raises(HanlinError, match=r"seq_len is 4096, but the model knows only 128"):
        open_data(changed(recipe, objective__seq_len=4096), tokenizer)
    with pytest.raises(HanlinError, match=r"give `objective.held_out`"):
        resolve_settings(changed(recipe, train__eval_every=2), open_data(recipe, tokenizer))
    for change, words in [
        ({"tokenizer": None}, "a new model needs `tokenizer`"),
        ({"name": "a/b"}, "no folder name"),
        ({"train__epochs": 1.0}, "not both"),
        ({"model__heads": 3, "model__kv_heads": 2}, "not a multiple of kv_heads"),
        ({"model__heads": 3}, "give head_dim"),
        ({"model__window": 8}, "belongs to the family mistral"),
        ({"objective__files": []}, "at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            changed(recipe, **change)
    train(changed(recipe, train__steps=1), quiet=True)
    Tokenizer.train([Path(__file__)], vocab_size=500).save(tmp_path / "larger")
    other = changed(
        recipe,
        name="other",
        tokenizer=tmp_path / "larger",
        model={"kind": "saved", "path": recipe.out / "model"},
    )
    assert Tokenizer.load(tmp_path / "larger").size == 500 > tokenizer.size
    with pytest.raises(HanlinError, match="Use the tokenizer that the model was trained with"):
        train(other, quiet=True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_family_can_be_made_anew_and_is_read_back(recipe, family):
    window = 16 if family == "mistral" else None
    chosen = changed(recipe, name=family, train__steps=1, model__family=family, model__window=window)
    train(chosen, quiet=True)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(chosen.out / "model")
    assert model.config.model_type == family


def test_settings_are_complete_after_resolving(recipe):
    data = open_data(recipe, open_tokenizer(recipe))
    settings, notes = resolve_settings(changed(recipe, train__lr=None, train__steps=None), data)
    assert isinstance(settings, TrainSettings)
    assert settings.epochs == 3 and settings.lr > 0
    assert len(notes) == 2
    muon, _ = resolve_settings(changed(recipe, train__lr=None, train__optimizer={"kind": "muon"}), data)
    assert (settings.lr, muon.lr) == (1e-3, 4e-3)
    with pytest.raises(HanlinError, match="How long to train"):
        resolve_settings(changed(recipe, train__steps=None), replace(data, epochs=None))
