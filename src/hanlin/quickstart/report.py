"""`report.md`: what was made, how well it does, how long it took, on which machine; `report.png` beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hanlin.core.files import write_text
from hanlin.core.progress import clock
from hanlin.quickstart.plot import draw_report

STAGES = {
    "1-text": "read, clean and split the text",
    "2-instructions": "make the instruction data",
    "3-tokenizer": "train the tokenizer",
    "4-shards": "write token shards",
    "5-plan": "time a step, decide how many",
    "6-pretrain": "pretraining",
    "7-sft": "instruction tuning",
    "8-evaluation": "evaluation",
}


@dataclass(frozen=True)
class Facts:
    """Everything that the report shows. stages: seconds by stage folder; results: their results."""

    text: str
    minutes: float
    machine: Mapping[str, str]
    stages: Mapping[str, float]
    results: Mapping[str, Mapping[str, Any]]
    pretrain: Sequence[dict]
    sft: Sequence[dict]


def write_report(out: Path, facts: Facts) -> Path:
    """Write `report.md` and `report.png` into `out`; returns the path of the former."""
    evaluation = facts.results["8-evaluation"]
    draw_report(evaluation, facts.pretrain, facts.sft, out / "report.png")
    parts = [
        "# Hanlin quickstart",
        f"A language model from raw text, made on this machine. {headline(evaluation)}",
        "![loss, bits per byte and exact answers](report.png)",
        "## What was made\n\n" + made_table(facts),
        "## Held-out text\n\n" + held_out_table(evaluation),
        "## Exact answers\n\n" + answers_table(evaluation),
        "## A conversation\n\n" + transcript(evaluation["transcript"]),
        "## Samples\n\n" + samples(evaluation["samples"]),
        "## Time and memory\n\n" + time_table(facts),
        "## The machine\n\n" + "\n".join(f"- {name}: {value}" for name, value in facts.machine.items()),
    ]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    return out / "report.md"


def headline(evaluation: Mapping[str, Any]) -> str:
    """One sentence with the figures that matter."""
    bits = evaluation["perplexity"]
    start, end = bits["start"]["bits_per_byte"], bits["pretrain"]["bits_per_byte"]
    return (
        f"On text that it never read it needs {end:.2f} bits for a byte ({start:.2f} before training; a byte 6-gram "
        f"model {evaluation['baselines']['6-gram']:.2f}, xz {evaluation['baselines']['xz']:.2f})."
    )


def made_table(facts: Facts) -> str:
    """Counts: text, tokens, parameters, examples."""
    text, data = facts.results["1-text"], facts.results["2-instructions"]
    shards, plan = facts.results["4-shards"], facts.results["5-plan"]
    rows = [
        ("text", f"{facts.text}: {text['train_bytes'] / 1e6:.2f} MB in {text['train_documents']:,} documents"),
        ("held out", f"{text['heldout_bytes'] / 1e6:.2f} MB in {text['heldout_documents']:,} documents, whole modules"),
        ("tokenizer", f"byte-level BPE, {facts.results['3-tokenizer']['size']:,} tokens"),
        ("tokens", f"{shards['train_tokens']:,} ({text['train_bytes'] / shards['train_tokens']:.2f} bytes a token)"),
        ("model", f"{plan['parameters'] / 1e6:.2f} M parameters"),
        ("pretraining", f"{plan['pretrain_steps']:,} steps, {_tokens(facts.pretrain):,} tokens read"),
        ("instruction tuning", f"{plan['sft_steps']:,} steps, {_tokens(facts.sft):,} tokens read"),
        ("instruction examples", f"{sum(data['counts'].values()):,} in {data['conversations']:,} conversations"),
    ]
    table = _table(("", ""), rows)
    counts = _table(("group", "examples"), [(name, f"{count:,}") for name, count in data["counts"].items()])
    return f"{table}\n\n{counts}"


def held_out_table(evaluation: Mapping[str, Any]) -> str:
    """Loss, perplexity and bits per byte after each stage, and the two that are no neural network."""
    names = {"start": "before training", "pretrain": "after pretraining", "sft": "after instruction tuning"}
    rows = []
    for stage, name in names.items():
        found = evaluation["perplexity"][stage]
        rows.append((name, f"{found['loss']:.3f}", f"{found['perplexity']:.1f}", f"{found['bits_per_byte']:.3f}"))
    rows.append(("byte 6-gram model, same text", "", "", f"{evaluation['baselines']['6-gram']:.3f}"))
    rows.append(("xz, same text", "", "", f"{evaluation['baselines']['xz']:.3f}"))
    return _table(("", "nats a token", "perplexity", "bits per byte"), rows)


def answers_table(evaluation: Mapping[str, Any]) -> str:
    """Share of answers that are right to the letter, by group and language, before and after instruction tuning."""
    before, after = evaluation["exam"]["pretrain"], evaluation["exam"]["sft"]
    rows = []
    for group in after:
        cells = [_grade(grades.get(group, {}).get(language)) for language in ("en", "zh") for grades in (before, after)]
        rows.append((group, *cells))
    return (
        "Every answer must be right to the letter. Operand pairs, words, functions and things of the groups marked "
        "unseen or never asked about stand in no training question.\n\n"
        + _table(("group", "English before", "after", "Chinese before", "after"), rows)
    )


def transcript(turns: Sequence[Mapping[str, str]]) -> str:
    """What was asked and answered, greedily."""
    return "\n\n".join(f"**You:** {turn['question']}\n\n**Model:** {_inline(turn['answer'])}" for turn in turns)


def samples(found: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """Continuations of the same openings after each stage."""
    names = {"pretrain": "After pretraining", "sft": "After instruction tuning"}
    parts = []
    for stage, name in names.items():
        blocks = [f"```text\n{sample['prompt']}{sample['text']}\n```" for sample in found[stage]]
        parts.append(f"{name}:\n\n" + "\n\n".join(blocks))
    return "\n\n".join(parts)


def time_table(facts: Facts) -> str:
    """Seconds and peak memory by stage; tokens a second and MFU of the two that train."""
    rows = []
    for stage, title in STAGES.items():
        metrics = {"6-pretrain": facts.pretrain, "7-sft": facts.sft}.get(stage, [])
        speed, mfu = _median(metrics, "tokens_per_s"), _median(metrics, "mfu")
        memory = facts.results[stage].get("peak_memory_mb")
        rows.append(
            (
                title,
                clock(facts.stages[stage]),
                f"{speed:,.0f}" if speed else "",
                f"{mfu:.1%}" if mfu else "",
                f"{memory:,.0f} MB" if memory else "",
            )
        )
    rows.append(("together", clock(sum(facts.stages.values())), "", "", ""))
    note = "MFU: FLOPs that the model needs (6 N + attention) against the matrix products measured on this machine."
    return _table(("stage", "time", "tokens/s", "MFU", "peak memory so far"), rows) + f"\n\n{note}"


def _grade(pair: Sequence[int] | None) -> str:
    return f"{pair[0] / pair[1]:.0%} of {pair[1]}" if pair and pair[1] else ""


def _tokens(rows: Sequence[dict]) -> int:
    return max((row.get("tokens") or 0 for row in rows), default=0)


def _median(rows: Sequence[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key)]
    return median(values) if values else None


def _inline(text: str) -> str:
    return text.replace("\n", "  \n").replace("*", "\\*").replace("_", "\\_") or "(nothing)"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
