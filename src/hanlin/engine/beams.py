"""Beam search, and diverse beam search.

    score(y) = (sum of log p(y_t | x, y_<t)) / length(y)^length_penalty     length: generated tokens, with the end token

Each step looks at the 2k best continuations of the k beams: those that end join the finished answers if they are among
the k best, the k best of the others go on. It is over when no beam that runs could still beat the worst of k finished
answers (judged at its present length), with `early_stopping` as soon as there are k of them, or at the limit of tokens.

Diverse beam search (arXiv:1610.02424): the beams stand in groups that search one after the other in each step, and a
token loses `diversity_penalty` for each time an earlier group has just chosen it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hanlin.engine.request import Request
from hanlin.engine.search import Branch

NEVER = float("-inf")


@dataclass
class Beam:
    """ids: prompt and answer; score: the sum of log-probabilities of the answer; member: which sequence computes it."""

    ids: list[int]
    score: float
    member: int


@dataclass
class Group:
    """Some of the beams. finished: (generated tokens, score over length^penalty), best first."""

    size: int
    beams: list[Beam]
    finished: list[tuple[list[int], float]] = field(default_factory=list)
    done: bool = False


class BeamSearch:
    """The `Search` of a request with `beams` > 1."""

    sharing, wants_hidden = True, False

    def __init__(self, root: Request) -> None:
        p = root.params
        self.root, self.members = root, [root]
        self._groups = [Group(p.beams // p.beam_groups, [Beam(list(root.ids), 0.0, 0)]) for _ in range(p.beam_groups)]

    def see(self, member: int, start: int, hidden: Tensor) -> None:
        """Beams do not look at hidden states."""

    def advance(self, logprobs: Tensor) -> Sequence[Branch]:
        chosen: list[int] = []  # tokens of the groups that have searched
        for group in self._groups:
            if not group.done:
                rows = logprobs[[beam.member for beam in group.beams]].float()  # (beams, V)
                self._search(group, self._penalised(rows, chosen))
                chosen += [beam.ids[-1] for beam in group.beams]
        branches: list[Branch] = []
        for group in self._groups:
            for beam in [] if group.done else group.beams:
                branches.append(Branch(beam.member, beam.ids))
                beam.member = len(branches) - 1
        if not branches:
            found = [answer for group in self._groups for answer in group.finished]
            self.root.end_search(sorted(found, key=lambda answer: -answer[1]))
        return branches

    def _penalised(self, rows: Tensor, chosen: Sequence[int]) -> Tensor:
        if not chosen or not self.root.params.diversity_penalty:
            return rows
        counts = torch.bincount(torch.tensor(chosen, device=rows.device), minlength=rows.shape[1])
        return rows - self.root.params.diversity_penalty * counts

    def _search(self, group: Group, rows: Tensor) -> None:
        """One step of a group: rows (beams, V)."""
        root, p = self.root, self.root.params
        totals = rows + torch.tensor([[beam.score] for beam in group.beams], device=rows.device)
        looked_at = max(2, 1 + len(root.ends)) * group.size  # even if every end token is among them, enough go on
        values, places = totals.flatten().topk(min(looked_at, totals.numel()))
        going: list[Beam] = []
        length = len(group.beams[0].ids) + 1 - root.prompt_tokens
        full = len(group.finished) == group.size and p.early_stopping
        for rank, (score, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            if score == NEVER:
                break
            parent, token = divmod(place, rows.shape[1])
            ids = [*group.beams[parent].ids, token]
            if token in root.ends or length >= root.limit:
                if rank < group.size and not full:
                    group.finished.append((ids[root.prompt_tokens :], score / length**p.length_penalty))
            elif len(going) < group.size:
                going.append(Beam(ids, score, group.beams[parent].member))
        group.finished = sorted(group.finished, key=lambda answer: -answer[1])[: group.size]
        enough = len(group.finished) == group.size
        best = going[0].score / length**p.length_penalty if going else NEVER
        group.done = not going or (enough and (p.early_stopping or best <= group.finished[-1][1]))
        if going:
            group.beams = going
