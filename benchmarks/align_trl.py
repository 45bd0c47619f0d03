"""TRL's side of `bench_align.py`: SFT, DPO or GRPO with LoRA by its own trainer, in its own environment.

    python align_trl.py TASK FOLDER '{"gradient_checkpointing": false, ...}' STEPS THREADS

The options go to TRL's config as they are; what is not named keeps TRL's default. The last line is the result in JSON.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
WARM = 2  # steps before the clock counts


def main() -> None:
    task, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    steps, threads = map(int, sys.argv[4:6])
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sys.path.insert(0, str(Path(__file__).parent))
    from align_work import ROW

    lengths = {} if task == "grpo" else {"max_length": ROW}
    with tempfile.TemporaryDirectory() as out:
        settings = {
            "output_dir": out, "max_steps": steps + WARM, "logging_steps": 1, "save_strategy": "no", "report_to": [],
            "use_cpu": True, "learning_rate": 1e-12, "disable_tqdm": True, **lengths, **options,
        }  # fmt: skip
        trainer = OPEN[task](folder, settings)
        ended, seen = watch(trainer)
        trainer.train()
    found = rates(task, trainer, ended, seen)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    from harness import calibrate

    used = {name: getattr(trainer.args, name) for name in ("bf16", "gradient_checkpointing")}
    versions = {module.__name__: module.__version__ for module in (trl, peft, transformers, torch)}
    print(json.dumps({**found, "memory_gib": memory, **used, "versions": versions, "calibration": calibrate()}))


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def open_sft(folder: Path, settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from align_work import read_rows

    chats = [row["messages"] for row in read_rows(folder / "sft.jsonl")]
    rows = Dataset.from_list([{"prompt": chat[:1], "completion": chat[1:]} for chat in chats])
    return SFTTrainer(str(folder / "model"), args=SFTConfig(**settings), train_dataset=rows, peft_config=lora())


def open_dpo(folder: Path, settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from align_work import read_rows

    rows = Dataset.from_list(read_rows(folder / "dpo.jsonl"))
    return DPOTrainer(str(folder / "model"), args=DPOConfig(**settings), train_dataset=rows, peft_config=lora())


def open_grpo(folder: Path, settings: dict[str, Any]) -> Any:
    """G = 8 is TRL's default; `fixed` (ours, not TRL's) makes every answer as long as it may be."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from align_work import ANSWER, read_rows, worth

    if settings.pop("fixed"):
        settings["generation_kwargs"] = {"min_new_tokens": ANSWER}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [worth(text) for text in completions]

    config = GRPOConfig(num_generations=8, max_completion_length=ANSWER, **settings)
    rows = Dataset.from_list(read_rows(folder / "grpo.jsonl"))
    return GRPOTrainer(str(folder / "model"), reward, args=config, train_dataset=rows, peft_config=lora())


OPEN = {"sft": open_sft, "dpo": open_dpo, "grpo": open_grpo}


def watch(trainer: Any) -> tuple[list[tuple[float, float]], list[dict[str, int]]]:
    """Lists that fill while it trains: when a step ended, on the clock and in CPU seconds of the process; what the
    collator put into a batch."""
    from transformers import TrainerCallback

    ended: list[tuple[float, float]] = []
    seen: list[dict[str, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ended.append((time.perf_counter(), time.process_time()))

    trainer.add_callback(Clock())
    collate, pad = trainer.data_collator, trainer.processing_class.pad_token_id

    def counted(rows: list[Any]) -> Any:
        batch = collate(rows)
        if isinstance(batch, dict) or hasattr(batch, "data"):
            ids = batch["input_ids"]
            trained = int((batch["labels"] != -100).sum()) if "labels" in batch else 0
            seen.append({"tokens": int((ids != pad).sum()), "trained": trained, "numbers": ids.numel()})
        return batch

    trainer.data_collator = counted
    return ended, seen


def rates(task: str, trainer: Any, ended: list[tuple[float, float]], seen: list[dict[str, int]]) -> dict[str, Any]:
    """Medians over the steps after the warm-up (the first interval ends with the second step)."""
    spans = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ended)][WARM - 1 :]
    seconds, busy = [span[0] for span in spans], statistics.median(span[1] for span in spans)
    batch = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    found: dict[str, Any] = {
        "step_seconds": statistics.median(seconds), "cpu_seconds": busy, "steps": len(seconds)
    }  # fmt: skip
    if task == "sft":
        work = seen[WARM : WARM + len(seconds)]
        speeds = [part["tokens"] / s for part, s in zip(work, seconds, strict=True)]
        share = sum(part["trained"] for part in work) / sum(part["tokens"] for part in work)
        padding = 1 - sum(part["tokens"] for part in work) / sum(part["numbers"] for part in work)
        return {**found, "value": statistics.median(speeds), "trained_share": share, "padding": padding}
    found["value"] = batch / statistics.median(seconds)
    if task == "grpo":
        logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
        found["length"] = statistics.mean(log["completions/mean_length"] for log in logs)
    return found


if __name__ == "__main__":
    main()
