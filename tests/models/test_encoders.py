"""BERT, RoBERTa and XLNet beyond plain parity: padding, old names in files, two streams, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.cases import redraw_all
from tests.models.cases_encoders import SIZES, XLNET, bert, roberta, segments_of, xlnet
from tests.models.oracle import quiet, save_theirs
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining
from transformers.models.bert import BertConfig, BertForPreTraining, BertModel
from transformers.models.roberta import RobertaConfig, RobertaModel

from hanlin.core.errors import HanlinError
from hanlin.models import Transformer, load_model, save_model
from hanlin.models.families import find_family
from hanlin.models.two_streams import two_streams
from hanlin.nn.heads import NextSentence, Pooler
from hanlin.nn.masks import Padding, Permutation

CLOSE = {"rtol": 0, "atol": 5e-5}
LENGTHS = torch.tensor([21, 14, 1])


def redrawn(model: nn.Module, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    redraw_all(model)
    return model.eval()


def some_ids(rows: int = 3, length: int = 21) -> torch.Tensor:
    return torch.randint(5, 131, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("side", ["behind", "in front"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlnet"])
@torch.no_grad()
def test_padded_rows_are_theirs_where_there_is_text(name, side, tmp_path):
    theirs = redrawn({"bert": bert, "roberta": roberta, "xlnet": xlnet}[name]()())
    ours = load_model(save_theirs(theirs, tmp_path))
    place = torch.arange(21)[None]
    valid = place < LENGTHS[:, None] if side == "behind" else place >= 21 - LENGTHS[:, None]
    ids = some_ids().masked_fill(~valid, theirs.config.pad_token_id)
    # Only RoBERTa counts tokens; BERT counts places, and XLNet distances.
    positions = (valid.cumsum(1) - 1).masked_fill(~valid, -1) if name == "roberta" else None
    found = ours(ids, mask=Padding(valid), positions=positions).logits
    expected = theirs(ids, attention_mask=valid.long()).logits
    torch.testing.assert_close(found[valid], expected[valid], **CLOSE)


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(tmp_path):
    ours = load_model(save_theirs(redrawn(roberta()()), tmp_path))
    ids = some_ids()
    valid = torch.arange(21)[None] < LENGTHS[:, None]
    padded = ours(ids.masked_fill(~valid, 1), mask=Padding(valid)).logits
    for row, length in enumerate(LENGTHS.tolist()):
        torch.testing.assert_close(padded[row, :length], ours(ids[row : row + 1, :length]).logits[0], **CLOSE)


# -- the heads in their files


@torch.no_grad()
def test_sentence_pairs_are_judged_as_there_and_go_back(tmp_path):
    theirs = redrawn(BertForPreTraining(BertConfig(**SIZES)))
    ours = load_model(save_theirs(theirs, tmp_path / "theirs"))
    assert isinstance(ours.next_sentence, NextSentence)
    check_pairs(ours, theirs)

    redrawn(ours, seed=4)
    save_model(ours, tmp_path / "ours")
    with quiet():
        back, report = AutoModelForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    check_pairs(ours, back)
    again = load_model(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def check_pairs(ours: Transformer, theirs: nn.Module) -> None:
    ids = some_ids()
    expected = theirs(ids, token_type_ids=segments_of(ids))
    found = ours(ids, segments=segments_of(ids))
    torch.testing.assert_close(found.logits, expected.prediction_logits, **CLOSE)
    torch.testing.assert_close(ours.next_sentence(found.hidden), expected.seq_relationship_logits, **CLOSE)
    assert expected.seq_relationship_logits.std() > 0.05


@pytest.mark.parametrize(("kind", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
@torch.no_grad()
def test_a_pooler_is_read_and_written(kind, config, tmp_path):
    theirs = redrawn(kind(config(**SIZES)))
    ours = load_model(save_theirs(theirs, tmp_path / "theirs"))
    assert isinstance(ours.pooler, Pooler) and ours.lm_head is None
    ids = some_ids()
    found = ours.pooler(ours(ids, logits=None).hidden)
    torch.testing.assert_close(found, theirs(ids).pooler_output, **CLOSE)

    save_model(ours, tmp_path / "ours")
    with quiet():
        back, report = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(found, back.eval()(ids).pooler_output, **CLOSE)


@torch.no_grad()
def test_files_of_the_first_years_are_read(tmp_path):
    """Google's BERT on the hub: gamma and beta, the tied matrix and its bias stored again, position ids, the pooler in
    a file that calls itself BertForMaskedLM."""
    theirs = redrawn(BertForPreTraining(BertConfig(**SIZES)))
    save_theirs(theirs, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in weights.items()
    }
    old["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(old, tmp_path / "model.safetensors")
    notes = {"architectures": ["BertForMaskedLM"], "position_embedding_type": "absolute", "directionality": "bidi"}
    change(tmp_path, **notes)
    check_pairs(load_model(tmp_path), theirs)


def test_a_weight_that_is_missing_is_named_as_it_should_be(tmp_path):
    save_theirs(redrawn(bert()()), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["bert.embeddings.LayerNorm.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(HanlinError, match=r"missing: bert\.embeddings\.LayerNorm\.bias"):
        load_model(tmp_path)


def test_two_heads_under_one_name_are_refused(tmp_path):
    ours = load_model(save_theirs(redrawn(BertModel(BertConfig(**SIZES))), tmp_path / "a"))
    ours.next_sentence = NextSentence(64)
    with pytest.raises(HanlinError, match=r"both be saved as bert\.pooler"):
        save_model(ours, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# -- XLNet's second stream


@pytest.mark.parametrize("at_some", [False, True], ids=["everywhere", "at some places"])
@torch.no_grad()
def test_two_streams_are_theirs(at_some, tmp_path):
    theirs = redrawn(xlnet()())
    ours = load_model(save_theirs(theirs, tmp_path))
    ids, generator = some_ids(), torch.Generator().manual_seed(7)
    rows, length = ids.shape
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(rows)])
    later = (order[:, None, :] >= order[:, :, None]).float()  # [row, i, j]: i must not see j
    places = order.argsort(1)  # of rank 0, 1, …
    # Rank 0 sees nothing: theirs then averages over all keys, ours gives zeros. It is no target.
    at = places[:, -6:] if at_some else None
    targets = at if at is not None else places[:, 1:]
    mapping = torch.nn.functional.one_hot(targets, length).float()
    segments = segments_of(ids)
    expected = theirs(ids, perm_mask=later, target_mapping=mapping, token_type_ids=segments).logits
    content, query = two_streams(
        ours, ids, content_mask=Permutation(order), query_mask=Permutation(order, strict=True), at=at, segments=segments
    )
    if at is None:
        query = query.gather(1, targets[..., None].expand(-1, -1, query.shape[-1]))
    torch.testing.assert_close(ours.logits(query), expected, **CLOSE)
    content_there = theirs.transformer(ids, perm_mask=later, token_type_ids=segments).last_hidden_state
    torch.testing.assert_close(content, content_there, **CLOSE)


# -- config.json


def change(folder, **keys) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.mark.parametrize(
    ("make", "keys", "message"),
    [
        (bert, {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        (bert, {"tie_word_embeddings": False}, "tie_word_embeddings"),
        (bert, {"is_decoder": True}, "is_decoder"),
        (bert, {"hidden_act": "gelu_newest"}, "hidden_act"),
        (bert, {"architectures": ["BertForSequenceClassification"]}, "architectures"),
        (bert, {"num_attention_heads": 5}, "num_attention_heads"),
        (roberta, {"pad_token_id": 64}, "pad_token_id"),
        (roberta, {"pad_token_id": -1}, "pad_token_id"),
        (xlnet, {"clamp_len": 12}, "clamp_len"),
        (xlnet, {"bi_data": True}, "bi_data"),
        (xlnet, {"same_length": True}, "same_length"),
        (xlnet, {"untie_r": False}, "untie_r"),
        (xlnet, {"attn_type": "both"}, "attn_type"),
        (xlnet, {"d_head": 8}, "d_head"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(make, keys, message, tmp_path):
    save_theirs(make()(), tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(HanlinError, match=rf"config\.json.*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize("clamp", [-1, 0, None])
def test_distances_without_a_limit_are_read(clamp, tmp_path):
    save_theirs(xlnet()(), tmp_path)
    change(tmp_path, clamp_len=clamp, untie_r=True, d_head=XLNET["d_model"] // XLNET["n_head"])
    load_model(tmp_path)


def test_robertas_padding_row_is_part_of_the_table():
    config = find_family("roberta", "x").read({"pad_token_id": 3, "max_position_embeddings": 70}, None)
    assert (config.embedding.offset, config.max_positions) == (4, 66)
