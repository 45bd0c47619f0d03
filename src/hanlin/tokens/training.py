"""Byte-level BPE (arXiv:1508.07909 over the 256 bytes, GPT-2): the most frequent neighbouring pair becomes a token,
again and again, until the vocabulary is full. Every byte is a token of its own, so nothing is ever unknown.
"""

from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, processors, trainers

from hanlin.core.errors import HanlinError
from hanlin.core.progress import Progress
from hanlin.tokens import cuts

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(4))  # for later methods: no resizing of a trained model
SPECIAL = (END_OF_TEXT, IM_START, IM_END, PAD, *RESERVED)

# The chat template writes these in every turn, texts hold them rarely: left alone, "assistant" costs 3 tokens a turn.
ROLES = "system\nuser\nassistant\n"
ROLES_EVERY = 10_000  # characters of text for which each role is counted once


def train_bpe(
    texts: Iterable[str], *, vocab_size: int, special: Sequence[str] = (), quiet: bool = True
) -> tokenizers.Tokenizer:
    """Byte-level BPE with `vocab_size` ids: `SPECIAL`, then `special`, the 256 bytes, and merges.

    Deterministic: the same texts in any order give the same tokenizer. A small corpus may run out of pairs that stand
    twice; then the vocabulary is smaller. Raises `HanlinError` for a vocabulary without room for merges, a special
    token given twice or empty, and texts that hold nothing.
    """
    names = [*SPECIAL, *special]
    if len(set(names)) != len(names) or not all(names):
        raise HanlinError(f"Special tokens must be different and not empty; found {', '.join(map(repr, names))}.")
    least = 256 + len(names)
    if vocab_size < least:
        raise HanlinError(
            f"A vocabulary of {vocab_size} is too small: the 256 bytes and {len(names)} special tokens take {least} "
            f"ids, and every merge one more. Ask for more than {least}; 4,096 is usual for a small model."
        )
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = cuts.training()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=sorted(cuts.ByteLevel.alphabet()),
        min_frequency=2,
        max_token_length=cuts.LONGEST_TOKEN,
        show_progress=False,
    )
    with Progress("count words", unit="MB", quiet=quiet) as bar:
        counted = _Counted(texts, bar)
        engine.train_from_iterator(counted, trainer)
    if not counted.characters:
        raise HanlinError("There is no text to train a tokenizer on: every source is empty. Give files with text.")
    engine.pre_tokenizer = cuts.reading()
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return engine


class _Counted:
    """Texts passing by, counted for the bar. An error of the source leaves through it unchanged."""

    def __init__(self, texts: Iterable[str], bar: Progress) -> None:
        self.texts, self.bar = texts, bar
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.characters += len(text)
            self.bar.advance(len(text.encode("utf-8", errors="surrogatepass")) / 1e6)
            yield text
        if self.characters:
            yield ROLES * max(100, self.characters // ROLES_EVERY)
