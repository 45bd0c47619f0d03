"""`hanlin model show DIR`, `hanlin model diff A B` and `hanlin model new … --out DIR`."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.models import ModelConfig

PRECISIONS = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}  # bytes of a weight
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def main(argv: list[str]) -> None:
    """Run `hanlin model`."""
    parser = make_parser(
        "model",
        "Show a model, say how two differ, or make a new one.",
        examples=[
            "hanlin model show runs/quickstart/model",
            "hanlin model diff runs/quickstart/model OTHER",
            "hanlin model new --like qwen3 --params 0.6B --out DIR",
            "hanlin model new --family qwen3 --layers 6 --width 192 --heads 3 --kv-heads 1 --tokenizer DIR --out DIR",
        ],
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|diff|new")
    show = verbs.add_parser("show", help="family, layers, parameters by part, memory by precision, bytes and FLOPs")
    show.add_argument("folder", metavar="DIR", help="model folder, or a config.json")
    show.add_argument("--length", type=int, metavar="N", help="sequence length for the FLOPs (default: the longest)")
    show.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    diff = verbs.add_parser("diff", help="how two models differ, in the field's words")
    diff.add_argument("folders", metavar="DIR", nargs=2, help="model folders, or config.json files")
    new = verbs.add_parser("new", help="a model folder with random weights, or with --like a balanced config.json")
    new.add_argument("--like", choices=FAMILIES, help="choose all sizes for --params in the proportions of this family")
    new.add_argument("--params", metavar="N", help="parameters with --like, such as 0.6B or 30M")
    new.add_argument("--weights", action="store_true", help="with --like: random weights too, not only config.json")
    new.add_argument("--family", choices=FAMILIES, default="qwen3", help="default: qwen3")
    new.add_argument("--layers", type=int, metavar="N")
    new.add_argument("--width", type=int, metavar="N")
    new.add_argument("--heads", type=int, metavar="N", help="query heads")
    new.add_argument("--kv-heads", type=int, metavar="N", help="key and value heads (default: as many)")
    new.add_argument("--head-dim", type=int, metavar="N", help="width of a head (default: width / heads)")
    new.add_argument("--hidden", type=int, metavar="N", help="feed-forward units (default: 8/3 width, in steps of 64)")
    new.add_argument("--window", type=int, metavar="N", help="sliding window of every layer")
    new.add_argument("--max-positions", type=int, default=2048, metavar="N", help="default: 2048")
    new.add_argument("--rope-theta", type=float, default=10_000.0, metavar="X", help="default: 10000")
    new.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding")
    new.add_argument("--vocab-size", type=int, metavar="N", help="default: the tokenizer's")
    new.add_argument("--tokenizer", metavar="DIR", help="its files are copied beside the weights")
    new.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    new.add_argument("--seed", type=int, default=0, metavar="N")
    new.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    arguments = parser.parse_args(argv)
    {"show": _show, "diff": _diff, "new": _new}[arguments.verb](arguments)


def _show(arguments: argparse.Namespace) -> None:
    import torch

    from hanlin.core.errors import HanlinError as Unreadable
    from hanlin.models import load_config, stored_dtype
    from hanlin.models.places import find_model

    folder = find_model(arguments.folder)
    config = load_config(folder)
    if arguments.length is not None and arguments.length < 1:
        raise HanlinError(f"--length is {arguments.length}; it must be at least 1.")
    try:
        dtype = stored_dtype(folder)
    except Unreadable:  # a config without weights
        dtype = torch.bfloat16
    facts = _facts(config, dtype, arguments.length)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_facts(facts, config)


def _diff(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from hanlin.models import load_config
    from hanlin.models.describe import differences
    from hanlin.models.places import find_model

    first, second = (load_config(find_model(folder)) for folder in arguments.folders)
    rows = differences(first, second)
    if not rows:
        print("The two are the same model: their configs say the same.")
        return
    table = Table(box=None, pad_edge=False)
    for title in ("", *arguments.folders):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=False).print(table)


def _new(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from hanlin.core.files import atomic_folder
    from hanlin.core.seeds import seed_everything
    from hanlin.models import Transformer, save_model
    from hanlin.models.folder import save_config
    from hanlin.tokens import Tokenizer

    _check_new(arguments)
    tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    vocab_size = arguments.vocab_size or (tokenizer.size if tokenizer else 0)
    if tokenizer is not None and vocab_size < tokenizer.size:
        raise HanlinError(f"--vocab-size {vocab_size} is less than the tokenizer's {tokenizer.size} tokens.")
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    config = replace(_like(arguments, vocab_size) if arguments.like else _sized(arguments, vocab_size), extra=ids)
    dtype = getattr(torch, arguments.dtype)
    with atomic_folder(arguments.out) as folder:
        if arguments.like and not arguments.weights:
            save_config(config, folder, dtype=dtype)
        else:
            seed_everything(arguments.seed)
            save_model(Transformer(config).to(dtype), folder)
        if tokenizer is not None:
            tokenizer.save(folder)
    if not arguments.quiet:
        _print_facts(_facts(config, dtype, None), config)


def _like(arguments: argparse.Namespace, vocab_size: int) -> "ModelConfig":
    """The balanced config of `--like FAMILY --params N`."""
    from hanlin.models.balanced import balanced_config

    return balanced_config(
        arguments.like, _count(arguments.params), vocab_size=vocab_size or None, max_positions=arguments.max_positions
    )


def _count(text: str) -> float:
    """0.6B, 30M, 500k or a plain number."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
    unit = units.get(text[-1:].lower())
    try:
        number = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        number = 0.0
    if not 1e4 <= number <= 1e13:
        raise HanlinError(f"--params is {text!r}; it must be a number of parameters such as 0.6B, 30M or 500k.")
    return number


def _sized(arguments: argparse.Namespace, vocab_size: int) -> "ModelConfig":
    """The config that the flags spell out."""
    from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig
    from hanlin.models.families import find_family

    return ModelConfig.uniform(
        arguments.family,
        depth=arguments.layers,
        attention=AttentionConfig(
            heads=arguments.heads,
            kv_heads=arguments.kv_heads or arguments.heads,
            head_dim=arguments.head_dim or arguments.width // arguments.heads,
            window=arguments.window,
            **find_family(arguments.family, "--family").attention_traits(),
        ),
        feed_forward=FeedForwardConfig(arguments.hidden or 64 * max(1, round(arguments.width * 8 / 3 / 64))),
        vocab_size=vocab_size,
        width=arguments.width,
        max_positions=arguments.max_positions,
        rope_theta=arguments.rope_theta,
        tied_embeddings=not arguments.untied,
    )


def _check_new(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    numbers = ("layers", "width", "heads", "kv_heads", "head_dim", "hidden", "window", "max_positions", "vocab_size")
    for name in numbers:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise HanlinError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    if arguments.like:
        _check_like(arguments)
        return
    absent = [name for name in ("layers", "width", "heads") if getattr(arguments, name) is None]
    if absent:
        needed = ", ".join(f"--{name}" for name in absent)
        raise HanlinError(f"{needed} must be given too, or let --like FAMILY --params N choose all sizes.")
    if arguments.params or arguments.weights:
        raise HanlinError("--params and --weights belong to --like FAMILY.")
    if not arguments.rope_theta > 0:
        raise HanlinError(f"--rope-theta is {arguments.rope_theta}; it must be above 0.")
    if not arguments.vocab_size and not arguments.tokenizer:
        raise HanlinError("How many tokens does the model know? Give --tokenizer DIR or --vocab-size N.")
    if arguments.head_dim is None and arguments.width % arguments.heads:
        raise HanlinError(
            f"A width of {arguments.width} does not divide among {arguments.heads} heads: give --head-dim, or a width "
            f"such as {arguments.width // arguments.heads * arguments.heads or arguments.heads}."
        )
    if Path(arguments.out).exists():
        raise HanlinError(f"{arguments.out} is already there, and nothing is overwritten. Choose another --out.")


def _check_like(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    if not arguments.params:
        raise HanlinError("--like needs --params, such as --params 0.6B.")
    sizes = ("layers", "width", "heads", "kv_heads", "head_dim", "hidden", "window", "untied")
    given = [f"--{name.replace('_', '-')}" for name in sizes if getattr(arguments, name)]
    if given:
        raise HanlinError(f"{', '.join(given)}: with --like the sizes are chosen. Give --params, or all sizes by hand.")
    if Path(arguments.out).exists():
        raise HanlinError(f"{arguments.out} is already there, and nothing is overwritten. Choose another --out.")


def _facts(config: "ModelConfig", dtype: Any, length: int | None) -> dict[str, Any]:
    from hanlin.models.describe import describe_model, layer_groups

    counted, reach = config.parameters(), length or config.max_positions
    per_token = config.flops_per_token(reach)
    return {
        "family": config.family,
        "model": describe_model(config),
        "layers": dict(layer_groups(config.layers)),
        "encoder_layers": dict(layer_groups(config.encoder)),
        "parameters": counted.total,
        "active_parameters": counted.active,
        "parameters_by_part": {part: n for part, n in counted.parts.items() if n},
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": {name: round(counted.total * size) for name, size in PRECISIONS.items()},
        "kv_bytes_per_token": config.kv_bytes_per_token(dtype.itemsize),
        "flops_length": reach,
        "training_flops_per_token": per_token,
        "forward_flops_per_token": per_token / 3,
    }


def _print_facts(facts: dict[str, Any], config: "ModelConfig") -> None:
    from hanlin.core.progress import quantity

    total, active = facts["parameters"], facts["active_parameters"]
    sizes = ", ".join(f"{quantity(size)}B {name}" for name, size in facts["weight_bytes"].items())
    rows = [
        *facts["model"].items(),
        ("parameters", f"{total:,}" + (f", {active:,} active" if active != total else "")),
        *((f"  {part}", f"{count:,} ({count / total:.1%})") for part, count in facts["parameters_by_part"].items()),
        ("weights", sizes),
        ("stored as", facts["dtype"]),
        ("KV cache", f"{facts['kv_bytes_per_token']:,} bytes a token"),
        (
            "FLOPs a token",
            f"{quantity(facts['forward_flops_per_token'])} forward, {quantity(facts['training_flops_per_token'])} "
            f"in training, at {facts['flops_length']:,} tokens",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    for stack in ("encoder_layers", "layers"):
        for where, words in facts[stack].items():
            print(f"\n{'encoder layer' if stack == 'encoder_layers' else 'layer'} {where}")
            print("\n".join(f"  {part:<{width - 2}}  {value}" for part, value in words.items()))
