"""A stage is a folder with `done.json`: what went in (as a fingerprint), what came out, how long it took.

    begun.json    written first: the fingerprint of the inputs. A stage that was killed and whose inputs are the same
                  goes on from what lies in the folder; with other inputs the folder is emptied.
    done.json     written last. While it holds the fingerprint of the inputs the stage is not done again.

The fingerprint of one stage is among the inputs of the next, so a change redoes what follows it and nothing else.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, sweep_partial, write_json
from hanlin.core.progress import clock, say
from hanlin.quickstart.machine import peak_memory


@dataclass(frozen=True)
class Done:
    """A finished stage. seconds: its working time, over all attempts; fresh: whether it ran just now."""

    name: str
    folder: Path
    fingerprint: str
    seconds: float
    result: dict[str, Any]
    fresh: bool


def run_stage(
    root: Path,
    name: str,
    inputs: Mapping[str, Any],
    work: Callable[[Path], dict[str, Any]],
    *,
    quiet: bool = False,
) -> Done:
    """Do `work(folder)` in `root/name` unless it is done already. inputs and the result of `work` are JSON values."""
    folder = root / name
    mark = fingerprint(inputs)
    done = _read(folder / "done.json")
    if done.get("fingerprint") == mark:
        say(f"{name:<14}  is there already, and its inputs have not changed", quiet=quiet)
        return Done(name, folder, mark, done["seconds"], done["result"], fresh=False)
    begun = _read(folder / "begun.json")
    before = float(begun.get("seconds", 0.0))
    if begun.get("fingerprint") != mark:
        shutil.rmtree(folder, ignore_errors=True)
        before = 0.0
    folder.mkdir(parents=True, exist_ok=True)
    sweep_partial(folder)
    write_json(folder / "begun.json", {"fingerprint": mark, "seconds": before})
    start = time.monotonic()
    try:
        result = {**work(folder), "peak_memory_mb": round(peak_memory())}
    except BaseException:
        spent = before + time.monotonic() - start  # `kill -9` leaves no time to write this
        if folder.is_dir():
            write_json(folder / "begun.json", {"fingerprint": mark, "seconds": spent})
        raise
    seconds = before + time.monotonic() - start
    write_json(
        folder / "done.json", {"fingerprint": mark, "seconds": seconds, "result": result, "inputs": dict(inputs)}
    )
    say(f"{name:<14}  done in {clock(seconds)}", quiet=quiet)
    return Done(name, folder, mark, seconds, result, fresh=True)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """A hash of JSON values, independent of the order of their keys."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, Any]:
    """A file that is missing, or that someone has edited into something else, counts as not there."""
    try:
        value = read_json(path)
    except HanlinError:
        return {}
    return value if isinstance(value, dict) else {}
