"""Guess the next tokens from the text itself: prompt lookup, n-gram speculation.

    ids = … a b c d e f … a b c     the last three stood there before   →   draft d e f …

The longest end of the ids, of at most `longest` and at least `shortest` tokens, that occurs earlier is looked up, and
what followed its last earlier occurrence is proposed. Where that runs into the end of the ids it goes on with what it
proposes itself, as LZ77 copies overlapping runs, so a b a b is continued with a b a b a b …

Speculative decoding: arXiv:2211.17192, here with a draft that costs no model (LLMA, arXiv:2304.04487). It wins where
answers repeat their input: code edits, extraction, summaries with quotations, tool calls.
"""

from collections.abc import Sequence

from hanlin.core.errors import HanlinError


class NgramIndex:
    """Where each n-gram of one sequence was last followed by something. Grows with the sequence, which never shrinks.

    With n-grams of 2 to 4 tokens 0.1 KB (text) to 0.5 KB (noise) a token, and 1.2 us to take one in.
    """

    def __init__(self) -> None:
        self.length = 0  # ids of the sequence that are indexed
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram → the place after its last occurrence but the end


class NgramDraft:
    """longest, shortest: tokens of the n-grams that are looked up; most: tokens proposed at once."""

    def __init__(self, longest: int = 4, shortest: int = 2, most: int = 8) -> None:
        if not 1 <= shortest <= longest:
            raise HanlinError(f"N-grams from {shortest} to {longest} tokens: expected 1 <= shortest <= longest.")
        if most < 1:
            raise HanlinError(f"An n-gram draft of at most {most} tokens: expected at least 1.")
        self.longest, self.shortest, self.most = longest, shortest, most

    def start(self) -> NgramIndex:
        """The state of one sequence, for `propose`."""
        return NgramIndex()

    def propose(self, ids: Sequence[int], state: NgramIndex, most: int | None = None) -> list[int]:
        """What probably follows `ids` (prompt and answer): `most` tokens, or none.

        state: of this sequence; `ids` only grew since the last call. Takes time for the new ids only.
        """
        most = self.most if most is None else min(most, self.most)
        self._extend(ids, state)
        if most < 1:
            return []
        length = len(ids)
        for size in range(min(self.longest, length), self.shortest - 1, -1):
            place = state.follows.get(tuple(ids[length - size :]))
            if place is not None:
                draft = list(ids[place : place + most])
                while len(draft) < most:
                    draft.append(draft[place + len(draft) - length])
                return draft
        return []

    def _extend(self, ids: Sequence[int], state: NgramIndex) -> None:
        if len(ids) < state.length:
            raise ValueError(f"the sequence shrank from {state.length} to {len(ids)} ids")
        for place in range(max(state.length, self.shortest), len(ids)):  # ids[place] follows what ends before it
            before = tuple(ids[max(0, place - self.longest) : place])
            for start in range(len(before) - self.shortest + 1):
                state.follows[before[start:]] = place
        state.length = len(ids)
