"""The whole way, stage by stage:

1-text → 2-instructions → 3-tokenizer → 4-shards → 5-plan → 6-pretrain → 7-sft → 8-evaluation → report.md, model/
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from hanlin.core.files import atomic_folder, write_text
from hanlin.core.metrics import read_metrics
from hanlin.core.progress import clock, say
from hanlin.quickstart.card import Card, write_card
from hanlin.quickstart.judge import evaluation_stage
from hanlin.quickstart.learn import plan_stage, pretrain_stage, sft_stage
from hanlin.quickstart.machine import describe_machine
from hanlin.quickstart.make_data import identity_for, instruction_stage, shard_stage, text_stage, tokenizer_stage
from hanlin.quickstart.recipe import QuickstartRecipe
from hanlin.quickstart.report import Facts, headline, write_report


@dataclass(frozen=True)
class Made:
    """What the quickstart leaves behind."""

    model: Path
    report: Path
    card: Card


def run_quickstart(recipe: QuickstartRecipe, *, quiet: bool = False) -> Made:
    """Everything from text to report; stages that are done already are passed over."""
    out = recipe.out
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", recipe.to_yaml())
    text = text_stage(recipe, quiet=quiet)
    instructions = instruction_stage(recipe, text, quiet=quiet)
    tokenizer = tokenizer_stage(recipe, text, instructions, quiet=quiet)
    shards = shard_stage(recipe, text, tokenizer, quiet=quiet)
    plan = plan_stage(recipe, [text, instructions, tokenizer, shards], quiet=quiet)
    pretrain = pretrain_stage(recipe, plan, tokenizer, shards, quiet=quiet)
    sft = sft_stage(recipe, plan, instructions, tokenizer, pretrain, quiet=quiet)
    evaluation = evaluation_stage(recipe, text, instructions, tokenizer, pretrain, sft, quiet=quiet)
    stages = [text, instructions, tokenizer, shards, plan, pretrain, sft, evaluation]
    identity = identity_for(recipe)
    report, model = out / "report.md", out / "model"
    if any(stage.fresh for stage in stages) or not report.exists() or not model.exists():
        facts = Facts(
            text=identity.source_en,
            minutes=recipe.minutes,
            machine=describe_machine(),
            stages={stage.name: stage.seconds for stage in stages},
            results={stage.name: stage.result for stage in stages},
            pretrain=read_metrics(pretrain.folder / "metrics.jsonl"),
            sft=read_metrics(sft.folder / "metrics.jsonl"),
        )
        write_report(out, facts)
        with atomic_folder(model) as temporary:
            shutil.copytree(sft.folder / "model", temporary, dirs_exist_ok=True)
    say(f"All stages: {clock(sum(stage.seconds for stage in stages))}. {headline(evaluation.result)}", quiet=quiet)
    card = write_card(
        identity.source_en, identity.source_zh, plan.result["parameters"], evaluation.result, bool(recipe.text)
    )
    return Made(model, report, card)
