"""What the cut of a model promises beside equal logits, in 2 and 6 processes; and what is refused, by name."""

from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as multiprocessing
from tests.parallel.tiny import ATTENTION, CHECKS, FOLDER, check, config, drawn

from hanlin.core.errors import HanlinError
from hanlin.models.config import AttentionConfig, LatentAttentionConfig, RelativeAttentionConfig
from hanlin.parallel import local_config, shard

pytestmark = pytest.mark.xdist_group("processes")  # its processes share the cores

RANKS = {2: [*CHECKS], 6: ["weights_come_back", "gradients_come_back"]}


@pytest.mark.parametrize("ranks", RANKS)
def test_so_many_ranks_keep_every_promise(tmp_path, ranks):
    """67 tokens of vocabulary are shared unequally by all; at 6 ranks three share a key head and its gradient."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hanlin.parallel"])
    processes = [
        context.Process(target=check, args=(rank, ranks, str(tmp_path), RANKS[ranks])) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    errors = [(tmp_path / f"errors-{rank}").read_text(encoding="utf-8") for rank in range(ranks)]
    assert errors == [""] * ranks, errors[0]


def attentions(made):
    return [layer.attention for layer in made.layers]


def test_a_cache_is_made_for_the_ranks_own_heads():
    made = config(replace(ATTENTION, heads=8, kv_heads=4))
    assert local_config(made, 1) == made
    assert [a.kv_shape for a in attentions(local_config(made, 2))] == [(2, 8, 8)] * 2
    assert [a.kv_shape for a in attentions(local_config(made, 4))] == [(1, 8, 8)] * 2
    latent = LatentAttentionConfig(heads=4, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)
    assert [a.kv_shape for a in attentions(local_config(config(latent), 2))] == [(1, 20, 0)] * 2
    assert local_config(made, 2).vocab_size == made.vocab_size


@pytest.mark.parametrize(
    ("attention", "ranks", "message"),
    [
        (AttentionConfig(6, 2, 8), 4, "Layer 0: 6 heads cannot be shared equally by 4 ranks; they can by 2, 3, 6"),
        (AttentionConfig(6, 2, 8), 3, "Layer 0: 2 key/value heads .* by 3 ranks"),
        (AttentionConfig(8, 8, 8), 8, "Layer 0: 36 hidden units .* by 8 ranks"),
        (AttentionConfig(70, 70, 2), 70, "vocabulary of 67 tokens .* 70 ranks"),
        (RelativeAttentionConfig(4, 8), 2, "Layer 0: .* RelativeAttention"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(attention, ranks, message):
    with pytest.raises(HanlinError, match=message):
        local_config(config(attention), ranks)


def test_without_a_process_group_the_cut_is_refused():
    with pytest.raises(HanlinError, match="torchrun"):
        shard(drawn(FOLDER, torch.float32))
