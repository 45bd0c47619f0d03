"""Qwen 1, Baichuan and ChatGLM: published with code of their own, so beside twins from papers and file names."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.models.cases import Case, Inputs
from tests.models.twin import Twin
from tests.models.twin_baichuan import SEVEN, THIRTEEN, BaichuanTwin
from tests.models.twin_chatglm import ChatGlmTwin
from tests.models.twin_chatglm2 import ChatGlm2Twin
from tests.models.twin_qwen import QwenTwin
from torch import Tensor

from hanlin.nn.masks import Causal, Prefix
from hanlin.nn.rope import block_positions

STARTS, BLANKS = (51, 36, 58), (50, 29, 57)  # a [gMASK] in front of <bos>, and in the second row a [MASK] further back


def plain(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs.ids)


def with_prompt(model: Any, inputs: Inputs) -> Tensor:
    return model(inputs.ids, STARTS, BLANKS)


def prompt(inputs: Inputs) -> dict[str, Any]:
    positions = block_positions(torch.tensor(STARTS), torch.tensor(BLANKS), inputs.ids.shape[1])
    return {"mask": Prefix(STARTS) | Causal(), "positions": positions}


def case(name: str, family: str, build: Callable[[], Twin], **more: Any) -> Case:
    return Case(name, family, build, reference="own twin", save=lambda twin, folder: twin.save(folder), reload=False,
                **{"call": plain} | more)  # fmt: skip


# long: only then do frequencies in fp16 differ from exact ones
GLM_6B: dict[str, Any] = {"call": with_prompt, "ours": prompt, "prompt": max(STARTS), "length": 72}
LAYERED = {"rmsnorm": False, "add_bias_linear": True, "add_qkv_bias": False, "post_layer_norm": False,
           "apply_residual_connection_post_layernorm": True}  # fmt: skip
CASES = [
    case("qwen", "qwen", QwenTwin),
    case("qwen-logn", "qwen", partial(QwenTwin, seq_length=8, use_dynamic_ntk=False, no_bias=False, rotary_pct=0.5)),
    # a decoded token would turn by another base than the keys before it: cached=False
    case("qwen-ntk", "qwen", partial(QwenTwin, seq_length=8, rotary_emb_base=5000), cached=False),
    case("baichuan", "baichuan", partial(BaichuanTwin, SEVEN)),
    case("baichuan-tied", "baichuan", partial(BaichuanTwin, SEVEN, tie_word_embeddings=True)),
    case("baichuan-13b", "baichuan-13b", partial(BaichuanTwin, THIRTEEN)),
    case("chatglm-6b", "chatglm", ChatGlmTwin, **GLM_6B),
    case("chatglm-untied", "chatglm", partial(ChatGlmTwin, tie_word_embeddings=False), **GLM_6B),
    case("chatglm2", "chatglm2", ChatGlm2Twin),
    case("chatglm2-layer-norms", "chatglm2", partial(ChatGlm2Twin, **LAYERED)),
    case("chatglm2-glm4", "chatglm2", partial(ChatGlm2Twin, rope_ratio=50, num_hidden_layers=3, vocab_size=131)),
]
