"""LoRA adapters as PEFT writes and reads them: `adapter_config.json` and `adapter_model.safetensors`.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight  (rank, in)      ...lora_B.weight  (out, rank)
                                     and with DoRA                                  ...lora_magnitude_vector  (out,)

The names between are those of the transformers model (`models.families`), so that an adapter moves between Hanlin,
PEFT, vLLM and llama.cpp. Of the many settings of PEFT, those that change no number are passed over, those of LoRA and
DoRA act, and any other that is set is refused by name.

A loaded adapter goes on learning: `load_lora` hangs it on the model open, `merge_lora` puts it into the weights for
good, for a new one to come.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_path, read_json, write_json
from hanlin.models.config import ModelConfig
from hanlin.models.families import find_family
from hanlin.models.formats.safetensors import FLOATS
from hanlin.nn.linear import Linear
from hanlin.tune.branch import LoraSettings
from hanlin.tune.lora import LoraAdapter, adapter_of, attach_lora, find_linears

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
_KEY = re.compile(r"base_model\.model\.(.+)\.(" + "|".join(map(re.escape, PARTS.values())) + ")")

ACTING = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}
HARMLESS = {  # where the weights of the file go is said by the file itself, and how they began does not matter any more
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "target_modules", "task_type",
}  # fmt: skip
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")  # `init_lora_weights` that leave the base model as it is


def save_lora(adapter: LoraAdapter, path: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Write the adapter into folder `path`, each file atomically, the config last. base_model: the name or folder of
    the model that it belongs to, for those who look for it.

    A layer that the family's files join with others (GPT-2's qkv) or keep in another shape (XLNet's heads) is a
    `HanlinError` before anything is written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise HanlinError(f"{folder} is a file; an adapter is a folder. Choose another name.")
    theirs, _ = _their_names(adapter.model)
    for name in adapter.branches:
        if name not in theirs:
            raise HanlinError(
                f"{name} is not a linear layer of its own in the files of this family (it is one part of a larger "
                "weight, or has another shape); PEFT has no name for its adapter. Merge it and save the model instead."
            )
    names = {theirs[name]: branch for name, branch in adapter.branches.items()}
    tensors: dict[str, Tensor] = {}
    for name, branch in names.items():
        for part, child in branch.children().items():
            tensors[f"base_model.model.{name}.{PARTS[part]}"] = child.get_parameter("weight").detach().contiguous()
    common = adapter.settings
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _task(adapter.model),
        "base_model_name_or_path": base_model,
        "r": common.rank,
        "lora_alpha": _whole(common.alpha),
        "lora_dropout": common.dropout,
        "use_rslora": common.rslora,
        "use_dora": common.dora,
        "target_modules": _shortest_targets(set(names), set(theirs.values())),
        "rank_pattern": {n: b.settings.rank for n, b in names.items() if b.settings.rank != common.rank},
        "alpha_pattern": {n: _whole(b.settings.alpha) for n, b in names.items() if b.settings.alpha != common.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, base: str | None = None) -> None:
    """`save_lora` of the adapter that hangs on `model`. base: the name or folder of the model without it. None that
    hangs there, or one that is merged (A and B would be added twice), is a `HanlinError`."""
    adapter = adapter_of(model)
    if adapter is None:
        raise HanlinError("The model has no adapter to save; `save_model` writes a plain or merged model.")
    if adapter.merged:
        raise HanlinError(
            "The adapter is merged into the weights; `unmerge()` it to save it alone, or `remove()` it and save the "
            "model."
        )
    save_lora(adapter, path, base_model=base)


@dataclass(frozen=True)
class LoraFile:
    """An adapter as it lies in a folder. common: its settings; layers: of each of our layers, its own settings, and by
    the names of `PARTS` A (rank, in), B (out, rank) and with DoRA the lengths (out,)."""

    common: LoraSettings
    layers: dict[str, tuple[LoraSettings, dict[str, Tensor]]]


def load_lora(model: nn.Module, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> LoraAdapter:
    """Hang the adapter in folder `path` on `model`, to learn on, and freeze the rest (`tune.lora.add_lora`). dtype: of
    A and B; None: that of their layer, but at least fp32. Errors as `read_lora`; the model is then as it was.
    """
    file = read_lora(model, path)
    settings = {name: own for name, (own, _) in file.layers.items()}
    adapter = attach_lora(model, file.common, settings, dtype=dtype)
    with torch.no_grad():
        for name, branch in adapter.branches.items():
            _, parts = file.layers[name]
            for part, child in branch.children().items():
                child.get_parameter("weight").copy_(parts[part])
    return adapter


def merge_lora(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the adapter in folder `path` into the weights of `model` for good, to the rounding of their dtype: a plain
    model, to save or to hang a new adapter on. Errors as `read_lora`."""
    adapter = load_lora(model, path)
    adapter.merge()
    adapter.remove()


def read_lora(model: nn.Module, path: str | os.PathLike[str]) -> LoraFile:
    """The adapter in folder `path`, for the layers of `model`, which is left alone (and may be frozen, `nn.frozen`).

    A setting that would change the numbers in another way than LoRA and DoRA, a tensor that is missing, unknown, or of
    the wrong shape is a `HanlinError`.
    """
    folder = Path(path)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    linears = find_linears(model)
    names, joined = _their_names(model)
    ours = {theirs: name for name, theirs in names.items()}
    common = _settings(config, folder)
    factors: dict[str, dict[str, Tensor]] = {}
    layers: dict[str, LoraSettings] = {}
    for key, tensor in tensors.items():
        found = _KEY.fullmatch(key)
        module = found[1] if found else key
        if module in joined:
            raise HanlinError(
                f"{folder / WEIGHTS}: {key!r} adapts a weight that is several layers here "
                f"({', '.join(joined[module])}), which Hanlin does not take apart. Merge it with PEFT "
                "(`merge_and_unload`) and load the merged model."
            )
        if found is None or module not in ours:
            near = get_close_matches(module, ours, n=1)
            hint = f' The nearest layer is "{near[0]}".' if near else ""
            raise HanlinError(f"{folder / WEIGHTS}: {key!r} belongs to no linear layer of this model.{hint}")
        factors.setdefault(ours[module], {})[found[2].removesuffix(".weight")] = tensor
        layers[ours[module]] = _settings(config, folder, module)
    if not factors:
        raise HanlinError(f"{folder / WEIGHTS} holds no adapter: it is empty.")
    for name, parts in factors.items():
        _check_parts(parts, linears[name], layers[name], names[name], folder)
    return LoraFile(common, {name: (layers[name], factors[name]) for name in linears if name in factors})


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise HanlinError(f"{folder} is no adapter: it has no {CONFIG}.")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise HanlinError(f"{folder / CONFIG} must be a JSON object, found a {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise HanlinError(f'{folder / CONFIG}: "peft_type" is {config.get("peft_type")!r}; Hanlin reads "LORA" here.')
    if config.get("bias", "none") != "none":
        raise HanlinError(f'{folder / CONFIG}: "bias" is {config["bias"]!r}; Hanlin reads adapters without, "none".')
    beginning = config.get("init_lora_weights", True)
    if beginning not in BEGINNINGS:
        raise HanlinError(
            f'{folder / CONFIG}: "init_lora_weights" is {beginning!r}, which changes the weights of the base model '
            "too. Save it with PEFT as a plain LoRA (`path_initial_model_for_weight_conversion`)."
        )
    for key, value in config.items():
        if value and key not in ACTING | HARMLESS | {"bias", "init_lora_weights"}:
            raise HanlinError(f'{folder / CONFIG}: "{key}" is {value!r}; Hanlin reads LoRA and DoRA, without it.')
    return config


def _settings(config: Mapping[str, Any], folder: Path, module: str | None = None) -> LoraSettings:
    """Of all layers, or of the one with their name `module`."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if module is not None:
        rank = _by_pattern(config.get("rank_pattern"), module, rank)
        alpha = _by_pattern(config.get("alpha_pattern"), module, alpha)
    try:
        rslora, dora = bool(config.get("use_rslora")), bool(config.get("use_dora"))
        return LoraSettings(rank, alpha, rslora, config.get("lora_dropout") or 0.0, dora)
    except (HanlinError, TypeError) as error:
        raise HanlinError(f"{folder / CONFIG}: {error}") from error


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.exists():
        if (folder / PICKLE).exists():
            raise HanlinError(
                f"{folder / PICKLE} is a pickle, which can run code when it is read; Hanlin does not. Load the adapter "
                "with PEFT once and save it again: `save_pretrained` writes safetensors."
            )
        raise HanlinError(f"{folder} is no whole adapter: it has no {WEIGHTS}.")
    try:
        with safe_open(file, framework="pt", device="cpu") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise HanlinError(f"{file} is not a whole safetensors file ({error}); fetch it again.") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise HanlinError(f"{file}: {name!r} is stored as {tensor.dtype}; an adapter has floating-point numbers.")
    return tensors


def _check_parts(parts: Mapping[str, Tensor], layer: Linear, own: LoraSettings, name: str, folder: Path) -> None:
    shapes = {"lora_A": (own.rank, layer.in_features), "lora_B": (layer.out_features, own.rank)}
    if own.dora:
        shapes["lora_magnitude_vector"] = (layer.out_features,)
    for part, shape in shapes.items():
        if part not in parts:
            raise HanlinError(f"{folder / WEIGHTS}: {name} has no {part}.")
        if tuple(parts[part].shape) != shape:
            raise HanlinError(
                f"{folder / WEIGHTS}: {part} of {name} is {list(parts[part].shape)}, expected {list(shape)} "
                f"(rank {own.rank} by {CONFIG})."
            )
    for part in parts.keys() - shapes:
        raise HanlinError(f'{folder / WEIGHTS}: {name} has a {part}, but {CONFIG} does not set "use_dora".')


def _their_names(model: nn.Module) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Our name of each linear layer -> its name in the transformers model, where the family gives it one of its own;
    and each name there that is several layers here -> those.

    A weight that is transposed there (GPT-2) has the same A and B.
    """
    linears = find_linears(model)
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return {name: name for name in linears}, {}
    # a frozen model keeps only the shapes of its weights: memory that nobody touches stands for them
    weights = {
        f"{name}.weight": torch.empty(layer.weight.shape) if layer.weight.is_meta else layer.weight.detach()
        for name, layer in linears.items()
    }
    state = {n: tuple(t.shape) for n, t in model.state_dict().items() if ".lora_" not in n}
    names: dict[str, str] = {}
    joined: dict[str, tuple[str, ...]] = {}
    for bound in find_family(config.family, "family").bind(config, state):
        if bound.ours[0] not in weights or len(bound.theirs) > 1:
            continue
        ours, theirs = [name.removesuffix(".weight") for name in bound.ours], bound.theirs[0].removesuffix(".weight")
        if len(ours) > 1:
            joined[theirs] = tuple(ours)
            continue
        weight = weights[bound.ours[0]]
        made = bound.rule.to_theirs([weight], config)[0]
        if made.ndim == 2 and (_same_memory(made, weight) or _same_memory(made.T, weight)):
            names[ours[0]] = theirs
    return names, joined


def _task(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return None
    architecture = find_family(config.family, "family").architecture
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)


def _whole(number: float) -> float:
    """16 rather than 16.0: some readers want an integer."""
    return int(number) if number == int(number) else number


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and (a.is_meta or a.data_ptr() == b.data_ptr())


def _shortest_targets(chosen: set[str], all_names: set[str]) -> list[str]:
    """`target_modules`: the last parts of the names where those mean no other layer, else whole names."""
    leaves = {name.split(".")[-1] for name in chosen}
    exact = chosen == {name for name in all_names if name.split(".")[-1] in leaves}
    return sorted(leaves if exact else chosen)
