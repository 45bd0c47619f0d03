"""`Conversation`: a chat request under way, the same for all interfaces that converse."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from hanlin.engine import Event
from hanlin.serve.answers import usage, usage_of
from hanlin.serve.chat_request import ChatRequest
from hanlin.serve.generation import Generation, start
from hanlin.serve.models import Served, find_model, room_for
from hanlin.serve.prompting import prompt_ids
from hanlin.serve.turns import Delta, Reading, Turn, reading_of


@dataclass
class Conversation:
    """body: what was asked for; ids: the prompt; turns: the answers, as far as they have come."""

    body: ChatRequest
    served: Served
    ids: list[int]
    reading: Reading
    generation: Generation
    turns: list[Turn]

    async def deltas(self) -> AsyncIterator[tuple[Turn, Delta, Event]]:
        """What each event adds to its turn. After a turn's last, `turn.completion` is there."""
        async for part, event in self.generation.events():
            turn = self.turns[part]
            yield turn, turn.push(event), event

    async def finish(self, request: Request) -> list[Turn]:
        """All turns, when the last has ended; a client that hangs up ends them earlier."""
        async with self.generation.watched(request):
            async for _ in self.deltas():
                pass
        return self.turns

    def usage(self, *, running: bool = False) -> dict[str, Any]:
        """Token counts; running: so far."""
        reasoned = sum(turn.reasoning_tokens for turn in self.turns)
        if running:
            return usage(len(self.ids), sum(turn.token_count for turn in self.turns))
        whole = [turn.completion for turn in self.turns if turn.completion is not None]
        return usage_of(whole, prompt_tokens=len(self.ids), reasoning_tokens=reasoned)


async def begin(request: Request, body: ChatRequest) -> Conversation:
    """Check a chat request and set it on its way."""
    served = find_model(request, body.model)
    tokenizer = served.engine.tokenizer
    body.check_together(vocab_size=tokenizer.size)
    ids = await asyncio.to_thread(prompt_ids, body, tokenizer)
    reading, constraint = await asyncio.to_thread(reading_of, body, tokenizer, ids)
    params = body.sampling(
        tokenizer,
        max_tokens=room_for(served.engine, [ids], body.limit, param="messages"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        constraint=constraint,
    )
    generation = await start(request, served, body, [ids], params)
    prefix = str(body.messages[-1].content) if body.echo else ""
    turns = [Turn(tokenizer, params, reading, part, prefix) for part in range(generation.parts)]
    return Conversation(body, served, ids, reading, generation, turns)
