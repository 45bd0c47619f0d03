"""Which replica a request goes to: the one that has read its beginning before, unless that one is overloaded.

Pages of a prompt that was read are kept by the engine that read it, so prompts that begin alike belong on one replica:

    home(key) = argmax over replicas r of hash(key, r)                    rendezvous hashing (Thaler, Ravishankar 1998)
    home, if its load < max(SLACK, ceil((1 + SPREAD) (total + 1) / n))    bounded loads, arXiv:1608.01350
    else the less loaded of two others drawn at random                    two choices (Mitzenmacher 2001)

A replica that goes takes only its own keys with it: every other key keeps its home. Nothing is remembered, so
any number of front ends agree without talking.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from random import Random
from typing import Any

BEGINNING = 1024  # characters, or a quarter of that in token ids: what is shared beyond them is shared up to them
SLACK = 8  # requests that a replica may always have: together they cost little more than one
SPREAD = 0.25  # how far above the mean load a home may go

# What is read before the conversation begins, in the templates' order; then where the prompt itself may stand.
BEFORE = ("model", "cache_salt", "system", "instructions", "tools")
PROMPTS = ("messages", "prompt", "input")


def beginning_of(body: Any) -> bytes | None:
    """What the prompt of a request's JSON body begins with, as a key; None if there is no prompt to read.

    A conversation is known by what comes before its first answer, so it keeps its key as it grows.
    """
    if not isinstance(body, dict):
        return None
    prompt = next((body[name] for name in PROMPTS if body.get(name)), None)
    if prompt is None:
        return None
    before = {name: body[name] for name in BEFORE if body.get(name)}
    try:
        opening = _opening(prompt) if isinstance(prompt, list) else prompt
        cut = opening[:BEGINNING] if isinstance(opening, str) else opening
        read = json.dumps([before, cut], sort_keys=True)
    except RecursionError:
        return None
    return hashlib.blake2b(read.encode(), digest_size=16).digest()


def _opening(parts: list[Any]) -> Any:
    """Of turns those up to the first of the user, each cut; of token ids the first; of several prompts the first."""
    if not isinstance(parts[0], dict):
        several = isinstance(parts[0], str | list)
        first = parts[0] if several else parts
        return first[:BEGINNING] if isinstance(first, str) else first[: BEGINNING // 4]
    opening = []
    for turn in parts:
        content = turn.get("content") if isinstance(turn, dict) else None
        text = content if isinstance(content, str) else json.dumps(content)
        opening.append([turn.get("role") if isinstance(turn, dict) else None, text[:BEGINNING]])
        if opening[-1][0] not in ("system", "developer"):
            break
    return opening


def home_of(key: bytes, replicas: Mapping[str, int]) -> str:
    """The replica that a key belongs to; replicas: name -> load, at least one."""
    return max(replicas, key=lambda name: (hashlib.blake2b(name.encode(), key=key, digest_size=8).digest(), name))


def capacity(replicas: Mapping[str, int]) -> int:
    """How many requests a home may have when one more is to come."""
    return max(SLACK, math.ceil((1 + SPREAD) * (sum(replicas.values()) + 1) / len(replicas)))


def choose_replica(key: bytes | None, replicas: Mapping[str, int], draw: Random) -> str:
    """The replica for a request with this key. replicas: name -> requests under way there, at least one."""
    if key is not None:
        home = home_of(key, replicas)
        if replicas[home] < capacity(replicas):
            return home
        replicas = {name: load for name, load in replicas.items() if name != home} or replicas
    two = draw.sample(sorted(replicas), min(2, len(replicas)))
    return min(two, key=lambda name: replicas[name])
