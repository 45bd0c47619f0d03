"""The tokenizer files of a model folder, as `transformers` lays them out, whoever wrote them.

tokenizer.json            vocabulary, merges, cuts, special tokens: the `tokenizers` library's own format
tokenizer_config.json     which special token is which (`eos_token`, `pad_token` …), perhaps the chat template
special_tokens_map.json   the same in older folders
chat_template.jinja       the chat template in newer ones
generation_config.json    which tokens end a generation (`eos_token_id`: a number or a list)
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, write_json, write_text

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder holds. engine_json: `tokenizer.json` as text. special: role -> spelling ("eos_token": "</s>").

    end_ids: `eos_token_id` of generation_config.json. config: tokenizer_config.json as it is, so that saving loses
    nothing that another program reads.
    """

    engine_json: str
    special: Mapping[str, str]
    chat_template: str | None = None
    end_ids: tuple[int, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def engine(self, where: str = "tokenizer.json") -> tokenizers.Tokenizer:
        """A fresh `tokenizers.Tokenizer`, without padding and truncation."""
        try:
            engine = tokenizers.Tokenizer.from_str(self.engine_json)
        except Exception as error:  # the library raises bare Exception
            raise HanlinError(
                f"{where} is not a tokenizer that the `tokenizers` library {tokenizers.__version__} can read: {error}. "
                "Expected the tokenizer.json of a Hugging Face model folder."
            ) from error
        engine.no_padding()
        engine.no_truncation()
        return engine


def read_folder(path: str | os.PathLike[str]) -> TokenizerFiles:
    """Read a folder's tokenizer files; `HanlinError` where `tokenizer.json` is missing or a file is malformed."""
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise HanlinError(_missing(folder))
    read_json(file)  # names the place of a syntax error
    config = _object(folder / "tokenizer_config.json")
    special = {
        role: spelling
        for source in (_object(folder / "special_tokens_map.json"), config)
        for role in ROLES
        if (spelling := _spelling(source.get(role), role, folder)) is not None
    }
    return TokenizerFiles(
        engine_json=file.read_text(encoding="utf-8"),
        special=special,
        chat_template=_template(folder, config),
        end_ids=_end_ids(folder / "generation_config.json"),
        config={key: value for key, value in config.items() if key != "chat_template"},
    )


def write_folder(path: str | os.PathLike[str], files: TokenizerFiles) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; other files of the folder stay."""
    folder = Path(path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {**files.special, **files.config}
    write_text(folder / "tokenizer.json", files.engine_json)
    if files.chat_template is not None:
        write_text(folder / "chat_template.jinja", files.chat_template)
    else:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_json(folder / "tokenizer_config.json", config)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise HanlinError(f"{file} is not UTF-8: {error}.") from error
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise HanlinError(f"`chat_template` in {folder / 'tokenizer_config.json'} is no text and no list of templates.")
    return found


def _end_ids(file: Path) -> tuple[int, ...]:
    found = _object(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(token, int) for token in ids):
        raise HanlinError(f"`eos_token_id` in {file} is {json.dumps(found)}; expected a token id or a list of them.")
    return tuple(ids)


def _spelling(value: Any, role: str, folder: Path) -> str | None:
    if isinstance(value, Mapping):  # {"content": "</s>", "lstrip": false, ...}
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise HanlinError(f"`{role}` in {folder / 'tokenizer_config.json'} is {value!r}; expected a token's spelling.")
    return value


def _object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise HanlinError(f"{file} holds a {type(value).__name__}; expected a JSON object.")
    return value


def _missing(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist. Give a folder with tokenizer.json, such as `hanlin tokenizer train` writes."
    if not folder.is_dir():
        return f"{folder} is a file; expected the folder that holds tokenizer.json."
    if (folder / "tokenizer.model").exists():
        return (
            f"{folder} holds a SentencePiece tokenizer.model but no tokenizer.json. Convert it once: "
            "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    return f"{folder} has no tokenizer.json. Give a folder with one, such as `hanlin tokenizer train` writes."
