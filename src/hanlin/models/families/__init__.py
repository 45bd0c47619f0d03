"""Which families Hanlin reads and writes: one short file each, and the dict of them."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.models.families.baichuan import BAICHUAN, BAICHUAN_13B
from hanlin.models.families.bart import BART
from hanlin.models.families.bert import BERT
from hanlin.models.families.bloom import BLOOM
from hanlin.models.families.chatglm import CHATGLM
from hanlin.models.families.chatglm2 import CHATGLM2
from hanlin.models.families.deepseek import DEEPSEEK
from hanlin.models.families.deepseek_v2 import DEEPSEEK_V2
from hanlin.models.families.deepseek_v3 import DEEPSEEK_V3
from hanlin.models.families.family import Family
from hanlin.models.families.gemma2 import GEMMA2
from hanlin.models.families.gemma3 import GEMMA3
from hanlin.models.families.glm4 import GLM, GLM4
from hanlin.models.families.gpt1 import GPT1
from hanlin.models.families.gpt2 import GPT2, GPT3
from hanlin.models.families.gpt_oss import GPT_OSS
from hanlin.models.families.llama import LLAMA
from hanlin.models.families.llama4 import LLAMA4
from hanlin.models.families.marian import MARIAN
from hanlin.models.families.mistral import MISTRAL
from hanlin.models.families.mixtral import MIXTRAL
from hanlin.models.families.phi3 import PHI3
from hanlin.models.families.qwen import QWEN
from hanlin.models.families.qwen2 import QWEN2
from hanlin.models.families.qwen3 import QWEN3
from hanlin.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from hanlin.models.families.roberta import ROBERTA
from hanlin.models.families.switch_transformers import SWITCH_TRANSFORMERS
from hanlin.models.families.t5 import T5, T5_V11
from hanlin.models.families.xlnet import XLNET

__all__ = ["FAMILIES", "Family", "family_of", "find_family"]

_ALL = (
    LLAMA,
    QWEN2,
    QWEN3,
    MISTRAL,
    GEMMA2,
    GEMMA3,
    PHI3,
    GLM,
    GLM4,
    GPT1,
    GPT2,
    GPT3,
    BLOOM,
    QWEN,
    BAICHUAN,
    BAICHUAN_13B,
    CHATGLM,
    CHATGLM2,
    BERT,
    ROBERTA,
    XLNET,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    LLAMA4,
    GPT_OSS,
    T5,
    T5_V11,
    SWITCH_TRANSFORMERS,
    BART,
    MARIAN,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def family_of(json: Mapping[str, Any], where: str) -> Family:
    """The family of a parsed `config.json`: the one of its `model_type`, and where several layouts share that name, the
    one that claims its keys. where: how the message about an unknown one begins, the file and `"model_type"`."""
    name = json.get("model_type")
    same = [family for family in FAMILIES.values() if family.model_type == name]
    if not same:
        raise _unknown(name, dict.fromkeys(family.model_type for family in FAMILIES.values()), where)
    for family in same:
        if family.claims is None or family.claims(json):
            return family
    layouts = " nor ".join(f'"{family.name}"' for family in same)
    raise HanlinError(
        f"{where} is {name!r}, a name that several layouts share; by its other keys this file is neither {layouts}."
    )


def find_family(name: object, where: str) -> Family:
    """The family called `name` (`Family.name`); an unknown one is a `HanlinError` that names those there are, and the
    nearest. where: how the message begins."""
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise _unknown(name, FAMILIES, where)


def _unknown(name: object, known: Mapping[str, Any], where: str) -> HanlinError:
    near = get_close_matches(str(name), known, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    return HanlinError(f"{where} is {name!r}, a family that Hanlin does not know. It knows {', '.join(known)}.{hint}")
