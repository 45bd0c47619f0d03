"""Training: Hanlin's `Trainer` against a plain transformers + AdamW loop, on two cores, tokens per second.

Same shapes, same random batch, same AdamW (fused), clipping at 1, next-token loss over every token. transformers is
taken at its best of {eager, compiled} x {fp32, bf16 autocast}; Hanlin eager in both, and compiled. Every run is a
process of its own and the sides take turns; the machine's GEMM peak is measured in each process after its run.

FLOPs a token = 6 * matmul parameters (head once) + 12 * layers * width * length (`ModelConfig.flops_per_token`).

What the profiles taught, in order of gain (10.5M parameters, bf16):
- Page faults. glibc gives freed activations back to the kernel and asks for them again every step; keeping them in the
  heap (`core.device.tune_allocator`) alone takes a plain transformers loop from about 3,800 to 6,000 tokens/s.
- Passes over memory. On a CPU with matrix units (AMX) the products were 150 ms of a step of 480 ms; the rest were
  SwiGLU, norms, turns and the loss, each a chain of torch operations that visit the same numbers again. One pass each
  in C++ (`kernels.training`, `kernels.cross_entropy`), on torch's own OpenMP threads: 335 ms. The chunk of the loss
  made eight visits (widen, max, subtract, exp, sum, divide, scatter, narrow) where now a row stays in the cache.
- Attention. SDPA's CPU kernel took a third of the step; batched products over blocks of 128 queries are 3x faster
  (`nn.block_attention`). Products, softmax and slopes that meet in the cache, and heads that stay where the projection
  put them (`kernels.train_attention`), are another 2x: 285 ms, of which the products are half.
- The loss. Logits in chunks that stay in the cache, their gradient in the same visit
  (`nn.losses.linear_cross_entropy`).
- One product for q, k, v and one for gate, up; norms, SwiGLU and RoPE with hand-written backwards.
What did not pay: threads of our own for these passes. torch's spin for the next operation on the same cores, and a
thread that has to take a core from another waits for milliseconds. Compiling is behind eager: the compiler fuses what
it sees, but not through the softmax and the loss.

    python benchmarks/bench_train.py [--runs 5] [--size 10m 100m] [--quick]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

SIZES = {  # width, layers, vocabulary, length, hidden, heads, tied, batch
    "10m": (256, 6, 8192, 256, 1024, 8, False, 16),
    "100m": (768, 12, 16384, 512, 2048, 12, True, 4),
}
SIDES = {
    "transformers fp32": ("transformers", "fp32", "eager"),
    "transformers fp32 compiled": ("transformers", "fp32", "compiled"),
    "transformers bf16": ("transformers", "bf16", "eager"),
    "transformers bf16 compiled": ("transformers", "bf16", "compiled"),
    "hanlin fp32": ("hanlin", "fp32", "eager"),
    "hanlin bf16": ("hanlin", "bf16", "eager"),
    "hanlin bf16 compiled": ("hanlin", "bf16", "compiled"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--quick", action="store_true", help="one run, eager bf16 only")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # library dtype mode size: one side, in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, steps=options.steps)))
        return
    import harness

    rows, raw = [], {}
    for size in options.size:
        wanted = {n: s for n, s in SIDES.items() if not options.quick or s[1:] == ("bf16", "eager")}
        commands = {
            name: [sys.executable, __file__, "--steps", str(options.steps), "--one", *side, size]
            for name, side in wanted.items()
        }
        compiled = [name for name, side in wanted.items() if side[2] == "compiled"]
        results = harness.interleave(commands, runs=1 if options.quick else options.runs, retries=2, once=compiled)
        raw[size] = results
        speeds = {name: harness.median(r) for name, r in results.items()}
        rival = max(v for n, v in speeds.items() if n.startswith("transformers"))
        for name, runs in results.items():
            peak = statistics.median(r["calibration"][f"gemm_{r['dtype']}"] for r in runs)
            rows.append({
                "parameters": f"{runs[0]['parameters'] / 1e6:.1f}M",
                "batch": runs[0]["batch"],
                "side": name,
                "tokens/s": f"{speeds[name]:,.0f}",
                "spread": harness.spread(runs),
                "of GEMM peak": f"{speeds[name] * runs[0]['flops_per_token'] / 1e9 / peak:.0%}",
                "ratio to transformers' best": f"{speeds[name] / rival:.2f}",
            })  # fmt: skip
    harness.write_results("train", rows, raw)


def run_one(library: str, dtype: str, mode: str, size: str, *, steps: int) -> dict:
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    _, _, vocabulary, length, _, _, _, batch = SIZES[size]
    ids = torch.randint(0, vocabulary, (batch, length))
    seconds_of = transformers_seconds if library == "transformers" else hanlin_seconds
    seconds, parameters = seconds_of(size, dtype, mode, ids, steps)
    sys.path.insert(0, str(Path(__file__).parent))
    from harness import calibrate

    return {
        "value": batch * length / seconds,
        "dtype": dtype,
        "parameters": parameters,
        "batch": f"{batch}×{length}",
        "flops_per_token": model_config(size).flops_per_token(length),
        "calibration": calibrate(),
    }


def transformers_seconds(size: str, dtype: str, mode: str, ids, steps: int) -> tuple[float, int]:
    """The plain loop: (median seconds of a step, parameters)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, vocabulary, length, hidden, heads, tied, _ = SIZES[size]
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary, intermediate_size=hidden,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length,
        tie_word_embeddings=tied, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3 if mode == "compiled" else 2):
        step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times), sum(p.numel() for p in model.parameters())


def hanlin_seconds(size: str, dtype: str, mode: str, ids, steps: int) -> tuple[float, int]:
    """The real Trainer's step, batch preparation included, fed with the same fixed batch."""
    import torch

    from hanlin.data.batch import Batch, document_positions, next_token_targets
    from hanlin.models import Transformer
    from hanlin.train import CausalLM, Trainer, TrainSettings

    class Fixed:
        rows_per_step, steps_per_epoch = len(ids), 0

        def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
            documents = torch.zeros_like(ids)
            whole = Batch(ids, next_token_targets(ids, documents), document_positions(documents), documents)
            return whole.rows(start, len(ids) if stop is None else stop)

        def fingerprint(self) -> dict:
            return {}

    config = model_config(size)
    model = Transformer(config)
    settings = TrainSettings(
        steps=1_000_000, batch_size=len(ids), lr=3e-4, precision=dtype, compile=mode == "compiled"
    )  # fmt: skip
    trainer = Trainer(model, CausalLM(), Fixed(), settings)
    if mode == "compiled":
        trainer.time_steps(2)
    return trainer.time_steps(steps), model.parameter_count()


def model_config(size: str):
    from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig

    width, layers, vocabulary, length, hidden, heads, tied, _ = SIZES[size]
    return ModelConfig.uniform(
        "llama", depth=layers, attention=AttentionConfig(heads, heads, width // heads),
        feed_forward=FeedForwardConfig(hidden), vocab_size=vocabulary, width=width, max_positions=length,
        tied_embeddings=tied,
    )  # fmt: skip


if __name__ == "__main__":
    main()
