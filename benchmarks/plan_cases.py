"""The models and steps that `bench_plan.py` predicts and measures: every kind of model and of step that a plan knows.

Memory: each peak is at least half a gigabyte. Time: small enough to be measured in a second or two a step.
"""

from dataclasses import replace

from hanlin.models.config import (
    AttentionConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    HeadConfig,
    LatentAttentionConfig,
    ModelConfig,
    NormConfig,
)
from hanlin.nn.routing import RouterConfig
from hanlin.plan.work import Lora, Work
from hanlin.train.choices import SGD, Adafactor, AdamW, Muon, Recompute
from hanlin.tune.lora import LoraSettings

Case = tuple[ModelConfig, Work]
FULL, OPERATORS, SECOND = Recompute(kind="full"), Recompute(kind="operators"), Recompute(kind="layers", every=2)


def llama(width: int, depth: int, vocabulary: int, hidden: int, *, heads: int = 12, kv: int = 4, **rest) -> ModelConfig:
    attention = {"heads": heads, "kv_heads": kv, "head_dim": width // heads, **rest.pop("attention", {})}
    return ModelConfig.uniform(
        "llama", depth=depth, attention=AttentionConfig(**attention), feed_forward=FeedForwardConfig(hidden),
        vocab_size=vocabulary, width=width, max_positions=8192, **rest,
    )  # fmt: skip


def experts(depth: int, count: int, hidden: int, chosen: int, *, shared: int = 0) -> ModelConfig:
    return ModelConfig.uniform(
        "qwen3_moe", depth=depth, attention=AttentionConfig(8, 4, 64, qk_norm=True), vocab_size=8192, width=512,
        feed_forward=ExpertsConfig(count, hidden, RouterConfig(chosen), shared_hidden=shared),
    )  # fmt: skip


BASE, LARGE, DEEP = llama(768, 4, 16384, 2048), llama(1024, 8, 16384, 2816, heads=16, kv=8), llama(384, 24, 8192, 1024)
TIED = replace(BASE, tied_embeddings=True)
WIDE_VOCABULARY = llama(512, 4, 32000, 1376, heads=8, tied_embeddings=True)
SLIDING = llama(768, 4, 16384, 2048, attention={"window": 512})
LATENT = ModelConfig.uniform(
    "deepseek_v3", depth=4, vocab_size=8192, width=512, attention=LatentAttentionConfig(8, 128, 64, 32, 64, q_rank=192),
    feed_forward=ExpertsConfig(16, 512, RouterConfig(4, kind="sigmoid", correction=True), shared_hidden=512),
)  # fmt: skip
AHEAD = replace(LATENT, predict_ahead=1)
GPT2 = ModelConfig.uniform(
    "gpt2", depth=6, attention=AttentionConfig(12, 12, 64, qkv_bias=True, output_bias=True, position=None),
    feed_forward=FeedForwardConfig(3072, bias=True, activation="gelu_new", gated=False), norm=NormConfig("layer"),
    embedding=EmbeddingConfig(positions="learned"), vocab_size=16384, width=768, tied_embeddings=True,
)  # fmt: skip
GEMMA = ModelConfig.uniform(
    "gemma2", depth=4, attention=AttentionConfig(8, 4, 64, softcap=50.0), norm=NormConfig(unit_offset=True),
    feed_forward=FeedForwardConfig(2048, activation="gelu_pytorch_tanh"), head=HeadConfig(softcap=30.0),
    vocab_size=16384, width=512, tied_embeddings=True,
)  # fmt: skip
MIXTURE, SHARED_MIXTURE = experts(4, 16, 512, 2), experts(3, 16, 512, 4, shared=512)

MEMORY: dict[str, Case] = {
    "base": (BASE, Work(4, 512, precision="fp32")),
    "base, bf16": (BASE, Work(4, 512)),
    "tied": (TIED, Work(4, 512)),
    "wide vocabulary, tied": (WIDE_VOCABULARY, Work(4, 512, precision="fp32")),
    "deep": (DEEP, Work(4, 512)),
    "4 micro-batches": (BASE, Work(2, 512, 4)),
    "8 micro-batches": (BASE, Work(2, 256, 8, precision="fp32")),
    "recompute": (DEEP, Work(4, 1024, recompute=FULL)),
    "recompute, fp32": (BASE, Work(4, 1024, precision="fp32", recompute=FULL)),
    "recompute every 2nd": (DEEP, Work(4, 512, precision="fp32", recompute=SECOND)),
    "recompute operators": (DEEP, Work(4, 512, recompute=OPERATORS)),
    "recompute, 2 micro-batches": (DEEP, Work(4, 512, 2, precision="fp32", recompute=FULL)),
    "LoRA": (LARGE, Work(2, 512, precision="fp32", lora=Lora())),
    "LoRA, bf16": (LARGE, Work(4, 512, lora=Lora(LoraSettings(16), "all"))),
    "LoRA, weights bf16": (LARGE, Work(4, 512, lora=Lora(LoraSettings(16, dropout=0.1), "all", "bf16"))),
    "LoRA, recompute, 2 micro-batches": (LARGE, Work(4, 512, 2, lora=Lora(), recompute=FULL)),
    "4k tokens": (BASE, Work(1, 4096)),
    "8k tokens": (llama(512, 4, 8192, 1376, heads=8), Work(1, 8192)),
    "8k tokens, recompute": (BASE, Work(1, 8192, recompute=FULL)),
    "4k tokens, fp32": (llama(512, 3, 8192, 1376, heads=8), Work(1, 4096, precision="fp32")),
    "packed": (BASE, Work(2, 1024, documents=8)),
    "packed, 4k tokens": (llama(512, 4, 8192, 1376, heads=8), Work(1, 4096, documents=6)),
    "sliding window": (SLIDING, Work(2, 2048)),
    "Muon": (BASE, Work(4, 512, optimizer=Muon())),
    "Muon, fp32": (DEEP, Work(2, 512, precision="fp32", optimizer=Muon())),
    "AdamW 8 bits": (BASE, Work(8, 512, optimizer=AdamW(state_bits=8))),
    "Adafactor": (BASE, Work(8, 512, optimizer=Adafactor())),
    "SGD": (BASE, Work(6, 512, optimizer=SGD())),
    "experts": (MIXTURE, Work(4, 512)),
    "experts, fp32": (MIXTURE, Work(2, 512, precision="fp32")),
    "experts, recompute": (MIXTURE, Work(4, 512, 2, recompute=FULL)),
    "experts, shared": (SHARED_MIXTURE, Work(4, 512)),
    "experts, latent attention": (LATENT, Work(2, 512)),
    "two tokens ahead": (AHEAD, Work(2, 512)),
    "GPT-2": (GPT2, Work(2, 512, precision="fp32")),
    "Gemma": (GEMMA, Work(4, 512)),
}  # fmt: skip


def small(width: int, depth: int, vocabulary: int, hidden: int, **rest) -> ModelConfig:
    return llama(width, depth, vocabulary, hidden, heads=width // 64, kv=width // 64, **rest)


TIME: dict[str, Case] = {
    "4 x 256": (small(256, 4, 8192, 1024), Work(8, 256)),
    "4 x 256, fp32": (small(256, 4, 8192, 1024), Work(8, 256, precision="fp32")),
    "16 x 256, fp32": (small(256, 16, 4096, 768), Work(4, 256, precision="fp32")),
    "3 x 768": (small(768, 3, 16384, 2048), Work(4, 256)),
    "2 x 1024": (small(1024, 2, 8192, 2816), Work(2, 512)),
    "wide vocabulary": (small(384, 3, 32000, 1024, tied_embeddings=True), Work(4, 256)),
    "2,048 tokens": (small(384, 3, 8192, 1024), Work(1, 2048)),
    "recompute, fp32": (small(384, 6, 8192, 1024), Work(4, 256, precision="fp32", recompute=FULL)),
    "recompute": (small(512, 6, 8192, 1376), Work(4, 512, recompute=FULL)),
    "8 micro-batches": (small(256, 4, 4096, 768), Work(2, 128, 8)),
    "experts, fp32": (experts(2, 8, 512, 2), Work(4, 256, precision="fp32")),
    "experts": (experts(3, 8, 512, 2), Work(4, 256)),
}
