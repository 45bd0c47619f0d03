"""A recipe with tools, reasoning, replay, noise or another loss: what is trained, for how long, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.align.templates import FORGETFUL, HERMES, with_template

from hanlin.align.build import train
from hanlin.align.methods import method_of, open_data
from hanlin.align.recipe import NewModel, SftObjective, TrainChoices, TrainRecipe
from hanlin.align.sft import sft_objective
from hanlin.align.sources import open_tokenizer
from hanlin.core.errors import HanlinError
from hanlin.data.build import build
from hanlin.data.recipe import DataRecipe
from hanlin.tokens import Tokenizer
from hanlin.train import CausalLM
from hanlin.train.objectives.supervised import Supervised

TOOLS = [{"name": "price", "description": "价格", "parameters": {"type": "object", "properties": {"of": {}}}}]


def turns(what: str, price: int) -> list[dict]:
    call = {
        "type": "function",
        "function": {"name": "price", "arguments": json.dumps({"of": what}, ensure_ascii=False)},
    }
    return [
        {"role": "user", "content": f"What costs {what}?"},
        {"role": "assistant", "content": "", "reasoning_content": f"价格 {what}", "tool_calls": [call]},
        {"role": "tool", "content": str(price)},
        {"role": "assistant", "content": f"{price}元。", "reasoning_content": "done"},
    ]


ROWS = [
    {"tools": TOOLS, "messages": turns("tea", 7)},
    {"tools": TOOLS, "messages": turns("茶", 9)},
    {"messages": [*turns("a pen", 3)[:1], {"role": "assistant", "content": "4", "reasoning_content": "a guess"},
                  {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No."}]},
]  # fmt: skip


@pytest.fixture
def recipe(tokenizer, tmp_path) -> TrainRecipe:
    with_template(tokenizer, HERMES, tmp_path / "tokenizer")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainRecipe(
        name="sft", runs=tmp_path / "runs", tokenizer=tmp_path / "tokenizer",
        model=NewModel(depth=2, width=64, heads=2, kv_heads=1, hidden=128),
        objective=SftObjective(files=[tmp_path / "chat.jsonl"], seq_len=512),
        train=TrainChoices(steps=4, lr=3e-3, batch_size=2, precision="fp32", device="cpu"),
    )  # fmt: skip


def with_objective(recipe: TrainRecipe, **changes) -> TrainRecipe:
    raw = recipe.model_dump()
    raw["objective"] |= changes
    return TrainRecipe.model_validate(raw)


@pytest.fixture
def shards(recipe, tmp_path) -> Path:
    rows = [{"text": f"Text number {n}: 二加二等于四，two plus two is four."} for n in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "shards"
    build(
        DataRecipe(out=out, tokenizer=recipe.tokenizer, sources=[{"paths": [str(tmp_path / "text.jsonl")]}]), quiet=True
    )
    return out


@pytest.mark.slow
def test_a_model_learns_to_reason_call_and_read_the_result(recipe):
    """By heart, in 150 steps; what it then writes by itself is what the template would have written."""
    from hanlin.engine import Engine, SamplingParams

    learnt = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 150})})
    train(learnt, quiet=True)
    tokenizer = Tokenizer.load(learnt.out / "model")
    declared = [{"type": "function", "function": TOOLS[0]}]
    with Engine.from_folder(learnt.out / "model") as engine:
        for what, price in (("tea", 7), ("茶", 9)):
            messages = turns(what, price)
            function = messages[1]["tool_calls"][0]["function"]
            call = f'{{"name": "price", "arguments": {function["arguments"]}}}'
            function["arguments"] = json.loads(function["arguments"])
            says = {1: f"<think>价格 {what}</think><tool_call>{call}</tool_call>", 3: f"<think>done</think>{price}元。"}
            for before, expected in says.items():
                prompt = tokenizer.chat(messages[:before], tools=declared)
                (told,) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=160))
                assert (told.finish_reason, told.text) == ("stop", expected)


def test_notes_count_what_is_learnt(recipe):
    data = open_data(recipe, open_tokenizer(recipe))
    assert "learnt among them: calls of tools 2, turns with reasoning 5" in data.notes
    last = open_data(with_objective(recipe, loss_on="last_turn"), open_tokenizer(recipe))
    assert "learnt among them: calls of tools 2, turns with reasoning 4" in last.notes


def test_the_last_turn_alone_trains_fewer_of_the_same_tokens(recipe):
    tokenizer = open_tokenizer(recipe)
    every, last = (
        open_data(with_objective(recipe, loss_on=how), tokenizer).source.batch(0) for how in ("all_turns", "last_turn")
    )
    assert torch.equal(every.ids, last.ids)
    differ = every.targets != last.targets
    assert differ.any() and (last.targets[differ] == -100).all()
    assert "a guess" in tokenizer.decode(every.targets[differ].tolist())


def test_the_last_turn_of_single_turns_is_refused_for_it_does_nothing(recipe, tmp_path):
    (tmp_path / "single.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(HanlinError, match=r"loss_on is last_turn, but none of the 1 conversations has an earlier turn"):
        open_data(
            with_objective(recipe, files=[tmp_path / "single.jsonl"], loss_on="last_turn"), open_tokenizer(recipe)
        )


def test_held_out_conversations_are_judged_on_the_same_turns(recipe):
    other = with_objective(recipe, loss_on="last_turn", held_out=recipe.objective.files)
    data = open_data(other, open_tokenizer(recipe))
    counts = [
        sum(CausalLM().count(source.batch(step))["tokens"] for step in range(source.steps_per_epoch))
        for source in (data.source, data.held_out["eval"])
    ]
    assert counts[0] == counts[1]


def test_a_template_that_would_train_wrongly_stops_before_the_first_step(recipe, tokenizer):
    with_template(tokenizer, FORGETFUL, recipe.tokenizer)
    with pytest.raises(HanlinError, match=r"chat\.jsonl:3, with the chat template of .*rewrites what stood before"):
        train(recipe, quiet=True)
    assert not recipe.out.exists()


def test_replay_mixes_in_whole_rows_and_the_epochs_stay_those_of_the_conversations(recipe, shards):
    """Ratio 3 over 4,096 rows: 1,024 of conversations and 3,072 of text, to a row; text is trained whole."""
    plain = open_data(recipe, open_tokenizer(recipe))
    mixed = with_objective(recipe, replay=[{"path": shards}], replay_ratio=3.0)
    data = open_data(mixed, open_tokenizer(recipe))
    assert data.source.steps_per_epoch == 4 * plain.source.steps_per_epoch
    assert data.epochs == plain.epochs == 3.0 and data.seq_len == 512
    assert any(note.startswith("replay: 400 documents") and "3 rows for each" in note for note in data.notes)
    names = [str(row) for step in range(2048) for row in data.source.batch(step).names]
    assert [sum("chat.jsonl" in name for name in names), len(names)] == pytest.approx([1024, 4096], abs=1.01)
    batch = next(b for b in map(data.source.batch, range(99)) if "chat.jsonl" not in str(b.names))
    assert (batch.targets >= 0).sum() >= batch.tokens - sum(int(row.max()) + 1 for row in batch.documents)
    assert train(mixed, quiet=True).finished
    with pytest.raises(HanlinError, match=r"weights\.1 was 3\.0, now 2\.0"):
        train(with_objective(mixed, replay_ratio=2.0), quiet=True)


@pytest.mark.parametrize("change", [{"replay_ratio": 1.0}, {"replay": [{"path": "x"}]}])
def test_replay_and_its_ratio_belong_together(recipe, change):
    with pytest.raises(ValueError, match="`replay` and `replay_ratio` belong together"):
        with_objective(recipe, **change)


def test_noise_and_loss_reach_the_objective_and_the_run(recipe):
    assert type(sft_objective(recipe.objective)) is CausalLM
    chosen = with_objective(recipe, neftune=5.0, loss="dft")
    objective = sft_objective(chosen.objective, ahead=1)
    assert isinstance(objective, Supervised)
    assert (objective.neftune, objective.token_loss, objective.ahead) == (5.0, "dft", 1)
    assert train(chosen, quiet=True).finished
    with pytest.raises(HanlinError, match=r"objective_settings\.neftune was 5\.0, now 10\.0"):
        train(with_objective(chosen, neftune=10.0), quiet=True)
    with pytest.raises(ValueError, match="neftune"):
        SftObjective(files=[Path("x")], neftune=0)


def test_every_sft_run_is_wired_with_its_own_objective(recipe):
    from hanlin.align.build import build_model, resolve_settings
    from hanlin.align.method import Parts

    tokenizer, chosen = open_tokenizer(recipe), with_objective(recipe, loss="dft")
    data = open_data(chosen, tokenizer)
    settings, _ = resolve_settings(chosen, data)
    parts = Parts(chosen, tokenizer, data, settings, build_model(chosen, tokenizer, data.seq_len), None)
    assert isinstance(method_of(chosen).wire(parts).objective, Supervised)
    assert type(method_of(recipe).wire(replace(parts, recipe=recipe)).objective) is CausalLM
