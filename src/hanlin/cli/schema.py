"""`hanlin schema NAME`: the JSON Schema of a recipe, so that an editor completes and checks it while it is written."""

import difflib
import json
from importlib import import_module

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

RECIPES = {
    "train": "hanlin.align.recipe:TrainRecipe",
    "data": "hanlin.data.recipe:DataRecipe",
    "synthesis": "hanlin.align.synthesis.recipe:SynthesisRecipe",
    "selection": "hanlin.align.selection.recipe:SelectionRecipe",
    "quickstart": "hanlin.quickstart.recipe:QuickstartRecipe",
}


def main(argv: list[str]) -> None:
    parser = make_parser(
        "schema",
        "Print the JSON Schema of a recipe. In VS Code, or any editor with the YAML language server, put\n"
        "`# yaml-language-server: $schema=PATH` on the first line of a recipe.",
        examples=["hanlin schema train > train.schema.json"],
    )
    parser.add_argument("name", metavar="NAME", help=f"which recipe: {', '.join(RECIPES)}")
    print(json.dumps(schema(parser.parse_args(argv).name), ensure_ascii=False, indent=2))


def schema(name: str) -> dict[str, object]:
    """The JSON Schema of the recipe that `hanlin NAME` reads."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.5)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise HanlinError(f"There is no recipe called `{name}`.{meant} The recipes are: {', '.join(RECIPES)}.")
    module, _, recipe = RECIPES[name].partition(":")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **getattr(import_module(module), recipe).model_json_schema(),
    }
