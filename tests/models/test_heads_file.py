"""Heads are saved beside the model, or in its file where the family has a place for them, and come back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hanlin.core.errors import HanlinError
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, load_model, save_model
from hanlin.models.heads_file import FILE, attach_heads, attached_heads, load_heads, save_heads
from hanlin.nn.heads import NextSentence, Pooler, SequenceClassifier, TokenClassifier, ValueHead

WIDTH = 32
HEADS = {
    "pairs": lambda: NextSentence(WIDTH),
    "pooler": lambda: Pooler(WIDTH),
    "label": lambda: SequenceClassifier(WIDTH, 5, pooling="mean", bias=True, dropout=0.1),
    "judge": lambda: SequenceClassifier(WIDTH, 2, pooling="cls", pooler=True),
    "names": lambda: TokenClassifier(WIDTH, 7, bias=False, dropout=0.25),
    "value": lambda: ValueHead(WIDTH),
}


def redrawn(head: nn.Module) -> nn.Module:
    for parameter in head.parameters():
        parameter.data.normal_()
    return head.eval()


def make_model() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig.uniform(
        "llama", depth=2, attention=AttentionConfig(4, 2, 8), feed_forward=FeedForwardConfig(48), vocab_size=61,
        width=WIDTH,
    )  # fmt: skip
    return Transformer(config).eval()


@pytest.mark.parametrize("name", HEADS)
def test_every_kind_comes_back_as_it_was(name, tmp_path):
    head = redrawn(HEADS[name]())
    save_heads({name: head}, tmp_path)
    again = load_heads(tmp_path)[name]
    assert repr(again) == repr(head) and not again.training
    assert {p: v for p, v in vars(again).items() if not p.startswith("_")} == {
        p: v for p, v in vars(head).items() if not p.startswith("_")
    }
    hidden, valid = torch.randn(3, 6, WIDTH), torch.arange(6)[None] < torch.tensor([6, 4, 1])[:, None]
    how = (hidden,) if isinstance(head, TokenClassifier | ValueHead) else (hidden, valid)
    assert torch.equal(again(*how), head(*how))


def test_heads_travel_with_their_model(tmp_path):
    model = make_model()
    attach_heads(model, {"judge": redrawn(HEADS["judge"]()), "critic": redrawn(HEADS["value"]())})
    save_model(model, tmp_path)
    assert not any("judge" in name for name in load_file(tmp_path / "model.safetensors"))
    again = load_model(tmp_path)
    assert attached_heads(again).keys() == {"judge", "critic"}
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    half = load_model(tmp_path, dtype=torch.bfloat16)
    assert half.judge.classifier.weight.dtype == torch.bfloat16


def test_a_model_without_heads_leaves_none_of_an_earlier_save(tmp_path):
    model = make_model()
    attach_heads(model, {"value": redrawn(HEADS["value"]())})
    save_model(model, tmp_path)
    assert (tmp_path / FILE).exists()
    del model.value
    save_model(model, tmp_path)
    assert not (tmp_path / FILE).exists() and not attached_heads(load_model(tmp_path))


def test_one_file_holds_description_and_weights(tmp_path):
    save_heads({name: make() for name, make in HEADS.items()}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_what_is_no_head_is_refused(tmp_path):
    with pytest.raises(HanlinError, match=r"'probe' is a Linear; Hanlin saves Pooler, NextSentence"):
        save_heads({"probe": nn.Linear(3, 2)}, tmp_path)
    with pytest.raises(HanlinError, match=r"cannot be called 'model'"):
        attach_heads(make_model(), {"model": HEADS["value"]()})
    assert not list(tmp_path.iterdir())


def rewritten(folder: Path, *, header: str | None, **changes: torch.Tensor) -> None:
    save_heads({"value": HEADS["value"]()}, folder)
    tensors = load_file(folder / FILE) | changes
    save_file(tensors, folder / FILE, metadata={} if header is None else {"heads": header})


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "does not say what its heads are"),
        ("[1]", "does not say what its heads are"),
        ('{"value": {"kind"', "not a whole file"),
        ('{"value": {"kind": "oracle"}}', "of the kind 'oracle'; Hanlin knows pooler, next_sentence"),
        ('{"value": 3}', "of the kind 3"),
        ('{"value": {"kind": "value", "depth": 2}}', "cannot be made from {'depth': 2}"),
        ('{"value": {"kind": "value", "width": 8}}', "do not fit it"),
        ('{"other": {"kind": "value", "width": 32}}', "weights of the head 'other' do not fit"),
        ("{}", "weights of no head that it names: value.value.bias, value.value.weight"),
    ],
)  # fmt: skip
def test_a_spoiled_file_is_told(header, message, tmp_path):
    rewritten(tmp_path, header=header)
    with pytest.raises(HanlinError, match=message):
        load_heads(tmp_path)


def test_a_cut_off_file_is_told(tmp_path):
    save_heads({"value": HEADS["value"]()}, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-40])
    with pytest.raises(HanlinError, match="not a whole file of heads"):
        load_heads(tmp_path)
