"""Activations that wait for the backward pass in the CPU's memory, while the GPU's holds the layers at work.

    forward    saved tensor --copy, on a stream of its own--> pinned memory      the GPU's copy is freed
    backward   pinned memory --copy--> GPU, the one before it already on its way

A storage is copied once, whole, however often it or a view of it is saved (queries, keys and values are views of one
product), and a view comes back with the strides it had: a kernel may depend on them. Weights stay, and so does what is
smaller than `above`: a copy costs some 10 us however small. On a CPU the copy is a plain one, which saves nothing and
changes nothing; it is there to be tested.
"""

import weakref
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """`with Offload(model.parameters(), above=1 << 20).saving():` around forward passes; backward inside or later.

    weights: whose memory is never moved. moved: bytes copied out so far; kept: bytes that went by and stayed.
    """

    def __init__(self, weights: Iterable[Tensor], *, above: int) -> None:
        self.above, self.moved, self.kept = above, 0, 0
        self._weights = list(weights)
        self._streams: dict[torch.device, Any] = {}
        self._held: weakref.WeakValueDictionary[tuple[Any, ...], _Held] = weakref.WeakValueDictionary()
        self._last: weakref.ref[_Held] | None = None

    @contextmanager
    def saving(self) -> Generator[None]:
        """What autograd saves inside is moved."""
        stay = {w.untyped_storage()._cdata for w in self._weights}  # ZeRO moves their memory

        def pack(tensor: Tensor) -> "Tensor | _View":
            return self._pack(tensor, stay)

        with saved_tensors_hooks(pack, _unpack):
            yield

    def _pack(self, tensor: Tensor, stay: set[int]) -> "Tensor | _View":
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), min(tensor.numel() * tensor.element_size(), storage.nbytes())
        if type(tensor) is not Tensor or size < self.above or storage._cdata in stay:
            self.kept += size
            return tensor
        key = (place, tensor._version, tensor.device)
        held = self._held.get(key)
        if held is None or held.source() is not storage:  # nothing, or what lay in the same place before
            before = self._last() if self._last is not None else None
            held = _Held(tensor, self._stream(tensor.device), before)
            self._held[key], self._last = held, weakref.ref(held)
            self.moved += storage.nbytes()
        return _View(held, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tuple(tensor.stride()))

    def _stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _Held:
    """One storage in the CPU's memory, as bytes, and how to get it back."""

    def __init__(self, tensor: Tensor, stream: Any, before: "_Held | None") -> None:
        self.device, self.stream = tensor.device, stream
        self.before = weakref.ref(before) if before is not None else None  # what the backward pass wants next
        self.source = weakref.ref(tensor.untyped_storage())
        self.back: weakref.ref[Any] | None = None  # the storage that came back, as long as some tensor lies in it
        self.coming: tuple[Tensor, Any] | None = None
        content = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        if stream is None:
            self.copy = content.clone()
            return
        self.copy = torch.empty_like(content, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))  # until it is computed
        with torch.cuda.stream(stream):
            self.copy.copy_(content, non_blocking=True)
        content.record_stream(stream)  # its memory is not given away before it is copied

    def fetch(self) -> None:
        """Begin to copy back, on the stream of copies."""
        if self.coming is None and (self.back is None or self.back() is None):
            with torch.cuda.stream(self.stream):
                content = self.copy.to(self.device, non_blocking=True)
                self.coming = content, self.stream.record_event()

    def take(self) -> Tensor:
        """The bytes on their device."""
        if self.stream is None:
            return self.copy
        storage = self.back() if self.back is not None else None
        if storage is not None:
            found = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        else:
            self.fetch()
            assert self.coming is not None
            found, arrived = self.coming
            self.coming, self.back = None, weakref.ref(found.untyped_storage())
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            found.record_stream(current)
        following = self.before() if self.before is not None else None
        if following is not None:
            following.fetch()
        return found


@dataclass(frozen=True)
class _View:
    """A saved tensor: where in its storage it lies."""

    held: _Held
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


def _unpack(saved: Tensor | _View) -> Tensor:
    if not isinstance(saved, _View):
        return saved
    content = saved.held.take()
    tensor = torch.empty(0, dtype=saved.dtype, device=content.device)
    return tensor.set_(content.untyped_storage(), saved.offset, saved.shape, saved.stride)
