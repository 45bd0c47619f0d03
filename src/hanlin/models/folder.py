"""A model is a folder in the Hugging Face layout: what transformers saved loads here, what is saved here loads there.

config.json  generation_config.json  model.safetensors (or shards and their index)
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hanlin.core.device import choose_device
from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, write_json
from hanlin.models.config import ModelConfig
from hanlin.models.families import Family, family_of, find_family
from hanlin.models.families.stored_heads import heads_in, heads_of
from hanlin.models.families.weights import Bound
from hanlin.models.formats.safetensors import FLOATS, WeightReader, find_weights, read_shapes, write_weights
from hanlin.models.heads_file import attach_heads, attached_heads, load_heads, save_heads
from hanlin.models.transformer import Transformer
from hanlin.nn.linear import PackedLinear

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
GENERATION = "generation_config"  # where `ModelConfig.extra` keeps what stood in generation_config.json


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """`config.json` of a model folder as a `ModelConfig`. An unknown family or a setting that this Transformer cannot
    honour is a `HanlinError` that names it."""
    folder, json = _read_config(path)
    config = family_of(json, f'{folder / "config.json"}: "model_type"').read(json, folder / "config.json")
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

    Heads that were saved with it (`nn.heads`) are its children again. A missing, superfluous or wrongly shaped weight
    is a `HanlinError` with its name.
    """
    folder, json = _read_config(path)
    config = load_config(folder)
    family = find_family(config.family, "family")
    held = _weights_of(family, config, folder)
    if dtype == "auto":
        dtype = _saved_dtype(json, held, folder)
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in held)
    prefix = family.prefix if bare else ""
    with torch.device("meta"), Undrawn():  # nothing is drawn at random only to be overwritten
        model = Transformer(config)
        for head in heads_in(family.heads, held, prefix):
            model.add_module(head.name, head.make(config.width))
    bound = family.as_stored(family.bind(config, _shapes(_stored(model)), bare=bare), held)
    extra = _check_shapes(model, family, bound, held, folder)
    _fill(model, bound, held, extra, folder, dtype, choose_device(str(device)))
    attach_heads(model, {name: head.to(model.device, dtype) for name, head in load_heads(folder).items()})
    return model.eval()


def stored_dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """What `dtype="auto"` means for this folder: what `config.json` says, else that of the stored weights."""
    folder, json = _read_config(path)
    held = {} if _named_dtype(json) else find_weights(folder)
    return _saved_dtype(json, held, folder)


def save_model(model: Transformer, path: str | os.PathLike[str], *, shard_bytes: int = 5_000_000_000) -> None:
    """Write `model.safetensors`, `generation_config.json` and `config.json` into folder `path`, each atomically and in
    this order, so that a new folder counts as a model (has a `config.json`) only when it is whole.

    Weights keep their dtype; tied ones are stored once. More than `shard_bytes` become several files with an index.
    Heads that are children of the model (`nn.heads`) go where the family's files have them, else into a file beside.
    A config that its family cannot express (`ModelConfig.family`) is a `HanlinError` before anything is written.
    """
    folder, config = _folder_to_write(path), model.config
    if any(".lora_" in name for name in model.state_dict()):
        raise HanlinError(
            "This model has an adapter, which is no part of its folder: `merge()` and `remove()` it first, or save it "
            "by itself (`hanlin.tune.save_lora`)."
        )
    family = find_family(config.family, "The model's family (`ModelConfig.family`)")
    json = family.write(config)
    inside, apart = heads_of(family.heads, model), attached_heads(model)
    for head in inside:
        del apart[head.name]
        if head.architecture is not None and model.lm_head is not None:
            json["architectures"] = [head.architecture]
    tensors = _stored(model, without=tuple(apart))
    weights: dict[str, Tensor] = {}
    for row in family.bind(config, _shapes(tensors)):
        made = row.rule.to_theirs([tensors[name] for name in row.ours], config)
        weights |= zip(row.theirs, made, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder, shard_bytes=shard_bytes)
    save_heads(apart, folder)
    _write_config(json, config, folder, model.model.embed_tokens.weight.dtype)


def save_config(config: ModelConfig, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> None:
    """`config.json` and `generation_config.json` of a model that has no weights yet."""
    folder = _folder_to_write(path)
    json = find_family(config.family, "The model's family (`ModelConfig.family`)").write(config)
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(json, config, folder, dtype)


class Undrawn(TorchFunctionMode):
    """Random numbers are not drawn: on the meta device that does nothing, but torch imports its compiler for it, which
    takes 0.8 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in DRAWS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _folder_to_write(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise HanlinError(f"{folder} is a file; a model is a folder. Choose another name.")
    return folder


def _write_config(json: dict[str, Any], config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    json["dtype"] = str(dtype).removeprefix("torch.")
    generation = {k: json[k] for k in TOKEN_IDS if json[k] is not None}
    write_json(folder / "generation_config.json", generation | config.extra.get(GENERATION, {}))
    write_json(folder / "config.json", json)


def _read_config(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    folder = Path(path)
    if folder.name == "config.json" and folder.is_file():
        folder = folder.parent
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


def _stored(model: Transformer, *, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Our name -> tensor of everything a file holds: tied weights once, under the embedding's name; of the children
    `without` nothing."""
    tensors = model.state_dict()
    for name in without:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
    if model.config.tied_embeddings:
        tensors.pop(HEAD, None)
    return tensors


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _weights_of(family: Family, config: ModelConfig, folder: Path) -> dict[str, Path]:
    """Their name -> file of every weight that takes part."""
    return {theirs: file for theirs, file in find_weights(folder).items() if not family.is_skipped(theirs)}


def _named_dtype(json: dict[str, Any]) -> str | None:
    return json.get("dtype") or json.get("torch_dtype")


def _saved_dtype(json: dict[str, Any], held: dict[str, Path], folder: Path) -> torch.dtype:
    named = _named_dtype(json)
    if named is None:
        with WeightReader(dict(list(held.items())[:1])) as reader:
            return next((reader.read(name).dtype for name in reader.names), torch.float32)
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if dtype not in FLOATS:
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in FLOATS))
        raise HanlinError(f'{folder / "config.json"}: "dtype" is {named!r}; Hanlin computes in {known}.')
    return dtype


def _check_shapes(
    model: Transformer, family: Family, bound: list[Bound], held: dict[str, Path], folder: Path
) -> dict[str, str]:
    """Refuse weights that do not fit. Returns {their name: our name} of a tied head that is stored all the same."""
    ours = _shapes(model.state_dict())
    expected: dict[str, tuple[int, ...]] = {}
    for row in bound:
        expected |= row.shapes(ours, model.config)
    ahead = {theirs for row in bound if row.ours[0].startswith("ahead.") for theirs in row.theirs}
    optional: dict[str, str] = {}
    if model.config.tied_embeddings and model.lm_head is not None:
        optional = {row.theirs[0]: HEAD for row in family.bind(model.config, {HEAD: ours[HEAD]})}
        expected |= {theirs: ours[name] for theirs, name in optional.items()}
    missing = sorted(expected.keys() - held.keys() - optional.keys())
    surplus = sorted(held.keys() - expected.keys())
    shapes = read_shapes({theirs: file for theirs, file in held.items() if theirs in expected})
    wrong = [
        f"{theirs} is {list(found)}, expected {list(expected[theirs])}"
        for theirs, found in sorted(shapes.items())
        if found != expected[theirs]
    ]
    kinds = {"missing": missing, "not part of this model": surplus, "of the wrong shape": wrong}
    problems = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        advice = "Are config.json and the weights of one model?"
        if missing and all(name in ahead for name in missing):
            advice = (
                "The config promises modules that predict further ahead; without them, set their number there to 0."
            )
        elif missing == [HEAD]:
            advice = 'If the head shares the embedding, config.json needs "tie_word_embeddings": true.'
        raise HanlinError(f"The weights in {folder} do not fit its config.json. {'; '.join(problems)}. {advice}")
    return {theirs: name for theirs, name in optional.items() if theirs in held}


@torch.no_grad()
def _fill(
    model: Transformer, bound: list[Bound], held: dict[str, Path], extra: dict[str, str], folder: Path,
    dtype: torch.dtype, device: torch.device,
) -> None:  # fmt: skip
    """Give a model without memory its weights; each is copied once, out of the mapped file to where it will stay."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    packed = tuple(f"{name}.{part}." for name, layer in layers.items() for part in layer.packed)
    shapes, buffers = _shapes(model.state_dict()), {name for name, _ in model.named_buffers()}
    tensors: dict[str, Tensor] = {}
    with WeightReader(held) as reader:

        def read(theirs: str) -> Tensor:
            tensor = reader.read(theirs)
            if tensor.dtype not in FLOATS:
                raise HanlinError(
                    f"{held[theirs]}: the weight {theirs!r} is stored as {str(tensor.dtype).removeprefix('torch.')}; "
                    "Hanlin reads float64, float32, bfloat16 and float16. Use the unquantised model."
                )
            return tensor

        for row in bound:
            made = row.rule.to_ours([read(n) for n in row.theirs], [shapes[n] for n in row.ours], model.config)
            for name, tensor in zip(row.ours, made, strict=True):
                stays = name.startswith(packed)  # packing copies those
                kind = torch.promote_types(dtype, torch.float32) if name in buffers else dtype  # corrections of routers
                tensors[name] = tensor.to(device, kind, copy=not stays, memory_format=torch.contiguous_format)
        for theirs in extra:
            head = read(theirs).to(device, dtype)
            if not torch.equal(head, tensors[EMBEDDING]):
                raise HanlinError(
                    f'{folder}: config.json says "tie_word_embeddings": true, but the weights hold a {theirs} that '
                    f"differs from {EMBEDDING}. Which of the two is right cannot be told from here."
                )
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tied_embeddings and model.lm_head is not None:
        model.lm_head.weight = model.model.embed_tokens.weight
    for layer in layers.values():
        layer.pack()


def _some(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
