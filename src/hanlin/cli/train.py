"""`hanlin train RECIPE [--nproc N] [--key.path value]`: every training method, as the recipe's `objective` says."""

import os
import shlex
import sys
from pathlib import Path

from hanlin.cli.parser import count, make_parser, whole
from hanlin.core.errors import HanlinError

OWN = {"--nproc": True, "--restarts": True, "--find-lr": False, "--quiet": False}  # flag -> whether it takes a value
COMMAND = "HANLIN_COMMAND"  # in a worker's environment: the command line that started all of them


def main(argv: list[str]) -> None:
    parser = make_parser(
        "train",
        "Train a model as a recipe says. Any value of the recipe can be given as --key.path value;\n"
        "`hanlin train RECIPE --help` lists them. The same command continues an interrupted run\n"
        "from its newest checkpoint.",
        examples=[
            "hanlin train recipes/pretrain-tiny.yaml",
            "hanlin train recipes/pretrain-tiny.yaml --train.steps 200 --name trial",
            "hanlin train recipes/pretrain-tiny.yaml --nproc 4 --parallel.tensor 2",
            "hanlin train recipes/pretrain-tiny.yaml --find-lr",
            "hanlin train recipes/sft-tiny.yaml --quiet",
            "torchrun --nnodes 2 --nproc-per-node 8 ... -m hanlin train recipe.yaml",
        ],
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file; see recipes/")
    parser.add_argument("--nproc", type=count, metavar="N", help="processes on this machine; `parallel:` says what for")
    parser.add_argument("--restarts", type=whole, metavar="N", help="times to start again when a process dies (3)")
    parser.add_argument("--find-lr", action="store_true", help="try rates from 1e-6 to 1 on the run's data, then stop")
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv or ["--help"])
        raise HanlinError("The recipe comes first: hanlin train RECIPE [--nproc N] [--key.path value] [--quiet].")
    recipe_file, *rest = argv
    own, overrides = _split(rest)
    options = parser.parse_args([recipe_file, *own])
    if options.nproc is None and options.restarts is not None:
        raise HanlinError("--restarts is for runs of several processes: give --nproc too.")
    if options.nproc is not None and not {"-h", "--help"} & set(overrides):
        _launch(options, recipe_file, overrides, argv)
        return
    _train(options, recipe_file, overrides, argv)


def _split(rest: list[str]) -> tuple[list[str], list[str]]:
    """(flags of the command itself, overrides of the recipe)."""
    own: list[str] = []
    overrides: list[str] = []
    words = iter(rest)
    for word in words:
        name = word.split("=")[0]
        if name not in OWN:
            overrides.append(word)
            continue
        own.append(word)
        if OWN[name] and "=" not in word:
            own += [next(words, "")]
    return own, overrides


def _launch(options, recipe_file: str, overrides: list[str], argv: list[str]) -> None:
    """Start the processes; what is wrong with the recipe is said once, before."""
    from hanlin.align.recipe import TrainRecipe
    from hanlin.core.launch import launch

    recipe = TrainRecipe.load(recipe_file, overrides, usage="hanlin train RECIPE")
    recipe.parallel.fitted(options.nproc)
    flags = [flag for flag, on in (("--find-lr", options.find_lr), ("--quiet", options.quiet)) if on]
    command = [sys.executable, "-m", "hanlin", "train", recipe_file, *overrides, *flags]
    restarts = 3 if options.restarts is None else options.restarts
    code = launch(
        command, options.nproc, logs=recipe.out / "logs", restarts=restarts, quiet=options.quiet,
        environment={**os.environ, COMMAND: shlex.join(["hanlin", "train", *argv])},
    )  # fmt: skip
    if code:
        raise SystemExit(code)


def _train(options, recipe_file: str, overrides: list[str], argv: list[str]) -> None:
    from hanlin.align.recipe import TrainRecipe

    recipe = TrainRecipe.load(recipe_file, overrides, usage="hanlin train RECIPE")

    from hanlin.align.build import find_lr, train
    from hanlin.align.methods import method_of
    from hanlin.parallel.joining import join_group
    from hanlin.parallel.processes import Processes

    with join_group(recipe.train.device):
        processes = Processes.here()
        if options.find_lr:
            find_lr(recipe, quiet=options.quiet)
            return
        result = train(recipe, quiet=options.quiet)
    if not processes.first:
        return
    if not result.finished:
        again = _same_command(argv, processes.world)
        print(f"Stopped after step {result.step}; a checkpoint is in {recipe.out}. To go on: {again}")
        return
    model = recipe.out / "model"
    verb = method_of(recipe).verb
    if not verb:  # it judges and does not write
        print(f"The model is in {model}.")
        return
    prompt = "" if verb == "chat" else ' "Once upon a time"'
    print(f"The model is in {model}. To {'talk to it' if verb == 'chat' else 'try it'}: hanlin {verb} {model}{prompt}")


def _same_command(argv: list[str], world: int) -> str:
    """What starts this run of `world` processes again: the launcher's command line, where `hanlin train --nproc`
    started them."""
    from hanlin.core.launch import LAUNCHER

    if LAUNCHER in os.environ and COMMAND in os.environ:
        return os.environ[COMMAND]
    if world > 1:
        return "start it again with the same launcher"
    return shlex.join(["hanlin", "train", *argv])
