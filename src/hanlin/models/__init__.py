"""One `Transformer` built from a `ModelConfig`; one short file a family; folders in the Hugging Face layout."""

from hanlin.models.config import AttentionConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.models.folder import load_config, load_model, save_model, stored_dtype
from hanlin.models.transformer import Output, Transformer

__all__ = [
    "AttentionConfig",
    "FeedForwardConfig",
    "LayerConfig",
    "ModelConfig",
    "Output",
    "Transformer",
    "load_config",
    "load_model",
    "save_model",
    "stored_dtype",
]
