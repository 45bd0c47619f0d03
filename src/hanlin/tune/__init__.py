"""How a base model gains a few trainable weights: each method is a function over a model."""

from hanlin.tune.branch import LoraSettings
from hanlin.tune.lora import LoraAdapter, adapter_of, add_lora, without_adapter
from hanlin.tune.peft_files import load_lora, merge_lora, save_adapter, save_lora

__all__ = [
    "LoraAdapter", "LoraSettings", "adapter_of", "add_lora", "load_lora", "merge_lora", "save_adapter", "save_lora",
    "without_adapter",
]  # fmt: skip
