"""`hanlin plan RECIPE --gpus 8xH100-80GB`: what a run will cost before it starts, and which layout fits."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import amount, count, figure, make_parser, size
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.models import ModelConfig
    from hanlin.plan.devices import Cluster
    from hanlin.plan.request import Request

AXES = ("data", "tensor", "pipeline", "context", "expert", "chunks")
TRAINING = (
    "batch", "micro_batch", "seq_len", "precision", "recompute", "method", "rank", "tokens", "price", "data",
    "pipeline", "context", "expert", "chunks", "shard", "schedule", "context_kind", "masters", "sequence",
)  # fmt: skip
SERVING = ("dtype", "cache_dtype", "context_length", "users", "prompt_cache")
REQUEST = 4096  # tokens of a request, where the model knows as many positions


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
            "hanlin plan runs/pretrain-tiny/model --serve --measure",
        ],
    )
    parser.add_argument("recipe", metavar="RECIPE", help="recipe, model folder, config.json or known name")
    parser.add_argument("--gpus", metavar="NxNAME", default="cpu", help="such as 8xH100-80GB (default: cpu)")
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes of so many devices (default: 1)")
    parser.add_argument("--price", type=amount, metavar="X", help="of an hour of one device")
    parser.add_argument("--tokens", type=amount, metavar="N", help="to train on in all, such as 15e12")
    parser.add_argument("--reserve", type=size, metavar="GIB", help="memory of a device to leave free")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time this machine first (20 s) and plan by that; --serve: time the engine",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--png", type=figure, metavar="FILE", help="a bar chart of the memory (png, svg, pdf)")
    step = parser.add_argument_group("one step")
    step.add_argument("--vocab-size", type=count, metavar="N", help="where the tokenizer is not here")
    step.add_argument("--seq-len", type=count, metavar="N", help="tokens a row")
    step.add_argument("--batch", type=count, metavar="N", help="rows of an optimizer step, over all devices")
    step.add_argument("--micro-batch", type=count, metavar="N", help="rows of one backward on one device")
    step.add_argument("--precision", choices=("fp32", "bf16", "fp16", "fp8"))
    step.add_argument("--recompute", choices=("none", "selective", "full"), help="activations made again")
    step.add_argument("--method", choices=("full", "lora", "qlora"), help="what is trained (default: full)")
    step.add_argument("--rank", type=count, metavar="N", help="of LoRA and QLoRA (default: 8)")
    step.add_argument("--masters", action="store_true", help="half-precision weights with fp32 copies (2 + 2 + 12)")
    layout = parser.add_argument_group("a layout, instead of the search")
    for axis in AXES:
        layout.add_argument(f"--{axis}", type=count, metavar="N")
    layout.add_argument("--shard", choices=("none", "zero1", "zero2", "zero3"))
    layout.add_argument("--sequence", action="store_true", help="sequence parallelism beside --tensor")
    layout.add_argument("--schedule", choices=("naive", "gpipe", "1f1b", "interleaved", "zero_bubble"))
    layout.add_argument("--context-kind", choices=("ring", "ulysses"))
    serve = parser.add_argument_group("serving")
    serve.add_argument("--serve", action="store_true", help="what these devices serve, instead of training")
    serve.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp8", "int8", "int4"), help="of the weights")
    serve.add_argument("--cache-dtype", choices=("fp32", "bf16", "fp16", "fp8"), help="of keys and values")
    serve.add_argument("--context-length", type=count, metavar="N", help="tokens of a request (default: up to 4096)")
    serve.add_argument("--users", type=count, nargs="+", metavar="N", help="requests at once in a replica, to tabulate")
    serve.add_argument(
        "--prompt-cache", type=size, metavar="GB",
        help="kept for prompts, a replica (default: 0; of deepseek-r1: 140, as a published table has it)",
    )  # fmt: skip
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
    if arguments.measure and not _is_this_machine(cluster):
        raise HanlinError(
            f"--measure measures this machine's processor: it belongs to --gpus cpu, not {arguments.gpus}."
        )
    request = read_request(arguments.recipe, vocab_size=arguments.vocab_size, overrides=overrides)
    _refuse_ignored(arguments, request)
    if _is_this_machine(cluster):
        from hanlin.plan.calibrate import known_rates, machine_rates

        rates = machine_rates(quiet=arguments.quiet or arguments.json) if arguments.measure else known_rates()
    return training_plan(
        request, cluster, layout=_layout(arguments), tokens=arguments.tokens, price=arguments.price,
        reserve=RESERVE if arguments.reserve is None else arguments.reserve * GIB,
        fixed_rows=arguments.micro_batch is not None, recompute=arguments.recompute, rates=rates,
    )  # fmt: skip


def _refuse_ignored(arguments: argparse.Namespace, request: "Request") -> None:
    """What this model cannot do, and flags that would change nothing in this run."""
    job, positions = request.job, request.job.config.max_positions
    if job.length > positions and not _grows(arguments.recipe):
        raise HanlinError(
            f"A row has {job.length} tokens (--seq-len, objective.seq_len), but the model knows only {positions} "
            f"positions. Give at most {positions}, or a model with more."
        )
    if arguments.masters and (job.precision == "fp32" or job.method != "full"):
        what = "--precision fp32" if job.precision == "fp32" else f"--method {job.method}"
        raise HanlinError(f"--masters are fp32 copies of half-precision weights that are trained; {what} has none.")
    if arguments.price is not None and arguments.tokens is None and request.steps is None:
        raise HanlinError("--price needs how long the run is: give --tokens, or a recipe with train.steps.")


def _grows(source: str) -> bool:
    """Whether this recipe makes a new model with as many positions as a row has tokens."""
    if not source.endswith((".yaml", ".yml")):
        return False
    from hanlin.align.recipe import NewModel, TrainRecipe

    model = TrainRecipe.load(Path(source)).model
    return isinstance(model, NewModel) and model.max_positions is None


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
    cluster, context = parse_gpus(arguments.gpus, arguments.nodes), _request_length(arguments, config)
    measured = _measured(arguments, cluster) if arguments.measure else None
    dtype = arguments.dtype or (measured["dtype"] if measured else "bf16")
    service = serve(
        config, cluster, dtype=dtype, cache_dtype=arguments.cache_dtype or (dtype if measured else "bf16"),
        tensor=arguments.tensor, set_aside=aside,
        reserve=SERVING_RESERVE if arguments.reserve is None else arguments.reserve * GIB,
    )  # fmt: skip
    plan = serving_plan(arguments.recipe, service, context=context, users=arguments.users)
    if aside:
        why = "" if arguments.prompt_cache is not None else ", as the published table has it"
        plan["notes"] = [f"{aside / 1e9:,.0f} GB of a replica kept for prompts (--prompt-cache){why}"]
    if published and service.dtype == "fp8" and service.cluster.device.name == "H200":
        plan["published"] = beside_published(service)
    if measured is not None:
        plan["measured"] = measured
    return plan


def _request_length(arguments: argparse.Namespace, config: "ModelConfig") -> int:
    """Tokens of a request; more than the model has positions for are refused."""
    if arguments.context_length is None:
        return min(REQUEST, config.max_positions)
    if arguments.context_length > config.max_positions:
        raise HanlinError(
            f"--context-length is {arguments.context_length}, but the model knows only {config.max_positions} "
            f"positions. Give at most {config.max_positions}, or a model with more."
        )
    return arguments.context_length


def _measured(arguments: argparse.Namespace, cluster: "Cluster") -> dict[str, Any]:
    """What the engine does with this folder, here, beside the roofline."""
    from hanlin.models.places import find_model

    folder = find_model(arguments.recipe)
    if not folder.is_dir():
        raise HanlinError(f"--serve --measure runs the model: give its folder, not {arguments.recipe}.")
    if arguments.vocab_size is not None or arguments.cache_dtype is not None:
        raise HanlinError("--vocab-size and --cache-dtype change the plan, but not the model that --measure runs.")
    from hanlin.plan.engine_speed import beside_engine

    return beside_engine(folder, cluster, dtype=arguments.dtype)


def _is_this_machine(cluster: "Cluster") -> bool:
    return cluster.world == 1 and cluster.device.name.startswith("CPU")


def _layout(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The fields of a layout that the flags spell out; None: none of them is given."""
    names = (*AXES, "shard", "schedule", "context_kind")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.sequence:
        given["sequence"] = True
    return given or None


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
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) not in (None, False)]
    if given:
        raise HanlinError(f"{', '.join(given)} {why}.")
