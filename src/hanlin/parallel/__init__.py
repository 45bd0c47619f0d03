"""How a model is laid over several processes. One file a parallelism."""

from hanlin.parallel.tensor import gather, load_sharded, local_config, shard
from hanlin.parallel.vocabulary import shard_logits, vocabulary_parallel_cross_entropy

__all__ = [
    "gather",
    "load_sharded",
    "local_config",
    "shard",
    "shard_logits",
    "vocabulary_parallel_cross_entropy",
]
