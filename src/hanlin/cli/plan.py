"""`hanlin plan RECIPE --gpus 8xH100-80GB`: what a run will cost before it starts, and which layout fits."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.parallel.settings import Layout

AXES = ("data", "tensor", "pipeline", "context", "expert", "chunks")
TRAINING = (
    "batch", "micro_batch", "seq_len", "precision", "recompute", "method", "rank", "tokens", "price", "data",
    "pipeline", "context", "expert", "chunks", "shard", "schedule", "context_kind",
)  # fmt: skip
SERVING = ("dtype", "cache_dtype", "context_length", "users", "prompt_cache")


def main(argv: list[str]) -> None:
    """Run `hanlin plan`."""
    parser = make_parser(
        "plan",
        "Parameters, FLOPs, memory by category, communication, time, money, and the fastest layout that fits.\n"
        "RECIPE is a training recipe (.yaml), a model folder, a config.json, or a known name such as llama-3-70b.",
        examples=[
            "hanlin plan recipes/pretrain-tiny.yaml --gpus cpu --vocab-size 4096",
            "hanlin plan llama-3-70b --gpus 64xH100-80GB --batch 1024 --tokens 15e12 --price 2.5 --png memory.png",
            "hanlin plan qwen3-0.6b --gpus 8xH100 --tensor 2 --data 4 --shard zero1",
            "hanlin plan llama-3-8b --gpus RTX-4090 --method qlora --batch 16 --seq-len 2048",
            "hanlin plan deepseek-r1 --serve --gpus 8xH200 --dtype fp8",
        ],
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe, model folder, config.json or known name")
    parser.add_argument("--gpus", metavar="NxNAME", default="cpu", help="such as 8xH100-80GB (default: cpu)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of so many devices (default: 1)")
    parser.add_argument("--price", type=_number, metavar="X", help="of an hour of one device")
    parser.add_argument("--tokens", type=_number, metavar="N", help="to train on in all, such as 15e12")
    parser.add_argument("--reserve", type=_number, metavar="GIB", help="memory of a device to leave free")
    parser.add_argument("--measure", action="store_true", help="time this machine first (20 s) and plan by that")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a bar chart of the memory (png, svg, pdf)")
    step = parser.add_argument_group("one step")
    step.add_argument("--vocab-size", type=int, metavar="N", help="where the tokenizer is not here")
    step.add_argument("--seq-len", type=int, metavar="N", help="tokens a row")
    step.add_argument("--batch", type=int, metavar="N", help="rows of an optimizer step, over all devices")
    step.add_argument("--micro-batch", type=int, metavar="N", help="rows of one backward on one device")
    step.add_argument("--precision", choices=("fp32", "bf16", "fp16", "fp8"))
    step.add_argument("--recompute", choices=("none", "selective", "full"), help="activations made again")
    step.add_argument("--method", choices=("full", "lora", "qlora"), help="what is trained (default: full)")
    step.add_argument("--rank", type=int, metavar="N", help="of LoRA and QLoRA (default: 8)")
    step.add_argument("--masters", action="store_true", help="half-precision weights with fp32 copies (2 + 2 + 12)")
    layout = parser.add_argument_group("a layout, instead of the search")
    for axis in AXES:
        layout.add_argument(f"--{axis}", type=int, metavar="N")
    layout.add_argument("--shard", choices=("none", "zero1", "zero2", "zero3"))
    layout.add_argument("--sequence", action="store_true", help="sequence parallelism beside --tensor")
    layout.add_argument("--schedule", choices=("naive", "gpipe", "1f1b", "interleaved", "zero_bubble"))
    layout.add_argument("--context-kind", choices=("ring", "ulysses"))
    serve = parser.add_argument_group("serving")
    serve.add_argument("--serve", action="store_true", help="what these devices serve, instead of training")
    serve.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp8", "int8", "int4"), help="of the weights")
    serve.add_argument("--cache-dtype", choices=("fp32", "bf16", "fp16", "fp8"), help="of keys and values")
    serve.add_argument("--context-length", type=int, metavar="N", help="tokens of a request (default: 4096)")
    serve.add_argument("--users", type=int, nargs="+", metavar="N", help="requests at once in a replica, for the table")
    serve.add_argument("--prompt-cache", type=_number, metavar="GB", help="kept for prompts, a replica (default: 0)")
    arguments = parser.parse_args(argv)
    plan = _serving(arguments) if arguments.serve else _training(arguments)
    if arguments.png is not None:
        _draw(plan, arguments.png)
    if arguments.json:
        print(json.dumps(plan, indent=1, ensure_ascii=False))
        return
    from hanlin.plan.table import print_plan

    print_plan(plan)
    if arguments.png is not None and not arguments.quiet:
        print(f"\nThe chart is in {arguments.png}.")


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    from hanlin.plan.devices import GIB, parse_gpus
    from hanlin.plan.report import training_plan
    from hanlin.plan.request import read_request
    from hanlin.plan.search import RESERVE

    _refuse(arguments, SERVING, "belong to --serve")
    if arguments.rank is not None and arguments.method not in ("lora", "qlora"):
        raise HanlinError("--rank belongs to --method lora or qlora.")
    cluster = parse_gpus(arguments.gpus, arguments.nodes)
    overrides = {
        "batch": arguments.batch, "length": arguments.seq_len, "micro_batch": arguments.micro_batch,
        "precision": arguments.precision, "recompute": arguments.recompute, "method": arguments.method,
        "rank": arguments.rank, "masters": arguments.masters or None,
    }  # fmt: skip
    rates = None
    if arguments.measure and (cluster.world > 1 or arguments.gpus.lower() != "cpu"):
        raise HanlinError(
            f"--measure measures this machine's processor: it belongs to --gpus cpu, not {arguments.gpus}."
        )
    if cluster.world == 1 and arguments.gpus.lower() == "cpu":
        from hanlin.plan.calibrate import known_rates, machine_rates

        rates = machine_rates(quiet=arguments.quiet or arguments.json) if arguments.measure else known_rates()
    request = read_request(arguments.recipe, vocab_size=arguments.vocab_size, overrides=overrides)
    return training_plan(
        request, cluster, layout=_layout(arguments), tokens=arguments.tokens, price=arguments.price,
        reserve=RESERVE if arguments.reserve is None else arguments.reserve * GIB,
        fixed_rows=arguments.micro_batch is not None, recompute=arguments.recompute, rates=rates,
    )  # fmt: skip


def _serving(arguments: argparse.Namespace) -> dict[str, Any]:
    from hanlin.plan.devices import GIB, parse_gpus
    from hanlin.plan.published import PROMPTS, beside_published
    from hanlin.plan.report import serving_plan
    from hanlin.plan.request import model_config
    from hanlin.plan.serving import SERVING_RESERVE, serve

    _refuse(arguments, TRAINING, "belong to training, not to --serve")
    if arguments.recipe.endswith((".yaml", ".yml")):
        raise HanlinError("--serve plans a model: give its folder, its config.json or a known name, not a recipe.")
    published = Path(arguments.recipe).name.lower() == "deepseek-r1"
    aside = arguments.prompt_cache * 1e9 if arguments.prompt_cache is not None else PROMPTS if published else 0.0
    config = model_config(arguments.recipe)
    if arguments.vocab_size is not None:
        config = config.with_vocabulary(arguments.vocab_size)
    service = serve(
        config, parse_gpus(arguments.gpus, arguments.nodes), dtype=arguments.dtype or "bf16",
        cache_dtype=arguments.cache_dtype or "bf16", tensor=arguments.tensor, set_aside=aside,
        reserve=SERVING_RESERVE if arguments.reserve is None else arguments.reserve * GIB,
    )  # fmt: skip
    plan = serving_plan(arguments.recipe, service, context=arguments.context_length or 4096, users=arguments.users)
    if published and service.dtype == "fp8" and service.cluster.device.name == "H200":
        plan["published"] = beside_published(service)
    return plan


def _layout(arguments: argparse.Namespace) -> "Layout | None":
    """The layout that the flags spell out; None: none of them is given."""
    from pydantic import ValidationError

    from hanlin.parallel.settings import Layout

    names = (*AXES, "shard", "schedule", "context_kind")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.sequence:
        given["sequence"] = True
    if not given:
        return None
    try:
        return Layout(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise HanlinError(f"This layout is not one: {first['msg'].removeprefix('Value error, ')}.") from None


def _draw(plan: dict[str, Any], path: Path) -> None:
    from hanlin.plan.chart import Bar, draw_memory

    machine = f"{plan['machine']['devices']} x {plan['machine']['device']}"
    if plan["kind"] == "serving":
        room = plan["machine"]["memory"] - plan["machine"]["reserve"]
        bars = [Bar("a device", plan["memory_per_device"], room)]
    else:
        bars = [Bar(row["name"], row["memory"], row["room"]) for row in plan["layouts"]]
    if not bars:
        raise HanlinError("There is no layout to draw: none can run this job at all.")
    draw_memory(bars, path, title=f"{plan['name']} on {machine}")


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]
    if given:
        raise HanlinError(f"{', '.join(given)} {why}.")


def _number(text: str) -> float:
    """A positive number, also as 15e12 or 15T."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    unit = units.get(text[-1:].lower())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1.0)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 2.5, 15e12 or 15T")
    return number
