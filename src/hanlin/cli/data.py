"""`hanlin data build`, `preview`, `synthesize` and `select`, each with a RECIPE."""

from typing import TypeVar

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError
from hanlin.core.recipe import Recipe

R = TypeVar("R", bound=Recipe)
EXAMPLES = [
    "hanlin data build recipes/data.yaml",
    "hanlin data build recipes/data.yaml --out runs/more --shard_mb 16",
    "hanlin data preview recipes/sft-tiny.yaml --rows 2",
    "hanlin data synthesize recipes/align/self-instruct.yaml",
    "hanlin data select recipes/align/select-ifd.yaml --method.keep 200",
]
SYNTHESIZE = [
    "hanlin data synthesize recipes/align/self-instruct.yaml --seeds tasks.txt --method.target 200",
    "hanlin data synthesize recipes/align/evol-instruct.yaml --writer.url http://HOST:8000/v1",
    "hanlin data synthesize recipes/align/rejection.yaml --help        (every value of this recipe)",
]
SELECT = [
    "hanlin data select recipes/align/select-ifd.yaml --files chat.jsonl --method.keep 200",
    "hanlin data select recipes/align/select-nuggets.yaml --method.least 0.9",
    "hanlin data select recipes/align/select-car.yaml --help        (every value of this recipe)",
]


def main(argv: list[str]) -> None:
    """Run `hanlin data`."""
    if argv and argv[0] in VERBS:
        VERBS[argv[0]](argv[1:])
        return
    parser = make_parser(
        "data",
        "build       text to token shards\n"
        "preview     what the model will see of a training recipe\n"
        "synthesize  new conversations, written by a model (docs/synthesis.md)\n"
        "select      of many conversations those worth training on (docs/selection.md)",
        examples=EXAMPLES,
    )
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; --key.path value overrides it")
    parser.parse_args(argv)


def _build(argv: list[str]) -> None:
    from hanlin.data.build import build
    from hanlin.data.recipe import DataRecipe

    recipe, quiet = _load(DataRecipe, argv, "build", "recipes/data.yaml")
    shards = build(recipe, quiet=quiet)
    print(
        f"{recipe.out}: {shards.documents:,} documents, {shards.tokens:,} tokens in {len(shards.shards)} shards, "
        f"{shards.text_bytes / shards.tokens:.2f} bytes a token"
    )


def _synthesize(argv: list[str]) -> None:
    from hanlin.align.synthesis.recipe import SynthesisRecipe

    _help(
        argv, "synthesize", "Conversations written by a model, from seeds; resumable. docs/synthesis.md", SYNTHESIZE
    )
    recipe, quiet = _load(SynthesisRecipe, argv, "synthesize", "recipes/align/self-instruct.yaml")
    from hanlin.align.synthesis.run import synthesize

    print("\n".join(synthesize(recipe, quiet=quiet).lines()))


def _select(argv: list[str]) -> None:
    from hanlin.align.selection.recipe import SelectionRecipe

    _help(argv, "select", "Of many conversations those worth training on, and why. docs/selection.md", SELECT)
    recipe, quiet = _load(SelectionRecipe, argv, "select", "recipes/align/select-ifd.yaml")
    from hanlin.align.selection.run import select

    found = select(recipe, quiet=quiet)
    print(f"{recipe.out / 'kept.jsonl'}: {len(found.kept):,} of {len(found.decisions):,} conversations kept")
    print("\n".join([*found.facts, f"why, for each: {recipe.out / 'selection.jsonl'}; {recipe.out / 'selection.png'}"]))


def _help(argv: list[str], verb: str, description: str, examples: list[str]) -> None:
    """Where help is asked for without a recipe: what the verb does, with examples."""
    if argv and argv[0] in ("-h", "--help"):
        parser = make_parser(f"data {verb}", description, examples=examples)
        parser.add_argument("recipe", metavar="RECIPE", help="YAML file; --key.path value overrides it")
        parser.parse_args(argv)


def _load(kind: type[R], argv: list[str], verb: str, example: str) -> tuple[R, bool]:
    """The recipe that argv names, and whether to be quiet."""
    rest = [word for word in argv if word != "--quiet"]
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if path is None and not {"-h", "--help"} & set(rest):
        raise HanlinError(f"Which recipe? For example: hanlin data {verb} {example}")
    return kind.load(path, rest, usage=f"hanlin data {verb} RECIPE"), "--quiet" in argv


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


VERBS = {"build": _build, "preview": _preview, "synthesize": _synthesize, "select": _select}
