"""The sampling flags that `hanlin generate` and `hanlin chat` share; each is a field of `SamplingParams`."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hanlin.engine import Engine, SamplingParams

ADAPTER = "adapter"  # the name of the one that --adapter loads


def add_sampling_flags(parser: argparse.ArgumentParser, *, temperature: float, top_p: float, max_tokens: int) -> None:
    """The flags, with these defaults."""
    group = parser.add_argument_group(
        "sampling",
        "In this order: penalties, temperature, top-k, top-p, min-p, typical (--filters-first: the temperature last).",
    )
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
    group.add_argument("--typical-p", type=float, default=1.0, metavar="X", help="locally typical sampling; 1 is off")
    group.add_argument("--filters-first", action="store_true", help="filter the untempered distribution")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is off")
    group.add_argument(
        "--presence-penalty", type=float, default=0.0, metavar="X", help="for words that were used; 0 off"
    )
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="for each use; 0 off")
    group.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N", help="no N tokens twice; 0 is off")
    group.add_argument("--dry", type=float, default=0.0, metavar="X", help="DRY's multiplier, 0.8 is usual; 0 is off")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    group.add_argument("--stop-token", type=int, action="append", default=[], metavar="ID", help="end at this token")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end tokens")
    group.add_argument("--seed", type=int, metavar="N", help="the same draws every time")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", default="auto", help="auto (whichever is faster here), float32, bfloat16, float16")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    group.add_argument("--max-context", type=int, metavar="N", help="tokens of prompt and output; default: the model's")
    group.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's files")
    group.add_argument("--draft", metavar="DIR", help="a smaller model with the same tokens that guesses ahead")
    group.add_argument("--speculate", choices=["off", "ngram", "mtp"], help="guess ahead without a draft model")


def sampling_params(
    arguments: argparse.Namespace, *, n: int = 1, logprobs: int | None = None, **more: Any
) -> "SamplingParams":
    """The parsed flags as `SamplingParams`; more: what a command adds."""
    from hanlin.engine import SamplingParams

    return SamplingParams(
        max_tokens=arguments.max_tokens,
        min_tokens=arguments.min_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        typical_p=arguments.typical_p,
        filters_first=arguments.filters_first,
        repetition_penalty=arguments.repetition_penalty,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        no_repeat_ngram=arguments.no_repeat_ngram,
        dry_multiplier=arguments.dry,
        stop=tuple(arguments.stop),
        stop_token_ids=tuple(arguments.stop_token),
        ignore_eos=arguments.ignore_eos,
        seed=arguments.seed,
        n=n,
        logprobs=logprobs,
        **more,
    )


def open_engine(arguments: argparse.Namespace, *, max_batch: int) -> "Engine":
    """The engine of the model `arguments.folder`, a folder or the name of a pulled one."""
    from hanlin.engine import Engine
    from hanlin.models.places import find_model

    limits: dict[str, Any] = {"max_batch": max_batch}
    if arguments.max_context is not None:
        limits["max_context"] = arguments.max_context
    if arguments.speculate is not None:
        limits["speculate"] = arguments.speculate
    return Engine.from_folder(
        find_model(arguments.folder),
        dtype=arguments.dtype,
        device=arguments.device,
        adapters={} if arguments.adapter is None else {ADAPTER: arguments.adapter},
        draft=None if arguments.draft is None else find_model(arguments.draft),
        **limits,
    )


def chosen_adapter(arguments: argparse.Namespace) -> str | None:
    """What `submit`, `generate` and `stream` get as `adapter`."""
    return None if arguments.adapter is None else ADAPTER
