"""`hanlin data build`, `preview`, `synthesize` and `select`, each with a RECIPE; `hanlin data problems --out DIR`."""

from pathlib import Path
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
    "hanlin data problems --out runs/sums --kind sum --largest 60",
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
        "select      of many conversations those worth training on (docs/selection.md)\n"
        "problems    arithmetic with answers that a program can check; needs no recipe (docs/alignment.md)",
        examples=EXAMPLES,
    )
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file; --key.path value overrides it")
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

    _help(argv, "synthesize", "Conversations written by a model, from seeds; resumable. docs/synthesis.md", SYNTHESIZE)
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


def _problems(argv: list[str]) -> None:
    parser = make_parser(
        "data problems",
        "Arithmetic in English and Chinese with answers that a program can check, for methods that learn from\n"
        "rewards: DIR/train.jsonl and DIR/held-out.jsonl, rows with `prompt` and `answer`. Numbers that stand side by\n"
        "side in a held-out problem stand so in no training problem, in any order, operation or language.",
        examples=[
            "hanlin data problems --out runs/sums --kind sum --largest 60",
            "hanlin data problems --out runs/chains --kind chain --terms 3 --largest 20 --worked 2000",
        ],
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--kind", default="sum", metavar="KIND", help="sum: two numbers; chain: `--terms` of them; story: a chain told"
    )
    parser.add_argument("--train", type=int, default=6000, metavar="N", help="training problems (default: 6000)")
    parser.add_argument("--held-out", type=int, default=400, metavar="N", help="held-out problems (default: 400)")
    parser.add_argument("--largest", type=int, default=60, metavar="N", help="largest number asked about (default: 60)")
    parser.add_argument("--terms", type=int, default=3, metavar="N", help="numbers in a chain or story (default: 3)")
    parser.add_argument(
        "--worked", type=int, default=0, metavar="N", help="also worked.jsonl: chats that think first, for kind sft"
    )
    parser.add_argument(
        "--answered", type=int, default=0, metavar="N", help="also answered.jsonl: chats with the answer alone"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other problems (default: 0)")
    chosen = parser.parse_args(argv)
    counts = {"--train": chosen.train, "--held-out": chosen.held_out}
    if wrong := [f"{flag} {count}" for flag, count in counts.items() if count < 1]:
        raise HanlinError(f"{', '.join(wrong)}: at least one problem of each is needed.")
    if wrong := [f"--{name}" for name in ("worked", "answered") if not 0 <= getattr(chosen, name) <= chosen.train]:
        raise HanlinError(f"{', '.join(wrong)}: between 0 and the {chosen.train} training problems can be worked out.")

    from hanlin.align.problems import write_problems

    made = write_problems(
        chosen.out, chosen.kind, train=chosen.train, held_out=chosen.held_out, largest=chosen.largest,
        terms=chosen.terms, worked=chosen.worked, answered=chosen.answered, seed=chosen.seed,
    )  # fmt: skip
    print("\n".join(f"{chosen.out / name}: {count:,}" for name, count in made.items()))
    wanted = {"train.jsonl": chosen.train, "held-out.jsonl": chosen.held_out}
    if short := [name for name, count in wanted.items() if made[name] < count]:
        print(f"There are no more different problems for {' and '.join(short)}; a larger --largest has more.")


VERBS = {
    "build": _build,
    "preview": _preview,
    "synthesize": _synthesize,
    "select": _select,
    "problems": _problems,
}
