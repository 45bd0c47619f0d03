"""Continued pretraining: the vocabulary may grow, its new rows are trained first, and what is forgotten is shown.

    new tokens     begin as the mean of the rows of the old tokens that spelt them (`models.resize`)
    their rows     are trained alone for the first share of the steps: the rest of the model, which knows nothing of
                   them yet, would otherwise pay for their errors (Chinese LLaMA, arXiv:2304.08177)
    two losses     on held-out text of the domain and of what the model knew, from before the first step to the end

How much of the rows repeats general text (replay, arXiv:2403.08763) is the recipe's `ratio`.
"""

from pathlib import Path

from torch import Tensor

from hanlin.align.recipe import ContinuedObjective, SavedModel, TrainRecipe
from hanlin.core.errors import HanlinError
from hanlin.core.files import write_text
from hanlin.core.progress import say
from hanlin.core.runs import Run
from hanlin.data.batch import BatchSource
from hanlin.models.folder import load_config
from hanlin.models.resize import resize_token_embeddings
from hanlin.models.transformer import Transformer
from hanlin.tokens import Tokenizer
from hanlin.train import CausalLM, Trainer, TrainSettings
from hanlin.train.choices import AdamW
from hanlin.train.history import plot_runs, read_run

NEW_ROWS = "new-rows"  # folder of that part within the run


def grow(model: Transformer, path: Path, tokenizer: Tokenizer) -> None:
    """Give a saved model the rows that a larger tokenizer needs. `HanlinError` if that one is no extension of its own
    tokenizer, which lies in `path`."""
    old_size = model.config.vocab_size
    if tokenizer.size <= old_size:
        return
    old = Tokenizer.load(path)
    for token in range(old.size):
        if tokenizer.token_bytes(token) != old.token_bytes(token):
            raise HanlinError(
                f"The tokenizer has {tokenizer.size} tokens and the model in {path} knows {old_size}, but it is no "
                f"extension of the model's own: token {token} is {tokenizer.token_bytes(token)!r}, there it is "
                f"{old.token_bytes(token)!r}. Add tokens behind the old ones."
            )
    mean = list(range(old.size))
    pieces = [old.encode_bytes(tokenizer.token_bytes(token)) or mean for token in range(old_size, tokenizer.size)]
    resize_token_embeddings(model, tokenizer.size, pieces=pieces)


def train_new_rows(
    model: Transformer, recipe: TrainRecipe, data: BatchSource, settings: TrainSettings, run: Run, *, quiet: bool
) -> None:
    """Train the rows of new tokens alone, if there are any: `new_rows_first` of the run's steps, in RUN/new-rows."""
    objective = recipe.objective
    assert isinstance(objective, ContinuedObjective) and isinstance(recipe.model, SavedModel)
    first = load_config(recipe.model.path).vocab_size
    steps = round(objective.new_rows_first * settings.planned_steps(data.steps_per_epoch))
    if first >= model.config.vocab_size or not steps:
        return
    tables = [model.model.embed_tokens.weight, *([] if model.lm_head is None else [model.lm_head.weight])]
    tables = list({id(table): table for table in tables}.values())
    trained = {id(table) for table in tables}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in trained]
    say(f"{model.config.vocab_size - first:,} new tokens: their rows are trained alone for {steps} steps", quiet=quiet)
    hooks = [table.register_hook(lambda gradient: _only_rows_from(first, gradient)) for table in tables]
    for parameter in frozen:
        parameter.requires_grad_(False)
    alone = settings.model_copy(
        update={
            "steps": steps, "epochs": None, "optimizer": AdamW(weight_decay=0.0), "eval_every": None,
            "keep_best": False, "average": None, "spikes": None, "lr": min(settings.lr, 1e-3), "balance": None,
        }
    )  # fmt: skip
    try:
        inner = Run.open(run.path / NEW_ROWS)
        trainer = Trainer(
            model, CausalLM(), data, alone, run=inner, seed=recipe.seed, title=f"{recipe.name} (new rows)", quiet=quiet
        )
        result = trainer.fit()
        trainer.close()
        if not result.finished:
            raise KeyboardInterrupt
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def _only_rows_from(first: int, gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:first] = 0.0
    return gradient


def write_report(run: Run) -> None:
    """`report.md` and `forgetting.png`: both held-out losses, before the first step and after the last."""
    history = read_run(run.path)
    lines = ["# Continued pretraining", "", "| held out | before | after | change |", "| --- | ---: | ---: | ---: |"]
    keys = []
    for name, title in (("eval/loss", "domain"), ("eval_general/loss", "general")):
        if curve := history.curve(name):
            before, after = curve[0][1], curve[-1][1]
            lines.append(f"| {title} | {before:.4f} | {after:.4f} | {after - before:+.4f} |")
            keys.append(name)
    lines += ["", "Loss in nats a token; a rise on the general text is what was forgotten.", "", "![](forgetting.png)"]
    plot_runs([history], keys, run.path / "forgetting.png")
    write_text(run.path / "report.md", "\n".join(lines) + "\n")
