"""`hanlin generate DIR PROMPT`: what a model writes after a prompt."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.cli.sampling_flags import (
    add_model_flags,
    add_sampling_flags,
    chosen_adapter,
    open_engine,
    sampling_params,
)
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.engine import Completion, Constraint, Engine, SamplingParams


def main(argv: list[str]) -> None:
    """Run `hanlin generate`. Only what the model wrote goes to stdout; speed and counts go to stderr."""
    parser = make_parser(
        "generate",
        "Continue a prompt. What the model writes goes to stdout, its speed to stderr.",
        examples=[
            'hanlin generate runs/quickstart/model "Return the" --stream',
            "hanlin generate DIR 从前 --temperature 0 --max-tokens 64",
            'hanlin generate DIR "What is json.dumps?" --chat',
            "cat story.txt | hanlin generate DIR - --n 3 --seed 1 --json",
            'hanlin generate DIR "Is water wet?" --chat --choice yes --choice no',
        ],
    )
    parser.add_argument("folder", metavar="DIR", help="model folder with its tokenizer, or the name of a pulled model")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message; the model answers it")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="so many independent completions")
    parser.add_argument("--json", action="store_true", help="one JSON object a completion instead of text")
    search = parser.add_argument_group("search (instead of drawing)")
    search.add_argument("--beams", type=int, default=1, metavar="N", help="beam search; prints the --n best")
    search.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="of beam scores; default 1")
    search.add_argument("--contrast", type=float, default=0.0, metavar="X", help="contrastive search; 0.6, --top-k 4")
    form = parser.add_argument_group("form (the output must match)").add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="a JSON schema")
    form.add_argument("--regex", metavar="PATTERN", help="a regular expression")
    form.add_argument("--choice", action="append", metavar="TEXT", help="one of these; repeatable")
    form.add_argument("--grammar", metavar="FILE", help="a grammar in Lark's notation")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: each token's log-probability, N others")
    add_sampling_flags(parser, temperature=0.8, top_p=0.95, max_tokens=256)
    add_model_flags(parser)
    arguments = parser.parse_args(argv)
    if arguments.stream and (arguments.n > 1 or arguments.json):
        raise HanlinError("--stream prints one text as it comes; it cannot be combined with --n or --json.")
    if arguments.logprobs is not None and not arguments.json:
        raise HanlinError("--logprobs needs --json: text has no place for them.")
    params = sampling_params(
        arguments,
        n=arguments.n,
        logprobs=arguments.logprobs,
        beams=arguments.beams,
        length_penalty=arguments.length_penalty,
        contrast=arguments.contrast,
        constraint=_constraint(arguments),
    )
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    _generate(arguments, [{"role": "user", "content": prompt}] if arguments.chat else prompt, params)


def _generate(arguments: argparse.Namespace, prompt: str | list[dict[str, Any]], params: "SamplingParams") -> None:
    together = max(arguments.beams, arguments.top_k if arguments.contrast else 1, min(arguments.n, 64))
    adapter = chosen_adapter(arguments)
    with open_engine(arguments, max_batch=together) as engine:
        if arguments.stream:
            completions = _stream(engine, prompt, params, adapter)
        else:
            completions = engine.generate(prompt, params, adapter=adapter)
    for number, completion in enumerate(completions):
        if arguments.json:
            print(json.dumps(asdict(completion), ensure_ascii=False))
        elif not arguments.stream:
            if len(completions) > 1:
                print(f"{'' if number == 0 else chr(10)}[{number + 1}]")
            print(completion.text)
    if not arguments.quiet:
        print(speed(completions), file=sys.stderr)


def _constraint(arguments: argparse.Namespace) -> "Constraint | None":
    from hanlin.engine import Constraint

    if arguments.json_schema is not None:
        return Constraint("json_schema", _read(arguments.json_schema))
    if arguments.grammar is not None:
        return Constraint("grammar", _read(arguments.grammar))
    if arguments.regex is not None:
        return Constraint("regex", arguments.regex)
    return None if arguments.choice is None else Constraint("choice", json.dumps(arguments.choice))


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HanlinError(f"{file} cannot be read as text: {error}.") from error


def _stream(
    engine: "Engine", prompt: str | list[dict[str, Any]], params: "SamplingParams", adapter: str | None
) -> list["Completion"]:
    ended = []
    for event in engine.stream(prompt, params, adapter=adapter):
        print(event.text, end="", flush=True)
        if event.completion is not None:
            ended.append(event.completion)
    print()
    return ended


def speed(completions: "list[Completion]") -> str:
    """Tokens, why they ended, and how fast they came, in one line."""
    count = sum(c.usage.completion_tokens for c in completions)
    first = min(c.usage.first_token_s for c in completions)
    seconds = max(c.usage.total_s for c in completions) - first
    rate = f", {(count - len(completions)) / seconds:,.0f} tokens/s" if count > len(completions) else ""
    reasons = ", ".join(dict.fromkeys(c.finish_reason for c in completions))
    return f"[{count} tokens ({reasons}), the first after {first * 1000:,.0f} ms{rate}]"
