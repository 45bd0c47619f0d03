"""`hanlin model show DIR` and `hanlin model new --family FAMILY … --out DIR`."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.models import ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


def main(argv: list[str]) -> None:
    """Run `hanlin model`."""
    parser = make_parser(
        "model",
        "Show a model folder, or make a new one with random weights.",
        examples=[
            "hanlin model show runs/quickstart/model",
            "hanlin model new --family qwen3 --layers 6 --width 192 --heads 3 --kv-heads 1 --tokenizer DIR --out DIR",
        ],
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="show|new")
    show = verbs.add_parser("show", help="family, parameters by part, layers, bytes and FLOPs a token")
    show.add_argument("folder", metavar="DIR", help="model folder")
    show.add_argument("--length", type=int, metavar="N", help="sequence length for the FLOPs (default: the longest)")
    show.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    new = verbs.add_parser("new", help="a model folder with random weights")
    new.add_argument("--family", choices=FAMILIES, default="qwen3", help="default: qwen3")
    new.add_argument("--layers", type=int, required=True, metavar="N")
    new.add_argument("--width", type=int, required=True, metavar="N")
    new.add_argument("--heads", type=int, required=True, metavar="N", help="query heads")
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
    {"show": _show, "new": _new}[arguments.verb](arguments)


def _show(arguments: argparse.Namespace) -> None:
    from hanlin.models import load_config, stored_dtype

    config = load_config(arguments.folder)
    if arguments.length is not None and arguments.length < 1:
        raise HanlinError(f"--length is {arguments.length}; it must be at least 1.")
    facts = _facts(config, stored_dtype(arguments.folder), arguments.length)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


def _new(arguments: argparse.Namespace) -> None:
    import torch

    from hanlin.core.files import atomic_folder
    from hanlin.core.seeds import seed_everything
    from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, save_model
    from hanlin.tokens import Tokenizer

    _check_new(arguments)
    tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    vocab_size = arguments.vocab_size or (tokenizer.size if tokenizer else 0)
    if tokenizer is not None and vocab_size < tokenizer.size:
        raise HanlinError(f"--vocab-size {vocab_size} is less than the tokenizer's {tokenizer.size} tokens.")
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    config = ModelConfig.uniform(
        arguments.family,
        depth=arguments.layers,
        attention=AttentionConfig(
            heads=arguments.heads,
            kv_heads=arguments.kv_heads or arguments.heads,
            head_dim=arguments.head_dim or arguments.width // arguments.heads,
            qkv_bias=arguments.family == "qwen2",
            qk_norm=arguments.family == "qwen3",
            window=arguments.window,
        ),
        feed_forward=FeedForwardConfig(arguments.hidden or 64 * max(1, round(arguments.width * 8 / 3 / 64))),
        vocab_size=vocab_size,
        width=arguments.width,
        max_positions=arguments.max_positions,
        rope_theta=arguments.rope_theta,
        tied_embeddings=not arguments.untied,
        extra=ids,
    )
    seed_everything(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    model = Transformer(config).to(dtype)
    with atomic_folder(arguments.out) as folder:
        save_model(model, folder)
        if tokenizer is not None:
            tokenizer.save(folder)
    if not arguments.quiet:
        _print_facts(_facts(config, dtype, None))


def _check_new(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    numbers = ("layers", "width", "heads", "kv_heads", "head_dim", "hidden", "window", "max_positions", "vocab_size")
    for name in numbers:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise HanlinError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
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


def _facts(config: "ModelConfig", dtype: Any, length: int | None) -> dict[str, Any]:
    from hanlin.models.sizes import model_sizes

    sizes = model_sizes(config, dtype, length)
    attention, feed_forward = config.layers[0].attention, config.layers[0].feed_forward
    return {
        "family": config.family,
        "parameters": sizes.total,
        "parameters_by_part": sizes.parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "weight_bytes": sizes.weight_bytes,
        "vocab_size": config.vocab_size,
        "tied_embeddings": config.tied_embeddings,
        "width": config.width,
        "layers": len(config.layers),
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "qk_norm": attention.qk_norm,
        "qkv_bias": attention.qkv_bias,
        "hidden": feed_forward.hidden,
        "windows": [layer.attention.window for layer in config.layers],
        "max_positions": config.max_positions,
        "rope_theta": config.rope_theta,
        "kv_bytes_per_token": sizes.kv_bytes_per_token,
        "flops_length": length or config.max_positions,
        "training_flops_per_token": sizes.training_flops_per_token,
        "forward_flops_per_token": sizes.training_flops_per_token / 3,
    }


def _print_facts(facts: dict[str, Any]) -> None:
    from hanlin.core.progress import quantity

    total = facts["parameters"]
    windows = [w for w in facts["windows"] if w is not None]
    reach = f"window {windows[0]:,} in {len(windows)} of {facts['layers']} layers" if windows else "full attention"
    traits = [name for key, name in (("qk_norm", "QK norm"), ("qkv_bias", "QKV bias")) if facts[key]]
    heads = f"{facts['heads']} heads on {facts['kv_heads']} key/value heads of {facts['head_dim']}"
    rows = [
        ("family", facts["family"]),
        ("parameters", f"{total:,}"),
        *(
            (f"  {part}", f"{count:,} ({count / total:.1%})" if count else "shares the embedding")
            for part, count in facts["parameters_by_part"].items()
        ),
        ("weights", f"{facts['dtype']}, {quantity(facts['weight_bytes'])}B"),
        ("vocabulary", f"{facts['vocab_size']:,}"),
        ("layers", f"{facts['layers']} of width {facts['width']}, feed-forward {facts['hidden']}"),
        ("attention", ", ".join([heads, reach, *traits])),
        ("positions", f"{facts['max_positions']:,}, rotary base {facts['rope_theta']:,.0f}"),
        ("KV cache", f"{facts['kv_bytes_per_token']:,} bytes a token"),
        (
            "FLOPs a token",
            f"{quantity(facts['forward_flops_per_token'])} forward, {quantity(facts['training_flops_per_token'])} "
            f"in training, at {facts['flops_length']:,} tokens",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
