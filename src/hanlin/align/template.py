"""A chat template as training uses it: conversation -> `Example`, or a refusal where it would train wrongly.

A template is a program of somebody else's, made for prompts. For training it must have four properties, which are
checked on every turn that is learnt, not on a sample:

    it writes everything   declarations, calls and results of tools, reasoning: many templates drop what they don't know
    it only grows          the text before an answer, and the answer, stay as they are whatever follows (`tokens.chat`)
    it ends each answer    with a token at which generation stops, inside the trained stretch, or the model never stops
    it leaves something    of the answer's words to train

`loss_on: last_turn` learns what the assistant does after the last message of the user, its calls of tools included.
That part is never rewritten by the templates that drop the reasoning of earlier turns (Qwen3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from hanlin.align.messages import Conversation, Message
from hanlin.core.errors import HanlinError
from hanlin.data.examples import Example
from hanlin.tokens import Tokenizer
from hanlin.tokens.chat import RewritingTemplateError

LossOn = Literal["all_turns", "last_turn"]

PROBE, ARGUMENT, VALUE = "probe_tool", "probe_argument", "probe_value"
DECLARED = {"type": "object", "properties": {ARGUMENT: {"type": "string", "description": VALUE}}, "required": []}
TOOL = {"type": "function", "function": {"name": PROBE, "description": VALUE, "parameters": DECLARED}}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Writes:
    """What a template writes beside plain text. arguments: how it wants those of a call, an object or its JSON text;
    None: it writes no calls. reasoning: the key under which it looks for it, or None."""

    tools: bool
    arguments: Literal["object", "text"] | None
    results: bool
    reasoning: str | None


class TrainingTemplate:
    """The chat template of `tokenizer`; loss_on: which of the assistant's turns are learnt."""

    def __init__(self, tokenizer: Tokenizer, *, loss_on: LossOn = "all_turns") -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on

    def encode(self, conversation: Conversation) -> Example:
        """The tokens, and which are learnt. A `HanlinError` names conversation, template, what is wrong, the remedy."""
        self._refuse_unwritten(conversation)
        answers = learnt(conversation.messages, self.loss_on)
        messages = self.plain(conversation)
        more = {"tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else {}
        about = f"{conversation.name}, with the chat template of {self.tokenizer.where}"
        try:
            chat = self.tokenizer.chat_trained(messages, answers=answers, **more)
        except RewritingTemplateError as error:
            last = learnt(conversation.messages, "last_turn")
            hint = " `objective.loss_on: last_turn` learns the last turn alone." if answers != last else ""
            raise HanlinError(f"{about}: {error}{hint}") from error
        except HanlinError as error:
            raise HanlinError(f"{about}: {error}") from error
        for number, (start, stop) in zip(answers, chat.turns, strict=True):
            self._check_ending(chat.ids[start:stop], f"{conversation.name}, turn {number + 1}")
        return Example(chat.ids, chat.trained, conversation.name)

    def plain(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages in the dialect of this template."""
        if not any(message.calls or message.reasoning is not None for message in conversation.messages):
            return conversation.plain()
        return conversation.plain(
            arguments_as_text=self.writes.arguments == "text", reasoning_key=self.writes.reasoning or REASONING_KEYS[0]
        )

    @cached_property
    def writes(self) -> Writes:
        """Found by asking the template to write each of them once."""
        user, done = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
        arguments: Literal["object", "text"] | None = None
        results = False
        for form, value, wrong in (
            ("object", {ARGUMENT: VALUE}, f"'{ARGUMENT}'"),  # an object written as Python spells it
            ("text", f'{{"{ARGUMENT}": "{VALUE}"}}', f'\\"{ARGUMENT}'),  # a text written as JSON once more
        ):
            call = {"id": "call00001", "type": "function", "function": {"name": PROBE, "arguments": value}}
            asked = [user, {"role": "assistant", "content": "", "tool_calls": [call]}]
            written = self._written(asked)
            if PROBE in written and VALUE in written and wrong not in written:
                answer = {"role": "tool", "content": "probe_result", "name": PROBE, "tool_call_id": "call00001"}
                arguments, results = form, "probe_result" in self._written([*asked, answer])
                break
        reasoning = next((k for k in REASONING_KEYS if VALUE in self._written([user, {**done, k: VALUE}])), None)
        return Writes(PROBE in self._written([user], tools=[TOOL]), arguments, results, reasoning)

    def _written(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        try:
            return self.tokenizer.chat_text(messages, **variables)
        except HanlinError:
            return ""

    def _refuse_unwritten(self, conversation: Conversation) -> None:
        messages = conversation.messages
        found = {
            "declarations of tools (`tools`)": bool(conversation.tools),
            "calls of tools": any(message.calls for message in messages),
            "results of tools": any(message.role == "tool" for message in messages),
            "reasoning (`reasoning_content`)": any(message.reasoning is not None for message in messages),
        }
        if not any(found.values()):
            return
        can = (self.writes.tools, self.writes.arguments is not None, self.writes.results, bool(self.writes.reasoning))
        missing = [what for (what, has), able in zip(found.items(), can, strict=True) if has and not able]
        if not missing:
            return
        advice = "Put a template that does into its chat_template.jinja, or take them out of the conversations"
        if missing[-1].startswith("reasoning"):
            advice += "; reasoning may also stand in the content, between marks of your choice"
        raise HanlinError(
            f"{conversation.name} has {' and '.join(missing)}, which the chat template of {self.tokenizer.where} does "
            f"not write, so they would be left out in silence. {advice}."
        )

    def _check_ending(self, ids: Sequence[int], where: str) -> None:
        tokenizer = self.tokenizer
        stops = " or ".join(repr(tokenizer.decode([token], skip_special=False)) for token in tokenizer.stop_ids)
        if not ids or ids[-1] not in tokenizer.stop_ids:
            found = f"it ends with {tokenizer.decode(ids[-8:], skip_special=False)!r}" if ids else "nothing is written"
            raise HanlinError(
                f"{where}: the chat template of {tokenizer.where} does not end the assistant's turn with a token at "
                f"which generation stops ({stops}): {found}. The model would never learn to stop. Use a template that "
                "writes the end of the turn with the turn, or name its token as an `eos_token_id` in "
                "generation_config.json."
            )
        if len(ids) < 2:
            raise HanlinError(
                f"{where}: the chat template of {tokenizer.where} leaves no word of the assistant's turn to be "
                f"trained, only its end {stops}. Use a template that writes the assistant's content behind the opening "
                "of its turn."
            )


def learnt(messages: Sequence[Message], loss_on: LossOn) -> list[int]:
    """The numbers of the messages to learn: the assistant's but for those of weight 0, of all turns or the last."""
    first = 0
    if loss_on == "last_turn":
        first = max((number for number, message in enumerate(messages) if message.role == "user"), default=-1) + 1
    return [
        number
        for number, message in enumerate(messages)
        if number >= first and message.role == "assistant" and message.trained
    ]
