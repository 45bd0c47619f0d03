"""Answers of a prescribed form: what the interfaces call it, as the engine's `Constraint`.

    response_format {type: text | json_object | json_schema}       OpenAI
    structured_outputs {json | regex | choice | grammar | json_object}   vLLM
    guided_json, guided_regex, guided_choice, guided_grammar       vLLM before 0.12
    json_schema                                                    llama.cpp

One of them a request. A grammar is written in Lark's notation, as llguidance reads it.
"""

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from hanlin.engine.types import Constraint
from hanlin.serve.errors import ApiError
from hanlin.serve.requests import Strict

MAX_CHOICES = 4096
Schema = dict[str, Any] | bool


class NamedSchema(Strict):
    """OpenAI's wrapping of a schema; name and description are labels, and every schema is enforced."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: Schema = Field(default_factory=dict, alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _together(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' belongs to the type 'json_schema', which needs it")
        return self

    def constraint(self) -> Constraint | None:
        if self.json_schema is not None:
            return schema_constraint(self.json_schema.schema_)
        return Constraint("json_object") if self.type == "json_object" else None


class StructuredOutputs(Strict):
    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = None
    json_object: bool = False

    def constraints(self, names: tuple[str, ...]) -> dict[str, Constraint]:
        return _constraints(names, self.json_, self.regex, self.choice, self.grammar, self.json_object)


class GuidedFields(Strict):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=MAX_CHOICES)
    guided_grammar: str | None = None
    json_schema: Schema | None = None

    def constraint(self) -> Constraint | None:
        """The one form that was asked for, or `ApiError` 400 if there are two."""
        found: dict[str, Constraint] = {}
        if self.response_format is not None and (wanted := self.response_format.constraint()) is not None:
            found["response_format"] = wanted
        if self.structured_outputs is not None:
            names = tuple(
                f"structured_outputs.{name}" for name in ("json", "regex", "choice", "grammar", "json_object")
            )
            found |= self.structured_outputs.constraints(names)
        guided = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "")
        found |= _constraints(
            guided, self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, False
        )
        if self.json_schema is not None:
            found["json_schema"] = schema_constraint(self.json_schema)
        if len(found) > 1:
            first, second = list(found)[:2]
            message = f"'{first}' and '{second}' both prescribe the answer's form; send one."
            raise ApiError(400, message, param=second, code="invalid_value")
        return next(iter(found.values()), None)


def schema_constraint(schema: Schema | str) -> Constraint:
    """A JSON schema, or its text."""
    return Constraint("json_schema", schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))


def _constraints(
    names: tuple[str, ...],
    schema: Schema | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    json_object: bool,
) -> dict[str, Constraint]:
    values = (
        None if schema is None else schema_constraint(schema),
        None if regex is None else Constraint("regex", regex),
        None if choice is None else Constraint("choice", json.dumps(choice, ensure_ascii=False)),
        None if grammar is None else Constraint("grammar", grammar),
        Constraint("json_object") if json_object else None,
    )
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}
