"""Documents -> tokens over all cores, in the order in which they came.

Documents travel to the workers in parcels of about half a megabyte of text; results are taken in the order of sending,
so what comes out does not depend on how many workers there are. A worker is a fresh process (spawn) that holds the
tokenizer; it leaves when its parent is gone, even by `kill -9`. With one worker everything happens in this process.
"""

import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process

import numpy as np

from hanlin.core.errors import HanlinError
from hanlin.core.text_sources import Document
from hanlin.tokens import Tokenizer

PARCEL = 1 << 19  # characters sent to a worker at once
AHEAD = 3  # parcels waiting for each worker
LONG = 1 << 20  # characters above which a document is encoded in pieces: an encoding takes about 100 bytes a token
LINE_START = re.compile(r"\n(?=\S)")  # every usual pre-tokenisation cuts here

Tokenised = tuple[Document, np.ndarray]


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer, *, workers: int) -> Iterator[Tokenised]:
    """(document, its tokens as uint32, without an end token) in order; at most a few parcels are held at a time.

    Raises `HanlinError` where a worker was killed (by the system, when memory ran out).
    """
    if workers <= 1:
        for parcel in parcels(documents):
            yield from zip(parcel, encode([document.text for document in parcel], tokenizer), strict=True)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(tokenizer,))
    try:
        waiting: deque[tuple[list[Document], Future[list[np.ndarray]]]] = deque()
        for parcel in parcels(documents):
            waiting.append((parcel, pool.submit(_work, [document.text for document in parcel])))
            if len(waiting) > workers * AHEAD:
                yield from _taken(*waiting.popleft())
        while waiting:
            yield from _taken(*waiting.popleft())
    except BrokenProcessPool as error:
        raise HanlinError(
            "A tokenising process ended suddenly; usually the system stopped it because memory ran out. Run the same "
            "command again with fewer workers: finished shards are kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def parcels(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of at least `PARCEL` characters."""
    parcel: list[Document] = []
    size = 0
    for document in documents:
        parcel.append(document)
        size += len(document.text)
        if size >= PARCEL:
            yield parcel
            parcel, size = [], 0
    if parcel:
        yield parcel


def encode(texts: list[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Tokens of each text; a very long one is encoded in pieces that begin with a line."""
    pieces = [pieces_of(text) for text in texts]
    flat = tokenizer.encode_batch([piece for parts in pieces for piece in parts])
    arrays = iter([np.array(ids, dtype=np.uint32) for ids in flat])
    return [np.concatenate([next(arrays) for _ in parts]) for parts in pieces]


def pieces_of(text: str) -> list[str]:
    """The text in pieces of about `LONG` characters, cut where a line begins."""
    cuts, at = [0], LONG
    while at < len(text) and (line := LINE_START.search(text, at)):
        cuts.append(line.end())
        at = line.end() + LONG
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _taken(parcel: list[Document], future: "Future[list[np.ndarray]]") -> Iterator[Tokenised]:
    yield from zip(parcel, future.result(), strict=True)


_mine: list[Tokenizer] = []  # the worker's own tokenizer: a process of the pool holds nothing else


def _begin(tokenizer: Tokenizer) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends us
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _mine[:] = [tokenizer]


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(texts: list[str]) -> list[np.ndarray]:
    return encode(texts, _mine[0])
