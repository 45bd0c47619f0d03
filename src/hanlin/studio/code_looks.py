"""What the parts of a program look like: keyword, string, comment … found by Pygments' lexers.

find_code_looks("x = 1  # one", "python")   ->   (1, ""), (1, ""), (1, "o"), (1, ""), (1, "n"), (2, ""), (5, "c")
"""

from collections.abc import Iterator

# The languages that models write. No others: some of Pygments' 500 lexers take quadratic time on hostile text.
LANGUAGES = (
    " python py pycon bash sh shell console zsh json yaml yml toml ini javascript js typescript ts jsx tsx html xml "
    "css c cpp c++ cuda cu csharp cs java kotlin swift go rust rs ruby php r julia lua perl scala sql diff make "
    "makefile dockerfile docker latex tex "
)
LOOKS = (  # the first that a token's type belongs to
    ("Comment", "c"),
    ("Keyword", "k"),
    ("Operator.Word", "k"),
    ("Literal.String", "s"),
    ("Literal.Number", "n"),
    ("Name.Function", "f"),
    ("Name.Class", "f"),
    ("Name.Tag", "k"),
    ("Name.Attribute", "f"),
    ("Name.Decorator", "f"),
    ("Name.Builtin", "b"),
    ("Name.Exception", "b"),
    ("Operator", "o"),
    ("Generic.Deleted", "n"),
    ("Generic.Inserted", "s"),
    ("Generic.Prompt", "c"),
)


def find_code_looks(code: str, language: str) -> Iterator[tuple[int, str]]:
    """(characters, look) from the first to the last; one stretch without a look for a language that is not known."""
    at = 0
    if f" {language} " in LANGUAGES:
        from pygments.lexers import get_lexer_by_name
        from pygments.token import string_to_tokentype

        kinds = [(string_to_tokentype(name), look) for name, look in LOOKS]
        lexer = get_lexer_by_name({"cu": "cuda", "shell": "bash"}.get(language, language))
        for start, kind, part in lexer.get_tokens_unprocessed(code):
            if start < at or not part:  # some lexers look at a stretch twice
                continue
            if start > at:
                yield start - at, ""
            yield len(part), next((look for each, look in kinds if kind in each), "")
            at = start + len(part)
    if at < len(code):
        yield len(code) - at, ""
