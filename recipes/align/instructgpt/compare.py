"""Stage 1's own answers, compared: the work of InstructGPT's labellers (arXiv:2203.02155, section 3.4), by a program.

    python recipes/align/instructgpt/compare.py

Of several sampled answers to each problem the nearest to the truth is set against the farthest. Problems whose answers
are all equally near say nothing and are left out. Writes `pairs.jsonl`, and `held-out.jsonl` from problems whose
numbers stand in no training problem.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hanlin.align.iterate import read_questions
from hanlin.align.iterate_rows import extreme_pairs
from hanlin.align.rewards import last_number
from hanlin.align.rollout import write_turns
from hanlin.align.samples import Sample
from hanlin.core.files import write_text
from hanlin.engine import Engine, SamplingParams
from hanlin.models import load_config
from hanlin.tokens import Tokenizer

LENGTH = 16  # tokens of an answer, as in stage 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/instructgpt-1-sft/model"), help="who answers")
    parser.add_argument("--problems", type=Path, default=Path("runs/instructgpt-problems"), help="of `data problems`")
    parser.add_argument("--out", type=Path, default=Path("runs/instructgpt-comparisons"))
    parser.add_argument("--prompts", type=int, default=6000, metavar="N", help="training problems that are answered")
    parser.add_argument("--answers", type=int, default=4, metavar="N", help="to each (the paper: 4 to 9)")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(options.model)
    longest = (load_config(options.model).max_positions or 2**16) - LENGTH
    with Engine.from_folder(options.model) as engine:
        for source, name in (("train", "pairs"), ("held-out", "held-out")):
            questions, _ = read_questions([options.problems / f"{source}.jsonl"], tokenizer, longest=longest)
            questions = questions[: options.prompts]
            samples = write_turns(
                engine, tokenizer, [question.prompt for question in questions], SamplingParams(max_tokens=LENGTH),
                copies=options.answers, seed=0, version=0, salt="",
            )  # fmt: skip
            made = extreme_pairs(questions, samples, nearness(samples))
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows)
            write_text(options.out / f"{name}.jsonl", "".join(lines))
            print(f"{options.out / name}.jsonl: {len(made.rows):,} pairs; left out: {made.counts}")


def nearness(samples: Sequence[Sample]) -> list[float | None]:
    """1 for the right number, less the farther away, 0 for none or an answer that does not end."""
    found = [last_number(sample.text) if sample.finish == "stop" else None for sample in samples]
    return [
        0.0 if number is None else 1 / (1 + abs(float(number) - float(sample.meta["answer"])))
        for number, sample in zip(found, samples, strict=True)
    ]


if __name__ == "__main__":
    main()
