"""Who writes: the own engine, or any OpenAI-compatible endpoint. Both answer many chats at once, in order.

An endpoint is contacted only where a recipe names it. Its client waits and tries again after 429 and 5xx, as the
server's Retry-After says or twice as long each time.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from hanlin.align.synthesis.rounds import Chat
from hanlin.core.errors import HanlinError, require
from hanlin.core.seeds import derive
from hanlin.engine import Engine, SamplingParams
from hanlin.engine.embedding import writes

KEY = "OPENAI_API_KEY"


class Writer(Protocol):
    """Answers chats. Used as a context manager: leaving it closes what it holds."""

    name: str

    def ask(self, chats: Sequence[Chat], sampling: SamplingParams, *, cut: bool = False) -> list[str | None]:
        """One answer a chat, in order; None where there is none: too long for the writer, refused, or (unless `cut`)
        not ended at max_tokens.

        Chat i draws with the seed that follows from `sampling.seed` and i, whatever stands beside it.
        """
        ...

    def __enter__(self) -> "Writer": ...
    def __exit__(self, *error: object) -> None: ...


class EngineWriter:
    """An `Engine` with a chat template."""

    def __init__(self, engine: Engine, name: str) -> None:
        if not writes(engine.model):
            raise HanlinError(f"{name} reads and does not write (it gives embeddings); synthesis needs a chat model.")
        if not engine.tokenizer.has_chat:
            raise HanlinError(
                f"{name} has no chat template, so it cannot be asked. Give a model that was tuned to chat, or put a "
                "chat_template.jinja into its folder."
            )
        self.name, self._engine = name, engine

    @classmethod
    def open(cls, folder: Path, **limits: Any) -> "EngineWriter":
        """Of a model folder. limits: of the engine."""
        return cls(Engine.from_folder(folder, **limits), folder.name)

    def ask(self, chats: Sequence[Chat], sampling: SamplingParams, *, cut: bool = False) -> list[str | None]:
        ids = [self._engine.tokenizer.chat(chat) for chat in chats]
        fitting = [i for i, each in enumerate(ids) if len(each) < self._engine.max_context]
        params = [_of_chat(sampling, i) for i in fitting]
        answers: list[str | None] = [None] * len(chats)
        for i, completion in zip(fitting, self._engine.generate([ids[i] for i in fitting], params), strict=True):
            if completion.finish_reason == "stop" or cut:
                answers[i] = completion.text.strip()
        return answers

    def __enter__(self) -> "EngineWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.close()


class EndpointWriter:
    """`POST url/chat/completions`, with the key in the environment variable OPENAI_API_KEY.

    url: up to and with /v1. concurrency: requests under way together. retries: after 429, 5xx and lost connections.
    timeout: seconds a request.
    """

    def __init__(self, url: str, model: str, *, concurrency: int = 8, retries: int = 5, timeout: float = 120.0) -> None:
        self._openai = require("openai", "synthesis")
        self.name, self.url, self._concurrency = model, url, concurrency
        self._client = self._openai.OpenAI(
            base_url=url, api_key=os.environ.get(KEY) or "none", max_retries=retries, timeout=timeout
        )

    def ask(self, chats: Sequence[Chat], sampling: SamplingParams, *, cut: bool = False) -> list[str | None]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            given = pool.map(lambda pair: self._one(pair[1], _of_chat(sampling, pair[0]), cut), enumerate(chats))
            try:
                answers = list(given)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        refusals = [answer for answer in answers if isinstance(answer, Exception)]
        if refusals and len(refusals) == len(answers):
            raise HanlinError(
                f"{self.url} answered none of {len(answers)} requests for the model {self.name!r}; the first: "
                f"{refusals[0]}. Nothing is lost: when it answers again, the same command goes on."
            )
        return [None if isinstance(answer, Exception) else answer for answer in answers]

    def _one(self, chat: Chat, sampling: SamplingParams, cut: bool) -> "str | Exception | None":
        failures = self._openai
        seed = {} if sampling.seed is None else {"seed": sampling.seed % 2**31}
        try:
            reply = self._client.chat.completions.create(
                model=self.name,
                messages=[dict(message) for message in chat],
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                **seed,
            )
        except (failures.AuthenticationError, failures.PermissionDeniedError) as error:
            raise HanlinError(
                f"{self.url} refuses the key ({error.status_code}). Put a valid one into {KEY}."
            ) from error
        except failures.NotFoundError as error:
            raise HanlinError(
                f"{self.url} knows no model {self.name!r}, or no chat/completions below this address (404: {error}). "
                "Check `writer.model`, and that `writer.url` ends where the API begins, usually in /v1."
            ) from error
        except failures.APITimeoutError as error:
            return error
        except failures.APIConnectionError as error:
            raise HanlinError(
                f"{self.url} cannot be reached ({error.__cause__ or error}). Check that the server runs, the host and "
                "port in `writer.url`, and any proxy; the same command then goes on."
            ) from error
        except failures.APIStatusError as error:  # still busy after all retries, or this one chat is refused
            return error
        choice = reply.choices[0] if reply.choices else None
        whole = choice is not None and choice.message.content and (choice.finish_reason == "stop" or cut)
        return choice.message.content.strip() if whole else None

    def __enter__(self) -> "EndpointWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()


def _of_chat(sampling: SamplingParams, index: int) -> SamplingParams:
    return sampling if sampling.seed is None else replace(sampling, seed=derive(sampling.seed, index))
