"""What an engine may use: how much at once, how much memory."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hanlin.core.errors import HanlinError


@dataclass(frozen=True)
class Limits:
    """max_batch: sequences computed together; max_waiting: requests that may queue beyond them (`submit` raises `Busy`
    past that); max_context: tokens a sequence may hold, prompt and output (None: the model's positions, or what the
    pages can hold); step_tokens: tokens computed in one step, so that a long prompt does not stall the others;
    pad_products: pad every step to step_tokens, so that no result depends on what is computed beside it, whatever the
    matrix library does with products of different heights (Hanlin's own kernels do not need it).

    Memory (`engine.memory`): page_size: tokens a page; cache_bytes: of the device's pages (None: what max_batch
    sequences can use, at most a quarter of the memory that is free); host_bytes: of pages in the host's memory below
    it; disk_folder, disk_bytes: of pages on disk below that, which survive a restart.

    speculate: how to guess tokens that one step then verifies (`engine.speculation`): from the text (ngram), by a
    smaller model (draft), by the model's own modules (mtp); most_drafts: how many at once.
    """

    max_batch: int = 64
    max_waiting: int = 256
    max_context: int | None = None
    step_tokens: int = 512
    pad_products: bool = False
    page_size: int = 16
    cache_bytes: int | None = None
    host_bytes: int = 0
    disk_folder: str | os.PathLike[str] | None = None
    disk_bytes: int = 4 << 30
    speculate: Literal["off", "ngram", "draft", "mtp"] = "off"
    most_drafts: int = 8

    def __post_init__(self) -> None:
        for name, least in [
            ("max_batch", 1), ("max_waiting", 0), ("max_context", 2), ("step_tokens", 1), ("page_size", 1),
            ("cache_bytes", 1), ("host_bytes", 0), ("disk_bytes", 1), ("most_drafts", 1),
        ]:  # fmt: skip
            found = getattr(self, name)
            if found is not None and found < least:
                raise HanlinError(f"{name} is {found}; it must be at least {least}.")
        if self.speculate not in ("off", "ngram", "draft", "mtp"):
            raise HanlinError(f"speculate is {self.speculate!r}; it is one of: off, ngram, draft, mtp.")


def read_limits(named: Mapping[str, Any]) -> Limits:
    """Limits by name; an unknown one is a `HanlinError`."""
    known = Limits.__dataclass_fields__
    if wrong := [name for name in named if name not in known]:
        raise HanlinError(f"Unknown limit `{wrong[0]}` of the engine; it is one of: {', '.join(known)}.")
    return Limits(**named)
