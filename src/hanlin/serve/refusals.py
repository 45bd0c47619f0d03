"""Parameters of the known interfaces (OpenAI's, vLLM's and llama.cpp's extensions) that do not act here.

Nothing that a client sends is ignored in silence. A parameter either acts, or changes nothing by its nature
(`HARMLESS`), or stands in `REFUSED` with the one kind of value under which its absence makes no difference; any other
value is answered 400 with the parameter's name.
"""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from hanlin.serve.errors import ApiError

# name -> (is this value the same as leaving it out?, why it is refused otherwise)
Refusals = Mapping[str, tuple[Callable[[Any], bool], str]]

# Labels for the caller's own book-keeping: they could not change an answer of this server even if it read them.
HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


def one_of(*values: Any) -> Callable[[Any], bool]:
    """Exactly one of these, of the same type: True is not 1."""
    return lambda found: any(found == value and type(found) is type(value) for value in values)


def empty(found: Any) -> bool:
    return found in ([], {}, "")


def zero(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found == 0


def one(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found == 1


def anything(found: Any) -> bool:
    """Echoed or read elsewhere; never wrong."""
    return True


never: Callable[[Any], bool] = one_of()

_CHAT_ONLY = "it belongs to conversations: use /v1/chat/completions"
_SAMPLER = "this sampler does not exist here"

REFUSED: Refusals = {
    "functions": (empty, "it is the old name of 'tools'"),
    "function_call": (one_of("none", "auto"), "it is the old name of 'tool_choice'"),
    "tools": (empty, _CHAT_ONLY),
    "tool_choice": (one_of("none", "auto"), _CHAT_ONLY),
    "parallel_tool_calls": (one_of(True, False), _CHAT_ONLY),
    "reasoning_effort": (one_of("none"), _CHAT_ONLY),
    "include_reasoning": (one_of(True), _CHAT_ONLY),
    "add_generation_prompt": (one_of(True), _CHAT_ONLY),
    "continue_final_message": (one_of(False), _CHAT_ONLY),
    "chat_template_kwargs": (empty, _CHAT_ONLY),
    "chat_template": (never, "a template is a program, and only the model's own is run"),
    "grammar": (never, "llama.cpp's notation is not read; use structured_outputs.grammar in Lark's"),
    "verbosity": (one_of("medium"), "the models served here have no verbosity switch"),
    "prediction": (never, "predicted output is not supported"),
    "modalities": (one_of(["text"]), "only text comes out"),
    "audio": (never, "only text comes out"),
    "web_search_options": (never, "this server contacts no other"),
    "service_tier": (one_of("auto", "default"), "there is one tier"),
    "store": (one_of(False), "only /v1/responses keeps answers"),
    "suffix": (empty, "filling a gap is not supported"),
    "top_logprobs": (zero, "completions have 'logprobs', a number"),
    "thinking_token_budget": (never, "the length of the reasoning cannot be bounded apart from the answer"),
    "documents": (empty, "put what the model shall read into the messages"),
    "mirostat": (zero, _SAMPLER),
    "tfs_z": (one, _SAMPLER),
    "xtc_probability": (zero, _SAMPLER),
    "dynatemp_range": (zero, _SAMPLER),
    "dry_penalty_last_n": (one_of(-1), "repetitions are looked for in the whole text"),
    "truncate_prompt_tokens": (never, "a prompt that does not fit is refused, not cut"),
    "spaces_between_special_tokens": (one_of(True), "the text is the tokens' own"),
    "allowed_token_ids": (empty, "use structured_outputs, or logit_bias"),
    "logits_processors": (empty, "no code of clients is run"),
    "mm_processor_kwargs": (empty, "only text goes in"),
    "kv_transfer_params": (empty, "pages do not travel between servers"),
    "include_obfuscation": (one_of(False), "no padding is added to chunks"),
}


def drop_neutral(
    body: dict[str, Any], *, known: Iterable[str], place: str = "", more: Refusals | None = None
) -> dict[str, Any]:
    """The body without what changes nothing; `ApiError` 400 for what would change something but cannot here.

    known: parameters that act on this route. A null value is the same as leaving the parameter out.
    """
    known = set(known)
    refused = {**REFUSED, **(more or {})}
    kept = {}
    for name, value in body.items():
        where = f"{place}{name}"
        if name in known:
            if value is not None:
                kept[name] = value
        elif name in refused:
            neutral, reason = refused[name]
            if value is not None and not neutral(value):
                message = f"'{where}' is not supported with this value: {reason}."
                raise ApiError(400, message, param=where, code="unsupported_parameter")
        elif name not in HARMLESS:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ApiError(400, f"Unknown parameter: '{where}'.{hint}", param=where, code="unknown_parameter")
    return kept
