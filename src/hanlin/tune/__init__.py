"""How a base model gains a few trainable weights: each method is a function over a model."""

from hanlin.tune.lora import LoraAdapter, LoraSettings, add_lora, without_adapter
from hanlin.tune.peft_files import load_lora, save_lora

__all__ = ["LoraAdapter", "LoraSettings", "add_lora", "load_lora", "save_lora", "without_adapter"]
