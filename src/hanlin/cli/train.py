"""`hanlin train RECIPE [--key.path value]`: every training method, as the recipe's `objective` says."""

from pathlib import Path

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError


def main(argv: list[str]) -> None:
    parser = make_parser(
        "train",
        "Train a model as a recipe says. Any value of the recipe can be given as --key.path value;\n"
        "`hanlin train RECIPE --help` lists them. The same command continues an interrupted run\n"
        "from its newest checkpoint.",
        examples=[
            "hanlin train recipes/pretrain-tiny.yaml",
            "hanlin train recipes/pretrain-tiny.yaml --train.steps 200 --name trial",
            "hanlin train recipes/sft-tiny.yaml --quiet",
        ],
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file; see recipes/")
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv or ["--help"])
        raise HanlinError("The recipe comes first: hanlin train RECIPE [--key.path value] [--quiet].")
    recipe_file, *rest = argv
    if any(flag.split("=")[0] == "--nproc" for flag in rest):
        raise HanlinError(
            "`--nproc` (several processes) is not supported yet: this version trains in one process, on all of its "
            "CPU cores or one GPU. Run the same command without it."
        )
    quiet = "--quiet" in rest
    overrides = [flag for flag in rest if flag != "--quiet"]

    from hanlin.align.recipe import TrainRecipe

    recipe = TrainRecipe.load(recipe_file, overrides, usage="hanlin train RECIPE")

    from hanlin.align.build import train

    result = train(recipe, quiet=quiet)
    if not result.finished:
        again = " ".join(["hanlin train", *argv])
        print(f"Stopped after step {result.step}; a checkpoint is in {recipe.out}. To go on: {again}")
        return
    model = recipe.out / "model"
    verb = "chat" if recipe.objective.kind == "sft" else "generate"
    prompt = "" if verb == "chat" else ' "Once upon a time"'
    print(f"The model is in {model}. To {'talk to it' if verb == 'chat' else 'try it'}: hanlin {verb} {model}{prompt}")
