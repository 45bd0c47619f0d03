"""`hanlin eval DIR --text FILE…`: held-out loss, perplexity and bits per byte; samples."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.evaluate.samples import Sample


def main(argv: list[str]) -> None:
    """Run `hanlin eval`."""
    parser = make_parser(
        "eval",
        "Held-out loss, perplexity and bits per byte of a model on text it was not trained on; samples.",
        examples=[
            "hanlin eval runs/quickstart/model --text held-out.txt",
            "hanlin eval DIR --text held-out/ --train-text corpus/     (beside a byte 6-gram model and xz)",
            'hanlin eval DIR --sample "Return the" --sample "从前"',
        ],
    )
    parser.add_argument("folder", metavar="DIR", help="model folder with its tokenizer, or the name of a pulled model")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="txt, jsonl, json, parquet, also .gz or .zst; folders"
    )
    parser.add_argument("--train-text", nargs="+", metavar="FILE", help="what it was trained on, for the baselines")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens that the model sees (default: all it can, at most 2048)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help="tokens predicted a window (default: half the context)")
    parser.add_argument("--sample", action="append", default=[], metavar="PROMPT", help="show how it goes on")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="length of a sample (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="of the samples (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args(argv)
    if not arguments.text and not arguments.sample:
        raise HanlinError("There is nothing to do: give --text FILE… to measure, or --sample PROMPT to read.")
    if arguments.train_text and not arguments.text:
        raise HanlinError("--train-text is for the baselines beside --text FILE…, which is missing.")
    _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from hanlin.models import load_model
    from hanlin.models.places import find_model
    from hanlin.tokens import Tokenizer

    folder = find_model(arguments.folder)
    model = load_model(folder, device=arguments.device)
    tokenizer = Tokenizer.load(folder)
    found: dict[str, Any] = {"model": arguments.folder}
    if arguments.text:
        from hanlin.evaluate.perplexity import evaluate_files

        held_out = evaluate_files(
            model,
            tokenizer,
            arguments.text,
            context=arguments.context,
            stride=arguments.stride,
            quiet=arguments.quiet or arguments.json,
        )
        found |= held_out.row()
        if arguments.train_text:
            found["baselines"] = _baselines(arguments)
    samples: list[Sample] = []
    if arguments.sample:
        samples = _samples(model, tokenizer, arguments)
        found["samples"] = [vars(sample) for sample in samples]
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _print(found, samples)


def _baselines(arguments: argparse.Namespace) -> dict[str, float]:
    """{name: bits per byte} of models that need no training run."""
    from hanlin.core.progress import say
    from hanlin.core.text_sources import read_documents
    from hanlin.evaluate.ngram import ByteNgram, xz_bits_per_byte

    train, test = ([d.text for d in read_documents(files)] for files in (arguments.train_text, arguments.text))
    say("counting bytes for the baselines", quiet=arguments.quiet or arguments.json)
    return {
        "byte 6-gram": ByteNgram.train(train).bits_per_byte(test),
        "xz": xz_bits_per_byte(train, test),
    }


def _samples(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> "list[Sample]":
    from hanlin.engine import Engine, SamplingParams
    from hanlin.evaluate.samples import draw_samples

    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed)
    engine = Engine(model, tokenizer)
    try:
        return draw_samples(arguments.sample, lambda prompts: [c.text for c in engine.generate(list(prompts), params)])
    finally:
        engine.close()


def _print(found: dict[str, Any], samples: "list[Sample]") -> None:
    from hanlin.evaluate.samples import show_samples

    if "loss" in found:
        rows = [
            ("tokens", f"{found['tokens']:,}"),
            ("bytes", f"{found['bytes']:,}"),
            ("loss", f"{found['loss']:.4f} nats a token"),
            ("perplexity", f"{found['perplexity']:,.2f} a token"),
            ("bits per byte", f"{found['bits_per_byte']:.4f}" if found["bits_per_byte"] else "no byte was predicted"),
            *((f"  {name}", f"{bits:.4f}") for name, bits in found.get("baselines", {}).items()),
        ]
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if samples:
        print(("\n" if "loss" in found else "") + show_samples(samples))
