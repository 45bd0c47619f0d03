"""What each process of `test_communication` does: a step out of the trainer's own parts under the tracer."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, LatentAttentionConfig, ModelConfig
from hanlin.models.transformer import Transformer
from hanlin.nn.losses import count_targets
from hanlin.nn.routing import RouterConfig
from hanlin.parallel.settings import Layout
from hanlin.parallel.tracer import Tracer
from hanlin.train.balance import Balance
from hanlin.train.choices import AdamW, Recompute
from hanlin.train.cluster import Cluster
from hanlin.train.gradient import Gradient
from hanlin.train.objective import CausalLM
from hanlin.train.optim import build_optimizer, clip_gradients
from hanlin.train.prefetch import prepare_step
from hanlin.train.recompute import recompute_layers

VOCABULARY, LENGTH, ROWS = 61, 16, 8


def config_of(name: str) -> ModelConfig:
    """Small models whose numbers share no divisor with the ranks, so that padding shows."""
    attention: Any = AttentionConfig(heads=4, kv_heads=2, head_dim=8)
    feed_forward: Any = FeedForwardConfig(36)
    rest: dict[str, Any] = {"tied_embeddings": True} if name == "tied" else {}
    if name == "norms":
        attention = replace(attention, qk_norm=True, qkv_bias=True, output_bias=True, kv_heads=1)
        feed_forward = FeedForwardConfig(36, bias=True)
    if name == "experts":
        feed_forward = ExpertsConfig(4, 12, RouterConfig(2), shared_hidden=8, shared_gate=True)
    if name == "latent":
        attention = LatentAttentionConfig(heads=4, kv_rank=10, nope_dim=8, rope_dim=4, value_dim=8, q_rank=12)
    return ModelConfig.uniform(
        "qwen3", depth=5, attention=attention, feed_forward=feed_forward, vocab_size=VOCABULARY, width=30, **rest
    )


class Rows:
    """Rows of random tokens: two documents in each."""

    rows_per_step, steps_per_epoch = ROWS, 0

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        count = (ROWS if stop is None else stop) - start
        ids = torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(step + start))
        documents = (torch.arange(LENGTH) * 2 // LENGTH).expand(count, -1).contiguous()
        return Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "rows"}


def one_step(rank: int, world: int, folder: str, cases: list[dict[str, Any]]) -> None:
    """A step of each case; writes what this rank sent, a list in the order of the cases."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = []
    for case in cases:
        torch.manual_seed(0)
        found.append(traced(**case))
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def traced(model: str, layout: dict[str, Any], micro: int | None, recompute: bool) -> dict[str, Any]:
    """The second of two optimizer steps as the `Trainer` makes them (everything is warm), and where this rank is."""
    device = torch.device("cpu")
    cluster = Cluster(Layout.model_validate(layout), device)
    net = Transformer(config_of(model)).train()
    cluster.lay(net)
    recompute_layers(net, Recompute(kind="full" if recompute else "none"))
    cluster.replicate(net)
    balance = Balance(net, None, group=cluster.mesh.group("replicas"))
    gradient = Gradient(net, CausalLM(), cluster, balance)
    optimizer = build_optimizer(net, AdamW(), 1e-3, dtype=None, pieces=cluster.pieces)
    for _ in range(2):
        work = prepare_step(0, Rows(), gradient.count, cluster.share, micro)
        with Tracer() as tracer:
            names = sorted(work.denominators)
            sums = cluster.sum_rows([*(work.denominators[n] for n in names), work.tokens, 0.0])
            gradient(work, dict(zip(names, sums, strict=False)))
            norm = float(cluster.gradient_norm())
            balance.finish()
            clip_gradients(cluster.pieces.values(), norm, 1.0)
            optimizer.step(1.0)
            cluster.publish()
    parts = [part if cluster.context is None else cluster.context.cut(part) for part in work.parts]
    for replication in cluster.replications:
        replication.close()
    return {
        "bytes": tracer.bytes(),
        "calls": [[call.op, call.payload, call.size] for call in tracer.calls],
        "trained": sum(int(count_targets(part.targets)) for part in parts),
        "micro_batches": len(parts),
        "rows": len(work.parts[0].ids),
        "pipeline": cluster.mesh.index("pipeline"),
        "tensor": cluster.mesh.index("tensor"),
    }
