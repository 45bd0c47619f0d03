"""The last stage before the report: what was learnt, after each stage, and beside what needs no neural network."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hanlin.align.build import new_config
from hanlin.core.files import write_text
from hanlin.core.progress import Progress
from hanlin.core.seeds import seed_everything
from hanlin.engine import Engine, SamplingParams
from hanlin.evaluate.answers import Answers
from hanlin.evaluate.ngram import ByteNgram, xz_bits_per_byte
from hanlin.evaluate.perplexity import evaluate_strings
from hanlin.evaluate.samples import draw_samples
from hanlin.models import Transformer, load_model
from hanlin.quickstart.corpus import read_documents
from hanlin.quickstart.exam import grades, sit_exam
from hanlin.quickstart.instructions import Example
from hanlin.quickstart.make_data import read_evaluation
from hanlin.quickstart.recipe import QuickstartRecipe
from hanlin.quickstart.stage import Done, run_stage
from hanlin.tokens import Tokenizer

OPENINGS = ("torch.nn.", "Return the ", "numpy.sum(a, axis=None)\n\n")
SAMPLE_TOKENS = 64
CONVERSATION = (
    "Hello",
    "Who are you?",
    "What does len do?",
    "What is torch.nn.Linear?",
    "How do I call json.dumps?",
    "What is 7 + 5?",
    "Tom has 9 apples and gives away 4. How many apples are left?",
    "What is the capital of France?",
    "你好",
    "你是谁？",
    "os.path.join 是什么？",
    "8 + 6 等于几？",
    "小明有7个苹果，又买了5个，一共有多少个苹果？",
    "法国的首都是哪里？",
)


def evaluation_stage(
    recipe: QuickstartRecipe,
    text: Done,
    instructions: Done,
    tokenizer: Done,
    pretrain: Done,
    sft: Done,
    *,
    quiet: bool,
) -> Done:
    """Perplexity, exact answers, samples and a transcript; the answers one by one are in `answers-*.md`."""
    inputs = {
        "evaluated_kb": recipe.evaluated_kb,
        "sft": sft.fingerprint,
        "instructions": instructions.fingerprint,
        "text": text.fingerprint,
    }

    def work(folder: Path) -> dict[str, Any]:
        reader = Tokenizer.load(tokenizer.folder)
        held_out = spread([d.text for d in read_documents(text.folder / "heldout.jsonl")], recipe.evaluated_kb * 1000)
        examples = read_evaluation(instructions)
        result: dict[str, Any] = {"perplexity": {}, "exam": {}, "samples": {}}
        for name, model in (
            ("start", fresh_model(recipe, reader)),
            ("pretrain", load_model(pretrain.folder / "model", device="cpu")),
            ("sft", load_model(sft.folder / "model", device="cpu")),
        ):
            found = evaluate_strings(model, reader, held_out, context=recipe.seq_len, quiet=quiet)
            result["perplexity"][name] = found.row()
            if name == "start":
                continue
            engine = Engine(model, reader, max_batch=64)
            try:
                answers = sit_exam(engine, reader, examples, title=f"ask {name}", quiet=quiet)
                result["exam"][name] = grades(answers, examples)
                write_text(folder / f"answers-{name}.md", list_answers(answers))
                result["samples"][name] = write_samples(engine, openings(recipe, held_out))
                result["transcript"] = converse(engine, conversation(recipe, examples))
            finally:
                engine.close()
        result["baselines"] = baselines(
            [document.text for document in read_documents(text.folder / "train.jsonl")], held_out, quiet=quiet
        )
        return result

    return run_stage(recipe.out, "8-evaluation", inputs, work, quiet=quiet)


def spread(texts: Sequence[str], size: int) -> list[str]:
    """Every k-th text, with the smallest k that leaves at most about `size` bytes."""
    total = sum(len(text.encode()) for text in texts)
    return list(texts[:: max(1, math.ceil(total / size))])


def fresh_model(recipe: QuickstartRecipe, tokenizer: Tokenizer) -> Transformer:
    """The model before it has read anything."""
    seed_everything(recipe.seed)
    return Transformer(new_config(recipe.model, tokenizer, recipe.seq_len)).eval()


def baselines(train: Sequence[str], held_out: Sequence[str], *, quiet: bool) -> dict[str, float]:
    """Bits per byte of a byte 6-gram model and of xz that have seen the same training text."""
    with Progress("6-gram, xz", total=2, unit="models", quiet=quiet) as bar:
        ngram = ByteNgram.train(train, order=6).bits_per_byte(held_out)
        bar.advance()
        xz = xz_bits_per_byte(train, held_out)
        bar.advance()
    return {"6-gram": ngram, "xz": xz}


def openings(recipe: QuickstartRecipe, held_out: Sequence[str]) -> list[str]:
    """What the samples begin with: of the user's own text, beginnings that the model has not read."""
    return [text[:24] for text in held_out[:3]] if recipe.text else list(OPENINGS)


def write_samples(engine: Engine, prompts: Sequence[str]) -> list[dict[str, str]]:
    """Continuations at temperature 0.7, seeded, so that stages can be compared."""
    params = SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=0.7, top_p=0.95, seed=0)

    def write(texts: Sequence[str]) -> list[str]:
        return [completion.text for completion in engine.generate(list(texts), params)]

    return [{"prompt": sample.prompt, "text": sample.text} for sample in draw_samples(prompts, write)]


def conversation(recipe: QuickstartRecipe, examples: Sequence[Example]) -> list[str]:
    """What the transcript asks: with the user's own text, some of its questions in place of Python's."""
    if not recipe.text:
        return list(CONVERSATION)
    general = [question for question in CONVERSATION if not any(c in question for c in ("len", "torch", "json", "os."))]
    return general + [example.question for example in examples if example.group.startswith("passages")][:4]


def converse(engine: Engine, questions: Iterable[str]) -> list[dict[str, str]]:
    """Each question alone, answered greedily, as a visitor of the page would first see it."""
    asked = list(questions)
    params = SamplingParams(max_tokens=120, temperature=0.0)
    completions = engine.generate([[{"role": "user", "content": question}] for question in asked], params)
    return [{"question": q, "answer": c.text.strip()} for q, c in zip(asked, completions, strict=True)]


def list_answers(answers: Answers) -> str:
    """Markdown: every question with the right answer and the given one, the wrong ones first."""
    lines = ["| | group | question | right answer | given |", "| --- | --- | --- | --- | --- |"]
    for answered in sorted(answers.answered, key=lambda a: (a.right, a.question.group)):
        cells = (answered.question.group, answered.question.prompt, answered.question.answer, answered.given)
        shown = " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells)
        lines.append(f"| {'✓' if answered.right else '✗'} | {shown} |")
    return "\n".join(lines) + "\n"
