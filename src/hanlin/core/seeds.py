"""Seeds: every source of chance is named, so that a run can be repeated whatever the rank.

`derive(seed, *path)` gives an independent 63-bit seed for a purpose ("shuffle", epoch 3): a hash, so that neighbouring
seeds share nothing and no draw depends on the order in which the others were made.
"""

import hashlib
import random


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed for one purpose. The same arguments give the same seed on every machine and Python."""
    text = "/".join([str(seed), *map(str, path)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (each with its own derived seed)."""
    import numpy as np
    import torch

    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))
