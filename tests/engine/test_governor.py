"""Drafting is used where it brings more tokens a second, left where it does not, and tried again in between."""

import random
from collections.abc import Callable

import pytest

from hanlin.core.errors import HanlinError
from hanlin.engine.governor import SpeculationGovernor

Cost = Callable[[int, int], float]  # (sequences, drafted in all) -> seconds of a step


def cheap(sequences: int, drafted: int) -> float:
    """Bound by memory: a step takes 20 ms, a further token hardly more."""
    return 0.020 + 0.0005 * (sequences + drafted) + 0.001 * (drafted > 0)


def dear(sequences: int, drafted: int) -> float:
    """Bound by arithmetic: twice the tokens take twice the time."""
    return 0.002 + 0.010 * (sequences + drafted)


class Machine:
    """A simulated clock: each drafted token is right with one chance, and only behind right ones. found: how often the
    proposer finds something to draft."""

    def __init__(self, cost: Cost, right: float, *, sequences: int = 1, found: float = 1.0, seed: int = 0) -> None:
        self.cost, self.right, self.sequences, self.found = cost, right, sequences, found
        self.chance = random.Random(seed)
        self.slow = 0.0  # how often a step is thirty times slower
        self.seconds, self.tokens, self.drafting = 0.0, 0, 0

    def run(self, governor: SpeculationGovernor | None, steps: int, *, always: int = 0) -> float:
        """Tokens a second of these steps. always: draft so many tokens, without a governor."""
        seconds = tokens = self.drafting = 0
        for _ in range(steps):
            names = list(range(self.sequences))
            lengths = governor.lengths(names) if governor else [always] * self.sequences
            lengths = [length if self.chance.random() < self.found else 0 for length in lengths]
            taken = [0] * self.sequences
            for place, length in enumerate(lengths):
                while taken[place] < length and self.chance.random() < self.right:
                    taken[place] += 1
            took = self.cost(self.sequences, sum(lengths)) * self.chance.uniform(0.95, 1.05)
            took *= 30 if self.chance.random() < self.slow else 1
            if governor:
                for name, length, accepted in zip(names, lengths, taken, strict=True):
                    governor.saw(name, length, accepted)
                governor.record(took, self.sequences, sum(lengths), sum(taken))
            seconds += took
            tokens += self.sequences + sum(taken)
            self.drafting += sum(lengths) > 0
        return tokens / seconds


def test_it_drafts_where_drafting_wins():
    machine = Machine(cheap, 0.8)
    governed = machine.run(SpeculationGovernor(worth=0.05), 2000)
    assert machine.drafting > 0.95 * 2000
    assert governed > 0.95 * machine.run(None, 2000, always=8)
    assert governed > 2 * machine.run(None, 2000)


@pytest.mark.parametrize(("cost", "right"), [(cheap, 0.02), (dear, 0.6)])
def test_it_goes_off_where_drafting_loses(cost, right):
    machine = Machine(cost, right, sequences=4)
    governed = machine.run(SpeculationGovernor(), 2000)
    assert machine.drafting < 0.05 * 2000
    assert governed > 0.97 * machine.run(None, 2000)
    if cost is dear:
        assert governed > 1.5 * machine.run(None, 2000, always=8)


def test_it_notices_when_the_text_changes_in_both_directions():
    governor, machine = SpeculationGovernor(longest_pause=128), Machine(cheap, 0.0)
    machine.run(governor, 600)
    assert machine.drafting < 60
    machine.right = 0.9
    machine.run(governor, 300)  # two pauses at most
    machine.run(governor, 300)
    assert machine.drafting > 270
    machine.right = 0.0
    machine.run(governor, 40)
    machine.run(governor, 600)
    assert machine.drafting < 60


def test_it_notices_when_the_machine_changes():
    governor, machine = SpeculationGovernor(longest_pause=128), Machine(cheap, 0.7)
    machine.run(governor, 500)
    assert machine.drafting > 450
    machine.cost = dear
    machine.run(governor, 40)
    machine.run(governor, 500)
    assert machine.drafting < 50


def test_a_loss_is_noticed_before_the_pause_ends():
    governor, machine = SpeculationGovernor(pause=10_000, longest_pause=10_000), Machine(cheap, 0.9)
    machine.run(governor, 200)
    machine.cost = dear
    machine.run(governor, 60)
    machine.run(governor, 200)
    assert machine.drafting == 0


def test_single_slow_steps_decide_nothing():
    for seed in range(5):
        machine = Machine(cheap, 0.8, seed=seed)
        machine.slow = 0.03
        governor = SpeculationGovernor()
        machine.run(governor, 1500)
        assert machine.drafting > 0.85 * 1500


def test_steps_of_different_sizes_are_judged_apart():
    def both(sequences: int, drafted: int) -> float:
        return max(0.020, 0.004 * (sequences + drafted))  # free up to five tokens, then bound by arithmetic

    governor = SpeculationGovernor(most=4)
    few, many = Machine(both, 0.8, sequences=1), Machine(both, 0.8, sequences=16)
    for _ in range(100):
        few.run(governor, 10)
        many.run(governor, 10)
    assert governor.drafts(1)
    assert not governor.drafts(16)
    assert few.drafting >= 6
    assert many.drafting <= 4


def test_where_nothing_is_found_to_draft_nothing_is_lost_and_nothing_decided():
    machine = Machine(cheap, 0.9, found=0.0)
    governor = SpeculationGovernor()
    machine.run(governor, 500)
    assert governor.drafts(1)  # costs nothing, and is still to be measured
    machine.found = 0.3  # as prompt lookup has it
    machine.run(governor, 500)
    assert governor.drafts(1)
    assert 100 < machine.drafting < 200


def measure(governor: SpeculationGovernor, steps: int, seconds: float, drafted: int = 0, accepted: int = 0) -> None:
    for _ in range(steps):
        governor.record(seconds, 1, drafted, accepted)


def test_a_probe_is_judged_by_itself_and_only_when_it_is_complete():
    governor = SpeculationGovernor(probe=4, pause=8, longest_pause=8)
    measure(governor, 4, 0.020)
    measure(governor, 1, 0.040, drafted=8)
    measure(governor, 9, 0.020)  # nothing was found to draft
    assert governor.drafts(1)  # one step of the four was measured
    measure(governor, 3, 0.040, drafted=8)
    assert not governor.drafts(1)
    measure(governor, 7, 0.020)
    assert not governor.drafts(1)
    measure(governor, 1, 0.020)
    assert governor.drafts(1)  # the pause is over
    measure(governor, 4, 0.030, drafted=8, accepted=1)  # 67 tokens a second against 50; with the old ones it were 43
    assert governor.drafts(1)
    measure(governor, 7, 0.030, drafted=8, accepted=1)
    assert governor.drafts(1)
    measure(governor, 1, 0.030, drafted=8, accepted=1)
    assert not governor.drafts(1)  # the turn of the loser, which is plain now


def warm(governor: SpeculationGovernor, sequences: int) -> None:
    """Measure until drafting is on."""
    while not governor.drafts(sequences):
        governor.record(0.02, sequences, 0, 0)
    for _ in range(4):
        governor.record(0.02, sequences, 8, 8)
    assert governor.drafts(sequences)


def test_the_length_follows_what_the_sequence_accepts():
    governor = SpeculationGovernor(most=8, worth=0.2)
    warm(governor, 4)
    assert governor.lengths(["new"] * 4) == [4] * 4  # 0.7^4 >= 0.2 > 0.7^5
    for _ in range(50):
        governor.saw("copies", 8, 8)
        governor.saw("half", 4, 1)
        governor.saw("never", 4, 0)
    assert governor.lengths(["copies", "half", "never", "new"]) == [8, 2, 0, 4]
    governor.forget("copies")
    assert governor.lengths(["copies", "half", "never", "new"]) == [4, 2, 0, 4]


def test_tokens_behind_the_first_wrong_one_do_not_count_as_tried():
    governor = SpeculationGovernor(most=8)
    warm(governor, 1)
    for _ in range(100):
        governor.saw("a", 8, 1)  # one right, one wrong, six unknown: a chance of one half
    assert governor.lengths(["a"]) == [2]


def test_a_sequence_without_tokens_is_tried_again():
    governor = SpeculationGovernor()
    warm(governor, 1)
    for _ in range(100):
        governor.saw("a", 4, 0)
    waited = 0
    while governor.lengths(["a"]) == [0]:
        waited += 1
    assert 5 < waited < 200


def test_the_same_history_gives_the_same_answers():
    one, two = SpeculationGovernor(), SpeculationGovernor()
    rates = [Machine(cheap, 0.4, sequences=3, found=0.5, seed=7).run(governor, 700) for governor in (one, two)]
    assert rates[0] == rates[1]
    assert one.lengths([0, 1, 2]) == two.lengths([0, 1, 2])


def test_it_starts_plain_and_an_empty_step_is_no_step():
    governor = SpeculationGovernor()
    assert governor.lengths([1, 2]) == [0, 0]
    assert governor.lengths([]) == []
    for _ in range(100):
        governor.record(0.01, 0, 0, 0)
        governor.record(0.0, 2, 4, 4)
    assert governor.lengths([1, 2]) == [0, 0]


def test_wrong_arguments_are_refused():
    for wrong in [{"most": 0}, {"worth": 0.0}, {"worth": 1.0}, {"probe": 0}, {"probe": 9, "pause": 8}]:
        with pytest.raises(HanlinError, match="expected"):
            SpeculationGovernor(**wrong)
