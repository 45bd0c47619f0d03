"""How many tokens to draft for each sequence, and whether at all: speculation that goes off by itself when it loses.

What verifying costs depends on the machine, the model and how many sequences share a step (little where a step is bound
by memory, as much as it brings where it is bound by arithmetic), and what it brings depends on the text. So both are
measured. For each number of sequences the governor takes turns:

    a few steps of the loser, then `pause` steps of the winner (more tokens a second), then the loser again, …

and as long as the winner stays the same, the pause doubles. It ends early when the winner falls below what the loser
last did. Tokens a second are tokens over the median of the step's seconds in the last steps of each kind, so that a
single slow step decides nothing.

A sequence gets k tokens where the chance that all k are right is at least `worth`: p^k >= worth, p = its tokens
accepted / tokens tried (arXiv:2211.17192, section 3.3), the older the lighter. A sequence that gets none slowly forgets
why, and is tried again. No clocks and no chance in here: the same calls give the same answers.
"""

import math
from collections import deque
from collections.abc import Hashable, Sequence
from statistics import median

from hanlin.core.errors import HanlinError

RECENT = 16  # steps of each kind that are remembered
MARGIN = 1.02  # drafting must win by this: a tie is plain
MEMORY = 0.9  # what one step leaves of the weight of those before it
PRIOR, PRIOR_TRIES = 0.7, 2.0  # a new sequence: as if so many tokens had been tried, so much of them accepted
FORGIVE = 1 / 64  # how far a sequence that gets no tokens goes back towards the prior at each step


class SpeculationGovernor:
    """most: tokens drafted for a sequence. worth: the chance below which a token is not drafted. Best is the cost of
    one more token to verify as a share of what a token costs at all: 0.05 where memory is the bound, 0.3 elsewhere.
    probe: steps of the losing kind at a time; pause, longest_pause: steps of the winning kind between these."""

    def __init__(
        self, most: int = 8, *, worth: float = 0.2, probe: int = 4, pause: int = 64, longest_pause: int = 512
    ) -> None:
        if most < 1 or probe < 1 or not probe <= pause <= longest_pause:
            raise HanlinError(
                f"Speculation with most={most}, probe={probe}, pause={pause}, longest_pause={longest_pause}: "
                "expected 1 <= most and 1 <= probe <= pause <= longest_pause."
            )
        if not 0 < worth < 1:
            raise HanlinError(f"Speculation with worth={worth}: expected a chance between 0 and 1.")
        self.most, self.worth = most, worth
        self._turns = (probe, pause, longest_pause)
        self._contests: dict[int, _Contest] = {}
        self._hopes: dict[Hashable, _Hope] = {}

    def lengths(self, sequences: Sequence[Hashable]) -> list[int]:
        """How many tokens to draft for each of the sequences that decode in the next step; all 0 where that loses."""
        if not self.drafts(len(sequences)):
            return [0] * len(sequences)
        return [self._length(sequence) for sequence in sequences]

    def drafts(self, sequences: int) -> bool:
        """Whether a step of so many sequences should be drafted for now."""
        return sequences > 0 and self._contest(sequences).drafting

    def record(self, seconds: float, plain_tokens: int, drafted: int, accepted: int) -> None:
        """Take in one step that only decoded (one with prompts in it says nothing: leave it out).

        seconds: of the whole step, drafting included. plain_tokens: what it would have brought without speculation, one
        a sequence. drafted, accepted: of all sequences; a step for which nothing was found to draft counts as plain.
        """
        if plain_tokens > 0 and seconds > 0:
            self._contest(plain_tokens).record(seconds, plain_tokens + accepted, drafted > 0)

    def saw(self, sequence: Hashable, drafted: int, accepted: int) -> None:
        """Take in what became of one sequence's draft."""
        if drafted > 0:
            self._hopes.setdefault(sequence, _Hope()).record(drafted, accepted)

    def forget(self, sequence: Hashable) -> None:
        """The sequence is finished."""
        self._hopes.pop(sequence, None)

    def _length(self, sequence: Hashable) -> int:
        hope = self._hopes.get(sequence) or _Hope()
        if hope.chance >= 1:
            return self.most
        if hope.chance < self.worth:
            hope.forgive()
            return 0
        return min(self.most, int(math.log(self.worth) / math.log(hope.chance) + 1e-9))

    def _contest(self, sequences: int) -> "_Contest":
        """1, 2, 3, 4–5, 6–7, 8–11, 12–15, 16–23, …: steps of very different sizes are not compared."""
        shift = max(0, sequences.bit_length() - 2)
        return self._contests.setdefault(sequences >> shift << shift, _Contest(*self._turns))


class _Hope:
    """The chance that the next drafted token of one sequence is right."""

    def __init__(self) -> None:
        self.accepted, self.tried = PRIOR * PRIOR_TRIES, PRIOR_TRIES

    @property
    def chance(self) -> float:
        return self.accepted / self.tried

    def record(self, drafted: int, accepted: int) -> None:
        tried = min(accepted + 1, drafted)  # what comes behind the first wrong token was not tried
        self.accepted = MEMORY * self.accepted + accepted
        self.tried = MEMORY * self.tried + tried

    def forgive(self) -> None:
        self.accepted += FORGIVE * (PRIOR * PRIOR_TRIES - self.accepted)
        self.tried += FORGIVE * (PRIOR_TRIES - self.tried)


class _Contest:
    """Plain steps against drafted ones, for one size of step."""

    def __init__(self, probe: int, pause: int, longest_pause: int) -> None:
        self._probe, self._first_pause, self._longest_pause = probe, pause, longest_pause
        self._steps: dict[bool, deque[tuple[float, int]]] = {  # (seconds, tokens), of drafted steps and of plain ones
            True: deque(maxlen=RECENT),
            False: deque(maxlen=RECENT),
        }
        self.drafting = False
        self._left = probe  # steps of this turn
        self._probing = True  # is this a turn of the loser (or of one not measured yet)?
        self._winner: bool | None = None  # is it drafting?
        self._pause = pause

    def record(self, seconds: float, tokens: int, drafted: bool) -> None:
        self._steps[drafted].append((seconds, tokens))
        if drafted == self.drafting or not self._probing:
            self._left -= 1
        if self._probing:
            if self._left <= 0:
                self._judge()
        elif self._left <= 0 or self._falls_behind():
            self._try(not self.drafting)

    def _judge(self) -> None:
        plain, drafted = self._rate(False), self._rate(True)
        if not plain or not drafted:
            self._try(not drafted)
            return
        winner = drafted > MARGIN * plain
        self._pause = min(2 * self._pause, self._longest_pause) if winner == self._winner else self._first_pause
        self._winner, self.drafting, self._left, self._probing = winner, winner, self._pause, False

    def _try(self, drafting: bool) -> None:
        self._steps[drafting].clear()  # what was measured long ago is not mixed with what is measured now
        self.drafting, self._left, self._probing = drafting, self._probe, True

    def _falls_behind(self) -> bool:
        """Is the winner now slower than the loser was when it was measured?"""
        ours, theirs = self._rate(self.drafting), self._rate(not self.drafting)
        return theirs > MARGIN * ours

    def _rate(self, drafted: bool) -> float:
        """Tokens a second of the last steps of one kind; 0: none."""
        steps = self._steps[drafted]
        if not steps:
            return 0.0
        return sum(tokens for _, tokens in steps) / len(steps) / median(seconds for seconds, _ in steps)
