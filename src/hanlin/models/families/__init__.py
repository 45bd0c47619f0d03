"""Which families Hanlin reads and writes: one short file each, and the dict of them."""

from difflib import get_close_matches

from hanlin.core.errors import HanlinError
from hanlin.models.families.family import Family
from hanlin.models.families.gemma2 import GEMMA2
from hanlin.models.families.llama import LLAMA
from hanlin.models.families.mistral import MISTRAL
from hanlin.models.families.qwen2 import QWEN2
from hanlin.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "find_family"]

_ALL = (
    LLAMA,
    QWEN2,
    QWEN3,
    MISTRAL,
    GEMMA2,
)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def find_family(name: object, where: str) -> Family:
    """The family called `name`; an unknown one is a `HanlinError` that names those there are, and the nearest.

    where: how the message begins, e.g. `models/x/config.json: "model_type"`.
    """
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    near = get_close_matches(str(name), FAMILIES, n=1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    known = ", ".join(FAMILIES)
    raise HanlinError(f"{where} is {name!r}, a family that Hanlin does not know. It knows {known}.{hint}")
