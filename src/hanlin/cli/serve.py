"""`hanlin serve FOLDER...`: an OpenAI-compatible server with a chat page at the same address."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError, require
from hanlin.core.progress import say

if TYPE_CHECKING:
    from hanlin.engine import Engine

KEY_VARIABLE = "HANLIN_API_KEY"


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
    page: bool = True,
    quiet: bool = False,
) -> None:
    """Load the folders, serve them until Ctrl-C. The first answers requests that name no model.

    Port 0 takes any free one. With api_key, both the interface and the page ask for it.
    """
    require("uvicorn", "serve")
    require("fastapi", "serve")
    if page:
        require("nicegui", "studio")
    offers = _with_names([model if isinstance(model, ServedModel) else ServedModel(model) for model in models])
    from hanlin.engine import Engine
    from hanlin.serve.app import create_app
    from hanlin.serve.run import address_of, bind, run_app

    listener = bind(host, port)  # before the models load: a taken port should not cost a minute
    engines: dict[str, Engine] = {}
    try:
        for name, offer in offers.items():
            engines[name] = Engine.from_folder(offer.folder)
        app = create_app(engines, api_key=api_key)
        if page:
            from hanlin.studio.mount import mount_chat

            mount_chat(
                app, [_chat_model(name, offer, engines[name]) for name, offer in offers.items()], api_key=api_key
            )
        address = address_of(listener)
        say(f"Serving {', '.join(engines)} at {address}", quiet=quiet)
        if page:
            say(f"  chat page         {address}/", quiet=quiet)
        say(f"  OpenAI interface  {address}/v1", quiet=quiet)
        if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
            say("  Anyone who reaches this machine can use it: --api-key asks for a key.", quiet=quiet)
        say("  Ctrl-C stops it.", quiet=quiet)
        run_app(app, listener)
    finally:
        listener.close()
        for engine in engines.values():
            engine.close()


def main(argv: list[str]) -> None:
    parser = make_parser(
        "serve",
        "Serve model folders over HTTP: the OpenAI interface below /v1 and a chat page at /.",
        examples=[
            "hanlin serve runs/quickstart/model",
            "hanlin serve runs/quickstart/model --port 8080 --api-key secret",
        ],
    )
    parser.add_argument("folder", nargs="+", help="a model folder (several: the first is the default model)")
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
    options = parser.parse_args(argv)
    if options.name is not None and len(options.folder) > 1:
        raise HanlinError("--name names one model, but several folders were given. Leave it out.")
    if options.api_key == "":
        raise HanlinError("--api-key is empty. Give a key, or leave the option out to serve without one.")
    serve_folder(
        [ServedModel(folder, name=options.name) for folder in options.folder],
        host=options.host,
        port=options.port,
        api_key=options.api_key,
        page=not options.no_page,
        quiet=options.quiet,
    )


def _with_names(models: Sequence[ServedModel]) -> dict[str, ServedModel]:
    """Each model under its name; two of the same name are an error."""
    named: dict[str, ServedModel] = {}
    for model in models:
        folder = Path(model.folder)
        if not folder.is_dir():
            raise HanlinError(f"{folder} is not a folder. Expected a model folder with config.json and tokenizer.json.")
        name = model.name or folder.resolve().name
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
