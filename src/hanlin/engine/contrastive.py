"""Contrastive search (arXiv:2202.06417): likely, but unlike what was written before.

    x_t = argmax over the k likeliest v of   (1 - a) p(v | x_<t) - a max_{j < t} cos(h_v, h_j)

h: the last hidden state of a token in its context, that of the prompt's tokens too; a: `contrast`, k: `top_k`. The k
candidates are sequences that share all pages but the last, and one step computes them all; the winner's logits give the
next candidates.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hanlin.engine.request import Request
from hanlin.engine.search import Branch


class ContrastiveSearch:
    """The `Search` of a request with `contrast` > 0."""

    sharing, wants_hidden = False, True

    def __init__(self, root: Request) -> None:
        self.root, self.members = root, [root]
        self._written: list[Tensor] = []  # directions of the hidden states of all tokens so far, (width,) each
        self._candidates: dict[int, Tensor] = {}  # member -> the direction of its last token
        self._chances = torch.ones(1)  # of each member's last token
        self._choosing = False

    def see(self, member: int, start: int, hidden: Tensor) -> None:
        directions = F.normalize(hidden.float(), dim=-1)
        if self._choosing:
            if start + len(hidden) == len(self.members[member].ids):
                self._candidates[member] = directions[-1]
            return
        self._written += directions[len(self._written) - start :].unbind()  # known ones come again after a preemption

    def advance(self, logprobs: Tensor) -> Sequence[Branch]:
        winner = 0
        if self._choosing:
            winner = self._best()
            self._written.append(self._candidates[winner])
            ids = self.members[winner].ids
            answer = ids[self.root.prompt_tokens :]
            if answer[-1] in self.root.ends or len(answer) >= self.root.limit:
                self.root.end_search([(list(answer), 0.0)])
                return []
        self._choosing = True
        self._candidates = {}
        row = logprobs[winner].float()
        values, tokens = row.topk(min(self.root.params.top_k, len(row)))
        possible = values > float("-inf")
        self._chances = values[possible].exp()
        ids = list(self.members[winner].ids)
        return [Branch(winner, [*ids, token]) for token in tokens[possible].tolist()]

    def _best(self) -> int:
        candidates = torch.stack([self._candidates[member] for member in range(len(self.members))])  # (k, width)
        likeness = (candidates @ torch.stack(self._written).T).amax(-1)
        contrast = self.root.params.contrast
        return int(((1 - contrast) * self._chances.to(likeness.device) - contrast * likeness).argmax())
