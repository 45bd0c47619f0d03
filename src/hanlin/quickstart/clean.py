"""Docstrings as prose: markup of reStructuredText becomes plain words, what is no text is dropped.

`:class:`~torch.nn.Linear`` -> `torch.nn.Linear`; `.. note:: x` -> `Note: x`; version notes, index
entries and pictures go. Code examples and tables stay: they are what people ask about.
"""

import inspect
import re

MINIMUM = 24  # characters of a docstring below which it says nothing ("Init.")
LONGEST_LINE = 400  # a longer line is a table of data or a URL list, not a sentence

_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?")
_LITERAL = re.compile(r"``(.+?)``", re.DOTALL)
_ADMONITION = re.compile(
    r"^(\s*)\.\. (note|warning|tip|important|seealso|attention|caution|hint)::[ \t]*", re.MULTILINE
)
_DROPPED = re.compile(
    r"^\s*\.\. (?:versionadded|versionchanged|deprecated|index|image|figure|plot|toctree|testsetup|testcleanup"
    r"|autosummary|autoclass|autofunction|autoattribute|automodule|currentmodule|module|_[^:]+:).*$\n?",
    re.MULTILINE,
)
_DIRECTIVE = re.compile(
    r"^\s*\.\. (?:code-block|code|math|testcode|testoutput|doctest|rubric)::[ \t]*\w*[ \t]*$\n?", re.M
)
_OPTION = re.compile(r"^\s+:(?:maxdepth|options|noindex|nowrap|label|members|show-inheritance|alt|width)\b.*$\n?", re.M)
_LICENCE = re.compile(r"^.*(?:[Cc]opyright \(c\)|All rights reserved|SPDX-License|# mypy:|@generated).*$\n?", re.M)
_BLANKS = re.compile(r"\n[ \t]*(?:\n[ \t]*){2,}")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(\[*])|(?<=[。！？])")
_ABBREVIATION = re.compile(r"(?:\be\.g|\bi\.e|\betc|\bvs|\bcf|\bresp|\bFig|\bEq|\bSec|\bal|\bNo)\.$")


def clean_docstring(text: str) -> str:
    """A docstring as plain text; "" if it says too little to keep."""
    if len(text) < MINIMUM:
        return ""
    text = inspect.cleandoc(text.replace("\r\n", "\n").replace("\t", "    "))
    text = _DROPPED.sub("", text)
    text = _ADMONITION.sub(lambda m: f"{m[1]}{m[2].capitalize()}: ", text)
    text = _DIRECTIVE.sub("", text)
    text = _OPTION.sub("", text)
    text = _LICENCE.sub("", text)
    text = _ROLE.sub(r"`\1`", text)
    text = _LINK.sub(r"\1", text)
    text = _LITERAL.sub(r"`\1`", text)
    return clean_text(text)


def clean_text(text: str) -> str:
    """Any text: control characters, trailing blanks, monstrous and empty lines go; "" if little is left."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(c for c in text if c in "\n\t" or c.isprintable())
    lines = [line.rstrip() for line in text.split("\n")]
    text = "\n".join(line for line in lines if len(line) <= LONGEST_LINE or " " in line[:LONGEST_LINE].strip())
    text = _BLANKS.sub("\n\n", text).strip()
    letters = sum(c.isalpha() for c in text)
    return text if len(text) >= MINIMUM and letters >= 0.4 * len(text.replace(" ", "")) else ""


def normalised(text: str) -> str:
    """What two near-equal texts share: lower case, digits as 0, nothing but letters and single blanks."""
    return " ".join(re.sub(r"\d+", "0", re.sub(r"[^\w]+", " ", text.lower())).split())


def paragraphs(text: str) -> list[str]:
    """Blocks between empty lines."""
    return [block for block in re.split(r"\n\s*\n", text) if block.strip()]


def first_sentence(text: str, *, limit: int = 160) -> str:
    """The first sentence of the first paragraph on one line; "" where there is none of at most `limit` characters."""
    blocks = paragraphs(text)
    if not blocks:
        return ""
    joined = " ".join(blocks[0].split())
    sentence = ""
    for part in _SENTENCE.split(joined):
        sentence = f"{sentence} {part}".strip() if sentence else part
        if not _ABBREVIATION.search(sentence):
            break
    sentence = sentence.strip()
    return sentence if 8 <= len(sentence) <= limit else ""
