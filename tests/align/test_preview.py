"""The preview shows what is trained and what is read, token for token, with borders and counts."""

import io
import json

import pytest
from rich.console import Console
from tests.align.templates import HERMES, with_template

from hanlin.align.methods import open_data
from hanlin.align.preview import Stretch, counts, preview, stretches
from hanlin.align.recipe import NewModel, SftObjective, TrainChoices, TrainRecipe
from hanlin.align.sources import open_tokenizer

ROWS = [
    {"instruction": "Who are you?", "output": "I am a [bold]small[/bold] model."},
    {"instruction": "你是谁？", "output": "我是一个小小的语言模型🙂"},
]


@pytest.fixture
def recipe(tmp_path, tokenizer_folder) -> TrainRecipe:
    (tmp_path / "chat.json").write_text(json.dumps(ROWS), encoding="utf-8")
    return TrainRecipe(
        name="x",
        runs=tmp_path,
        tokenizer=tokenizer_folder,
        model=NewModel(),
        objective=SftObjective(files=[tmp_path / "chat.json"], seq_len=128),
        train=TrainChoices(batch_size=1, steps=1),
    )


def shown(recipe: TrainRecipe, **options) -> str:
    stream = io.StringIO()
    preview(recipe, console=Console(file=stream, soft_wrap=True, **options))
    return stream.getvalue()


def test_a_pipe_gets_marks_borders_special_tokens_and_counts(recipe):
    text = shown(recipe)
    assert "⟦I am a [bold]small[/bold] model.<|im_end|>⟧" in text
    assert "⟦我是一个小小的语言模型🙂<|im_end|>⟧" in text
    assert "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n⟦" in text
    assert {"┌ document 1: chat.json:1", "┌ document 2: chat.json:2"} <= set(
        text.replace("document 2: chat.json:1", "document 1: chat.json:1")
        .replace("document 1: chat.json:2", "document 2: chat.json:2")
        .splitlines()
    )
    assert "<|pad|>" not in text
    batch = open_data(recipe, open_tokenizer(recipe)).source.batch(0)
    assert f"{int((batch.targets != -100).sum())} tokens trained" in text
    assert "1 x 128 tokens, 2 documents" in text


def test_a_terminal_gets_two_colours_and_no_marks(recipe):
    text = shown(recipe, force_terminal=True, color_system="standard")
    assert "⟦" not in text
    trained, read = "\x1b[1;32mI am a [bold]small[/bold] model.<|im_end|>\x1b[0m", "\x1b[90m"
    assert trained in text
    assert f"{read}<|im_start|>user" in text


def test_the_stretches_are_the_batch_and_nothing_else(recipe):
    tokenizer = open_tokenizer(recipe)
    batch = open_data(recipe, tokenizer).source.batch(0)
    parts = [part for part in stretches(batch, 0, tokenizer) if isinstance(part, Stretch)]
    assert sum(part.tokens for part in parts) == batch.tokens
    assert sum(part.tokens for part in parts if part.trained) == int((batch.targets != -100).sum())
    ids = batch.ids[0][batch.documents[0] >= 0].tolist()
    assert "".join(part.text for part in parts) == tokenizer.decode(ids, skip_special=False)
    assert len(counts(batch)) == 2


def test_tools_and_reasoning_are_shown_with_what_is_trained_of_them(recipe, tokenizer, tmp_path):
    """The call and the thought stand between the marks, the declaration and the result do not."""
    call = {"name": "price", "arguments": {"of": "茶"}}
    row = {
        "tools": [{"name": "price", "parameters": {}}],
        "messages": [
            {"role": "user", "content": "茶多少钱？"},
            {"role": "assistant", "content": "", "reasoning_content": "看价格", "tool_calls": [call]},
            {"role": "tool", "content": "9"},
            {"role": "assistant", "content": "九元。"},
        ],
    }
    (tmp_path / "tools.json").write_text(json.dumps([row]))
    with_template(tokenizer, HERMES, tmp_path / "tokenizer")
    objective = SftObjective(files=[tmp_path / "tools.json"], seq_len=512)
    text = shown(recipe.model_copy(update={"tokenizer": tmp_path / "tokenizer", "objective": objective}))
    written = '<tool_call>{"name": "price", "arguments": {"of": "茶"}}</tool_call><|im_end|>'
    assert f"<|im_start|>assistant\n⟦<think>看价格</think>{written}⟧" in text
    assert '\n{"type": "function", "function": {"name": "price", "parameters": {}}}\n' in text
    assert "\n<tool_response>9</tool_response><|im_end|>\n" in text and "⟦九元。<|im_end|>⟧" in text
    assert "learnt among them: calls of tools 1, turns with reasoning 1" in text
