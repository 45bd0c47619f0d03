"""How a model is laid over several processes. One file a parallelism."""

from hanlin.parallel.expert import expert_cut, expert_parameters, gather_experts, split_experts
from hanlin.parallel.tensor import (
    copies,
    cut_of,
    cut_tensor,
    gather,
    join_tensors,
    load_sharded,
    local_config,
    replicated,
    shard,
)
from hanlin.parallel.vocabulary import (
    shard_logits,
    vocabulary_parallel_cross_entropy,
    vocabulary_parallel_loss,
    vocabulary_parallel_token_sums,
)

__all__ = [
    "copies",
    "cut_of",
    "cut_tensor",
    "expert_cut",
    "expert_parameters",
    "gather",
    "gather_experts",
    "join_tensors",
    "load_sharded",
    "local_config",
    "replicated",
    "shard",
    "shard_logits",
    "split_experts",
    "vocabulary_parallel_cross_entropy",
    "vocabulary_parallel_loss",
    "vocabulary_parallel_token_sums",
]
