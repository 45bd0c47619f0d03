"""Generation: Hanlin's `Engine` against `transformers.generate`, greedy, new tokens per second of the whole call.

Random weights of the Qwen3 kind, prompts of 64 tokens, 128 new tokens, one prompt and eight at once. Both sides in fp32
and in bf16, each taken at its better one. Every run is a process of its own and the sides take turns; every repetition
has other prompts, so the prefix cache finds nothing. The limit for one prompt is reading the
weights once a token: "of read bandwidth" is the bytes of the matrices times steps a second over the GB/s that a plain
sum reaches in the same process (it can pass 100 % where the weights fit into the caches).

What a small model's token costs is calls, not arithmetic. 3M parameters, fp32, an Intel with two cores: with torch's
operations 2.4 ms, of which 25 products took 37 us each, 25 RMS norms 25 us each (eight operations apiece) and six calls
of SDPA 23 us each. With one kernel an operation (`hanlin.kernels`) it is 1.2 ms: a product takes 7–12 us, a norm 5,
attention 10, and the rest is Python: half of a layer's 150 us lies between its kernels. Two OpenMP pools (one for each
thread that computes) on two cores wait for each other by sleeping, so the kernels have threads of their own.

    python benchmarks/bench_decode.py [--runs 3] [--size 3m 10m 100m] [--rows 1 8] [--new 128] [--quick]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZES = {  # layers, width, heads, key heads, feed-forward, vocabulary; heads of 64, tied embeddings
    "3m": (6, 192, 3, 1, 512, 4096),
    "10m": (8, 256, 4, 2, 1024, 8192),
    "100m": (12, 768, 12, 4, 2048, 32000),
}
PROMPT = 64
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
SIDES = [(library, dtype) for library in ("transformers", "hanlin") for dtype in ("float32", "bfloat16")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of a run; their median counts")
    parser.add_argument("--quick", action="store_true", help="one run of two calls and 32 new tokens")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # library dtype size rows: one side, in this process
    options = parser.parse_args()
    if options.quick:
        options.runs, options.repeats, options.new = 1, 2, 32
    if options.one:
        library, dtype, size, rows = options.one
        print(json.dumps(run_one(library, dtype, size, int(rows), options.new, options.repeats)))
        return
    import harness

    table, raw = [], {}
    for size in options.size:
        for rows in options.rows:
            common = [sys.executable, __file__, "--new", str(options.new), "--repeats", str(options.repeats)]
            commands = {f"{lib} {dtype}": [*common, "--one", lib, dtype, size, str(rows)] for lib, dtype in SIDES}
            results = harness.interleave(commands, runs=options.runs, calibration="read_gb_s")
            raw[f"{size} x{rows}"] = results
            speeds = {name: harness.median(r) for name, r in results.items()}
            rival = max(speed for name, speed in speeds.items() if name.startswith("transformers"))
            for name, runs in results.items():
                bandwidth = statistics.median(r["calibration"]["read_gb_s"] for r in runs)
                table.append({
                    "parameters": f"{runs[0]['parameters'] / 1e6:.1f}M",
                    "prompts": rows,
                    "side": name,
                    "tokens/s": f"{speeds[name]:,.0f}",
                    "spread": harness.spread(runs),
                    "of read bandwidth": f"{speeds[name] / rows * runs[0]['weight_bytes'] / 1e9 / bandwidth:.0%}",
                    "ratio to transformers' best": f"{speeds[name] / rival:.2f}",
                })  # fmt: skip
    harness.write_results("decode", table, raw)


def run_one(library: str, dtype: str, size: str, rows: int, new: int, repeats: int) -> dict:
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    vocabulary = SIZES[size][-1]
    generate, parameters, itemsize = SIDE_OF[library](dtype, size, rows, new)
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        prompts = torch.randint(0, vocabulary, (rows, PROMPT))
        start = time.perf_counter()
        count = generate(prompts)
        seconds.append(time.perf_counter() - start)
        assert count == rows * new, (count, rows, new)
    sys.path.insert(0, str(Path(__file__).parent))
    from harness import calibrate

    return {
        "value": rows * new / statistics.median(seconds[1:]),
        "parameters": parameters,
        "weight_bytes": parameters * itemsize,
        "calibration": calibrate(),
    }


Side = tuple[Callable, int, int]  # prompts -> number of new tokens; parameters; bytes of each


def transformers_side(dtype: str, size: str, rows: int, new: int) -> Side:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers, width, heads, kv_heads, hidden, vocabulary = SIZES[size]
    config = Qwen3Config(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=64, intermediate_size=hidden, vocab_size=vocabulary, max_position_embeddings=1024,
        tie_word_embeddings=True, attn_implementation="sdpa", eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def generate(prompts: torch.Tensor) -> int:
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new, use_cache=True
        )
        return out[:, PROMPT:].numel()

    return generate, sum(p.numel() for p in model.parameters()), getattr(torch, dtype).itemsize


def hanlin_side(dtype: str, size: str, rows: int, new: int) -> Side:
    import torch

    from hanlin.engine import Engine, SamplingParams
    from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, save_model
    from hanlin.tokens import Tokenizer

    layers, width, heads, kv_heads, hidden, vocabulary = SIZES[size]
    config = ModelConfig.uniform(
        "qwen3", depth=layers, attention=AttentionConfig(heads, kv_heads, 64, qk_norm=True),
        feed_forward=FeedForwardConfig(hidden), vocab_size=vocabulary, width=width, max_positions=1024,
        tied_embeddings=True,
    )  # fmt: skip
    model = Transformer(config).to(getattr(torch, dtype))
    parameters = model.parameter_count()
    tokenizer = Tokenizer.train_from_iterator(["any text will do, since weights are random "] * 50, vocab_size=300)
    with tempfile.TemporaryDirectory() as folder:  # as a user has it
        save_model(model, folder)
        tokenizer.save(folder)
        engine = Engine.from_folder(folder, dtype=dtype, device="cpu", max_batch=rows)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

    def generate(prompts: torch.Tensor) -> int:
        return sum(len(c.token_ids) for c in engine.generate(prompts.tolist(), params))

    return generate, parameters, getattr(torch, dtype).itemsize


SIDE_OF: dict[str, Callable[[str, str, int, int], Side]] = {"transformers": transformers_side, "hanlin": hanlin_side}


if __name__ == "__main__":
    main()
