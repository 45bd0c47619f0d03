"""Writers whose answers follow from the question and the seed alone, so that a test knows what must come out."""

from collections.abc import Callable, Sequence

from hanlin.align.synthesis.rounds import Chat
from hanlin.core.seeds import derive
from hanlin.engine import SamplingParams


class Scripted:
    """say(question, draw) -> the answer; draw: a number that follows from the chat's seed."""

    name = "scripted"

    def __init__(self, say: Callable[[str, int], str | None]) -> None:
        self.say, self.asked = say, 0

    def ask(self, chats: Sequence[Chat], sampling: SamplingParams, *, cut: bool = False) -> list[str | None]:
        assert sampling.seed is not None
        self.asked += len(chats)
        return [self.say(chat[-1]["content"], derive(sampling.seed, i)) for i, chat in enumerate(chats)]

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *error: object) -> None: ...


class Killed(BaseException):
    """What a `kill` looks like from inside."""


class Dying(Scripted):
    """Answers so many times, then the process is gone."""

    def __init__(self, say: Callable[[str, int], str | None], after: int) -> None:
        super().__init__(say)
        self.left = after

    def ask(self, chats: Sequence[Chat], sampling: SamplingParams, *, cut: bool = False) -> list[str | None]:
        if not self.left:
            raise Killed
        self.left -= 1
        return super().ask(chats, sampling, cut=cut)
