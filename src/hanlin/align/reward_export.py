"""Reward models in other people's layout: transformers' `...ForSequenceClassification` with one label.

    model.*              the trunk                  config.json: "architectures": ["LlamaForSequenceClassification"],
    score.weight (1, w)  the head                   "num_labels": 1 ("id2label"), "pad_token_id"

transformers reads the score at the last token that is no padding, whichever side that stands on, and finds it by
`pad_token_id`; where the padding token ends answers too it finds the wrong one, so such a tokenizer is refused.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hanlin.align.reward import HEAD, add_reward_head, reward_head
from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, read_json, write_json
from hanlin.models import Transformer, load_model, save_model
from hanlin.models.formats.safetensors import WeightReader, find_weights, write_weights
from hanlin.tokens import Tokenizer

CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
SCORE, OUTPUT = "score.weight", "lm_head.weight"
LABELS = ("id2label", "label2id", "num_labels", "problem_type")  # keys of a classifier's config.json
SHARD_BYTES = 5_000_000_000


def load_reward_model(
    folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | torch.device = "auto"
) -> Transformer:
    """A reward model from a folder of ours (`heads.safetensors`) or transformers' (`score.weight`, one label).

    The head is `model.reward`. dtype None: as saved. `HanlinError` if the folder holds no reward model.
    """
    path = Path(folder)
    if not is_foreign(path):
        return load_model(path, dtype=dtype or "auto", device=device)
    config = read_json(path / "config.json")
    kept = {key: value for key, value in config.items() if key not in LABELS}
    kept["architectures"] = [name.replace(CLASSIFIER, CAUSAL) for name in config["architectures"]]
    kept["tie_word_embeddings"] = True  # there is no output head for words
    held = find_weights(path)
    with WeightReader(held) as reader, TemporaryDirectory() as place:
        score = reader.read(SCORE).clone() if SCORE in held else None
        if score is None or score.shape[0] != 1:
            found = "no score.weight" if score is None else f"{score.shape[0]} labels"
            raise HanlinError(f"{path} has {found}; a reward model has one label.")
        trunk = {name: reader.read(name) for name in held if name not in (SCORE, OUTPUT)}
        write_weights(trunk, Path(place), shard_bytes=SHARD_BYTES)
        write_json(Path(place) / "config.json", kept)
        model = load_model(place, dtype=dtype or "auto", device=device)
    add_reward_head(model)
    with torch.no_grad():
        reward_head(model, steps=False).classifier.weight.copy_(score)
    return model.eval()


def export_reward_model(model: Transformer, tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Write a reward model so that transformers' `AutoModelForSequenceClassification` reads it, whole or not at all."""
    classifier = reward_head(model, steps=False).classifier
    if classifier.bias is not None:
        raise HanlinError("The head has a bias, for which transformers' layout has no place.")
    if tokenizer.pad_id in tokenizer.stop_ids:
        raise HanlinError(
            "The tokenizer pads with the token that ends an answer, so transformers would read the score one token too "
            "early. Give it a padding token of its own."
        )
    head = model._modules.pop(HEAD)
    try:
        with atomic_folder(Path(folder)) as place:
            save_model(model, place)
            with WeightReader(find_weights(place)) as reader:
                weights = {name: reader.read(name).clone() for name in reader.names if name != OUTPUT}
            write_weights({**weights, SCORE: classifier.weight.detach().cpu()}, place, shard_bytes=SHARD_BYTES)
            config = read_json(place / "config.json")
            if not all(name.endswith(CAUSAL) for name in config["architectures"]):
                raise HanlinError(f"transformers has no classifier for {config['architectures'][0]}.")
            config["architectures"] = [name.replace(CAUSAL, CLASSIFIER) for name in config["architectures"]]
            config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, "pad_token_id": tokenizer.pad_id}
            write_json(place / "config.json", config)
            tokenizer.save(place)
    finally:
        model.add_module(HEAD, head)


def is_foreign(folder: Path) -> bool:
    """Whether `config.json` speaks of transformers' classifier."""
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    names = config.get("architectures") if isinstance(config, dict) else None
    return bool(names) and all(str(name).endswith(CLASSIFIER) for name in names or ())
