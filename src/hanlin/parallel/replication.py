"""What replicas owe each other: ranks that hold the same weights and read different rows must sum their gradients.

                 whole on every rank             sent a step, in numbers, with M micro-batches
    data         weights, gradients, optimiser   all-reduce P
    zero1        weights, gradients              reduce-scatter P            all-gather P
    zero2        weights                         reduce-scatter M P          all-gather P
    zero3        -                               reduce-scatter M P          all-gather 2 M P_layers + P_rest

(ZeRO, arXiv:1910.02054.) P: trainable parameters, in ZeRO padded; `parallel.zero` has the exact counts. `data` and
`zero` are the two implementations of `Replication`, and one step of a trainer goes

    begin -> forward, backward, … , with last(): forward, backward -> finish -> optimiser over `pieces` -> publish
"""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn


class Replication(Protocol):
    """How one set of parameters is shared by the ranks of a group, and its gradients summed. Every rank of the group
    makes the same calls in the same order, and as many backward passes."""

    @property
    def pieces(self) -> dict[str, nn.Parameter]:
        """What the optimiser steps on: the parameters themselves, or this rank's flat share of each (1-D; a parameter
        of which this rank has nothing is left out). Their `.grad` is there after `finish`."""
        ...

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """[start, stop) of each piece in its flattened parameter."""
        ...

    def begin(self) -> None:
        """Before the first forward of a step: gradients become empty."""
        ...

    def last(self) -> AbstractContextManager[None]:
        """Around the last micro-batch: its gradients leave while backward goes on. Need not be used."""
        ...

    def finish(self) -> None:
        """After the last backward of a step: each piece's `.grad` becomes the sum over micro-batches and ranks. A
        parameter that a rank did not use counts as zero."""
        ...

    def publish(self) -> None:
        """After the optimiser: what it wrote into the pieces gets into the parameters of all ranks, before they are
        used next."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every parameter is whole: to evaluate, to save, and to load, since what is written into the
        parameters gets into the pieces."""
        ...

    def close(self) -> None:
        """Leave a model of whole, plain parameters behind, as before."""
        ...
