"""By the score of a reward model (or any other judge), with or without length bins.

Reward models like long answers. With bins, examples are parted by length into equally large groups and each group gives
its best in proportion, so that the lengths kept are the lengths there were.
"""

from collections.abc import Sequence

from hanlin.align.selection.decisions import Decision, Selection, check_count, keep_top, ranked


def select_by_reward(scores: Sequence[float], keep: int, *, lengths: Sequence[int] = (), bins: int = 1) -> Selection:
    """The `keep` best; bins > 1: the best of each of so many groups of like length. lengths: of each example."""
    if bins == 1:
        return keep_top(scores, keep, named="reward")
    check_count(keep, len(scores))
    by_length = sorted(range(len(scores)), key=lambda place: (lengths[place], place))
    edges = [len(scores) * part // bins for part in range(bins + 1)]
    quota = [keep * edge // len(scores) for edge in edges]  # a group's share; the shares sum to `keep`
    decisions: dict[int, Decision] = {}
    for part in range(bins):
        group = by_length[edges[part] : edges[part + 1]]
        room = quota[part + 1] - quota[part]
        order = [group[i] for i in ranked([scores[place] for place in group])]
        for rank, place in enumerate(order, start=1):
            where = f"rank {rank} of {len(group)} with lengths {lengths[group[0]]} to {lengths[group[-1]]}"
            decisions[place] = Decision(rank <= room, scores[place], f"reward {scores[place]:.4g}, {where}")
    return Selection([decisions[place] for place in range(len(scores))])
