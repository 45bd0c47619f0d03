"""Cross-entropy through a large output head: `nn.losses.linear_cross_entropy` against whole logits, memory and time.

Vocabulary 151,936 (Qwen's), 4,096 tokens, width 1,024, fp32, two cores. The naive side is what training loops do:
logits = hidden W^T, `F.cross_entropy`, `backward`. Each run is a process of its own that measures its peak (VmHWM)
above what was there before the loss and above the gradient of W, which both sides must hold. The gradients of both
sides are compared at full size. Bars: memory at most 15 % of naive's, time at most 1.1 times naive's.

Hanlin makes the gradients in the forward pass, chunk by chunk: three products, as naive has, and no pass over N x V
numbers that are not in memory for another reason.

    python benchmarks/bench_losses.py [--runs 3]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY, TOKENS, WIDTH = 151_936, 4096, 1024
EVERY = 64  # of the gradient of W, every 64th row is compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # side, file for its gradients: in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one[0], Path(options.one[1]))))
        return
    from safetensors.torch import load_file

    import harness

    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.safetensors" for side in ("naive", "hanlin")}
        commands = {side: [sys.executable, __file__, "--one", side, str(file)] for side, file in files.items()}
        results = harness.interleave(commands, runs=options.runs, calibration="gemm_fp32", retries=2)
        naive, ours = (load_file(files[side]) for side in ("naive", "hanlin"))
    apart = max(float((ours[name] - naive[name]).norm() / naive[name].norm()) for name in naive)
    seconds = {side: TOKENS / harness.median(rows) for side, rows in results.items()}
    memory = {side: harness.median(rows, "above_mb") for side, rows in results.items()}
    rows = [
        {
            "side": side,
            "seconds, forward and backward": f"{seconds[side]:.1f}",
            "ratio to naive (≤ 1.10)": f"{seconds[side] / seconds['naive']:.2f}",
            "MB above weights and their gradient": f"{memory[side]:,.0f}",
            "of naive's (≤ 15 %)": f"{memory[side] / memory['naive']:.1%}",
            "gradients apart (relative)": f"{apart if side == 'hanlin' else 0:.1e}",
        }
        for side in results
    ]
    harness.write_results("losses", rows, results)


def run_one(side: str, file: Path) -> dict:
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    from hanlin.nn.losses import linear_cross_entropy

    torch.set_num_threads(2)
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.03).requires_grad_()
    hidden = torch.randn(TOKENS, WIDTH).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    torch.randn(1024, 1024) @ torch.randn(1024, 1024)  # the library's threads and buffers are there
    before = reset_peak()
    start = time.perf_counter()
    if side == "naive":
        loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    else:
        loss = linear_cross_entropy(hidden, weight, targets)
    (loss / TOKENS).backward()
    seconds = time.perf_counter() - start
    grads = hidden.grad, weight.grad
    assert grads[0] is not None and grads[1] is not None
    above = peak() - before - grads[1].numel() * 4
    save_file({"hidden": grads[0], "weight": grads[1][::EVERY].contiguous(), "loss": loss.detach()[None]}, file)
    sys.path.insert(0, str(Path(__file__).parent))
    from harness import calibrate

    return {
        "value": TOKENS / seconds,
        "above_mb": above / 1e6,
        "loss": float(loss.detach()) / TOKENS,
        "calibration": calibrate(),
    }


def reset_peak() -> int:
    """Let the kernel count the peak from here (bytes that are resident now)."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak() -> int:
    return memory("VmHWM")


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


if __name__ == "__main__":
    main()
