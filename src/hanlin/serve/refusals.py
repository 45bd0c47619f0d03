"""Parameters of the OpenAI interface (and of vLLM's and llama.cpp's extensions) that do not act here.

Nothing that a client sends is ignored in silence. A parameter either acts (`requests.py`), or changes nothing by its
nature (`HARMLESS`), or stands in `REFUSED` with the one kind of value under which its absence makes no difference; any
other value is answered 400 with the parameter's name.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from hanlin.serve.errors import ApiError

# Labels for the caller's own book-keeping: they could not change an answer of this server even if it read them.
HARMLESS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "request_id"})


def _one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda found: any(found == value and type(found) is type(value) for value in values)


def _empty(found: Any) -> bool:
    return found in ([], {}, "")


def _zero(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found == 0


def _one(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and found == 1


_TOOLS = "this server does not call tools yet"
_FORM = "answers of a prescribed form (JSON, regular expression, choice, grammar) are not supported yet"
_never: Callable[[Any], bool] = _one_of()

# name -> (is this value the same as leaving it out?, why it is refused otherwise)
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (_empty, _TOOLS),
    "tool_choice": (_one_of("none", "auto"), _TOOLS),
    "parallel_tool_calls": (_one_of(True, False), _TOOLS),
    "functions": (_empty, _TOOLS),
    "function_call": (_one_of("none", "auto"), _TOOLS),
    "response_format": (_one_of({"type": "text"}), _FORM),
    "structured_outputs": (_never, _FORM),
    "guided_json": (_never, _FORM),
    "guided_regex": (_never, _FORM),
    "guided_choice": (_never, _FORM),
    "guided_grammar": (_never, _FORM),
    "grammar": (_never, _FORM),
    "json_schema": (_never, _FORM),
    "frequency_penalty": (_zero, "use repetition_penalty"),
    "presence_penalty": (_zero, "use repetition_penalty"),
    "logit_bias": (_empty, "single tokens cannot be made likelier yet"),
    "reasoning_effort": (_one_of("none"), "the models served here have no reasoning switch"),
    "verbosity": (_one_of("medium"), "the models served here have no verbosity switch"),
    "prediction": (_never, "predicted output is not supported"),
    "modalities": (_one_of(["text"]), "only text comes out"),
    "audio": (_never, "only text comes out"),
    "web_search_options": (_never, "this server contacts no other"),
    "service_tier": (_one_of("auto", "default"), "there is one tier"),
    "store": (_one_of(False), "this server stores nothing"),
    "suffix": (_empty, "filling a gap is not supported"),
    "best_of": (_one, "ask for n completions and choose"),
    "use_beam_search": (_one_of(False), "beam search is not supported"),
    "length_penalty": (_one, "it belongs to beam search, which is not supported"),
    "include_stop_str_in_output": (_one_of(False), "the text ends before the stop string"),
    "skip_special_tokens": (_one_of(True), "special tokens are never part of the text"),
    "add_generation_prompt": (_one_of(True), "the answer is always a new turn of the assistant"),
    "continue_final_message": (_one_of(False), "the answer is always a new turn of the assistant"),
    "chat_template": (_never, "the model's own template is used"),
    "chat_template_kwargs": (_empty, "the template is called without options"),
    "prompt_logprobs": (_never, "use /v1/completions with echo and logprobs"),
    "return_token_ids": (_one_of(False), "use /tokenize"),
    "priority": (_zero, "requests are served in the order of their arrival"),
    "cache_salt": (_never, "the cache of prompts is not divided among clients"),
    "continuous_usage_stats": (_one_of(False), "usage comes with the last chunk"),
    "thinking_token_budget": (_never, "the models served here have no reasoning switch"),
    "typical_p": (_one, "this sampler does not exist here"),
    "mirostat": (_zero, "this sampler does not exist here"),
}


def drop_neutral(body: dict[str, Any], *, known: Iterable[str], place: str = "") -> dict[str, Any]:
    """The body without what changes nothing; `ApiError` 400 for what would change something but cannot here.

    known: parameters that act on this route. A null value is the same as leaving the parameter out.
    """
    known = set(known)
    kept = {}
    for name, value in body.items():
        where = f"{place}{name}"
        if name in known:
            if value is not None:
                kept[name] = value
        elif name in REFUSED:
            neutral, reason = REFUSED[name]
            if value is not None and not neutral(value):
                message = f"'{where}' is not supported with this value: {reason}."
                raise ApiError(400, message, param=where, code="unsupported_parameter")
        elif name not in HARMLESS:
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ApiError(400, f"Unknown parameter: '{where}'.{hint}", param=where, code="unknown_parameter")
    return kept
