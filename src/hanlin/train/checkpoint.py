"""Checkpoints: `checkpoints/step-N/`, whole or absent, verified before a byte of them is believed.

One process (or several that all hold the whole model) writes files that anybody reads:

    model.safetensors      weights under their Hugging Face names (a tied head once)
    optimizer.safetensors  the optimiser's tensors, "NAME/exp_avg" ..., averages, and torch's random states "random/cpu"
    state.json             step, tokens, seconds, what decides the run (settings, data, model), random states
    manifest.json          CRC-32 and size of the three

Several processes with a part of the model each write `rank-R.safetensors`, every piece once; the manifest lists them
and how each piece sits in its whole tensor (`train.sharded`), so that any number of processes reads them (`reader`).

The folder is written under a temporary name, fsynced and renamed, so a killed process leaves no half of one. What a
disk or a person damages later is found by the checksums: then the checkpoint before it is taken, and the damaged folder
is set aside as `damaged-step-N`. Nothing here is pickle.
"""

import json
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.files import TEMPORARY, atomic_folder, disk_errors, fsync, move_folder, read_json
from hanlin.core.runs import Run
from hanlin.train.reader import (
    MANIFEST,
    MODEL,
    ONE_FILE_SET,
    OPTIMIZER,
    SHARDED,
    STATE,
    CheckpointReader,
    DamagedCheckpointError,
    name_in_file,
    open_checkpoint,
)
from hanlin.train.sharded import Held, Place
from hanlin.train.tensor_file import SAFETENSORS_NAMES, write_tensors

PATIENCE = 1800.0  # seconds that the first process waits for the files of the others
LEAVING = 10.0  # the same, once the run is being left


@dataclass(frozen=True)
class Checkpoint:
    """What is to be saved. state: JSON values (see `saving`); held: this process's tensors, by reference."""

    state: dict[str, Any]
    held: Sequence[Held]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def encoded(self) -> bytes:
        """The state as it is written; a metric's sum may be NaN, so it is JSON that only Python reads."""
        return json.dumps(self.state, ensure_ascii=False).encode()


def write_checkpoint(folder: Path, step: int, state: bytes, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint of whole tensors (format 1), atomically. A full disk is a `HanlinError`; what was there before
    stays."""
    files: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
    for name, tensor in tensors.items():
        file, key = name_in_file(name)
        files[file][key] = tensor
    with atomic_folder(folder) as temporary:
        (temporary / STATE).write_bytes(state)
        sums = {file: write_tensors(temporary / file, own) for file, own in files.items()}
        sums[STATE] = _crc32(state)
        about = {file: {"crc32": found, "bytes": (temporary / file).stat().st_size} for file, found in sums.items()}
        _write_manifest(temporary, {"format": ONE_FILE_SET, "step": step, "files": about})


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def shared_folder(folder: Path) -> Path:
    """Where the processes of a run write their files before `folder` is there."""
    return folder.with_name(f"{TEMPORARY}shared-{folder.name}")


def write_part(folder: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Write this process's tensors for the checkpoint `folder`, and say so to the one that `finish_parts`."""
    temporary = shared_folder(folder)
    try:
        with disk_errors(folder):
            file = temporary / part_file(rank)
            found = write_tensors(file, tensors)
            fsync(file)
            report = temporary / f"{_report(rank)}.new"
            report.write_text(json.dumps({"crc32": found, "bytes": file.stat().st_size}))
            report.replace(temporary / _report(rank))
    except BaseException:
        with suppress(OSError):  # an empty file fits on a full disk
            (temporary / _failure(rank)).touch()
        raise


def finish_parts(
    folder: Path,
    step: int,
    state: bytes,
    written: Sequence[Sequence[Place]],
    *,
    hurried: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until every process has written its part, then make the checkpoint `folder` of them, atomically.

    written: of each rank, what is in its file. hurried: whether the others are likely gone. `HanlinError` if one of
    them failed or does not answer; then nothing stays.
    """
    temporary = shared_folder(folder)
    try:
        reports = _await_reports(temporary, len(written), hurried)
        with disk_errors(folder):
            (temporary / STATE).write_bytes(state)
            files = {part_file(rank): report for rank, report in enumerate(reports)}
            files[STATE] = {"crc32": _crc32(state), "bytes": len(state)}
            manifest = {"format": SHARDED, "step": step, "world": len(written), "files": files, "tensors": {}}
            for rank, places in enumerate(written):
                for place in places:
                    about = {"dtype": SAFETENSORS_NAMES[place.dtype], "shape": list(place.shape), "pieces": []}
                    piece = {"file": part_file(rank), "key": place.name, **place.to_json()}
                    manifest["tensors"].setdefault(place.name, about)["pieces"].append(piece)
                (temporary / _report(rank)).unlink()
            _write_manifest(temporary, manifest)
            for file in (STATE, MANIFEST):
                fsync(temporary / file)
            fsync(temporary)
            move_folder(temporary, folder)
            fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def part_file(rank: int) -> str:
    """The name of what a process writes."""
    return f"rank-{rank}.safetensors"


def newest_checkpoint(run: Run, notice: Callable[[str], None], *, set_aside: bool = True) -> CheckpointReader | None:
    """The newest whole checkpoint of `run`; None if there is none at all.

    A damaged one is passed over with a `notice` that names what is wrong, and set aside so that it is not counted among
    the kept ones (set_aside=False leaves it, for a process that only reads). If every one is damaged: `HanlinError`.
    """
    damaged: list[tuple[Path, str]] = []
    for _, folder in reversed(run.checkpoints()):
        try:
            found = open_checkpoint(folder)
        except DamagedCheckpointError as error:
            damaged.append((folder, str(error)))
            continue
        for bad, reason in damaged:
            aside = f" It is set aside as {_set_aside(bad).name}." if set_aside else ""
            notice(f"{bad} is damaged: {reason}{aside} Continuing from {folder.name} instead.")
        return found
    if damaged:
        reasons = " ".join(f"{folder.name}: {reason}" for folder, reason in damaged)
        raise HanlinError(
            f"No checkpoint in {run.path / 'checkpoints'} can be read. {reasons} "
            "Restore one of them, or delete that folder to start from the beginning."
        )
    return None


def prune_checkpoints(run: Run, keep_last: int, best: int | None = None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one of step `best`."""
    for step, folder in run.checkpoints()[:-keep_last]:
        if step != best:
            doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")  # gone at once for every reader, then deleted
            folder.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _report(rank: int) -> str:
    return f"rank-{rank}.json"


def _failure(rank: int) -> str:
    return f"rank-{rank}.failed"


def _await_reports(temporary: Path, world: int, hurried: Callable[[], bool]) -> list[dict[str, Any]]:
    """What each process says of its file. Files, not a collective: a thread must not come between those of training."""
    started, missing = time.monotonic(), set(range(world))
    hurry_from: float | None = None
    while True:
        missing = {rank for rank in missing if not (temporary / _report(rank)).exists()}
        failed = sorted(rank for rank in missing if (temporary / _failure(rank)).exists())
        if missing == set(failed):
            break
        now = time.monotonic()
        if hurry_from is None and hurried():
            hurry_from = now
        if (
            not temporary.is_dir()
            or now - started > PATIENCE
            or (hurry_from is not None and now - hurry_from > LEAVING)
        ):
            break
        time.sleep(0.02)
    if missing:
        raise HanlinError(
            f"The checkpoint was given up: {_listed(missing)} did not write {'its' if len(missing) == 1 else 'their'} "
            "part. The checkpoint before it stays."
        )
    return [read_json(temporary / _report(rank)) for rank in range(world)]


def _listed(ranks: set[int]) -> str:
    return f"process {min(ranks)}" if len(ranks) == 1 else f"the processes {', '.join(map(str, sorted(ranks)))}"


def _set_aside(folder: Path) -> Path:
    target = folder.with_name(f"damaged-{folder.name}")
    if target.exists():
        shutil.rmtree(target)
    folder.replace(target)
    return target
