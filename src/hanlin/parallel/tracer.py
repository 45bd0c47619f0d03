"""What this process says to others: every collective and every sent message, with its payload in bytes.

    with Tracer() as tracer:
        step()
    tracer.bytes()          {"all_reduce": 123456, ...}

Payload is the tensor of a call, numel x itemsize, as a formula counts it: of an all-gather the output, of a
reduce-scatter the input, of a message the sent tensor (who receives counts nothing), of everything else the input.
`Call.wire` is what a rank sends when the group of n does it as a ring (arXiv:1909.08053 and NCCL do):

    all-reduce 2 (n-1)/n     all-gather, reduce-scatter, all-to-all (n-1)/n     broadcast, reduce, message 1

It sees the calls where torch dispatches them, so also those of backward, of hooks, of autograd functions and of
DTensor, asynchronous ones, and batches of messages; of this thread, and of the threads in which its backward runs.
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUTPUT, INPUT = 0, 1

# operator of c10d -> (name, which argument is the payload)
CALLS: dict[str, tuple[str, int]] = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", OUTPUT),
    "_allgather_base_": ("all_gather", OUTPUT),
    "allgather_coalesced_": ("all_gather", OUTPUT),
    "allgather_into_tensor_coalesced_": ("all_gather", OUTPUT),
    "reduce_scatter_": ("reduce_scatter", INPUT),
    "_reduce_scatter_base_": ("reduce_scatter", INPUT),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", INPUT),
    "alltoall_": ("all_to_all", INPUT),
    "alltoall_base_": ("all_to_all", INPUT),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "gather_": ("gather", INPUT),
    "scatter_": ("scatter", INPUT),
    "send": ("send", 0),
    "barrier": ("barrier", -1),
}
SILENT = {"recv_", "recv_any_source_", "monitored_barrier_"}
"""Operators of which this process gives nothing."""
FUNCTIONAL = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
}  # of DTensor


@dataclass(frozen=True)
class Call:
    """op: name; payload: bytes; ranks: of the group, as numbers of the whole run."""

    op: str
    payload: int
    ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def wire(self) -> float:
        """Bytes that this rank sends, in a ring."""
        n = len(self.ranks)
        if self.op == "all_reduce":
            return self.payload * 2 * (n - 1) / n
        if self.op in ("all_gather", "reduce_scatter", "all_to_all"):
            return self.payload * (n - 1) / n
        return float(self.payload)


class Tracer:
    """Writes down the calls made inside of it. calls: in their order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._mode = _Mode(self.calls)

    def __enter__(self) -> "Tracer":
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)

    def bytes(self, ranks: tuple[int, ...] | None = None) -> dict[str, int]:
        """Payload by operation; ranks: of one group only."""
        found: dict[str, int] = {}
        for call in self.calls:
            if ranks is None or call.ranks == ranks:
                found[call.op] = found.get(call.op, 0) + call.payload
        return found

    def wire(self) -> dict[str, float]:
        """Bytes on the wire by operation, in rings."""
        found: dict[str, float] = {}
        for call in self.calls:
            found[call.op] = found.get(call.op, 0.0) + call.wire
        return found


class _Mode(TorchDispatchMode):
    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._note(func, _arguments(func, args, kwargs or {}))
        elif func.namespace == "_c10d_functional":
            self._note_functional(func, _arguments(func, args, kwargs or {}), out)
        return out

    def _note(self, func: Any, arguments: dict[str, Any]) -> None:
        operator = func._schema.name.split("::")[1]
        if operator in SILENT:
            return
        name, which = CALLS[operator]
        payload = 0 if which < 0 else _bytes(list(arguments.values())[which])
        group = dist.ProcessGroup.unbox(arguments["process_group"])
        self._calls.append(Call(name, payload, tuple(dist.get_process_group_ranks(group))))

    def _note_functional(self, func: Any, arguments: dict[str, Any], out: Any) -> None:
        operator = func._schema.name.split("::")[1]
        if operator not in FUNCTIONAL:  # wait_tensor
            return
        name = FUNCTIONAL[operator]
        payload = _bytes(out if name == "all_gather" else next(iter(arguments.values())))
        group = dist.distributed_c10d._resolve_process_group(arguments["group_name"])
        self._calls.append(Call(name, payload, tuple(dist.get_process_group_ranks(group))))


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """By name, in the operator's order."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    return given | kwargs


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
