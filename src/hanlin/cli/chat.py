"""`hanlin chat DIR`: talk to a model in the terminal. Works in a pipe too: each line of stdin is a message."""

import contextlib
import sys
from typing import TYPE_CHECKING

from hanlin.cli.generate import speed
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
    from hanlin.engine import Engine, SamplingParams

Message = dict[str, str]

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt and start again (without TEXT: none)
/quit          leave (so does Ctrl-D)
Ctrl-C stops an answer; what was said so far stays."""


def main(argv: list[str]) -> None:
    """Run `hanlin chat`."""
    parser = make_parser(
        "chat",
        "Talk to a model in the terminal. /help lists what else you can type; Ctrl-C stops an answer.",
        examples=[
            "hanlin chat runs/quickstart/model",
            'hanlin chat DIR --system "Answer in one sentence." --temperature 0',
            "echo 你好 | hanlin chat DIR --quiet",
        ],
    )
    parser.add_argument(
        "folder", metavar="DIR", help="model folder with its tokenizer and chat template, or the name of a pulled model"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    add_sampling_flags(parser, temperature=0.7, top_p=0.95, max_tokens=512)
    add_model_flags(parser)
    arguments = parser.parse_args(argv)
    params = sampling_params(arguments)
    with open_engine(arguments, max_batch=1) as engine:
        if not engine.tokenizer.has_chat:
            raise HanlinError(
                f"{arguments.folder} has no chat template: this model continues text and was not taught to answer. "
                f'Use `hanlin generate {arguments.folder} "…"`.'
            )
        adapter = chosen_adapter(arguments)
        Chat(engine, params, system=arguments.system, adapter=adapter, quiet=arguments.quiet).run()


class Chat:
    """The conversation and its loop. On a terminal it shows a prompt; in a pipe only the answers go to stdout."""

    def __init__(
        self,
        engine: "Engine",
        params: "SamplingParams",
        *,
        system: str = "",
        adapter: str | None = None,
        quiet: bool = False,
    ) -> None:
        self._engine, self._params, self._system, self._adapter = engine, params, system, adapter
        self._turns: list[Message] = []
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._quiet = quiet

    def run(self) -> None:
        """Until /quit or the end of the input."""
        if self._terminal:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  (arrow keys and history for `input`)
            self._remark("/help lists what you can type; Ctrl-C stops an answer; Ctrl-D leaves.")
        while (line := self._read()) is not None:
            text = line.strip()
            if text.startswith("/"):
                if not self._command(text):
                    return
            elif text:
                self._answer(text)

    def _read(self) -> str | None:
        while True:
            try:
                if self._terminal:
                    return input("\n> ")
                return sys.stdin.readline() or None
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                if not self._terminal:
                    raise
                self._remark("\n(Ctrl-D or /quit leaves)")

    def _command(self, text: str) -> bool:
        """Do what a line with a slash says; False: leave."""
        name, _, rest = text.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self._turns.clear()
            self._remark("(forgotten)")
        elif name == "/system":
            self._system = rest.strip()
            self._turns.clear()
            self._remark(f"(system prompt {'set' if self._system else 'removed'}; the conversation starts again)")
        else:
            self._remark(HELP if name == "/help" else f"There is no {name}.\n{HELP}")
        return True

    def _answer(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})
        try:
            ids = self._fitting_prompt()
            said = self._speak(ids)
        except HanlinError as error:
            if not self._terminal:
                raise
            self._turns.pop()
            self._remark(f"hanlin: {error}")
            return
        self._turns.append({"role": "assistant", "content": said})

    def _fitting_prompt(self) -> list[int]:
        """The conversation as tokens; the oldest exchanges go where there would be too little room for an answer."""
        context = self._engine.max_context
        room = min(self._params.max_tokens, context // 4)
        forgotten = 0
        while True:
            system = [{"role": "system", "content": self._system}] if self._system else []
            ids = self._engine.tokenizer.chat([*system, *self._turns])
            if len(ids) + room <= context or len(self._turns) == 1:
                break
            del self._turns[:2]
            forgotten += 1
        if forgotten:
            self._remark(f"(the context of {context} tokens is full: the oldest {forgotten} exchanges are forgotten)")
        return ids

    def _speak(self, ids: list[int]) -> str:
        """Print the answer as it comes; Ctrl-C ends it with what there is."""
        said: list[str] = []
        remark = ""
        handle = self._engine.submit(ids, self._params, adapter=self._adapter)
        try:
            for event in handle:
                print(event.text, end="", flush=True)
                said.append(event.text)
                if event.completion is not None:
                    remark = speed([event.completion])
        except KeyboardInterrupt:
            if not self._terminal:
                raise
            remark = "(stopped)"
        finally:
            handle.abort()
            print(flush=True)
        self._remark(remark)
        return "".join(said)

    def _remark(self, text: str) -> None:
        """What is not the model's: on stderr, dim on a terminal."""
        if not self._quiet or self._terminal:
            print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
