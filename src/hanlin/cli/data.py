"""`hanlin data build RECIPE` and `hanlin data preview RECIPE`."""

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

EXAMPLES = [
    "hanlin data build recipes/data.yaml",
    "hanlin data build recipes/data.yaml --out runs/more --shard-mb 16",
    "hanlin data preview recipes/sft.yaml",
]


def main(argv: list[str]) -> None:
    """Run `hanlin data`."""
    if argv and argv[0] == "preview":
        from hanlin.align.preview import main as preview

        preview(argv[1:])
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
