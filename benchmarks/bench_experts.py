"""Mixture of experts: the forward and backward pass of one block, Hanlin against transformers, on two cores.

Same shape, same spread of weights, same random tokens and gradient; `.grad` is dropped after each step, as in training.
transformers is `Qwen3MoeSparseMoeBlock` (softmax, top-k, renormalised, SwiGLU) at those `experts_implementation`s that
can run here: `eager` (first turn only: it makes a gradient of all experts for each expert) and `grouped_mm`;
`batched_mm` copies the weights for each (token, choice): tens of GB at these shapes. bf16 is weights and activations in
bf16. Every run is a process of its own and the sides take turns.

Each library runs as its training loop runs it: Hanlin's `Trainer` keeps freed memory in the heap
(`core.device.tune_allocator`), a transformers loop does not. Most of the gain is that, and it would help any library:
the sides "tuned" (transformers with our allocator settings) and "untuned" (Hanlin without) show what the block does.

FLOPs = 3 (forward, two backward) * 2 * tokens * top_k * 3 * width * hidden. Peak: memory over weights and gradients.

What the profiles taught (64 experts, top-8, 1024 x 512, 512 tokens):
- Page faults are the largest single cost after the products: the gradients of the weights are 400 MB of fresh pages a
  step, which doubles the time of the products that write them (fp32 51 -> 90 ms, bf16 16 -> 51 ms). Huge pages (THP)
  halve that, the allocator's setting removes it.
- Gather and sum. A token's k rows are added up by an embedding bag: 0.3-0.6 ms where `y[inverse].view(...).sum(1)`
  takes 1.7-2.2; `index_select` is three times as fast as `x[index]`.
- The routing weight scales the incoming gradient (n, width), and its own gradient is a row-wise dot with the stored
  output; scaling activations instead costs passes over (n, hidden), which is the wider one in Mixtral.
- The activation and the sorted rows are made again in the backward pass: two cheap passes.
- What is left is 90 % products with 64 rows for each weight matrix, at 60 % (fp32) and 25 % (bf16) of the peak, inside
  MKL and oneDNN, and transformers makes the same ones.
What did not pay: groups padded to multiples of 16 or 32 rows; one batched product over groups padded to the fullest
(fp32 slower; bf16 equal at 37 % more rows, and worse with imbalance); operands swapped (bf16 forward a quarter faster,
but its output lies transposed); huge pages on top of the allocator's setting. One expert a thread would give 4-12 %.

    python benchmarks/bench_experts.py [--runs 3] [--shape 8 64 64-wide] [--dtype fp32 bf16] [--quick]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

SHAPES = {  # experts, top_k, tokens, width, hidden
    "8": (8, 2, 1024, 1024, 3584),  # Mixtral's, each width a quarter
    "64": (64, 8, 512, 1024, 512),
    "64-wide": (64, 8, 512, 2048, 768),  # Qwen3-30B-A3B's experts, half as many
}
SIDES = {  # library, experts_implementation, allocator
    "transformers eager": ("transformers", "eager", "plain"),
    "transformers grouped_mm": ("transformers", "grouped_mm", "plain"),
    "transformers grouped_mm, tuned": ("transformers", "grouped_mm", "tuned"),
    "hanlin, untuned": ("hanlin", "-", "plain"),
    "hanlin": ("hanlin", "-", "tuned"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", nargs="*", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=7, help="timed steps of a run")
    parser.add_argument("--quick", action="store_true", help="one run, without eager")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # library implementation allocator shape dtype
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, steps=options.steps)))
        return
    import harness

    rows, raw = [], {}
    for shape in options.shape:
        for dtype in options.dtype:
            wanted = {n: s for n, s in SIDES.items() if not (options.quick and s[1] == "eager")}
            commands = {
                name: [sys.executable, __file__, "--steps", str(options.steps), "--one", *side, shape, dtype]
                for name, side in wanted.items()
            }
            results = harness.interleave(
                commands, runs=1 if options.quick else options.runs, retries=2, calibration=f"gemm_{dtype}",
                once=[name for name, side in wanted.items() if side[1] == "eager"],
            )  # fmt: skip
            raw[f"{shape} {dtype}"] = results
            rows += table_rows(shape, dtype, results)
    harness.write_results("experts", rows, raw)


def table_rows(shape: str, dtype: str, results: dict) -> list[dict]:
    import harness

    experts, top_k, tokens, width, hidden = SHAPES[shape]
    flops = 18 * tokens * top_k * width * hidden
    times = {name: harness.median(runs) for name, runs in results.items()}
    rival = min(t for name, t in times.items() if SIDES[name][0] == "transformers" and SIDES[name][2] == "plain")
    tuned = times["transformers grouped_mm, tuned"]
    rows = []
    for name, runs in results.items():
        peak = statistics.median(r["calibration"][f"gemm_{dtype}"] for r in runs)
        rows.append({
            "shape": f"{experts} experts, top-{top_k}, {width}×{hidden}, {tokens} tokens",
            "dtype": dtype,
            "side": name,
            "forward + backward, ms": f"{times[name]:,.0f}",
            "spread": harness.spread(runs),
            "forward, ms": f"{harness.median(runs, 'forward'):,.0f}",
            "of GEMM peak": f"{flops / times[name] / 1e6 / peak:.0%}",
            "peak, MB": f"{harness.median(runs, 'peak_mb'):,.0f}",
            "× transformers' best": f"{rival / times[name]:.2f}",
            "× it tuned": f"{tuned / times[name]:.2f}",
        })  # fmt: skip
    return rows


def run_one(library: str, implementation: str, allocator: str, shape: str, dtype: str, *, steps: int) -> dict:
    import torch

    from hanlin.core.device import peak_memory_bytes, tune_allocator

    if allocator == "tuned":
        tune_allocator()
    torch.set_num_threads(2)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    block = build(library, implementation, shape, kind)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.02)
    _, _, tokens, width, _ = SHAPES[shape]
    x = torch.randn(1, tokens, width, dtype=kind).requires_grad_()
    direction = torch.randn(1, tokens, width, dtype=kind)
    held = 2 * sum(p.numel() * p.element_size() for p in block.parameters())
    before = peak_memory_bytes() - held // 2

    def step() -> tuple[float, float]:
        """Milliseconds of the forward pass and of both."""
        start = time.perf_counter()
        y = block(x)
        middle = time.perf_counter()
        y.backward(direction)
        stop = time.perf_counter()
        block.zero_grad(set_to_none=True)
        x.grad = None
        return (middle - start) * 1e3, (stop - start) * 1e3

    steps = 1 if implementation == "eager" else steps
    for _ in range(1 if implementation == "eager" else 2):
        step()
    times = [step() for _ in range(steps)]
    peak = peak_memory_bytes() - before - held
    sys.path.insert(0, str(Path(__file__).parent))
    from harness import calibrate

    return {
        "value": statistics.median(both for _, both in times),
        "forward": statistics.median(forward for forward, _ in times),
        "peak_mb": peak / 1e6,
        "calibration": calibrate(),
    }


def build(library: str, implementation: str, shape: str, dtype):
    """The block, its weights yet to be drawn."""
    experts, top_k, _, width, hidden = SHAPES[shape]
    if library == "hanlin":
        from hanlin.nn.experts import MixtureOfExperts
        from hanlin.nn.routing import RouterConfig

        return build_in(dtype, lambda: MixtureOfExperts(width, hidden, experts, RouterConfig(top_k)))
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=hidden, num_experts=experts, num_experts_per_tok=top_k,
        norm_topk_prob=True, vocab_size=8, num_hidden_layers=1,
    )  # fmt: skip
    config._experts_implementation = implementation
    return build_in(dtype, lambda: Qwen3MoeSparseMoeBlock(config))


def build_in(dtype, make):
    """make() with parameters of this dtype from the start: a cast would leave its traces in the peak."""
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(default)


if __name__ == "__main__":
    main()
