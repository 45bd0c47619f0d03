"""`hanlin generate DIR PROMPT`: what a model writes after a prompt."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hanlin.cli.parser import make_parser
from hanlin.cli.sampling_flags import add_model_flags, add_sampling_flags, open_engine, sampling_params
from hanlin.core.errors import HanlinError

if TYPE_CHECKING:
    from hanlin.engine import Completion, Engine, SamplingParams


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
        ],
    )
    parser.add_argument("folder", metavar="DIR", help="model folder with its tokenizer")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message; the model answers it")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="so many independent completions")
    parser.add_argument("--json", action="store_true", help="one JSON object a completion instead of text")
    parser.add_argument("--logprobs", type=int, metavar="N", help="with --json: each token's log-probability, N others")
    add_sampling_flags(parser, temperature=0.8, top_p=0.95, max_tokens=256)
    add_model_flags(parser)
    arguments = parser.parse_args(argv)
    if arguments.stream and (arguments.n > 1 or arguments.json):
        raise HanlinError("--stream prints one text as it comes; it cannot be combined with --n or --json.")
    if arguments.logprobs is not None and not arguments.json:
        raise HanlinError("--logprobs needs --json: text has no place for them.")
    params = sampling_params(arguments, n=arguments.n, logprobs=arguments.logprobs)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    _generate(arguments, [{"role": "user", "content": prompt}] if arguments.chat else prompt, params)


def _generate(arguments: argparse.Namespace, prompt: str | list[dict[str, Any]], params: "SamplingParams") -> None:
    with open_engine(arguments, max_batch=max(1, min(arguments.n, 16))) as engine:
        completions = _stream(engine, prompt, params) if arguments.stream else engine.generate(prompt, params)
    for number, completion in enumerate(completions):
        if arguments.json:
            print(json.dumps(asdict(completion), ensure_ascii=False))
        elif not arguments.stream:
            if len(completions) > 1:
                print(f"{'' if number == 0 else chr(10)}[{number + 1}]")
            print(completion.text)
    if not arguments.quiet:
        print(speed(completions), file=sys.stderr)


def _stream(engine: "Engine", prompt: str | list[dict[str, Any]], params: "SamplingParams") -> list["Completion"]:
    ended = []
    for event in engine.stream(prompt, params):
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
