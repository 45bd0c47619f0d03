"""A tiny model with everything that is cut in a special way, and what each process of `test_tensor_ways` checks."""

import os
import traceback
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hanlin.core.errors import HanlinError
from hanlin.models import Transformer, load_model, save_model
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, ModelConfig
from hanlin.nn.frozen import freeze
from hanlin.nn.losses import IGNORE
from hanlin.nn.routing import RouterConfig
from hanlin.parallel import gather, load_sharded, shard, shard_logits, vocabulary_parallel_cross_entropy

ATTENTION = AttentionConfig(6, 2, 8, qkv_bias=True, output_bias=True, qk_norm=True)
VOCABULARY = 67  # shared equally by no number of ranks


def config(attention: AttentionConfig = ATTENTION, *, tied: bool = True, experts: bool = True) -> ModelConfig:
    dense = LayerConfig(attention, FeedForwardConfig(36, bias=True))
    routed = ExpertsConfig(4, 24, RouterConfig(2), bias=True, shared_hidden=12, shared_gate=True)
    layers = (dense, LayerConfig(attention, routed)) if experts else (dense, dense)
    return ModelConfig("qwen3", VOCABULARY, 32, layers, tied_embeddings=tied)


def drawn(made: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model whose every parameter is random, the same in every process."""
    torch.manual_seed(3)
    model = Transformer(made).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, dtype=torch.float64).to(dtype) * 0.2)
    return model


def numbers(rows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))


def weights_come_back(rank: int, ranks: int, folder: Path) -> None:
    whole = drawn(config(), torch.float64)
    cut = shard(deepcopy(whole))
    found, wanted = gather(cut), dict(whole.named_parameters())
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    storage = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in cut.parameters()}
    assert sum(storage.values()) == sum(p.nbytes for p in cut.parameters())  # nothing of the whole is held


def gradients_come_back(rank: int, ranks: int, folder: Path) -> None:
    """Of the vocabulary-parallel loss with some targets left out; key heads fewer than ranks at 6 ranks."""
    whole = drawn(config(), torch.float64)
    cut, ids = shard(deepcopy(whole)), numbers()
    targets = ids.roll(-1, 1).masked_fill(ids % 5 == 0, IGNORE)
    assert (targets == IGNORE).any()
    hidden = cut(ids, logits=None).hidden
    loss = vocabulary_parallel_cross_entropy(shard_logits(cut, hidden), targets, VOCABULARY)
    loss.backward()
    logits = whole(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    assert (loss - expected).abs() <= 1e-12 * expected
    found = gather(cut, of=lambda p: p.grad)
    for name, parameter in whole.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-11 * parameter.grad.norm() + 1e-13, name


def frozen_equals_whole(rank: int, ranks: int, folder: Path) -> None:
    """fp32 within 1e-5, from a folder; experts have no place in a frozen model's kernels and stay plain."""
    made = config(experts=False)
    whole = drawn(made, torch.float32)
    expected, ids = whole(numbers()).logits, numbers()
    if not rank:
        save_model(drawn(FOLDER, torch.float32), folder / "model")
    dist.barrier()
    loaded = load_sharded(folder / "model", dtype=torch.float32)
    from_folder = load_model(folder / "model", dtype=torch.float32)
    cut = shard(deepcopy(whole))
    with torch.no_grad():
        for model, logits in ((cut, expected), (loaded, from_folder(ids).logits)):
            assert (model(ids).logits - logits).abs().max() <= 1e-5
            assert freeze(model)
            assert (model(ids).logits - logits).abs().max() <= 1e-5
    with pytest.raises(HanlinError, match="cut"):
        shard(loaded)


def saving_is_refused(rank: int, ranks: int, folder: Path) -> None:
    with pytest.raises(HanlinError, match=f"part {rank} of .* {ranks} ranks"):
        save_model(shard(drawn(FOLDER, torch.float32)), folder / f"part-{rank}")
    assert not (folder / f"part-{rank}").exists()


def is_refused(rank: int, ranks: int, folder: Path) -> None:
    whole = drawn(config(experts=False), torch.float32)
    freeze(whole)
    with pytest.raises(HanlinError, match="frozen"):
        shard(whole)
    whole = drawn(config(), torch.float32)
    whole.model.layers[0].self_attn.q_proj.branch = torch.zeros_like
    with pytest.raises(HanlinError, match="adapter"):
        shard(whole)


FOLDER = ModelConfig.uniform(
    "qwen3",
    depth=2,
    attention=AttentionConfig(6, 2, 8, qk_norm=True),
    feed_forward=FeedForwardConfig(36),
    vocab_size=VOCABULARY,
    width=32,
)
CHECKS = {f.__name__: f for f in (weights_come_back, gradients_come_back, frozen_equals_whole, saving_is_refused,
                                  is_refused)}  # fmt: skip


def check(rank: int, ranks: int, folder: str, names: list[str]) -> None:
    """Run the named checks in one of `ranks` processes; what failed is written to `folder`/errors-rank."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    failed = []
    for name in names:
        meeting = f"file://{folder}/meeting-{name}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
        try:
            CHECKS[name](rank, ranks, Path(folder))
        except Exception:
            failed.append(traceback.format_exc())
        dist.destroy_process_group()
    Path(folder, f"errors-{rank}").write_text("\n".join(failed), encoding="utf-8")
