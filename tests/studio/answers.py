"""Answers for the tests of the page, made without an engine."""

import math

from hanlin.engine import Completion, Event, TokenLogprob, Usage
from hanlin.studio.answer import Answer


def answered(tokenizer, text, *, step=1):
    """An answer that came token by token, its text `step` tokens at a time."""
    answer = Answer("tiny", tokenizer)
    ids = tokenizer.encode(text)
    shown = ""
    for count, token in enumerate(ids, 1):
        sent = tokenizer.decode(ids[:count]).rstrip("\ufffd") if count % step == 0 or count == len(ids) else shown
        answer.add(Event(sent[len(shown) :], [token], [TokenLogprob(token, math.log(0.5), ((token, math.log(0.5)),))]))
        shown = sent
    whole = Completion(text, ids, None, "stop", Usage(3, len(ids), 0.5, 1.5))
    answer.add(Event(text[len(shown) :], completion=whole))
    return answer
