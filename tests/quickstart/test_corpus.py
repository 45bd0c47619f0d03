"""The corpus: what is read, how it is cleaned, and that nothing held out is trained on."""

import sys
import textwrap
from pathlib import Path

import pytest

from hanlin.core.errors import HanlinError
from hanlin.quickstart.clean import clean_docstring, first_sentence, normalised, paragraphs
from hanlin.quickstart.corpus import (
    build_corpus,
    corpus_fingerprint,
    deduplicate,
    package_files,
    read_documents,
    split_documents,
)
from hanlin.quickstart.facts import fact_of, newcomers_facts, short_signature
from hanlin.quickstart.own_text import own_documents, own_files, title_of
from hanlin.quickstart.walk import Document, SourceFile, compiled_documents, public_names, read_file, split_signature


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    root = tmp_path / "smallpack"
    (root / "tests").mkdir(parents=True)
    (root / "deep").mkdir()
    (root / "__init__.py").write_text('"""A small package that helps with testing."""\n')
    (root / "broken.py").write_text('"""Never seen: the next line is no Python."""\ndef (:\n')
    (root / "tests" / "test_x.py").write_text('"""Tests are no documentation, so this is not read."""\n')
    (root / "deep" / "__init__.py").write_text("")
    (root / "deep" / "shapes.py").write_text(
        textwrap.dedent('''
        class Box:
            """A box with a :class:`~smallpack.Lid` and ``walls`` on all sides.

            .. versionadded:: 1.2

            .. note:: It can be opened.
            """

            def __init__(self, width: int, height: int = 3, *, lid: bool = True) -> None: ...

            def open(self, slowly=False):
                """Open the box and show what is inside of it."""

            @staticmethod
            def fold(paper, times=2):
                """Fold paper to a box, as often as was asked for."""

            def _no(self): ...
        ''')
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "smallpack"


def test_package_gives_one_document_a_docstring_with_its_signature(package: str) -> None:
    documents = {d.name: d for file in package_files(package) for d in read_file(file)}
    assert sorted(documents) == [
        "smallpack",
        "smallpack.deep.shapes.Box",
        "smallpack.deep.shapes.Box.fold",
        "smallpack.deep.shapes.Box.open",
    ]
    box = documents["smallpack.deep.shapes.Box"]
    assert box.head == "smallpack.deep.shapes.Box(width, height=3, *, lid=True)"
    assert box.body == "A box with a `smallpack.Lid` and `walls` on all sides.\n\nNote: It can be opened."
    assert box.text.startswith(box.head + "\n\n")
    assert box.group == "smallpack.deep"
    assert documents["smallpack.deep.shapes.Box.open"].head.endswith("open(slowly=False)")
    assert documents["smallpack.deep.shapes.Box.fold"].head.endswith("fold(paper, times=2)")


def test_functions_written_in_c_are_asked_themselves() -> None:
    found = {d.name: d for d in compiled_documents(["builtins", "math", "json"])}
    assert found["len"].text == "len(obj, /)\n\nReturn the number of items in a container."
    assert found["math.sqrt"].head == "math.sqrt(x, /)"
    assert found["str.join"].head == "str.join(iterable, /)"
    assert found["json.dumps"].head.startswith("json.dumps(obj, ")


def test_public_names_are_what_people_call_things() -> None:
    names = public_names(["json", "os.path", "torch.nn", "torch"])
    assert names["json.encoder.JSONEncoder"] == "json.JSONEncoder"
    assert names["posixpath.join"] == "os.path.join"
    assert names["torch.nn.modules.linear.Linear"] == "torch.nn.Linear"


@pytest.mark.parametrize(
    ("text", "signature", "rest"),
    [
        ("f(x, y=(1, 2)) -> int\n\nAdd.", "(x, y=(1, 2)) -> int", "Add."),
        ("f(a,\n  b=2)\n\nMany lines.", "(a, b=2)", "Many lines."),
        ("f(x) is a function.", None, "f(x) is a function."),
        ("Plain words.", None, "Plain words."),
    ],
)
def test_signature_in_a_docstring_is_split_off(text: str, signature: str | None, rest: str) -> None:
    assert split_signature("m.f", text) == (signature, rest)


def test_cleaning_keeps_examples_and_chinese_and_drops_markup() -> None:
    text = "求和函数，返回所有元素之和，参数见 :ref:`下文 <below>`。\n\n.. index:: sum\n\n>>> total([1, 2])\n3"
    assert clean_docstring(text) == "求和函数，返回所有元素之和，参数见 `下文`。\n\n>>> total([1, 2])\n3"
    assert clean_docstring("Init.") == ""


def test_first_sentence_ends_where_the_sentence_ends() -> None:
    assert first_sentence("Return e.g. a list.  Then more.") == "Return e.g. a list."
    assert first_sentence("返回元素之和，可为空。空时为零。") == "返回元素之和，可为空。"
    assert first_sentence("word " * 80) == ""


def test_near_equal_documents_stay_once_and_short_ones_by_name() -> None:
    long = "Return the element of the list at the place that was asked for, or the default if it is not there"
    documents = [
        Document("a.get", "function", "a.get", f"{long}, version 1.", "a"),
        Document("b.fetch", "function", "b.fetch", f"{long.upper()} ... Version 2", "b"),
        Document("c.copy", "function", "c.copy", "Return a shallow copy.", "c"),
        Document("d.clone", "function", "d.clone", "Return a shallow copy.", "d"),
        Document("e.copy", "function", "e.copy", "Return a shallow copy!", "e"),
    ]
    assert [d.name for d in deduplicate(documents)] == ["a.get", "c.copy", "d.clone"]


def test_split_shares_no_text_and_keeps_whole_modules(tmp_path: Path) -> None:
    shared = "This paragraph stands in many modules and must not be counted as held out text at all."
    documents = [
        Document(
            f"m{i}.f{j}",
            "function",
            f"m{i}.f{j}(x)",
            f"No. {'x' * i}y{'z' * j} is its own text.\n\n{shared}",
            f"m{i}",
        )
        for i in range(40)
        for j in range(5)
    ]
    train, held_out = split_documents(documents, kept=["m3.f1"], share=0.1)
    assert not {d.group for d in train} & {d.group for d in held_out}
    assert "m3" in {d.group for d in train}
    assert 0.05 < len(held_out) / len(documents) < 0.2
    trained = {normalised(p) for d in train for p in paragraphs(d.body)}
    assert not any(normalised(p) in trained for d in held_out for p in paragraphs(d.body))
    assert split_documents(documents, kept=["m3.f1"], share=0.1) == (train, held_out)
    sizes = build_corpus(tmp_path, documents, kept=["m3.f1"], share=0.1)
    assert read_documents(tmp_path / "train.jsonl") == train
    assert read_documents(tmp_path / "heldout.jsonl") == held_out
    assert sizes["heldout_bytes"] == sum(len(d.text.encode()) for d in held_out)


def test_fingerprint_names_python_and_packages() -> None:
    found = corpus_fingerprint()
    assert found["python"] == sys.version.split()[0]
    assert found["torch"][0].isdigit()
    assert "transformers" not in found  # a development package must not change the corpus


def test_facts_come_from_the_documentation() -> None:
    documents = compiled_documents(["builtins", "math"])
    facts = {fact.name: fact for fact in newcomers_facts(documents, limit=1000)}
    assert facts["len"].sentence == "Return the number of items in a container."
    assert facts["math.sqrt"].signature == "math.sqrt(x, /)"
    assert len(newcomers_facts(documents, limit=10)) == 10
    assert fact_of(Document("x", "function", "x()", "y(a) -> b\n\nlower case is no sentence.", "x")) is None
    assert short_signature("f(alpha, beta, gamma, delta)", limit=24) == "f(alpha, beta, ...)"


def test_own_files_become_titled_passages(tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_text(
        "# Tea\n\nTea is made from leaves and hot water.\n\n"
        "## 茶\n\n茶是一种用叶子泡成的饮料，味道清香，很多人每天都喝。\n"
    )
    (tmp_path / "story.txt").write_text(
        "\n\n".join(f"Chapter {'abcdefgh'[i]}. " + "The road was long and dark. " * 20 for i in range(8))
    )
    (tmp_path / "rows.jsonl").write_text('{"text": "A row that holds a whole text of its own."}\n')
    (tmp_path / "code.py").write_text('def go(far):\n    """Go as far as the road will lead you."""\n')
    documents = own_documents(own_files([tmp_path]))
    names = {d.name for d in documents}
    assert {"Tea", "茶", "code.go"} <= names
    assert any("A row that holds" in d.body for d in documents)
    assert all(len(d.body) < 2400 for d in documents)
    assert title_of("庭院深深深几许，杨柳堆烟，帘幕无重数。" * 5) == "庭院深深深几许"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "the corpus is empty"),
        ("symbols.txt", b"+ - * / = < > " * 20, "no text to learn from"),
        ("latin.txt", "caf\xe9 and more".encode("latin-1"), "not UTF-8: byte 3"),
        ("rows.jsonl", b'{"text": "good enough to be read here"}\n{oops}\n', "rows.jsonl:2 is not valid JSON"),
        ("rows.jsonl", b'{"other": 1}\n', "has no field 'text'"),
    ],
)
def test_unusable_own_text_is_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HanlinError, match=message):
        own_documents(own_files([tmp_path / name]))


def test_missing_own_text_is_explained(tmp_path: Path) -> None:
    with pytest.raises(HanlinError, match="does not exist"):
        own_files([tmp_path / "nothing"])
    with pytest.raises(HanlinError, match="holds no text"):
        own_files([tmp_path])


def test_broken_source_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(b'"""\xff"""')
    assert read_file(SourceFile(path, "x")) == []
