"""Output that must match: a JSON schema, a regular expression, a list of choices, a grammar.

Before a token is drawn, every token that no valid text continues with is forbidden:

    text so far ──▶ parser state ──▶ one bit a token of the vocabulary ──▶ the sampler's `allowed`

The parser is llguidance (Earley over a lexer of regular-expression derivatives, walking the vocabulary as a trie of
bytes); ours are the vocabulary it sees, the limits, the places of speculation and the cache. Special tokens match no
text: a grammar names them as `<|name|>`. Where the text may end, every end token is allowed. Nothing is forced: a word
may be spelled in every way the vocabulary can spell it.

JSON. Between the parts of a document there may be one line break and up to 40 blanks, so that compact and indented
documents can be written, but no endless row of spaces; before and after the document there is nothing. Characters
stand for themselves (only control characters, quotes and backslashes are escaped). Properties come in the order of the
schema, and keys that `additionalProperties` lets in may repeat. What a schema asks and llguidance cannot keep is
refused by name. A schema may choose other whitespace with llguidance's own "x-guidance" key.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError, require
from hanlin.engine.types import Constraint
from hanlin.tokens import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LONGEST = 128 * 1024  # characters of a constraint; 400 KB of patterns took 3 s to compile, this stays below 1 s
KEPT = 32  # compiled grammars; one at its limit of states holds 40 MB
LIMITS = {"initial_lexer_fuel": 500_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000}
LIMITS |= {"max_items_in_row": 2000, "max_lexer_states": 50_000, "max_grammar_size": 200_000}

JSON_SPACE = r"\r?\n[ \t]{0,40}|[ \t]{1,40}"
ALL = -1  # 32 ones


class Constraints:
    """Compiles constraints for one tokenizer.

    vocabulary: ids the model gives logits for (it may exceed the tokenizer's). end_ids: tokens that end a text; allowed
    wherever the constraint may end, and nowhere else. The tokenizer is read at the first `compile` (half a second for
    150,000 tokens). Threads may share it.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: frozenset[int]) -> None:
        bad = sorted(token for token in end_ids if not 0 <= token < vocabulary)
        if not end_ids or bad:
            raise HanlinError(
                f"A constrained output needs at least one end token, all below {vocabulary} (the vocabulary); "
                f"found {bad or 'none'}."
            )
        self._tokenizer, self._vocabulary, self._end_ids = tokenizer, vocabulary, end_ids
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def words(self) -> int:
        """Width of a mask: 32 tokens a word."""
        return (self._vocabulary + 31) // 32

    def compile(self, constraint: Constraint) -> "Matcher":
        """The matcher of a new text. `HanlinError`, with the reason, for what cannot be compiled or is too large;
        at most two seconds, usually a millisecond; a constraint seen before costs a copy."""
        state = self._recall(constraint)
        if state is None:
            state = self._build(constraint)
            with self._lock:
                self._compiled[constraint] = state
                self._compiled.move_to_end(constraint)
                while len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return Matcher(state.deep_copy(), self.words, self._end_ids)

    def start_masks(
        self, executor: Executor, places: Sequence["tuple[Matcher, Sequence[int]] | None"]
    ) -> "Future[Tensor]":
        """Begin to fill the masks of a step in another thread, while the forward runs.

        A pair (matcher, drafted) makes len(drafted) + 1 rows, as `Matcher.masks` does; None makes one row of ones. The
        future gives the rows in order: (M, words) int32. Until it is done, its matchers must be left alone.
        """
        return executor.submit(self.fill_masks, tuple(places))

    def fill_masks(self, places: Sequence["tuple[Matcher, Sequence[int]] | None"]) -> Tensor:
        """The masks that `start_masks` promises, at once: (M, words) int32."""
        heights = [1 if place is None else len(place[1]) + 1 for place in places]
        masks = torch.full((sum(heights), self.words), ALL, dtype=torch.int32)
        for place, rows in zip(places, masks.split(heights) if heights else (), strict=True):
            if place is not None:
                place[0].fill(rows, place[1])
        return masks

    def _recall(self, constraint: Constraint) -> "LLMatcher | None":
        """The compiled constraint, if there is one that still works: all its copies share the lexer's states, which are
        made as texts need them, so that a hard constraint wears out after some texts and is compiled anew."""
        with self._lock:
            state = self._compiled.get(constraint)
            if state is None:
                return None
            self._compiled.move_to_end(constraint)
        probe = state.deep_copy()
        probe.compute_bitmask()
        return None if probe.is_error() else state

    def _build(self, constraint: Constraint) -> "LLMatcher":
        if len(constraint.value) > LONGEST:
            raise HanlinError(
                f"The constraint ({constraint.kind}) has {len(constraint.value):,} characters; "
                f"at most {LONGEST:,} are compiled."
            )
        library = require("llguidance", "constrain")
        grammar = json.dumps({"grammars": [{"lark_grammar": to_lark(constraint)}]})
        limits = library.LLParserLimits(**LIMITS, verbose_errors=False)
        with self._lock:
            vocabulary = self._view
        state: LLMatcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if not state.is_error():
            state.compute_bitmask()  # some grammars fail only here; and every copy starts with a warm lexer
        if state.is_error():
            reason = _reason(state) if constraint.kind == "grammar" else _reason(state).split("\n   1 | ")[0]
            raise HanlinError(f"The constraint ({constraint.kind}) cannot be compiled: {reason}")
        return state

    @cached_property
    def _view(self) -> "LLTokenizer":
        """The tokenizer as llguidance sees it. Ids that no token has, and spellings that no text can have, are empty,
        which is never allowed."""
        tokenizer, end_ids = self._tokenizer, sorted(self._end_ids)
        special = {token for token in tokenizer.special.values() if token < self._vocabulary} | self._end_ids
        vocabulary = _Vocabulary(
            tokens=[tokenizer.token_bytes(token) for token in range(self._vocabulary)],
            special=sorted(special),
            end=end_ids[0],
            encode=tokenizer.encode,
        )
        return require("llguidance", "constrain").LLTokenizer(vocabulary, eos_token=end_ids)


class Matcher:
    """How far one text is inside its constraint. One thread at a time."""

    def __init__(self, state: "LLMatcher", words: int, end_ids: frozenset[int]) -> None:
        self._state, self._words, self._end_ids = state, words, end_ids
        self._ended = False

    def mask(self, drafted: Sequence[int] = ()) -> Tensor:
        """What may follow the accepted tokens and these: (words,) int32, bit t % 32 of word t // 32 is token t."""
        return self.masks(drafted)[-1]

    def masks(self, drafted: Sequence[int]) -> Tensor:
        """What may follow the accepted tokens and each beginning of these: (len(drafted) + 1, words) int32.

        After a drafted token that is not allowed, or that ends the text, the rows are ones: nothing is drawn there.
        """
        rows = torch.full((len(drafted) + 1, self._words), ALL, dtype=torch.int32)
        self.fill(rows, drafted)
        return rows

    def fill(self, rows: Tensor, drafted: Sequence[int]) -> None:
        """`masks` into rows that are all ones, contiguous int32 on the CPU; lets other threads run meanwhile."""
        taken = 0
        for place, row in enumerate(rows):
            self._state.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
            if place == len(drafted) or drafted[place] in self._end_ids:
                break
            if not self._state.try_consume_tokens([drafted[place]]):
                break
            taken += 1
        if taken:
            self._state.rollback(taken)

    def accept(self, token: int) -> None:
        """The text goes on with this token (an end token is accepted too). `HanlinError` if the constraint forbids it,
        or became too complex to follow: its mask then allowed only the end, and what was written is no match."""
        if token in self._end_ids:
            good = self._state.is_accepting()
            self._ended |= good
        else:
            good = not self._ended and self._state.try_consume_tokens([token]) == 1
        if good:
            return
        self._state.compute_bitmask()  # only this tells a token that is forbidden from one that was too much work
        if self.error:
            raise HanlinError(f"The constraint became too complex while the text was written: {self.error}")
        raise HanlinError(f"The constraint does not allow the token {token} here.")

    @property
    def finished(self) -> bool:
        """Whether nothing but the end is allowed."""
        return self._ended or self._state.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text so far is a match as it stands."""
        return self._ended or (not self.error and self._state.is_accepting())

    @property
    def error(self) -> str:
        """Why the constraint can no longer be followed; empty while it can."""
        return _reason(self._state) if self._state.is_error() else ""

    def copy(self) -> "Matcher":
        """One that goes on alone from here."""
        twin = Matcher(self._state.deep_copy(), self._words, self._end_ids)
        twin._ended = self._ended
        return twin


def to_lark(constraint: Constraint) -> str:
    """The constraint as a grammar in Lark's notation. `HanlinError` for a value that does not fit its kind."""
    return KINDS[constraint.kind](constraint.value) + '\n%llguidance {"no_forcing": true}\n'


def json_rule(schema: Any) -> str:
    """A JSON schema as the body of a Lark rule, with our whitespace unless it chooses its own."""
    if not isinstance(schema, dict | bool):
        raise HanlinError(f"A JSON schema is an object, true or false; found {json.dumps(schema)[:80]}.")
    if schema is False:
        raise HanlinError("The JSON schema is false, which nothing matches.")
    schema = {} if schema is True else schema
    options = schema.get("x-guidance", {})
    if not isinstance(options, dict):
        raise HanlinError(f'"x-guidance" in the JSON schema must be an object; found {json.dumps(options)[:80]}.')
    if not options.keys() & {"whitespace_pattern", "whitespace_flexible"}:
        options = {**options, "whitespace_pattern": JSON_SPACE}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _json_schema(value: str) -> str:
    return f"start: {json_rule(_read_json(value, 'a JSON schema'))}"


def _json_object(value: str) -> str:
    if value:
        raise HanlinError(f"json_object takes no value; found {value[:80]!r}. A shape is given by json_schema.")
    return f"start: {json_rule({'type': 'object'})}"


def _regex(value: str) -> str:
    pattern = require("llguidance", "constrain").regex_to_lark(value, "")
    return f"start: TEXT\nTEXT: /{pattern}/" if pattern else 'start: ""'


def _choice(value: str) -> str:
    choices = _read_json(value, "a JSON list of strings")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise HanlinError(f"choice takes a JSON list of at least one string; found {value[:80]}.")
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in choices)


def _grammar(value: str) -> str:
    return value


def _read_json(value: str, what: str) -> Any:
    try:
        return json.loads(value)
    except RecursionError:
        raise HanlinError(f"The constraint is nested too deeply to be read; expected {what}.") from None
    except ValueError as error:
        raise HanlinError(f"The constraint is not {what}: {error}.") from None


def _reason(state: "LLMatcher") -> str:
    """llguidance's own words, without its dump of the state."""
    text = state.get_error().split("<state>")[0].split("<non-verbose/>")[0].strip()
    if text.startswith("NoExtension"):
        return "no text that the vocabulary can spell matches it."
    return text[:600] + ("…" if len(text) > 600 else "")


class _Vocabulary:
    """What `llguidance.LLTokenizer` asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int, encode: Any) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id, self._encode = tokens, special, end, encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


KINDS = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}
