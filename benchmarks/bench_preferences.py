"""Does every method of the preference family raise the true worth of what a model says?

One small model is trained on chats of mixed worth (`preference_task`). It answers the training questions; the true
worth says which of its answers is better, and each method learns from that as it wants it told:

    pairs      DPO, DPOP, TDPO, SimPO, ORPO     the better and the worse of two answers
    unpaired   KTO                              better or worse than the mean
    ranked     RRHF                             four answers with their worth
    chats      SPIN                             good answers (the best of eight random ones) only; sft 0.2

Reported: how often a sampled answer to a question that was never trained is worth more than one of the first model's
(a tie is half a win), and the mean worth. The first model against itself gives 50 %. Rates are those that `hanlin
train` takes by itself.

    python benchmarks/bench_preferences.py [--folder runs/preferences] [--quick] [--only dpo kto]

Finished parts are not done again: the same command goes on after a stop. One core, about twenty minutes; --quick: two.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch

from hanlin.align.build import train
from hanlin.align.iterate_recipe import IteratedObjective
from hanlin.align.iterate_rows import Question, extreme_pairs, grouped
from hanlin.align.preference_recipe import KtoObjective, PreferenceObjective, RrhfObjective
from hanlin.align.recipe import NewModel, SavedModel, SftObjective, TrainChoices, TrainRecipe
from hanlin.align.rollout import write_turns
from hanlin.align.samples import Prompt, Sample
from hanlin.engine import Engine, SamplingParams
from hanlin.tokens import Tokenizer
from hanlin.train.choices import Muon
from harness import machine, table
from preference_task import answer, chat, questions, worth

RESULT = Path(__file__).parent / "results" / "preferences.json"
SIZE = NewModel(depth=3, width=96, heads=3, kv_heads=1, hidden=256, max_positions=128)
DRAW = SamplingParams(max_tokens=48)
METHODS = ("dpo", "dpop", "tdpo", "kto", "simpo", "orpo", "rrhf", "spin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--quick", action="store_true", help="a fifth of the steps and answers")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    bench = Bench(options.folder / ("quick" if options.quick else "whole"), quick=options.quick)
    rows = [bench.measured("first model", bench.first_model())]
    for method in options.only:
        for seed in range(options.seeds):
            rows.append(bench.measured(method, bench.learnt(method, seed), seed))
            print(table([shown(row) for row in rows]), flush=True)
    if not options.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


class Bench:
    """The folder of all runs. quick: fewer steps, answers and comparisons."""

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        folder.mkdir(parents=True, exist_ok=True)
        self.asked, self.held = questions()
        self.answers = 8 if quick else 24  # of the first model to each training question
        self.compared = 8 if quick else 32  # answers to each held-out question

    def first_model(self) -> Path:
        """Tuned on chats of mixed worth."""
        out = self.folder / "first" / "model"
        if out.exists():
            return out
        chance = random.Random(0)
        file = self.rows("chats", [chat(question, chance) for question in self.asked for _ in range(20)])
        texts = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
        (self.folder / "text.txt").write_text("\n".join(turn["content"] for turns in texts for turn in turns))
        Tokenizer.train([self.folder / "text.txt"], vocab_size=512).save(self.folder / "tokenizer")
        recipe = TrainRecipe(
            name="first", runs=self.folder, tokenizer=self.folder / "tokenizer", model=SIZE,
            objective=SftObjective(files=[file], seq_len=128),
            train=choices(lr=4e-3, epochs=2 if self.quick else 8, batch_size=16, optimizer=Muon()),
        )  # fmt: skip
        train(recipe)
        return out

    def learnt(self, method: str, seed: int) -> Path:
        """The first model after `method`."""
        name = f"{method}-{seed}"
        out = self.folder / name / "model"
        if not out.exists():
            began = time.perf_counter()
            train(self.recipe(method, name, seed))
            seconds = self.folder / name / "seconds.json"
            seconds.write_text(json.dumps(time.perf_counter() - began))
        return out

    def recipe(self, method: str, name: str, seed: int) -> TrainRecipe:
        kinds: dict[str, Any] = {
            "dpo": lambda: PreferenceObjective(files=[self.judged("pairs")]),
            "dpop": lambda: PreferenceObjective(kind="dpop", penalty=5.0, files=[self.judged("pairs")]),
            "tdpo": lambda: PreferenceObjective(kind="tdpo2", files=[self.judged("pairs")]),
            "simpo": lambda: PreferenceObjective(kind="simpo", files=[self.judged("pairs")]),
            "orpo": lambda: PreferenceObjective(kind="orpo", files=[self.judged("pairs")]),
            "kto": lambda: KtoObjective(files=[self.judged("unpaired")]),
            "rrhf": lambda: RrhfObjective(files=[self.judged("ranked")]),
            "spin": lambda: IteratedObjective(
                files=[self.demonstrations()], method="spin", rounds=2, sft=0.2, max_tokens=48
            ),
        }
        return TrainRecipe(
            name=name, runs=self.folder, seed=seed, model=SavedModel(path=self.first_model()),
            objective=kinds[method](), train=choices(epochs=1 if self.quick else 3, batch_size=8),
        )  # fmt: skip

    def judged(self, form: str) -> Path:
        """The first model's answers to the training questions, judged by their true worth."""
        file = self.folder / f"{form}.jsonl"
        if file.exists():
            return file
        copies = {"pairs": 2, "unpaired": 2, "ranked": 4}[form]
        rows: list[dict[str, Any]] = []
        for turn in range(self.answers // copies):
            asked, samples = self.draw(self.first_model(), self.asked, copies, seed=turn)
            values = [worth(sample.prompt.text, sample.text) for sample in samples]
            mean = sum(values) / len(values)
            if form == "pairs":
                rows += extreme_pairs(asked, samples, values).rows
                continue
            for question, answers in grouped(asked, samples):
                prompt, texts = question.prompt.text, [sample.text for sample in answers]
                worths = [worth(prompt, text) for text in texts]
                if form == "ranked":
                    rows.append({"prompt": prompt, "completions": texts, "scores": worths})
                else:
                    rows += [{"prompt": prompt, "completion": t, "label": w > mean}
                             for t, w in zip(texts, worths, strict=True)]  # fmt: skip
        return self.rows(form, rows)

    def demonstrations(self) -> Path:
        """Good answers, for SPIN, which is shown no judgement."""
        chance = random.Random(1)
        rows = []
        for question in self.asked * (1 if self.quick else 6):
            best = max((answer(question, chance) for _ in range(8)), key=lambda text: worth(question, text))
            rows.append({"prompt": question, "completion": best})
        return self.rows("demonstrations", rows)

    def rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    def draw(self, model: Path, asked: list[str], copies: int, seed: int) -> tuple[list[Question], list[Sample]]:
        tokenizer = Tokenizer.load(model)
        prompts = [
            Prompt(tuple(tokenizer.chat([{"role": "user", "content": text}])), text, {}, number)
            for number, text in enumerate(asked)
        ]
        with Engine.from_folder(model, dtype="float32", device="cpu") as engine:
            samples = write_turns(engine, tokenizer, prompts, DRAW, copies=copies, seed=seed, version=0, salt="")
        turns = [Question(p, [{"role": "user", "content": p.text}], None) for p in prompts]
        return turns, samples

    def measured(self, method: str, model: Path, seed: int = 0) -> dict[str, Any]:
        """Win rate and mean worth on held-out questions, against answers of the first model drawn with another seed."""
        file = model.parent / "measured.json"
        if file.exists():
            return json.loads(file.read_text())
        _, before = self.draw(self.first_model(), self.held, self.compared, seed=10_000)
        _, after = self.draw(model, self.held, self.compared, seed=20_000)
        pairs = [tuple(worth(s.prompt.text, s.text) for s in both) for both in zip(before, after, strict=True)]
        wins = [1.0 if new > old else 0.5 if new == old else 0.0 for old, new in pairs]
        rate = sum(wins) / len(wins)
        seconds = model.parent / "seconds.json"
        row = {
            "method": method, "seed": seed, "win_rate": rate, "comparisons": len(wins),
            "deviation": (sum((win - rate) ** 2 for win in wins) / len(wins) ** 2) ** 0.5,
            "worth": sum(new for _, new in pairs) / len(pairs), "before": sum(old for old, _ in pairs) / len(pairs),
            "seconds": round(json.loads(seconds.read_text()), 1) if seconds.exists() else None,
        }  # fmt: skip
        file.write_text(json.dumps(row))
        return row


def choices(**chosen: Any) -> TrainChoices:
    return TrainChoices(precision="fp32", device="cpu", save_every=100, **chosen)


def shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "method": row["method"], "win rate": f"{row['win_rate']:.1%} ± {1.96 * row['deviation']:.1%}",
        "mean worth": f"{row['worth']:+.3f} (before {row['before']:+.3f})", "seconds": str(row["seconds"] or ""),
    }  # fmt: skip


if __name__ == "__main__":
    main()
