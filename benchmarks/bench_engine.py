"""The engine against the other ways to generate on a CPU, on random models of the Qwen3 kind.

    speed    one prompt: tokens/s of decoding (512 + 64 tokens), of reading a prompt of 512 and of 2,048 tokens
    load     32 requests of ragged lengths that arrive over some seconds: output tokens/s of all together
    prefix   64 requests that begin with the same 1,000 tokens, with the prefix cache and (a salt each) without
    stall    the gaps between the tokens of running streams while a long prompt is read, beside the time of one step
    start    a fresh process: from the folder on disk to the first token

All sides read one folder of weights, in processes of their own that take turns, on all cores. Prompts are random and
never repeated, so only the rows of `prefix` find anything in a cache. The time of n decoded tokens is that of 1 + n
less that of 1. transformers' padded `generate` gets the batch size that suits it best, its continuous batching a cache
of the size it needs (by itself it clears most of the memory at every call).

What a step costs (Intel, AMX, two cores, bf16). One token of 100M parameters takes 10.6 ms: 7.1 are products, which
read the weights at 28 GB/s, all that two cores get; 0.7 attention, 1.1 norms, turns, gates and sums, 1.7 Python, of
which 0.4 lie outside the model (tables 0.11, plan 0.04, sampling and delivery 0.2). Of 512 tokens of a prompt of 2,048
(98 ms) products are 46, attention 33, what stands between products 15; sharing that between the threads, too, reads
prompts 11 to 20 % faster. With 0.6B parameters the first touch of fresh pages cost 120 ms a step, about as much as all
its attention: `open_engine` touches them beforehand.

    python benchmarks/bench_engine.py [--size 100m 0.6b] [--what speed load prefix stall start] [--runs 3] [--quick]
        [--peers SITE_PACKAGES]      where llama_cpp, gguf and ctranslate2 are installed, for their rows

What is not measured now stays in the results as it was.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from load import Arrival, Watch, milliseconds, play, ragged

SIZES = {  # layers, width, heads, key heads, head width, feed-forward, vocabulary; tied embeddings
    "tiny": (2, 64, 4, 2, 16, 128, 512),
    "100m": (12, 768, 12, 4, 64, 2048, 32768),
    "0.6b": (28, 1024, 16, 8, 128, 3072, 151936),
}
WINDOW = {"tiny": 0.5, "100m": 2.0, "0.6b": 10.0}  # seconds in which the requests of `load` arrive
LONG = {"tiny": 1024, "100m": 8192, "0.6b": 4096}  # the prompt of `stall`
BUDGETS = (128, 256, 512, 1024)  # its step_tokens
CONTEXT = 16384
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
SECTIONS = ("speed", "load", "prefix", "stall", "start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="*", choices=list(SIZES), default=["100m", "0.6b"])
    parser.add_argument("--what", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one run, fewer repetitions, fewer sides")
    parser.add_argument("--peers", help="site-packages with llama_cpp, gguf, ctranslate2")
    parser.add_argument("--compiled", action="store_true", help="transformers with torch.compile too (minutes)")
    parser.add_argument("--only", nargs="*", help="sides by name, for a look at one of them; writes no file")
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "hanlin-bench"), help="where weights lie")
    parser.add_argument("--one", nargs=3, metavar=("SECTION", "SIDE", "SIZE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(*options.one, options)))
        return
    import harness

    runs = 1 if options.quick else options.runs
    file = harness.RESULTS / "engine.json"
    raw = {} if options.only or not file.exists() else json.loads(file.read_text(encoding="utf-8"))["raw"]
    for size in options.size:
        make_model(size, options.models)
        for section in options.what:
            sides = [side for side in sides_of(section, size, options) if not options.only or side in options.only]
            command = [sys.executable, __file__, "--models", options.models, *(["--quick"] if options.quick else [])]
            command += ["--peers", options.peers] if options.peers else []
            commands = {side: [*command, "--one", section, side, size] for side in sides}
            results = harness.interleave(commands, runs=runs, calibration="read_gb_s", once=["transformers compiled"])
            raw[f"{section} {size}"] = results
    found = [(section, size) for size in SIZES for section in SECTIONS if f"{section} {size}" in raw]
    table = [row for section, size in found for row in ROWS_OF[section](size, raw[f"{section} {size}"])]
    if options.only or "tiny" in options.size:
        print(harness.table(table))
    else:
        harness.write_results("engine", table, raw)


def sides_of(section: str, size: str, options: argparse.Namespace) -> list[str]:
    if section == "speed":
        rivals = ["transformers bfloat16"]
        rivals += [] if options.quick else ["transformers float32"]
        rivals += ["transformers compiled"] if options.compiled else []
        rivals += ["llama.cpp Q8_0", "llama.cpp BF16", "CTranslate2 int8"] if options.peers else []
        return ["hanlin", *rivals]
    if section == "load":
        return ["hanlin", *(f"transformers padded {n}" for n in ([16] if options.quick else [8, 16, 32])),
                "transformers continuous"]  # fmt: skip
    if section == "prefix":
        return ["shared", "salted"]
    if section == "stall":
        return [str(budget) for budget in BUDGETS]
    return ["hanlin", "transformers"]


def make_model(size: str, root: str) -> Path:
    """Random weights and a tokenizer of the model's own size, as a folder."""
    import torch

    from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer, save_model

    folder = Path(root) / size
    if (folder / "done").exists():
        return folder
    torch.manual_seed(0)
    layers, width, heads, kv_heads, head, hidden, vocabulary = SIZES[size]
    config = ModelConfig.uniform(
        "qwen3", depth=layers, attention=AttentionConfig(heads, kv_heads, head, qk_norm=True),
        feed_forward=FeedForwardConfig(hidden), vocab_size=vocabulary, width=width, max_positions=CONTEXT,
        tied_embeddings=True,
    )  # fmt: skip
    save_model(Transformer(config).to(torch.bfloat16), folder)
    write_tokenizer(folder, vocabulary)
    (folder / "done").touch()
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of `size` tokens, so that a start reads as much as a real one does: the bytes, all pairs of
    them, and from there on pairs followed by a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    begins = iter([*alphabet, *(a + b for a in alphabet for b in alphabet)])
    while len(vocabulary) < size:
        begin = next(begins)
        new = alphabet[: size - len(vocabulary)]
        merges += [(begin, letter) for letter in new]
        vocabulary |= {begin + letter: len(vocabulary) + i for i, letter in enumerate(new)}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "!", "tokenizer_class": "PreTrainedTokenizerFast"}')


def run_one(section: str, side: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in this process."""
    import torch

    from harness import calibrate

    torch.set_num_threads(THREADS)
    folder = str(Path(options.models) / size)
    found = RUN_OF[section](side, size, folder, options)
    return {**found, "calibration": calibrate()}


# ---- one prompt


def run_speed(side: str, size: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    generate = generator(side, folder, options.peers)
    vocabulary, repeats, new = SIZES[size][-1], 2 if options.quick else 3, 32 if options.quick else 64
    long = min(2048, CONTEXT // 2)

    def seconds(length: int, count: int) -> float:
        prompt = random_prompt(vocabulary, length)
        start = time.perf_counter()
        generate(prompt, count)
        return time.perf_counter() - start

    seconds(512, 3)  # warms up
    if "compiled" in side:
        seconds(512, 1 + new)
    times: dict[tuple[int, int], list[float]] = {(512, 1): [], (512, 1 + new): [], (long, 1): []}
    for _ in range(repeats):
        for key, taken in times.items():
            taken.append(seconds(*key))
    first, whole, longer = (statistics.median(taken) for taken in times.values())
    return {"value": new / (whole - first), "prefill": 512 / first, "long prefill": long / longer}


def generator(side: str, folder: str, peers: str | None) -> Callable[[list[int], int], None]:
    import rivals

    rivals.look_in(peers)
    name, _, kind = side.partition(" ")
    if name == "transformers":
        compiled = kind == "compiled"
        return rivals.Transformers(folder, "bfloat16" if compiled else kind, compiled=compiled)
    if name == "llama.cpp":
        return rivals.LlamaCpp(folder, kind, context=4096, threads=THREADS)
    if name == "CTranslate2":
        return rivals.CTranslate2(folder, kind, threads=THREADS)
    engine = open_engine(folder)

    def generate(prompt: list[int], new: int) -> None:
        (completion,) = engine.generate([prompt], greedy(new))
        assert len(completion.token_ids) == new

    return generate


def speed_rows(size: str, results: Mapping[str, Sequence[dict]]) -> list[dict]:
    from harness import median

    rows = []
    for name, column in [("decode, 512 + 64", "value"), ("prefill 512", "prefill"), ("prefill 2,048", "long prefill")]:
        speeds = {side: median(runs, column) for side, runs in results.items()}
        rows += compare(size, name, "tokens/s", speeds, "transformers", results, column)
    return rows


# ---- requests that arrive over time


def run_load(side: str, size: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    import rivals

    arrivals = ragged(32, WINDOW[size], SIZES[size][-1])
    wanted = sum(a.new for a in arrivals)
    if side == "hanlin":
        engine = open_engine(folder)
        engine.generate([random_prompt(SIZES[size][-1], 64)], greedy(2))
        watches = [Watch() for _ in arrivals]
        lines = iter(watches)
        handles = []

        def submit(arrival: Arrival) -> None:
            handles.append(engine.submit(arrival.prompt, greedy(arrival.new), on_event=next(lines)))

        began = play(arrivals, submit)
        while sum(len(w.times) for w in watches) < wanted:
            time.sleep(0.01)
        seconds = max(w.times[-1] for w in watches) - began
        first = [w.times[0] - began - a.at for w, a in zip(watches, arrivals, strict=True)]
        gaps = [gap for w in watches for gap in w.gaps]
        stats = engine.stats()
        return {
            "value": wanted / seconds, "first token ms": milliseconds(first), "between tokens ms": milliseconds(gaps),
            "steps": stats.steps, "seconds": seconds,
        }  # fmt: skip
    model = rivals.Transformers(folder, "bfloat16")
    model(arrivals[0].prompt[:64], 2)
    if "padded" in side:
        seconds = model.padded(arrivals, int(side.split()[-1]))
        return {"value": wanted / seconds, "seconds": seconds}
    seconds, count = model.continuous(arrivals, limit=60 if options.quick else 240)
    return {"value": count / seconds, "seconds": seconds, "finished": count / wanted}


def load_rows(size: str, results: Mapping[str, Sequence[dict]]) -> list[dict]:
    from harness import median

    speeds = {side: median(runs) for side, runs in results.items()}
    padded = max((side for side in speeds if "padded" in side), key=lambda side: speeds[side], default=None)
    cut = {side: runs[0] for side, runs in results.items() if runs[0].get("finished", 1) < 1}
    kept = {s: speed for s, speed in speeds.items() if s not in cut and ("padded" not in s or s == padded)}
    rows = compare(size, "load, 32 ragged requests", "output tokens/s", kept, "transformers padded", results)
    for side, run in cut.items():  # what had not ended says only that it is slower than the time it was given
        told = f"cut after {run['seconds']:.0f} s, hanlin ended after {results['hanlin'][0]['seconds']:.0f} s"
        rows.append({"model": size, "what": "load, 32 ragged requests", "side": side, "unit": "output tokens/s",
                     "value": "–", "spread": "–", "ratio": told})  # fmt: skip
    return rows


# ---- a common beginning


def run_prefix(side: str, size: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    engine, vocabulary = open_engine(folder, gigabytes=4), SIZES[size][-1]
    requests = 16 if options.quick else 64
    engine.generate([random_prompt(vocabulary, 64)], greedy(2))
    common = random_prompt(vocabulary, 1000)
    prompts = [common + random_prompt(vocabulary, 24) for _ in range(requests)]
    start = time.perf_counter()
    salts = [str(n) if side == "salted" else "" for n in range(requests)]
    handles = [engine.submit(p, greedy(32), salt=salt) for p, salt in zip(prompts, salts, strict=True)]
    ends = [event.completion for handle in handles for event in handle if event.completion]
    seconds = time.perf_counter() - start
    return {"value": requests * 32 / seconds, "cached": sum(c.usage.cached_tokens for c in ends) / (1024 * requests)}


def prefix_rows(size: str, results: Mapping[str, Sequence[dict]]) -> list[dict]:
    from harness import median

    speeds = {f"prefix cache {'on' if s == 'shared' else 'off (a salt each)'}": median(r) for s, r in results.items()}
    named = dict(zip(speeds, results.values(), strict=True))
    return compare(size, "common 1,000-token prefix", "output tokens/s", speeds, "prefix cache off", named)


# ---- a long prompt beside running streams


def run_stall(side: str, size: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    budget, vocabulary = int(side), SIZES[size][-1]
    length = LONG[size] // 2 if options.quick else LONG[size]
    engine = open_engine(folder, step_tokens=budget)
    engine.generate([random_prompt(vocabulary, 64)], greedy(2))
    steps, start = engine.stats().steps, time.perf_counter()
    engine.generate([random_prompt(vocabulary, length)], greedy(1))
    alone = time.perf_counter() - start
    steps = engine.stats().steps - steps
    watches = [Watch() for _ in range(4)]
    running = [engine.submit(random_prompt(vocabulary, 64), greedy(CONTEXT // 2), on_event=watch) for watch in watches]
    while min(len(w.times) for w in watches) < 48:
        time.sleep(0.01)
    asked = time.perf_counter()
    for event in engine.submit(random_prompt(vocabulary, length), greedy(1)):
        assert event.completion is not None
    answered = time.perf_counter()
    for handle in running:
        handle.abort()
    before = [b - a for w in watches for a, b in zip(w.times[8:], w.times[9:], strict=False) if b < asked]
    beside = [b - a for w in watches for a, b in zip(w.times, w.times[1:], strict=False) if asked < b < answered]
    return {
        "value": milliseconds(beside)["p99"], "step ms": 1e3 * alone / steps, "beside ms": milliseconds(beside),
        "before ms": milliseconds(before), "first token s": answered - asked, "alone s": alone, "length": length,
    }  # fmt: skip


def stall_rows(size: str, results: Mapping[str, Sequence[dict]]) -> list[dict]:
    from harness import median

    return [
        {
            "model": size,
            "what": f"4 streams beside a prompt of {runs[0]['length']:,}",
            "side": f"step_tokens {side}",
            "unit": "ms between tokens, p99",
            "value": f"{median(runs):.0f}",
            "spread": f"{min(r['value'] for r in runs):.0f}–{max(r['value'] for r in runs):.0f}",
            "ratio": f"{median(runs, 'value') / median(runs, 'step ms'):.2f} of a mean step "
            f"({median(runs, 'step ms'):.0f} ms); alone {statistics.median(r['before ms']['p50'] for r in runs):.0f}; "
            f"the prompt's first token after {median(runs, 'first token s'):.1f} s",
        }
        for side, runs in results.items()
    ]


# ---- a fresh process

STARTS = {
    "hanlin": """
import time; t = [time.perf_counter()]
from hanlin.engine import Engine, SamplingParams
t.append(time.perf_counter())
engine = Engine.from_folder(FOLDER, dtype="bfloat16", device="cpu")
t.append(time.perf_counter())
first = next(engine.stream("The first words of a prompt", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
t.append(time.perf_counter())
""",
    "transformers": """
import time; t = [time.perf_counter()]
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
t.append(time.perf_counter())
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
t.append(time.perf_counter())
model.generate(**tokenizer("The first words of a prompt", return_tensors="pt"), max_new_tokens=1, do_sample=False)
t.append(time.perf_counter())
""",
}


def run_start(side: str, size: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    told = "print('stages', *[b - a for a, b in zip(t, t[1:])], flush=True)"
    code = STARTS[side].replace("FOLDER", repr(folder)) + told
    times = []
    for _ in range(1 if options.quick else 2):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("stages"))
            times.append((time.perf_counter() - start, [float(part) for part in line.split()[1:]]))
    best, stages = min(times)
    return {"value": best, "stages": dict(zip(("imports", "folder", "first token"), stages, strict=True))}


def start_rows(size: str, results: Mapping[str, Sequence[dict]]) -> list[dict]:
    from harness import median

    rows = []
    for side, runs in results.items():
        stages = {name: statistics.median(r["stages"][name] for r in runs) for name in runs[0]["stages"]}
        rows.append({
            "model": size, "what": "folder to first token", "side": side, "unit": "s", "value": f"{median(runs):.2f}",
            "spread": f"{min(r['value'] for r in runs):.1f}–{max(r['value'] for r in runs):.1f}",
            "ratio": ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()),
        })  # fmt: skip
    return rows


# ---- what they share


def open_engine(folder: str, *, gigabytes: int = 2, **limits: Any) -> Any:
    """An engine that has run for a while: every page of its cache was written once. A system hands out memory when it
    is first touched, which on a virtual machine can cost more than the attention that writes there."""
    from hanlin.engine import Engine

    engine = Engine.from_folder(folder, dtype="bfloat16", device="cpu", cache_bytes=gigabytes << 30, **limits)
    for store in engine._memory.cache.store:
        store.zero_()
    return engine


def greedy(new: int) -> Any:
    from hanlin.engine import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)


def random_prompt(vocabulary: int, length: int) -> list[int]:
    import torch

    return torch.randint(10, vocabulary, (length,)).tolist()


def compare(
    size: str, what: str, unit: str, speeds: Mapping[str, float], rival: str,
    results: Mapping[str, Sequence[dict]], column: str = "value",
) -> list[dict]:  # fmt: skip
    """Rows of one comparison; ratio: our speed over this side's, and for ours over the best whose name begins so."""
    best = max((speed for side, speed in speeds.items() if side.startswith(rival)), default=float("nan"))
    ours = next(iter(speeds.values()))
    rows = []
    for index, (side, speed) in enumerate(speeds.items()):
        values = [run[column] for run in results[side]]
        rows.append({
            "model": size, "what": what, "side": side, "unit": unit, "value": f"{speed:,.1f}",
            "spread": f"{min(values):,.1f}–{max(values):,.1f}",
            "ratio": f"{ours / best:.2f} × {rival}" if not index else f"1/{ours / speed:.2f}",
        })  # fmt: skip
    return rows


Run = Callable[[str, str, str, argparse.Namespace], dict[str, Any]]
Rows = Callable[[str, Mapping[str, Sequence[dict]]], list[dict]]
RUN_OF: dict[str, Run] = {
    "speed": run_speed, "load": run_load, "prefix": run_prefix, "stall": run_stall, "start": run_start,
}  # fmt: skip
ROWS_OF: dict[str, Rows] = {
    "speed": speed_rows, "load": load_rows, "prefix": prefix_rows, "stall": stall_rows, "start": start_rows,
}  # fmt: skip


if __name__ == "__main__":
    main()
