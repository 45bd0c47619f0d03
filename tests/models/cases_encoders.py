"""BERT, RoBERTa and XLNet, with their head and without, with segments and padding."""

from functools import partial
from typing import Any

import torch
from tests.models.cases import Case, Inputs
from torch import Tensor, nn
from transformers.models.bert import BertConfig, BertForMaskedLM, BertModel
from transformers.models.roberta import RobertaConfig, RobertaForMaskedLM, RobertaModel
from transformers.models.xlnet import XLNetConfig, XLNetLMHeadModel, XLNetModel

from hanlin.nn.masks import Padding

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
XLNET = {"vocab_size": 131, "d_model": 64, "n_layer": 3, "n_head": 4, "d_inner": 96}
LENGTHS = (21, 14, 1)  # of the three rows, where they are padded


def build(kind: Any, config: Any, settings: dict[str, Any], **how: Any) -> nn.Module:
    return kind(config(**settings), **how)


def segments_of(ids: Tensor) -> Tensor:
    """Sentence A and B, with another border in each row."""
    rows, length = ids.shape
    border = 5 + 4 * torch.arange(rows)[:, None]
    return (torch.arange(length)[None] >= border).long()


def valid_of(ids: Tensor) -> Tensor:
    """Which tokens are real, padding behind."""
    return torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]


def theirs_of(inputs: Inputs, with_: tuple[str, ...]) -> dict[str, Any]:
    how: dict[str, Any] = {"input_ids": inputs.ids}
    if "segments" in with_:
        how["token_type_ids"] = segments_of(inputs.ids)
    if "padding" in with_:
        how["attention_mask"] = valid_of(inputs.ids).long()
    return how


def ours_of(inputs: Inputs, with_: tuple[str, ...]) -> dict[str, Any]:
    how: dict[str, Any] = {}
    if "segments" in with_:
        how["segments"] = segments_of(inputs.ids)
    if "padding" in with_:
        how["mask"] = Padding(valid_of(inputs.ids))
    return how


def logits(model: nn.Module, inputs: Inputs, with_: tuple[str, ...]) -> Tensor:
    return model(**theirs_of(inputs, with_)).logits


def hidden(model: Any, inputs: Inputs, with_: tuple[str, ...]) -> Tensor:
    return model.base_model(**theirs_of(inputs, with_)).last_hidden_state


def case(name: str, make: Any, *with_: str, reload: str | None = "AutoModelForMaskedLM", bare: bool = False) -> Case:
    read = partial(hidden, with_=with_)
    return Case(
        name, name.partition("-")[0], make, "encoder", call=read if bare else partial(logits, with_=with_), hidden=read,
        ours=partial(ours_of, with_=with_), cached=False, reload=reload is not None, reload_class=reload or "",
    )  # fmt: skip


def bert(**settings: Any) -> Any:
    return partial(build, BertForMaskedLM, BertConfig, SIZES | settings)


def roberta(**settings: Any) -> Any:
    return partial(build, RobertaForMaskedLM, RobertaConfig, SIZES | {"type_vocab_size": 1} | settings)


def xlnet(**settings: Any) -> Any:
    return partial(build, XLNetLMHeadModel, XLNetConfig, XLNET | settings)


# The bare models are built without the pooler that `test_encoders` has; transformers wants one, so it cannot load ours.
CASES = [
    case("bert", bert()),
    case("bert-segments", bert(type_vocab_size=3, hidden_act="relu", layer_norm_eps=1e-5), "segments"),
    case("bert-padded", bert(), "padding", "segments"),
    case("bert-bare", partial(build, BertModel, BertConfig, SIZES, add_pooling_layer=False), reload=None, bare=True),
    case("roberta", roberta(layer_norm_eps=1e-5)),
    case("roberta-pad-0", roberta(pad_token_id=0, type_vocab_size=2, hidden_act="gelu_new"), "segments"),
    case(
        "roberta-bare",
        partial(build, RobertaModel, RobertaConfig, SIZES, add_pooling_layer=False),
        reload=None,
        bare=True,
    ),
    case("xlnet", xlnet(), reload="XLNetLMHeadModel"),
    case("xlnet-segments", xlnet(ff_activation="relu"), "segments", reload="XLNetLMHeadModel"),
    case("xlnet-uni", xlnet(attn_type="uni", tie_word_embeddings=False), reload="XLNetLMHeadModel"),
    case("xlnet-bare", partial(build, XLNetModel, XLNetConfig, XLNET), reload="AutoModel", bare=True),
]
