"""Text to ids: byte-level BPE training, the `Tokenizer`, chat templates."""

from hanlin.tokens.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
