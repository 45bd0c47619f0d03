"""The sampling flags that `hanlin generate` and `hanlin chat` share; each is a field of `SamplingParams`."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanlin.engine import Engine, SamplingParams


def add_sampling_flags(parser: argparse.ArgumentParser, *, temperature: float, top_p: float, max_tokens: int) -> None:
    """The flags, with these defaults."""
    group = parser.add_argument_group("sampling (applied in this order: repetition penalty, temperature, k, p, min-p)")
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default {max_tokens}")
    group.add_argument("--min-tokens", type=int, default=0, metavar="N", help="no end before so many tokens")
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="X",
        help=f"0 takes the likeliest; default {temperature}",
    )
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="only the N likeliest tokens; 0 is off")
    group.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="X",
        help=f"only the fewest that together reach X; default {top_p}",
    )
    group.add_argument("--min-p", type=float, default=0.0, metavar="X", help="none below X times the likeliest")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is off")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--stop-token", type=int, action="append", default=[], metavar="ID", help="end at this token")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end tokens")
    group.add_argument("--seed", type=int, metavar="N", help="the same draws every time")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", default="auto", help="auto (whichever is faster here), float32, bfloat16, float16")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument("--max-context", type=int, metavar="N", help="tokens of prompt and output; default: the model's")


def sampling_params(arguments: argparse.Namespace, *, n: int = 1, logprobs: int | None = None) -> "SamplingParams":
    """The parsed flags as `SamplingParams`."""
    from hanlin.engine import SamplingParams

    return SamplingParams(
        max_tokens=arguments.max_tokens,
        min_tokens=arguments.min_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        stop=tuple(arguments.stop),
        stop_token_ids=tuple(arguments.stop_token),
        ignore_eos=arguments.ignore_eos,
        seed=arguments.seed,
        n=n,
        logprobs=logprobs,
    )


def open_engine(arguments: argparse.Namespace, *, max_batch: int) -> "Engine":
    """The engine of the model folder `arguments.folder`."""
    from hanlin.engine import Engine

    limits = {} if arguments.max_context is None else {"max_context": arguments.max_context}
    return Engine.from_folder(
        arguments.folder, dtype=arguments.dtype, device=arguments.device, max_batch=max_batch, **limits
    )
