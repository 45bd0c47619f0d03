"""The bytes a token stands for, for the two ways in which tokenizers spell bytes.

byte level (GPT-2)       each byte is one printable character of an alphabet of 256:  "Ġthe" = b" the"
SentencePiece            "▁" is a space, other characters are themselves, "<0xE4>" is a byte:  "▁the" = b" the"
"""

import json
import re
from collections.abc import Callable

import tokenizers

from hanlin.core.errors import HanlinError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
METASPACE = "▁"

Spell = Callable[[str], bytes]


def byte_alphabet() -> dict[str, int]:
    """Character of the alphabet -> byte: printable Latin-1 for itself, then U+0100 onwards for the rest, in order."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def speller(engine: tokenizers.Tokenizer, where: str) -> Spell:
    """The function from a token as the vocabulary writes it to its bytes; `HanlinError` for another kind of decoder."""
    steps = decoder_steps(engine)
    if "ByteLevel" in steps:
        alphabet = byte_alphabet()
        return lambda token: bytes(alphabet[character] for character in token)
    if "Metaspace" in steps or "Replace" in steps or "ByteFallback" in steps:
        return _spell_metaspace
    raise HanlinError(
        f"The tokenizer in {where} spells its tokens in a way that Hanlin does not know (decoder: "
        f"{', '.join(steps) or 'none'}). Expected byte-level BPE or SentencePiece."
    )


def decoder_steps(engine: tokenizers.Tokenizer) -> list[str]:
    """Names of the decoder's parts."""
    description = json.loads(engine.decoder.__getstate__()) if engine.decoder is not None else {}
    return [part["type"] for part in description.get("decoders", [description] if description else [])]


def _spell_metaspace(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(METASPACE, " ").encode()
