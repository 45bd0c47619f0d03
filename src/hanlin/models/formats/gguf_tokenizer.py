"""The tokenizer inside a GGUF file -> `tokenizer.json`, `tokenizer_config.json` and a chat template.

    tokenizer.ggml.model        "gpt2": byte-level BPE with `merges`; "llama": SentencePiece BPE, with `scores` instead
    tokenizer.ggml.pre          the name of the cuts before merging ("smollm", "llama-bpe", "qwen2" …), for "gpt2"
    tokenizer.ggml.tokens       every token's spelling; token_type: 1 normal, 2 unknown, 3 control, 4 user defined,
                                5 unused, 6 a byte
    tokenizer.ggml.*_token_id   which one begins, ends, pads …
    tokenizer.chat_template     Jinja

SentencePiece merges, of all neighbours, those that make the token of the highest score; so a token's merges are all its
cuts into two tokens, in the order of the scores.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.tokens.cuts import PATTERN
from hanlin.tokens.folder import TokenizerFiles

ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>")  # of a turn or document
WORDS = {"gpt-2", "phi-2", "smollm", "starcoder", "refact", "codeshell"}  # GPT-2's words
DIGITS = {"smollm", "starcoder", "refact", "codeshell"}  # before them, each digit by itself
LLAMA3 = {"llama-bpe", "llama3", "llama-v3", "smaug-bpe"}  # numbers in threes; a whole word may be a token
QWEN2 = {"qwen2", "deepseek-r1-qwen"}
KNOWN = sorted(WORDS | LLAMA3 | QWEN2)


@dataclass(frozen=True)
class GgufTokenizer:
    """What a folder needs: its tokenizer files, the number of ids, and the ids for config.json and
    generation_config.json (ends: all that end a generation)."""

    files: TokenizerFiles
    size: int
    bos: int | None
    eos: int | None
    pad: int | None
    ends: tuple[int, ...]


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> GgufTokenizer:
    """The tokenizer of a GGUF file's metadata; path: its name in errors. A kind of vocabulary or a set of cuts that is
    not known here is refused by name: another would cut texts in other places, which nobody would see."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        found = "no tokenizer" if kind is None else f"a tokenizer of the kind {kind!r}"
        raise HanlinError(
            f"{path} holds {found}; Hanlin reads 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)."
        )
    tokens, types = _tokens(metadata, path)
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise HanlinError(f"{path}: its tokenizer rewrites characters (`precompiled_charsmap`), which Hanlin cannot.")
    ids = {role: _id(metadata, f"{name}_token_id", tokens, path) for role, name in ROLES.items()}
    special = {f"{role}_token": tokens[number] for role, number in ids.items() if number is not None}
    engine = (_byte_level if kind == "gpt2" else _sentencepiece)(metadata, tokens, types, path)
    engine |= {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(tokens, types)}
    engine["post_processor"] = _around(metadata, tokens, ids, default=kind == "llama" or _pre(metadata) in LLAMA3)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise HanlinError(f"{path}: `tokenizer.chat_template` is no text.")
    files = TokenizerFiles(json.dumps(engine, ensure_ascii=False, indent=1), special, template)
    files.engine(str(path))  # the library must read it
    also = [_id(metadata, f"{role}_token_id", tokens, path) for role in ("eot", "eom")]
    also += [n for n, token in enumerate(tokens) if types[n] == CONTROL and token in ENDS]
    ends = tuple(dict.fromkeys(number for number in (ids["eos"], *also) if number is not None))
    return GgufTokenizer(files, len(tokens), ids["bos"], ids["eos"], ids["pad"], ends)


def _tokens(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    tokens = _texts(metadata, "tokens", path)
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise HanlinError(f"{path}: `tokenizer.ggml.token_type` must hold one number for each of {len(tokens)} tokens.")
    seen: set[str] = set()
    for number, token in enumerate(tokens):
        if types[number] != UNUSED and token in seen:
            raise HanlinError(f"{path}: the token {token!r} stands twice in its vocabulary (again as {number}).")
        if types[number] != UNUSED:
            seen.add(token)
    return tokens, types


def _texts(metadata: Mapping[str, Any], name: str, path: Path) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        what = "missing" if found is None else "no list of texts"
        raise HanlinError(f"{path}: `tokenizer.ggml.{name}` is {what}; without it there is no tokenizer.")
    return found


def _id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str], path: Path) -> int | None:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if found is None or found in (0xFFFFFFFF, -1):  # llama.cpp's "none"
        return None
    if not isinstance(found, int) or not 0 <= found < len(tokens):
        raise HanlinError(f"{path}: `tokenizer.ggml.{name}` is {found!r}; expected one of {len(tokens)} ids.")
    return found


def _pre(metadata: Mapping[str, Any]) -> Any:
    return metadata.get("tokenizer.ggml.pre")


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}


def _added(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens that are matched before any cut: control tokens (special) and those that users defined."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": token, **plain, "special": types[number] != USER}
        for number, token in enumerate(tokens)
        if types[number] in (UNKNOWN, CONTROL, USER)
    ]


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path) -> dict[str, Any]:
    pre = _pre(metadata)
    if pre not in KNOWN:
        raise HanlinError(
            f"{path}: its tokenizer cuts texts in a way called {pre!r} (`tokenizer.ggml.pre`), which Hanlin does not "
            f"know. It knows {', '.join(KNOWN)}."
        )
    vocabulary = _vocabulary(tokens, types)
    merges = [merge.split(" ") for merge in _texts(metadata, "merges", path)]
    for pair in merges:
        if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise HanlinError(f"{path}: the merge {' '.join(pair)!r} does not join two tokens into a third.")
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre in DIGITS else []
    if pre not in WORDS:
        pattern = PATTERN if pre in QWEN2 else PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
        steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre in WORDS}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocabulary, merges) | {"ignore_merges": pre in LLAMA3},
    }


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise HanlinError(f"{path}: `tokenizer.ggml.scores` must hold one number for each of {len(tokens)} tokens.")
    vocabulary = _vocabulary(tokens, types)
    pieces = {token for number, token in enumerate(tokens) if types[number] == NORMAL}
    merges = [
        [piece[:cut], piece[cut:]]
        for _, piece in sorted((-scores[vocabulary[piece]], piece) for piece in pieces if len(piece) > 1)
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    ahead = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}, space] if ahead else [space]
    after: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    after += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if ahead else []
    unknown = next((tokens[number] for number, kind in enumerate(types) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": before},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": after},
        "model": _bpe(vocabulary, merges) | {"unk_token": unknown, "fuse_unk": True, "byte_fallback": BYTE in types},
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    return {"type": "BPE", **unset, **flags, "vocab": vocabulary, "merges": merges}


def _around(
    metadata: Mapping[str, Any], tokens: Sequence[str], ids: Mapping[str, int | None], *, default: bool
) -> dict[str, Any] | None:
    """What a prompt gets before and behind it. default: whether a beginning token, where the file does not say."""
    before = ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", default) else None
    behind = ids["eos"] if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if before is None and behind is None:
        return None

    def row(*texts: str) -> list[dict[str, Any]]:
        found = []
        for place, text in enumerate(texts):
            found += [_special(tokens[before], place)] if before is not None else []
            found += [{"Sequence": {"id": text, "type_id": place}}]
            found += [_special(tokens[behind], place)] if behind is not None else []
        return found

    used = {tokens[number]: number for number in (before, behind) if number is not None}
    table = {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in used.items()}
    return {"type": "TemplateProcessing", "single": row("A"), "pair": row("A", "B"), "special_tokens": table}


def _special(token: str, place: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": place}}
