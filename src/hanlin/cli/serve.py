"""`hanlin serve FOLDER...`: an OpenAI-compatible server with a chat page at the same address."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError, MissingExtraError, require
from hanlin.core.progress import say

if TYPE_CHECKING:
    from fastapi import FastAPI

    from hanlin.engine import Engine

KEY_VARIABLE = "HANLIN_API_KEY"

LIMITS: dict[str, tuple[type, str]] = {  # the engine's own, by their names
    "dtype": (str, "float32, bfloat16 … or auto, whichever is faster here (default)"),
    "device": (str, "cpu, cuda … or auto (default)"),
    "ranks": (int, "processes of this machine that the model is cut over (tensor parallelism)"),
    "max_batch": (int, "sequences computed together"),
    "max_waiting": (int, "requests that may queue beyond them; then 429"),
    "max_context": (int, "tokens a conversation may have (default: the model's)"),
    "step_tokens": (int, "tokens computed in one step"),
    "cache_bytes": (int, "bytes of keys and values on the device"),
    "host_bytes": (int, "bytes of further ones in memory"),
    "disk_folder": (str, "folder for those that outlive the process"),
    "disk_bytes": (int, "bytes of that folder at most"),
    "speculate": (str, "guess tokens and verify them together: off (default), ngram, draft, mtp"),
    "most_drafts": (int, "tokens guessed at once"),
    "draft": (str, "folder of the small model that guesses, with --speculate draft"),
}


@dataclass(frozen=True)
class ServedModel:
    """A model folder to serve and what the page says about it.

    name: default the folder's. card: Markdown, what this model is; default its size. examples: questions to click on.
    Both in one language, or a mapping with "en" and "zh". sampling: the page's first settings, such as temperature=0.2.
    """

    folder: str | os.PathLike[str]
    name: str | None = None
    card: Mapping[Any, str] | str = ""
    examples: Mapping[Any, Sequence[str]] | Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def serve_folder(
    models: Sequence[ServedModel | str | os.PathLike[str]],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    key_file: str | os.PathLike[str] | None = None,
    page: bool = True,
    request_seconds: float | None = None,
    drain_seconds: float = 30.0,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    adapter_root: str | os.PathLike[str] | None = None,
    limits: Mapping[str, Any] | None = None,
    replicas: int | None = None,
    quiet: bool = False,
) -> None:
    """Load the folders, serve them until Ctrl-C or SIGTERM. The first answers requests that name no model.

    Port 0 takes any free one. With api_key, both the interface and the page ask for it; key_file has further keys with
    their limits. request_seconds: an answer that takes longer is given up; drain_seconds: what answers under way may
    still take when the server is told to stop. adapters: name -> folder, on the first model; adapter_root: clients may
    load those below it. limits: the engine's (max_batch, max_context …) with dtype and device. replicas: processes that
    each have the models, behind this one address (the extra `ray`, `docs/replicas.md`); default: this process alone.
    """
    require("uvicorn", "serve")
    require("fastapi", "serve")
    if page:
        require("nicegui", "studio")
    if page and key_file is not None and api_key is None:
        raise HanlinError("The page opens with --api-key: give one beside --key-file, or leave it out with --no-page.")
    if adapter_root is not None and not Path(adapter_root).is_dir():
        raise HanlinError(f"{adapter_root} is not a folder. Expected the one below which adapters lie.")
    if replicas is not None:
        _check_replicas(replicas, page=page, adapter_root=adapter_root)
    offers = _with_names([model if isinstance(model, ServedModel) else ServedModel(model) for model in models])
    from hanlin.engine import Engine
    from hanlin.serve.app import create_app
    from hanlin.serve.limits import read_keys
    from hanlin.serve.run import address_of, bind, run_app

    keys = [] if key_file is None else read_keys(key_file)
    listener = bind(host, port)  # before the models load: a taken port should not cost a minute
    engines: dict[str, Engine] = {}
    held = ExitStack()
    try:
        if replicas is not None:
            folders = {name: offer.folder for name, offer in offers.items()}
            app = _front(
                held, replicas, folders, limits or {}, adapters or {}, api_key=api_key, keys=keys,
                request_seconds=request_seconds,
            )  # fmt: skip
        else:
            for name, offer in offers.items():
                loaded = {} if engines else dict(adapters or {})
                engines[name] = Engine.from_folder(offer.folder, adapters=loaded, **(limits or {}))
            app = create_app(
                engines,
                api_key=api_key,
                keys=keys,
                request_seconds=request_seconds,
                adapter_root=None if adapter_root is None else Path(adapter_root),
            )
        if page:
            from hanlin.studio.mount import mount_chat

            mount_chat(
                app, [_chat_model(name, offer, engines[name]) for name, offer in offers.items()], api_key=api_key
            )
        address = address_of(listener)
        say(f"Serving {', '.join(offers)} at {address}", quiet=quiet)
        if page:
            say(f"  chat page         {address}/", quiet=quiet)
        say(f"  OpenAI interface  {address}/v1", quiet=quiet)
        if api_key is None and not keys and host not in ("127.0.0.1", "localhost", "::1"):
            say("  Anyone who reaches this machine can use it: --api-key asks for a key.", quiet=quiet)
        say("  Ctrl-C stops it.", quiet=quiet)
        run_app(app, listener, drain_seconds=drain_seconds)
    finally:
        listener.close()
        for engine in engines.values():
            engine.close()
        held.close()


def _front(
    held: ExitStack,
    count: int,
    folders: Mapping[str, str | os.PathLike[str]],
    limits: Mapping[str, Any],
    adapters: Mapping[str, str | os.PathLike[str]],
    **access: Any,
) -> "FastAPI":
    """The application before `count` replicas, which run until `held` is closed. They start elsewhere: full paths."""
    from hanlin.serve.front import create_front
    from hanlin.serve.replicas import Offer, running_replicas

    def full(places: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(Path(place).resolve()) for name, place in places.items()}

    places = full({name: limits[name] for name in ("disk_folder", "draft") if name in limits})
    offer = Offer(full(folders), {**limits, **places}, full(adapters), **access)
    fleet = held.enter_context(running_replicas(offer, count))
    return create_front(fleet, api_key=offer.api_key, keys=offer.keys)


def _check_replicas(count: int, *, page: bool, adapter_root: str | os.PathLike[str] | None) -> None:
    """What several processes cannot do is refused before anything starts."""
    if find_spec("ray") is None:  # not imported yet: it reads its environment when it is
        raise MissingExtraError("ray", "ray")
    if count < 1:
        raise HanlinError(f"--replicas is {count}; expected a number of processes, at least 1.")
    if page:
        raise HanlinError("The chat page needs the model in its own process. Use --no-page with --replicas.")
    if adapter_root is not None:
        raise HanlinError(
            "--adapter-root lets clients load adapters, which a replica that is replaced would lack. With --replicas "
            "give them at the start: --adapter NAME=FOLDER."
        )


def main(argv: list[str]) -> None:
    parser = make_parser(
        "serve",
        "Serve model folders over HTTP: the OpenAI interface below /v1 and a chat page at /.",
        examples=[
            "hanlin serve runs/quickstart/model",
            "hanlin serve runs/quickstart/model --port 8080 --api-key secret",
            "hanlin serve base --adapter poet=runs/poet --max-context 8192 --key-file keys.jsonl --no-page",
            "hanlin serve base --replicas 2 --no-page",
        ],
    )
    parser.add_argument(
        "folder", nargs="+", help="a model folder or a pulled model's name (several: the first is the default)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (0.0.0.0: all; default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (0: any free one; default 8000)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        help=f"ask for this key (default: the environment variable {KEY_VARIABLE}, if set)",
    )
    parser.add_argument("--no-page", action="store_true", help="only the interface, no chat page")
    parser.add_argument("--name", help="the model's name for clients (default: the folder's name)")
    parser.add_argument("--key-file", help='further keys, a JSON object a line: {"key", "name", "max_concurrent", …}')
    parser.add_argument("--timeout", type=float, help="seconds after which an answer is given up (default: never)")
    parser.add_argument(
        "--drain", type=float, default=30.0, help="seconds for answers under way at the end (default 30)"
    )
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="LoRA on the first model")
    parser.add_argument(
        "--replicas", type=int, metavar="N", help="N processes with the models behind this address (extra: ray)"
    )
    parser.add_argument("--adapter-root", help="clients may load adapters below this folder (default: none)")
    for name, (kind, help_text) in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=help_text)
    options = parser.parse_args(argv)
    if options.name is not None and len(options.folder) > 1:
        raise HanlinError("--name names one model, but several folders were given. Leave it out.")
    if options.api_key == "":
        raise HanlinError("--api-key is empty. Give a key, or leave the option out to serve without one.")
    from hanlin.models.places import find_model

    serve_folder(
        [ServedModel(find_model(folder), name=options.name) for folder in options.folder],
        host=options.host,
        port=options.port,
        api_key=options.api_key,
        page=not options.no_page,
        key_file=options.key_file,
        request_seconds=_positive("--timeout", options.timeout),
        drain_seconds=options.drain,
        adapters=_adapters(options.adapter),
        adapter_root=options.adapter_root,
        limits={name: value for name in LIMITS if (value := getattr(options, name)) is not None},
        replicas=options.replicas,
        quiet=options.quiet,
    )


def _positive(name: str, seconds: float | None) -> float | None:
    if seconds is not None and not seconds > 0:
        raise HanlinError(f"{name} is {seconds}; expected seconds above 0.")
    return seconds


def _adapters(given: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER, each name once."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not name or not folder or name in found:
            raise HanlinError(f"--adapter is '{text}'; expected NAME=FOLDER, each name once.")
        found[name] = folder
    return found


def _with_names(models: Sequence[ServedModel]) -> dict[str, ServedModel]:
    """Each model under its name; two of the same name are an error."""
    from hanlin.models.places import find_model

    named: dict[str, ServedModel] = {}
    for model in models:
        folder = find_model(model.folder)
        if not folder.is_dir():
            raise HanlinError(f"{folder} is not a folder. Expected a model folder with config.json and tokenizer.json.")
        name = model.name or folder.resolve().name
        model = replace(model, folder=folder)
        if name in named:
            raise HanlinError(f"Two models are called '{name}': {named[name].folder} and {folder}. Rename one folder.")
        named[name] = model
    if not named:
        raise HanlinError("No model folder was given.")
    return named


def _chat_model(name: str, offer: ServedModel, engine: "Engine") -> Any:
    import dataclasses

    from hanlin.studio.chat_model import CHAT_SAMPLING, ChatModel

    card: Any = offer.card or _default_card(engine)
    sampling = dataclasses.replace(CHAT_SAMPLING, **offer.sampling)
    return ChatModel(name, engine, card=card, examples=offer.examples, sampling=sampling)


def _default_card(engine: "Engine") -> dict[str, str]:
    size = engine.model.parameter_count()
    shown = f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.1f} M"
    return {
        "en": f"A model of {shown} parameters that holds {engine.max_context:,} tokens.",
        "zh": f"{shown} 参数的模型，上下文可容纳 {engine.max_context:,} 个词元。",
    }
