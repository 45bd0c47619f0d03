"""Markdown in stretches: nothing of the source is lost, and nothing that it holds becomes markup of its own."""

import html
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanlin.studio.code_looks import LANGUAGES, find_code_looks
from hanlin.studio.markdown import Tag, find_cuts, read_markdown
from hanlin.studio.rendering import render_answer

ELEMENTS = set(
    "p h1 h2 h3 h4 h5 h6 hr br blockquote ul ol li strong em del code a span div pre button "  # noqa: SIM905
    "table thead tbody tr th td".split()
)
ATTRIBUTES = {"class", "data-label", "type", "start", "href", "target", "rel", "colspan"}
VOID = {"hr", "br"}

lines = st.sampled_from(
    [
        "", "  ", "word", "翰林院", "# Head", "- item", "  - deep", "1. one", "2) two", "> said", ">> twice",
        "```", "```python",
        "~~~", "   ```js", "| a | b |", "| - | :-: |", "|--|", "a | `|` \\| c |", "---",
        "* * *", "**b** *i* ~~d~~ `c`", "**",
        "[x](http://a.b)",
        "![x](http://a.b/i.png)", "[x](javascript:alert(1))", "<script>alert(1)</script>",
        "x\r", "\\*no\\*", "**a *b **c", "https://a.b/c?d=e.", "　　段落",
        "\tcode", "    indented", "x = 1 # one", "a<br>b", "<br/>",
    ]
)  # fmt: skip
documents = st.one_of(
    st.lists(lines, max_size=12).map("\n".join), st.text(alphabet="a翰 `*_~#>-|\\[]()!<:1.\n\r\t", max_size=80)
)


def shown(text):
    """The text as a reader sees it: without marks, without tags."""
    items = read_markdown(text)
    return "".join("" if isinstance(i, Tag) or i.look == "mark" else text[i.low : i.high] for i in items)


def markup(text):
    """The tags, with the text that is not hidden between them."""
    return "".join(
        i.markup if isinstance(i, Tag) else "" if i.look == "mark" else html.escape(text[i.low : i.high])
        for i in read_markdown(text)
    )


class Inspector(HTMLParser):
    """Fails on what a model must not be able to write."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert tag in ELEMENTS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, name
            if name == "href":
                assert re.match(r"(https?://|mailto:)", value, re.I), value
                self.links.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_comment(self, data):
        raise AssertionError(data)


def inspect(text):
    inspector = Inspector()
    inspector.feed(render_answer(text, []))
    inspector.close()
    assert inspector.open == []
    return inspector.links


@settings(deadline=None, max_examples=500)
@given(text=documents, data=st.data())
def test_every_character_comes_out_once_and_in_order(text, data):
    begin = data.draw(st.integers(0, len(text)))
    at = begin
    for item in read_markdown(text, begin):
        if not isinstance(item, Tag):
            assert item.low == at < item.high
            at = item.high
    assert at == len(text)


@settings(deadline=None, max_examples=500)
@given(text=documents)
def test_the_markup_is_ours_balanced_and_harmless(text):
    inspect(text)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        '```"><img/src=x/onerror=alert(1)>\ncode\n```',
        "```html\n</code></pre><script>alert(1)</script>\n```",
        '[a](https://a.b/"onmouseover="alert(1))',
        "[a](javascript:alert(1)) [b](data:text/html,x) [c](JaVaScRiPt:alert(1))",
        "[d](//evil.example) [e](\x01javascript:x) [f](vbscript:x)",
        "| <svg onload=alert(1)> | b |\n| - | - |\n| </td></table><script> | x |",
        "# <iframe src=//evil.example>\n- <b>\n> <!-- --><style>*{}</style>",
        "![spy](https://evil.example/a.png)",
    ],
)
def test_hostile_text_stays_text(text):
    links = inspect(text)
    assert all(link.startswith("https://a.b/") for link in links)
    assert re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]*>", "", render_answer(text, [])))) == re.sub(r"\s", "", text)


def test_blocks_have_their_elements():
    text = "# Head 一\n\nOne **two** *three* ~~four~~ `5*5*5`\nsecond line\n\n"
    text += "> said\n> - in a list\n\n---\n1. a\n   - b\n2. c\n"
    assert markup(text) == (
        "<h1>Head 一</h1><p>One <strong>two</strong> <em>three</em> <del>four</del> <code>5*5*5</code>\nsecond line</p>"
        "<blockquote><p>said</p><ul><li><p>in a list</p></li></ul></blockquote><hr>"
        '<ol start="1"><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>'
    )


def test_chinese_emphasis_needs_no_spaces():
    assert markup("他说**“你好”**，然后*走*了。") == "<p>他说<strong>“你好”</strong>，然后<em>走</em>了。</p>"
    assert shown("　　两格缩进") == "　　两格缩进"
    assert markup("snake_case_name 与 2 * 3 * 4") == "<p>snake_case_name 与 2 * 3 * 4</p>"


def test_a_code_block_keeps_its_text_and_its_language():
    text = "- so:\n  ```Python\n  def f():\n      return '**'\n  ```\n- end"
    assert shown(text) == "so:def f():\n    return '**'\nend"
    assert 'data-label="python"' in markup(text)
    looks = {text[i.low : i.high]: i.look for i in read_markdown(text) if not isinstance(i, Tag)}
    assert looks["def"] == "k" and looks["f"] == "f" and looks["return"] == "k" and looks["**"] == "s"
    assert shown("```\nnever closed\n\n# no head") == "never closed\n\n# no head"


def test_tables_have_cells_and_sides():
    text = "| 名 | n |\n|:--|--:|\n| `a|b` | 1 \\| 2 |\n| x |\nafter"
    assert markup(text) == (
        '<div class="md-table"><table><thead><tr><th class="md-left">名</th><th class="md-right">n</th></tr></thead>'
        '<tbody><tr class="md-marks"><td colspan="2"></td></tr>'
        '<tr><td class="md-left"><code>a|b</code></td><td class="md-right">1 | 2</td></tr>'
        '<tr><td class="md-left">x</td></tr></tbody></table></div><p>after</p>'
    )


def test_links_are_marked_as_foreign_and_images_are_not_loaded():
    text = "[文档](https://a.b/x_(y)) and https://a.b/c。![图](https://a.b/i.png)"
    assert inspect(text) == ["https://a.b/x_(y)", "https://a.b/c"]
    assert 'rel="noopener noreferrer nofollow"' in markup(text) and shown(text) == "文档 and https://a.b/c。图"


def test_cuts_stand_between_blocks():
    text = "one\n\ntwo\ntwo\n\n```\na\n\nb\n```\n\n- x\n\n  y\n\nend"
    assert [text[cut:].split("\n")[0] for cut in find_cuts(text, 0)] == ["two", "```", "- x", "end"]


@pytest.mark.parametrize(
    "text",
    [
        "*" * 20_000, "**a" * 7_000, "[" * 20_000, "`" * 20_000, "_a" * 10_000, "|" * 20_000, ">" * 20_000,
        "- " * 10_000, "> - " * 5_000, "a\n" * 20_000, "| a |\n" * 5_000, "```\n" * 5_000, "  " * 10_000 + "x",
        "\\" * 20_000, "~~" * 10_000, "https://" * 3_000, "1. a\n" * 5_000, "*a **b " * 3_000, "[a](" * 5_000,
        "```\n- \n> " * 3_000, "a|b\n|-|-" + " " * 20_000 + "x", "- " * 10_000 + "x", "a|b\n" + "-|" * 10_000,
    ],
)  # fmt: skip
def test_hostile_text_costs_no_more_than_other(text):
    begin = time.process_time()
    assert sum(i.high - i.low for i in read_markdown(text) if not isinstance(i, Tag)) == len(text)
    assert time.process_time() - begin < 3.0


@pytest.mark.parametrize("language", [*LANGUAGES.split(), "unknown", "", "py on"])
def test_every_language_gives_back_the_whole_code(language):
    code = "def f(x): # 注释\n\treturn {'a': \"b\n<tag a='1'>\\\n  /* c */ 1.5e3 // d\n\n$ ls | x\n" * 3
    assert sum(size for size, _ in find_code_looks(code, language)) == len(code)


def test_looks_of_a_program():
    found, at = {}, 0
    code = "@d\ndef f(x):\n    return len('s') + 1.5  # c"
    for size, look in find_code_looks(code, "py"):
        found[code[at : at + size]] = look
        at += size
    assert {
        "@d": "f",
        "def": "k",
        "len": "b",
        "s": "s",
        "1.5": "n",
        "# c": "c",
        "+": "o",
        "x": "",
    }.items() <= found.items()
