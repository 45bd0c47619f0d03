"""Whatever is drawn from what a constraint allows is a match, and nothing else is forbidden."""

import itertools
import json
import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hanlin.core.errors import HanlinError
from hanlin.engine.constraints import Constraints, Matcher
from hanlin.engine.types import Constraint
from hanlin.tokens import Tokenizer

TEXT = (
    'The quick brown fox. 敏捷的棕色狐狸。世界你好！ {"name": "fox", "tags": ["a", "b"]}, {"名字": "狐狸", "年龄": 3}\n'
)
SPARE = 7  # models round their vocabulary up

PERSON = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["fox", "狐狸", 'a "quoted"\n', None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["名字", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator([TEXT * 20] * 5, vocab_size=360)


@pytest.fixture(scope="module")
def constraints(tokenizer) -> Constraints:
    return Constraints(tokenizer, tokenizer.size + SPARE, frozenset(tokenizer.stop_ids))


def allowed(mask: torch.Tensor) -> set[int]:
    return {32 * word + bit for word, ones in enumerate(mask.tolist()) for bit in range(32) if ones >> bit & 1}


def draw(matcher: Matcher, tokenizer: Tokenizer, rng: random.Random, most: int = 4000) -> str:
    """Any allowed token, with a leaning to the end so that it comes."""
    ids: list[int] = []
    for _ in range(most):
        choices = sorted(allowed(matcher.mask()))
        ends = [token for token in choices if token in tokenizer.stop_ids]
        token = rng.choice(ends if ends and rng.random() < 0.2 else choices)
        matcher.accept(token)
        if token in tokenizer.stop_ids:
            return tokenizer.decode_bytes(ids).decode()
        ids.append(token)
    raise AssertionError(f"no end after {most} tokens: {tokenizer.decode(ids)[-80:]!r}")


def is_person(value: object) -> bool:
    if not isinstance(value, dict) or list(value) != [key for key in PERSON["properties"] if key in value]:
        return False
    tags = value.get("tags", [True])
    return (
        len(value["名字"]) <= 6
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and value.get("kind") in PERSON["properties"]["kind"]["enum"]
        and len(tags) in (1, 2)
        and all(isinstance(tag, bool) for tag in tags)
    )


@pytest.mark.parametrize("seed", range(10))
def test_every_draw_from_a_schema_is_an_instance_of_it(constraints, tokenizer, seed):
    matcher = constraints.compile(Constraint("json_schema", json.dumps(PERSON)))
    assert is_person(json.loads(draw(matcher, tokenizer, random.Random(seed))))


@pytest.mark.parametrize("seed", range(5))
def test_every_draw_of_a_json_object_is_one(constraints, tokenizer, seed):
    text = draw(constraints.compile(Constraint("json_object")), tokenizer, random.Random(seed))
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", [r"[a-c]{2}/\d\"?", r"(世|界|好)+，?", r"a|ab|abc", r"(?i)fox\s?[^\W\d_]{1,3}", ""])
def test_every_draw_of_a_pattern_matches_it_whole(constraints, tokenizer, pattern):
    for seed in range(8):
        text = draw(constraints.compile(Constraint("regex", pattern)), tokenizer, random.Random(seed))
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "choices", [["yes", "no"], ["世", "世界", "世界好"], ["", "x"], ['"\\\n/', "'"], ["😀", "<|im_end|>"]]
)
def test_every_choice_is_drawn_and_nothing_else(constraints, tokenizer, choices):
    constraint = Constraint("choice", json.dumps(choices))
    drawn = {draw(constraints.compile(constraint), tokenizer, random.Random(seed)) for seed in range(60)}
    assert drawn == set(choices)


def test_a_grammar_nests_and_names_special_tokens(constraints, tokenizer):
    grammar = 'start: "(" start ")" | "好" <|im_start|> "x"'
    for seed in range(8):
        text = draw(constraints.compile(Constraint("grammar", grammar)), tokenizer, random.Random(seed))
        depth = text.count("(")
        assert text == "(" * depth + "好<|im_start|>x" + ")" * depth


@pytest.mark.parametrize(
    ("pattern", "letters", "longest"),
    [
        (r"(a|b){0,3}ab?c", "abc", 6),
        (r"(世|界){1,2}。?", "世界。", 3),
        (r"[Tt]he? ?q{0,2}", "Theqt ", 6),
        (r"(好!?){0,2}", "好!", 4),
        (r"x?", "x", 2),
    ],
)
def test_forbidden_is_exactly_what_cannot_go_on(constraints, tokenizer, pattern, letters, longest):
    """Against the whole (finite) language, found by trying every string."""
    strings = ("".join(some) for n in range(longest + 1) for some in itertools.product(letters, repeat=n))
    language = {text.encode() for text in strings if re.fullmatch(pattern, text)}
    ends, ordinary = set(tokenizer.stop_ids), set(range(tokenizer.size)) - set(tokenizer.special.values())
    rng = random.Random(0)
    for _ in range(20):
        matcher, prefix = constraints.compile(Constraint("regex", pattern)), b""
        while not matcher.finished:
            begun = [text for text in language if text.startswith(prefix)]
            steps = {t for t in ordinary if any(text.startswith(prefix + tokenizer.token_bytes(t)) for text in begun)}
            assert allowed(matcher.mask()) == steps | (ends if prefix in language else set()), prefix
            token = rng.choice(sorted(steps))
            matcher.accept(token)
            prefix += tokenizer.token_bytes(token)
        assert prefix in language


def test_special_tokens_and_spare_ids_are_no_text(constraints, tokenizer):
    mask = allowed(constraints.compile(Constraint("regex", r"(?s:.*)")).mask())
    special = set(tokenizer.special.values())
    assert mask & special == set(tokenizer.stop_ids)
    assert not mask & set(range(tokenizer.size, tokenizer.size + SPARE + 32))
    assert mask - special == set(range(tokenizer.size)) - special - beginnings_of_no_character(tokenizer)


def beginnings_of_no_character(tokenizer: Tokenizer) -> set[int]:
    """Tokens with which no UTF-8 text begins: at most three more bytes make a cut character whole."""

    def begins(data: bytes) -> bool:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            return error.reason == "unexpected end of data"
        return True

    return {token for token in range(tokenizer.size) if not begins(tokenizer.token_bytes(token))}


def test_all_end_tokens_are_allowed_together(tokenizer):
    ends = frozenset([*tokenizer.stop_ids, tokenizer.encode("x")[0]])  # even a token that would be text
    with pytest.raises(HanlinError, match="no text that the vocabulary can spell"):
        Constraints(tokenizer, tokenizer.size, ends).compile(Constraint("choice", '["x", "xy"]'))
    matcher = Constraints(tokenizer, tokenizer.size, ends).compile(Constraint("regex", "y?"))
    assert allowed(matcher.mask()) == ends | set(tokenizer.encode("y"))
    for end in ends:
        twin = matcher.copy()
        twin.accept(end)
        assert twin.finished
        with pytest.raises(HanlinError, match="does not allow"):
            twin.accept(tokenizer.encode("y")[0])


def test_finished_when_only_the_end_is_left(constraints, tokenizer):
    matcher = constraints.compile(Constraint("regex", "ab?"))
    assert not matcher.finished
    assert not matcher.complete
    matcher.accept(tokenizer.encode("a")[0])
    assert not matcher.finished
    assert matcher.complete
    matcher.accept(tokenizer.encode("b")[0])
    assert matcher.finished
    assert matcher.complete
    assert allowed(matcher.mask()) == set(tokenizer.stop_ids)


def test_a_forbidden_token_is_refused_and_changes_nothing(constraints, tokenizer):
    matcher = constraints.compile(Constraint("regex", "世界"))
    before = matcher.mask()
    for token in (tokenizer.encode("x")[0], tokenizer.stop_ids[0], tokenizer.size):
        with pytest.raises(HanlinError, match="does not allow"):
            matcher.accept(token)
    assert torch.equal(matcher.mask(), before)


@given(seed=st.integers(0, 10**6), good=st.integers(0, 12), wrong=st.booleans())
def test_places_of_speculation_equal_one_by_one(constraints, tokenizer, seed, good, wrong):
    rng = random.Random(seed)
    start = constraints.compile(Constraint("json_schema", json.dumps(PERSON)))
    for _ in range(rng.randrange(20)):
        start.accept(rng.choice(sorted(allowed(start.mask()) - set(tokenizer.stop_ids)) or [tokenizer.stop_ids[0]]))
        if start.finished:
            return
    slow, drafted, expected = start.copy(), [], [start.mask()]
    for _ in range(good):
        token = rng.choice(sorted(allowed(slow.mask())))
        drafted.append(token)
        if token in tokenizer.stop_ids:
            break
        slow.accept(token)
        expected.append(slow.mask())
    if wrong:
        drafted += [0 if 0 not in allowed(expected[-1]) else tokenizer.size, 9]
    rows = start.masks(drafted)
    assert rows.shape == (len(drafted) + 1, constraints.words)
    assert torch.equal(rows[: len(expected)], torch.stack(expected))
    assert bool((rows[len(expected) :] == -1).all())
    assert torch.equal(start.mask(), expected[0])  # rolled back
    assert torch.equal(start.mask(drafted[: len(expected) - 1]), expected[-1])


def test_a_copy_goes_its_own_way(constraints, tokenizer):
    matcher = constraints.compile(Constraint("choice", '["ax", "by", "世"]'))
    a, b = matcher.copy(), matcher.copy()
    a.accept(tokenizer.encode("a")[0])
    b.accept(tokenizer.encode("b")[0])
    assert allowed(a.mask()) == set(tokenizer.encode("x"))
    assert allowed(b.mask()) == set(tokenizer.encode("y"))
    assert len(allowed(matcher.mask())) > 2
    again = constraints.compile(Constraint("choice", '["ax", "by", "世"]'))
    assert torch.equal(again.mask(), matcher.mask())


def test_masks_are_filled_in_another_thread(constraints, tokenizer):
    one, two = (constraints.compile(Constraint("regex", pattern)) for pattern in ("ab*", "世界"))
    a = tokenizer.encode("a")[0]
    with ThreadPoolExecutor(1) as executor:
        masks = constraints.start_masks(executor, [None, (one, [a, a]), (two, []), None]).result()
    assert (masks.shape, masks.dtype) == ((6, constraints.words), torch.int32)
    assert bool((masks[[0, 3, 5]] == -1).all())
    assert torch.equal(masks[1:3], one.masks([a]))
    assert torch.equal(masks[4], two.mask())
    assert constraints.fill_masks([]).shape == (0, constraints.words)


def test_texts_of_one_constraint_may_be_written_in_parallel(constraints, tokenizer):
    constraint = Constraint("json_schema", json.dumps(PERSON))

    def write(seed: int) -> str:
        return draw(constraints.compile(constraint), tokenizer, random.Random(seed))

    alone = [write(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(write, range(4))) == alone


def test_whitespace_in_json_is_bounded(constraints, tokenizer):
    matcher = constraints.compile(Constraint("json_schema", '{"type": "array", "items": {"const": 1}}'))
    space, line = tokenizer.encode(" ")[0], tokenizer.encode("\n")[0]
    for token in (tokenizer.encode("[")[0], line, *[space] * 40):
        matcher.accept(token)
    assert not allowed(matcher.mask()) & {space, line}
    plain = '{"type": "array", "items": {"const": 1}, "x-guidance": {"whitespace_flexible": false}}'
    matcher = constraints.compile(Constraint("json_schema", plain))
    matcher.accept(tokenizer.encode("[")[0])
    assert not allowed(matcher.mask()) & {space, line}
    for text in (
        json.dumps(PERSON, ensure_ascii=False),
        json.dumps(PERSON, ensure_ascii=False, indent=4),
    ):  # both common ways to write fit
        matcher = constraints.compile(Constraint("json_object"))
        for token in tokenizer.encode(text):
            matcher.accept(token)
        assert matcher.complete


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def some_object(key: int) -> dict:
    return {"type": "object", "properties": {f"k{key}": {"type": "integer"}}, "required": [f"k{key}"]}


BOMBS = {
    "deep": Constraint("json_schema", nested(10_000)),
    "deeper than the library reads": Constraint("json_schema", nested(200)),
    "endless": Constraint("json_schema", '{"$ref": "#"}'),
    "circle": Constraint(
        "json_schema", '{"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}, "$ref": "#/$defs/a"}'
    ),
    "product": Constraint(
        "json_schema", json.dumps({"allOf": [{"anyOf": [some_object(9 * a + b) for b in range(9)]} for a in range(9)]})
    ),
    "many": Constraint("json_schema", json.dumps({"enum": [str(number) for number in range(10_000)]}) + " " * 100_000),
    "large": Constraint("regex", "a" * 200_000),
    "brackets": Constraint("regex", "(" * 50_000 + "a" + ")" * 50_000),
    "doubling": Constraint(
        "grammar",
        'start: A0\nA30: "x"\n' + "\n".join(f"A{place}: A{place + 1} A{place + 1}" for place in range(30)),
    ),
    "left": Constraint("grammar", "start: start"),
    "wall": Constraint("grammar", "start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly(constraints, name):
    constraints.compile(Constraint("json_object"))  # the tokenizer is read
    began = time.thread_time()
    with pytest.raises(HanlinError):
        constraints.compile(BOMBS[name])
    assert time.thread_time() - began < 2.0


def test_a_constraint_that_explodes_while_it_is_followed_says_so_and_starts_afresh(constraints, tokenizer):
    def follow() -> None:
        matcher = constraints.compile(Constraint("regex", r"(\w{1,200}|\d){1,400}[^\w]{300}"))
        for token in tokenizer.encode("quick brown fox".replace(" ", "") * 40):
            matcher.accept(token)

    for _ in range(2):
        began = time.thread_time()
        with pytest.raises(HanlinError, match="too complex"):
            follow()
        assert time.thread_time() - began < 2.0


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (Constraint("json_schema", "{"), "not a JSON schema"),
        (Constraint("json_schema", "[1]"), "object, true or false"),
        (Constraint("json_schema", "false"), "nothing matches"),
        (Constraint("json_schema", '{"type": "狐狸"}'), "Invalid type: 狐狸"),
        (Constraint("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Constraint("json_object", "{}"), "takes no value"),
        (Constraint("regex", "(世"), "unclosed group"),
        (Constraint("regex", r"(a)\1"), "backreferences are not supported"),
        (Constraint("choice", "[]"), "at least one string"),
        (Constraint("choice", '["a", 1]'), "at least one string"),
        (Constraint("choice", "yes"), "not a JSON list of strings"),
        (Constraint("grammar", 'start: nothing "x"'), "nothing"),
        (Constraint("grammar", "{}"), "expecting rule"),
    ],
)
def test_a_bad_constraint_is_refused_with_the_reason(constraints, constraint, reason):
    with pytest.raises(HanlinError, match=re.escape(reason)):
        constraints.compile(constraint)


def test_without_a_place_to_end_there_is_no_constraint(tokenizer):
    with pytest.raises(HanlinError, match="at least one end token"):
        Constraints(tokenizer, tokenizer.size, frozenset())
    with pytest.raises(HanlinError, match="found \\[9999\\]"):
        Constraints(tokenizer, tokenizer.size, frozenset([9999]))


def test_a_sentencepiece_vocabulary_spells_spaces_and_bytes(tmp_path):
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "世"]
    model = {"type": "BPE", "vocab": {piece: at for at, piece in enumerate(pieces)}, "merges": [["▁", "a"]]}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    end = {"id": 0, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}
    engine = {
        "version": "1.0",
        "added_tokens": [{**end, "normalized": False}],
        "normalizer": space,
        "model": {**model, "byte_fallback": True, "unk_token": None, "fuse_unk": True},
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(engine), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    matcher = Constraints(tokenizer, tokenizer.size, frozenset([0])).compile(Constraint("regex", "( a|世)b"))

    def bytes_of(mask: torch.Tensor) -> list[bytes]:
        return sorted(tokenizer.token_bytes(token) for token in allowed(mask))

    assert bytes_of(matcher.mask()) == sorted([b" ", b" ", b" a", "世".encode(), b"\xe4"])  # "▁" and <0x20>
    for text in ("世", "b"):
        matcher.accept(tokenizer.encode(text)[0])
    assert allowed(matcher.mask()) == {0}
