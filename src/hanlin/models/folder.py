"""A model is a folder in the Hugging Face layout: what transformers saved loads here, what is saved here loads there.

config.json  generation_config.json  model.safetensors (or shards and their index)
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hanlin.core.device import choose_device
from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, write_json
from hanlin.models.config import ModelConfig
from hanlin.models.families import find_family
from hanlin.models.formats.safetensors import FLOATS, find_weights, read_shapes, read_weights, write_weights
from hanlin.models.transformer import Transformer
from hanlin.nn.linear import PackedLinear

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config"  # where `ModelConfig.extra` keeps what stood in generation_config.json


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """`config.json` of a model folder as a `ModelConfig`. An unknown family or a setting that this Transformer cannot
    honour is a `HanlinError` that names it."""
    folder, json = _read_config(path)
    config = find_family(json.get("model_type"), f'{folder / "config.json"}: "model_type"').read(
        json, folder / "config.json"
    )
    if (folder / "generation_config.json").exists():
        config.extra[GENERATION] = read_json(folder / "generation_config.json")
    return config


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: str | torch.device = "auto",
) -> Transformer:
    """The model in `path`, in evaluation mode. dtype "auto": as saved (what `config.json` says, else that of the stored
    weights). device "auto": CUDA if there is one, else CPU.

    A missing, superfluous or wrongly shaped weight is a `HanlinError` with its name.
    """
    folder, json = _read_config(path)
    config = load_config(folder)
    held = _ours_by_theirs(config, folder)
    if dtype == "auto":
        dtype = _saved_dtype(json, held, folder)
    with torch.device("meta"):  # nothing is drawn at random only to be overwritten
        model = Transformer(config)
    _check_shapes(model, held, folder)
    _fill(model, held, folder, dtype, choose_device(str(device)))
    return model.eval()


def stored_dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """What `dtype="auto"` means for this folder: what `config.json` says, else that of the stored weights."""
    folder, json = _read_config(path)
    held = {} if _named_dtype(json) else _ours_by_theirs(load_config(folder), folder)
    return _saved_dtype(json, held, folder)


def save_model(model: Transformer, path: str | os.PathLike[str], *, shard_bytes: int = 5_000_000_000) -> None:
    """Write `model.safetensors`, `generation_config.json` and `config.json` into folder `path`, each atomically and in
    this order, so that a new folder counts as a model (has a `config.json`) only when it is whole.

    Weights keep their dtype; tied ones are stored once. More than `shard_bytes` become several files with an index.
    A config that its family cannot express (`ModelConfig.family`) is a `HanlinError` before anything is written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise HanlinError(f"{folder} is a file; a model is a folder. Choose another name.")
    config = model.config
    family = find_family(config.family, "The model's family (`ModelConfig.family`)")
    json = family.write(config)
    json["dtype"] = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    weights = {family.their_name(name): tensor for name, tensor in _stored(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder, shard_bytes=shard_bytes)
    generation = {k: json[k] for k in TOKEN_IDS if json[k] is not None}
    write_json(folder / "generation_config.json", generation | config.extra.get(GENERATION, {}))
    write_json(folder / "config.json", json)


def _read_config(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise HanlinError(f"{folder} {what}. A model is a folder with config.json and model.safetensors.")
    if not (folder / "config.json").exists():
        raise HanlinError(f"{folder} is no model folder: it has no config.json.")
    json = read_json(folder / "config.json")
    if not isinstance(json, dict):
        raise HanlinError(f"{folder / 'config.json'} must be a JSON object, found a {type(json).__name__}.")
    if json.get("quantization_config"):
        raise HanlinError(
            f'{folder / "config.json"}: "quantization_config" says that the weights are quantised; Hanlin reads plain '
            "floating-point weights. Use the unquantised model."
        )
    return folder, json


def _stored(model: Transformer) -> dict[str, Tensor]:
    """Our name -> tensor of everything a file holds: tied weights once, under the embedding's name."""
    tensors = model.state_dict()
    if model.config.tied_embeddings:
        del tensors[HEAD]
    return tensors


def _ours_by_theirs(config: ModelConfig, folder: Path) -> dict[str, tuple[str, Path]]:
    """Their name -> (our name, file) of every weight that takes part."""
    family = find_family(config.family, "family")
    return {
        theirs: (ours, file)
        for theirs, file in find_weights(folder).items()
        if (ours := family.our_name(theirs)) is not None
    }


def _named_dtype(json: dict[str, Any]) -> str | None:
    return json.get("dtype") or json.get("torch_dtype")


def _saved_dtype(json: dict[str, Any], held: dict[str, tuple[str, Path]], folder: Path) -> torch.dtype:
    named = _named_dtype(json)
    if named is None:
        files = {theirs: file for theirs, (ours, file) in held.items() if ours == EMBEDDING}
        return next((tensor.dtype for _, tensor in read_weights(files)), torch.float32)
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if dtype not in FLOATS:
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in FLOATS))
        raise HanlinError(f'{folder / "config.json"}: "dtype" is {named!r}; Hanlin computes in {known}.')
    return dtype


def _check_shapes(model: Transformer, held: dict[str, tuple[str, Path]], folder: Path) -> None:
    family = find_family(model.config.family, "family")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    optional = {HEAD} if model.config.tied_embeddings else set()
    found = {ours for ours, _ in held.values()}
    missing = sorted(family.their_name(name) for name in expected.keys() - found - optional)
    surplus = sorted(theirs for theirs, (ours, _) in held.items() if ours not in expected)
    shapes = read_shapes({theirs: file for theirs, (_, file) in held.items()})
    wrong = [
        f"{theirs} is {list(shapes[theirs])}, expected {list(expected[ours])}"
        for theirs, (ours, _) in sorted(held.items())
        if ours in expected and shapes[theirs] != expected[ours]
    ]
    kinds = {"missing": missing, "not part of this model": surplus, "of the wrong shape": wrong}
    problems = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        advice = "Are config.json and the weights of one model?"
        if missing == [HEAD]:
            advice = 'If the head shares the embedding, config.json needs "tie_word_embeddings": true.'
        raise HanlinError(f"The weights in {folder} do not fit its config.json. {'; '.join(problems)}. {advice}")


@torch.no_grad()
def _fill(
    model: Transformer, held: dict[str, tuple[str, Path]], folder: Path, dtype: torch.dtype, device: torch.device
) -> None:
    """Give a model without memory its weights; each is copied once, out of the mapped file to where it will stay."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    packed = tuple(f"{name}.{part}." for name, layer in layers.items() for part in layer.packed)
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in read_weights({theirs: file for theirs, (_, file) in held.items()}):
        ours, file = held[theirs]
        if tensor.dtype not in FLOATS:
            raise HanlinError(
                f"{file}: the weight {theirs!r} is stored as {str(tensor.dtype).removeprefix('torch.')}; Hanlin reads "
                "float64, float32, bfloat16 and float16. Use the unquantised model."
            )
        tensors[ours] = tensor.to(device, dtype, copy=not ours.startswith(packed))  # packing copies those
    if model.config.tied_embeddings:
        head = tensors.pop(HEAD, None)
        if head is not None and not torch.equal(head, tensors[EMBEDDING]):
            raise HanlinError(
                f'{folder}: config.json says "tie_word_embeddings": true, but the weights hold a {HEAD} that differs '
                f"from {EMBEDDING}. Which of the two is right cannot be told from here."
            )
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tied_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in layers.values():
        layer.pack()


def _some(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
