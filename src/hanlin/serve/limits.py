"""Who may ask how much: keys and their limits, and the gate that closes when the server goes down.

A key may have a bound on its requests under way at one time, and on its tokens a minute: prompt tokens count when a
request starts, the answer's when it ends, and whoever has used up the last 60 seconds' allowance waits until enough of
them are over (429 with Retry-After). A request is never cut short by it, so one long answer may overdraw.
"""

import hmac
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.serve.errors import ApiError

WINDOW = 60.0  # seconds


@dataclass(frozen=True)
class Key:
    """A client's key. adapters: names of the only adapters it may use; None: all."""

    key: str
    name: str = ""
    max_concurrent: int | None = None
    tokens_per_minute: int | None = None
    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        limits = {"max_concurrent": self.max_concurrent, "tokens_per_minute": self.tokens_per_minute}
        for name, value in limits.items():
            if value is not None and (type(value) is not int or value < 1):
                raise HanlinError(f"{name} of the key '{self.name}' is {value!r}; expected a whole number above 0.")
        if not self.key or not isinstance(self.key, str) or not isinstance(self.name, str):
            raise HanlinError("A key is empty, or it or its name is no text.")


def same_key(shown: str, key: str) -> bool:
    """Compared in constant time, so that a wrong key tells nothing about the right one."""
    return hmac.compare_digest(shown.encode(), key.encode())


def read_keys(path: str | os.PathLike[str]) -> list[Key]:
    """Keys of a file with a JSON object a line: {"key", "name", "max_concurrent", "tokens_per_minute", "adapters"}.

    Only "key" is needed; a missing name is the line's number.
    """
    file = Path(path)
    if not file.is_file():
        raise HanlinError(f'{file} is not a file. Expected lines such as {{"key": "…", "name": "alice"}}.')
    keys: list[Key] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or "key" not in entry:
                raise ValueError('it is no object with a "key"')
            adapters = entry.pop("adapters", None)
            said: dict[str, Any] = {"name": str(number), **entry}
            key = Key(**said, adapters=None if adapters is None else tuple(adapters))
        except (ValueError, TypeError, HanlinError) as error:
            raise HanlinError(f"{file}, line {number}: {error}") from error
        if any(key.key == other.key for other in keys):
            raise HanlinError(f"{file}, line {number}: this key stands there twice.")
        keys.append(key)
    if not keys:
        raise HanlinError(f"{file} holds no keys.")
    return keys


@dataclass
class Account:
    """What a key has under way and has used. Belongs to the event loop's thread."""

    key: Key
    clock: Callable[[], float] = time.monotonic
    open: int = 0
    used: int = 0  # within the window
    _entries: deque[tuple[float, int]] = field(default_factory=deque)

    def charge(self, tokens: int) -> None:
        """Tokens that were read or written."""
        if self.key.tokens_per_minute is not None and tokens:
            self._entries.append((self.clock(), tokens))
            self.used += tokens

    def check(self) -> None:
        """`ApiError` 429 if this key has to wait."""
        if self.key.max_concurrent is not None and self.open >= self.key.max_concurrent:
            message = f"This key has {self.open} requests under way, as many as it may. Wait for one to end."
            raise ApiError(429, message, code="too_many_requests", retry_after=1)
        limit = self.key.tokens_per_minute
        if limit is None:
            return
        now = self.clock()
        while self._entries and self._entries[0][0] <= now - WINDOW:
            self.used -= self._entries.popleft()[1]
        if self.used >= limit:
            excess, wait = self.used - limit, 0.0
            for then, tokens in self._entries:
                excess, wait = excess - tokens, then + WINDOW - now
                if excess < 0:
                    break
            message = f"This key has used {self.used} tokens in the last minute, of {limit} that it may."
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=max(1, math.ceil(wait)))


class Gate:
    """Counts what is under way; closed, it lets nobody in any more.

    keys: none means that nobody is asked for one.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.accounts = [Account(key) for key in keys]
        self.anybody = Account(Key("-", ""))
        self.closed = False
        self.open = 0

    def account(self, shown: str | None) -> Account:
        """Whose key this is, or `ApiError` 401."""
        if not self.accounts:
            return self.anybody
        if not shown:
            raise ApiError(401, "This server needs a key: send 'Authorization: Bearer KEY'.", code="missing_api_key")
        found = [account for account in self.accounts if same_key(shown, account.key.key)]  # looks at all of them
        if not found:
            raise ApiError(401, "The key is wrong.", code="invalid_api_key")
        return found[0]

    def enter(self, account: Account) -> None:
        """One more request, or `ApiError` 503 or 429."""
        if self.closed:
            raise ApiError(503, "The server is going down and takes no new requests.", code="draining", retry_after=5)
        account.check()
        self.open += 1
        account.open += 1

    def leave(self, account: Account) -> None:
        self.open -= 1
        account.open -= 1
