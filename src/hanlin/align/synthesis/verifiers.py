"""Is an answer right? verify(question, answer, reference) -> a number or a bool; a reward function will do."""

import unicodedata
from collections.abc import Callable

from hanlin.align import rewards
from hanlin.align.callables import load_callable
from hanlin.core.errors import HanlinError

Verifier = Callable[[str, str, str | None], float]


def exact(question: str, answer: str, reference: str | None) -> float:
    """Equal to the letter, but for white space."""
    return float(answer.split() == (reference or "").split())


def last_number(question: str, answer: str, reference: str | None) -> float:
    """The last number of the answer is the last of the reference; full-width digits count as digits."""
    given, wanted = (rewards.last_number(unicodedata.normalize("NFKC", text)) for text in (answer, reference or ""))
    return float(wanted is not None and given == wanted)


def find_verifier(name: str) -> Verifier:
    """One of `VERIFIERS`, or `module:function` of the user's own."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    if ":" not in name:
        raise HanlinError(f"There is no verifier {name!r}; it is one of {', '.join(VERIFIERS)}, or module:function.")
    return load_callable(name)


VERIFIERS: dict[str, Verifier] = {"exact": exact, "last_number": last_number}
