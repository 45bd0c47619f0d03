"""`hanlin quickstart`: raw text to a chat page, before your eyes."""

from pathlib import Path

from hanlin.cli.parser import make_parser


def main(argv: list[str]) -> None:
    parser = make_parser(
        "quickstart",
        "Raw text to a language model that answers: tokenizer, pretraining, instruction tuning, evaluation, a report,\n"
        "and a chat page. Nothing is downloaded: the default text is the documentation of Python and of the packages\n"
        "that Hanlin needs. The same command continues after an interruption, and redoes only what has changed.\n"
        "Any value of the recipe can be given as --key.path value (hanlin schema quickstart lists them).",
        examples=[
            "hanlin quickstart",
            "hanlin quickstart --minutes 30",
            "hanlin quickstart --text notes/ story.txt --out runs/mine",
            "hanlin quickstart --minutes 1 --no-serve --model.depth 4",
        ],
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="YAML", help="a recipe to start from (default: the built-in one)"
    )
    parser.add_argument("--text", nargs="+", type=Path, metavar="PATH", help="your own files or folders instead")
    parser.add_argument(
        "--minutes", metavar="N", help="for everything up to the page; scales the training (default 10)"
    )
    parser.add_argument("--out", metavar="DIR", help="where everything goes (default runs/quickstart)")
    parser.add_argument("--no-serve", action="store_true", help="end after the report")
    parser.add_argument("--host", default="127.0.0.1", help="address of the page (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port of the page (0: any free one; default 8000)")
    options, overrides = parser.parse_known_args(argv)
    for flag in ("minutes", "out"):
        if getattr(options, flag) is not None:
            overrides += [f"--{flag}", getattr(options, flag)]
    if options.text:
        overrides += ["--text", *map(str, options.text)]

    from hanlin.quickstart.recipe import QuickstartRecipe
    from hanlin.quickstart.stages import run_quickstart

    recipe = QuickstartRecipe.load(options.recipe, overrides)
    if not options.no_serve:
        from hanlin.core.errors import require

        for package in ("fastapi", "uvicorn", "nicegui"):  # before the minutes are spent, not after
            require(package, "studio")
    made = run_quickstart(recipe, quiet=options.quiet)
    print(f"The report is {made.report}, the model {made.model}")
    if options.no_serve:
        print(f"To talk to it: hanlin chat {made.model}, or hanlin serve {made.model}")
        return

    from hanlin.cli.serve import ServedModel, serve_folder
    from hanlin.quickstart.grown_up import NAME, grown_up_card, grown_up_folder

    models = [
        ServedModel(
            made.model,
            name="quickstart",
            card=made.card.text,
            examples=made.card.examples,
            sampling={"temperature": 0.0, "max_tokens": 160},
        )
    ]
    grown_up = grown_up_folder(quiet=options.quiet)
    if grown_up is not None:
        models.append(ServedModel(grown_up, name=NAME, card=grown_up_card()))
    serve_folder(models, host=options.host, port=options.port, quiet=options.quiet)
