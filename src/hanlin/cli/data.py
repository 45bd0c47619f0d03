"""`hanlin data build RECIPE` and `hanlin data preview RECIPE`."""

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

EXAMPLES = [
    "hanlin data build recipes/data.yaml",
    "hanlin data build recipes/data.yaml --out runs/more --shard_mb 16",
    "hanlin data preview recipes/sft-tiny.yaml --rows 2",
]


def main(argv: list[str]) -> None:
    """Run `hanlin data`."""
    if argv and argv[0] == "preview":
        _preview(argv[1:])
    elif argv and argv[0] == "build":
        _build(argv[1:])
    else:
        parser = make_parser(
            "data", "Text to token shards (build); what the model will see (preview).", examples=EXAMPLES
        )
        parser.add_argument("verb", choices=["build", "preview"])
        parser.add_argument("recipe", metavar="RECIPE", help="YAML file; --key.path value overrides it")
        parser.parse_args(argv)


def _build(argv: list[str]) -> None:
    from hanlin.data.build import build
    from hanlin.data.recipe import DataRecipe

    quiet = "--quiet" in argv
    rest = [word for word in argv if word != "--quiet"]
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if path is None and not {"-h", "--help"} & set(rest):
        raise HanlinError("Which recipe? For example: hanlin data build recipes/data.yaml")
    recipe = DataRecipe.load(path, rest, usage="hanlin data build RECIPE")
    shards = build(recipe, quiet=quiet)
    print(
        f"{recipe.out}: {shards.documents:,} documents, {shards.tokens:,} tokens in {len(shards.shards)} shards, "
        f"{shards.text_bytes / shards.tokens:.2f} bytes a token"
    )


def _preview(argv: list[str]) -> None:
    parser = make_parser(
        "data preview",
        "Print one batch of a training recipe in two colours, before anything is trained: tokens that the model is\n"
        "asked to produce, and tokens that it only reads. Values of the recipe can be given as --key.path value.",
        examples=[
            "hanlin data preview recipes/sft-tiny.yaml",
            "hanlin data preview recipes/pretrain-tiny.yaml --rows 1",
        ],
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe of `hanlin train`")
    parser.add_argument("--rows", type=int, metavar="N", help="rows to print (default: the whole batch)")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="which batch, from 0 (default: the first)")
    options, overrides = parser.parse_known_args(argv)
    if options.step < 0 or (options.rows is not None and options.rows < 1):
        raise HanlinError("--rows is at least 1 and --step at least 0.")

    from hanlin.align.preview import preview
    from hanlin.align.recipe import TrainRecipe

    recipe = TrainRecipe.load(options.recipe, overrides, usage="hanlin data preview RECIPE")
    preview(recipe, step=options.step, rows=options.rows)
