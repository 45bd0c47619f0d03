"""Iterated methods as a plain sequence of runs of `hanlin train`, each in its own folder of the run.

    round k:   the model writes answers (`Engine`)  →  they are judged  →  rows  →  a run learns them  →  next model

    RUN/round-k/samples.jsonl     what was written, and what it was worth
    RUN/round-k/rows.jsonl        what is learnt from it (pairs, or chats for rft)
    RUN/round-k/round.json        when the round is finished: what was left out and why, the mean reward
    RUN/model, RUN/report.md      the last round's model; a table of the rounds

Whatever is finished is not done again. The reference of spin and self_rewarding is the model that a round begins with;
of the others it is the model that the first round began with.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from hanlin.align.conversations import read_rows
from hanlin.align.iterate_recipe import IteratedObjective
from hanlin.align.iterate_rows import Made, Question, Score, Scorer, extreme_pairs, rft_rows, rso_rows, spin_rows
from hanlin.align.judge import Judge
from hanlin.align.messages import RowError
from hanlin.align.method import Data, Parts, Wiring
from hanlin.align.on_policy_run import reward_set
from hanlin.align.pairs import prompt_turns
from hanlin.align.preference_recipe import PreferenceObjective
from hanlin.align.prompts import PromptRows
from hanlin.align.recipe import NewModel, SavedModel, SftObjective, TrainRecipe
from hanlin.align.reward_recipe import RewardObjective
from hanlin.align.rollout import write_turns
from hanlin.align.samples import Prompt, Sample
from hanlin.align.sources import open_tokenizer
from hanlin.align.synthesis.writers import EngineWriter
from hanlin.core.errors import HanlinError
from hanlin.core.files import atomic_folder, write_text
from hanlin.core.progress import say
from hanlin.core.runs import Run
from hanlin.core.seeds import derive
from hanlin.engine import Engine, SamplingParams
from hanlin.models import load_config
from hanlin.parallel.processes import Processes
from hanlin.tokens import Tokenizer
from hanlin.train.trainer import TrainResult

Train = Callable[..., TrainResult]
GIVEN = ("completion", "chosen", "output")  # columns that may hold the file's own answer


def read_questions(
    files: Sequence[Path], tokenizer: Tokenizer, *, longest: int, answered: bool = False
) -> tuple[list[Question], int]:
    """Prompts in every spelling of `align.pairs`, with the file's answer where there is one (the last turn of a chat,
    `completion`, `chosen`, `output`), and how many have more than `longest` tokens and were left out. answered:
    a row without an answer is an error."""
    questions: list[Question] = []
    left = 0
    for file in files:
        for number, row in read_rows(Path(file)):
            where = f"{file}, row {number}"
            if not isinstance(row, dict):
                raise RowError(f"{where} is no JSON object; expected a `prompt` or a list of turns.")
            turns = prompt_turns(row, where)
            given = next((row[name] for name in GIVEN if isinstance(row.get(name), str)), None)
            if turns and turns[-1].get("role") in ("assistant", "gpt"):
                *turns, last = turns
                given = str(last.get("content", ""))
            if not turns:
                raise RowError(f"{where} has no prompt; its columns are {', '.join(row)}.")
            if answered and not (given and given.strip()):
                raise RowError(
                    f"{where} has no answer to learn from; spin needs chats, or a `completion` with the `prompt`."
                )
            turns = [{**turn, "role": ROLE.get(str(turn.get("role")), turn.get("role"))} for turn in turns]
            ids = tokenizer.chat(turns)
            if len(ids) > longest:
                left += 1
                continue
            meta = {key: value for key, value in row.items() if key not in ("prompt", "messages", "conversations")}
            prompt = Prompt(tuple(ids), str(turns[-1].get("content", "")), meta, len(questions))
            questions.append(Question(prompt, turns, given))
    if not questions:
        raise HanlinError(f"There is no prompt of at most {longest} tokens in {', '.join(map(str, files))}.")
    return questions, left


def open_questions(recipe: TrainRecipe, tokenizer: Tokenizer, positions: int | None, quiet: bool) -> Data:
    """The prompts, for `hanlin data preview`; what is trained is written only when the rounds are run."""
    choice = recipe.objective
    assert isinstance(choice, IteratedObjective)
    questions, left = read_questions(choice.files, tokenizer, longest=_longest(choice, positions))
    notes = [
        f"{len(questions):,} prompts; {choice.value('rounds'):g} rounds, {choice.value('answers'):g} answers to each"
    ]
    if left:
        notes.append(
            f"{left:,} prompts are left out: with max_tokens they are longer than the model's {positions} positions"
        )
    prompts = [question.prompt for question in questions]
    rows = recipe.train.batch_size
    source = PromptRows(prompts, rows=rows, steps=-(-len(prompts) // rows), pad_id=tokenizer.pad_id)
    return Data(source, {}, choice.seq_len or positions or 2, 1.0, notes)


def no_single_run(parts: Parts) -> Wiring:
    raise HanlinError(
        "Iterated methods are several runs; a range test of the rate is made with the kind that they use."
    )


def iterate(recipe: TrainRecipe, train: Train, quiet: bool) -> TrainResult:
    """All rounds, then RUN/model and RUN/report.md. `Method.run` of kind `iterated`."""
    choice, ranks = recipe.objective, Processes.here()
    assert isinstance(choice, IteratedObjective)
    if isinstance(recipe.model, NewModel):
        raise HanlinError("Iterated methods go on with a model that answers: give model {kind: saved, path: ...}.")
    tokenizer = open_tokenizer(recipe)
    longest = _longest(choice, load_config(recipe.model.path).max_positions)
    questions, left = read_questions(choice.files, tokenizer, longest=longest, answered=choice.method == "spin")
    held = read_questions(choice.held_out, tokenizer, longest=longest)[0] if choice.held_out else []
    say(f"{len(questions):,} prompts, {left:,} too long", quiet=quiet)
    with ranks.first_alone():
        agree(recipe, writes=ranks.first)
    rounds = Rounds(recipe, choice, tokenizer, questions, held[: choice.held_out_rows], train, quiet)
    current, result = recipe.model.path, None
    for number in range(1, int(choice.value("rounds")) + 1):
        result = rounds.play(number, current)
        if not result.finished:
            return result
        current = rounds.folder(number) / "run" / "model"
    assert result is not None
    if ranks.first:
        with atomic_folder(recipe.out / "model") as folder:
            shutil.copytree(current, folder, dirs_exist_ok=True)
        rounds.report(current)
    ranks.wait()
    return result


def agree(recipe: TrainRecipe, *, writes: bool) -> None:
    """Write RUN/recipe.yaml, or refuse to go on with rounds that another recipe made. More rounds, other held-out
    prompts and what `train` allows between two tries may change."""
    run = Run.open(recipe.out) if writes else Run(recipe.out)
    if run.recipe.exists() and any(recipe.out.glob("round-*/made.json")):
        before = _decisive(yaml.safe_load(run.recipe.read_text(encoding="utf-8")))
        now = _decisive(yaml.safe_load(recipe.to_yaml()))
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            raise HanlinError(
                f"{recipe.out} was begun with another recipe: `{changed[0]}` was {before.get(changed[0])}, now "
                f"{now[changed[0]]}. Set it back, give the new run another `name`, or delete {recipe.out}."
            )
    if writes:
        write_text(run.recipe, recipe.to_yaml())


def _decisive(raw: dict[str, Any]) -> dict[str, Any]:
    """What decides the rounds that are there, flat."""
    free = ("rounds", "held_out", "held_out_rows")
    objective = {f"objective.{name}": value for name, value in raw["objective"].items() if name not in free}
    return {"seed": raw["seed"], "model": raw["model"], "adapter": raw["adapter"], **objective}


class Rounds:
    """What all rounds have in common."""

    def __init__(
        self, recipe: TrainRecipe, choice: IteratedObjective, tokenizer: Tokenizer, questions: list[Question],
        held: list[Question], train: Train, quiet: bool,
    ) -> None:  # fmt: skip
        self.recipe, self.choice, self.tokenizer, self.questions, self.held = recipe, choice, tokenizer, questions, held
        self.train, self.quiet, self.ranks = train, quiet, Processes.here()

    def folder(self, number: int) -> Path:
        return self.recipe.out / f"round-{number}"

    def play(self, number: int, current: Path) -> TrainResult:
        """One round from the model in `current`; what of it is there already is kept."""
        folder = self.folder(number)
        done = folder / "round.json"
        if done.exists():
            return TrainResult(json.loads(done.read_text(encoding="utf-8"))["steps"], True, {})
        made = folder / "made.json"
        if self.choice.annotators is not None and not made.exists():
            self._refresh(number, current)
        if self.ranks.first and not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._write(number, current, folder)
        self.ranks.wait()
        result = self.train(self._run(number, current), quiet=self.quiet)
        if result.finished and self.ranks.first:
            counts = json.loads(made.read_text(encoding="utf-8"))
            write_text(done, json.dumps({"round": number, "steps": result.step, **counts}, indent=1) + "\n")
        self.ranks.wait()
        return result

    def _write(self, number: int, current: Path, folder: Path) -> None:
        """Let the model answer, judge the answers, and write what is to be learnt."""
        choice, seed = self.choice, derive(self.recipe.seed, "round", number)
        chosen = self._drawn(number)
        with _engine(current, self.recipe) as engine:
            samples = self._answers(engine, chosen, int(choice.value("answers")), seed)
            reward = self._reward(number)
            scores = self._scores(reward, engine, current, chosen, samples)
            before = self._measure(engine, reward, seed)
        made = self._rows(chosen, samples, scores, seed)
        lines = [
            {"prompt": s.prompt.text, "answer": s.text, "score": score, "finish": s.finish}
            for s, score in zip(samples, scores, strict=True)
        ]
        write_text(folder / "samples.jsonl", _jsonl(lines))
        told = ", ".join(f"{count:,} {why}" for why, count in made.counts.items() if count)
        say(
            f"round {number}: {len(made.rows):,} rows of {len(samples):,} answers; left out: {told or 'none'}",
            quiet=self.quiet,
        )
        if not made.rows:
            raise HanlinError(
                f"Round {number} of {choice.method} gives nothing to learn from {len(samples)} answers ({told}). Look "
                f"at {folder / 'samples.jsonl'}; more answers or another temperature make more differences."
            )
        write_text(folder / "rows.jsonl", _jsonl(made.rows))
        known = [score for score in scores if score is not None]
        counts = {
            "answers": len(samples), "rows": len(made.rows), "left_out": made.counts,
            "score": sum(known) / len(known) if known else None, "held_out_score": before,
        }  # fmt: skip
        write_text(folder / "made.json", json.dumps(counts, indent=1) + "\n")

    def _drawn(self, number: int) -> list[Question]:
        """The prompts of a round, counted from 0."""
        most = self.choice.prompts_a_round or len(self.questions)
        start = (number - 1) * most
        places = [place % len(self.questions) for place in range(start, start + min(most, len(self.questions)))]
        return [self.questions[place] for place in places]

    def _answers(self, engine: Engine, questions: Sequence[Question], copies: int, seed: int) -> list[Sample]:
        choice = self.choice
        params = SamplingParams(
            max_tokens=choice.max_tokens, temperature=choice.value("temperature"), top_p=choice.value("top_p")
        )
        prompts = [question.prompt for question in questions]
        return write_turns(engine, self.tokenizer, prompts, params, copies=copies, seed=seed, version=0, salt="")

    def _reward(self, number: int) -> Scorer | None:
        """What scores answers: the recipe's rewards, or the round's own reward model."""
        choice = self.choice
        if choice.annotators is not None:
            from hanlin.align.reward_model import ModelReward

            model = ModelReward(self.folder(number) / "reward" / "model", self.tokenizer)
            return lambda samples: list(model(samples))
        if not choice.rewards:
            return None
        return _total(reward_set(choice.rewards, self.tokenizer, max_tokens=choice.max_tokens))

    def _refresh(self, number: int, current: Path) -> None:
        """A reward model, trained anew on what annotators said of answers of all rounds so far, this one's included
        (Llama 2, arXiv:2307.09288 section 3.2). Their answers are drawn apart from those that are learnt from."""
        choice, folder = self.choice, self.folder(number)
        file = folder / "compared.jsonl"
        if self.ranks.first and not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            annotators = reward_set(choice.annotators or [], self.tokenizer, max_tokens=choice.max_tokens)
            chosen = self._drawn(number)
            with _engine(current, self.recipe) as engine:
                samples = self._answers(engine, chosen, 2, derive(self.recipe.seed, "annotators", number))
            write_text(file, _jsonl(extreme_pairs(chosen, samples, annotators(samples).total).rows))
        self.ranks.wait()
        files = [found for k in range(1, number + 1) if (found := self.folder(k) / "compared.jsonl").stat().st_size]
        if not files:
            raise HanlinError("The annotators find no two answers to one prompt of different worth to compare.")
        usual = self.recipe.train.model_copy(update={"lr": None, "steps": None, "epochs": None, "eval_every": None})
        run = self.recipe.model_copy(
            update={"name": "reward", "runs": folder, "objective": RewardObjective(files=files), "train": usual}
        )
        if not (run.out / "model").exists():
            self.train(run, quiet=self.quiet)

    def _scores(
        self, reward: Scorer | None, engine: Engine, current: Path, chosen: list[Question], samples: list[Sample]
    ) -> list[Score]:
        choice = self.choice
        if choice.method in ("self_rewarding", "rlaif"):
            if choice.judge is None:
                return self._judged(EngineWriter(engine, current.name), chosen, samples)
            with EngineWriter.open(choice.judge, device=self.recipe.train.device) as writer:
                return self._judged(writer, chosen, samples)
        if reward is None or choice.method == "spin":
            return [None] * len(samples)
        return reward(samples)

    def _judged(self, writer: Any, chosen: list[Question], samples: list[Sample]) -> list[Score]:
        """Marks of a judge; of rlaif a comparison of each prompt's two first answers, as 1 and 0."""
        choice = self.choice
        asked = choice.judge_samples or (1 if choice.method == "rlaif" else 3)
        judge = Judge(writer, choice.rubric, samples=asked)
        if choice.method == "self_rewarding":
            return judge(samples)
        return compared(judge, samples)

    def _measure(self, engine: Engine, reward: Scorer | None, seed: int) -> float | None:
        """The mean reward of one answer to each held-out prompt."""
        if reward is None or not self.held:
            return None
        known = [score for score in reward(self._answers(engine, self.held, 1, seed)) if score is not None]
        return sum(known) / len(known) if known else None

    def _rows(self, chosen: list[Question], samples: list[Sample], scores: list[Score], seed: int) -> Made:
        choice = self.choice
        if choice.method == "spin":
            return spin_rows(chosen, samples)
        if choice.method == "rso":
            accepted = choice.accepted or max(2, int(choice.value("answers")) // 4)
            return rso_rows(chosen, samples, scores, accepted=accepted, beta=choice.accept_beta or 0.5, seed=seed)
        if choice.method == "rft":
            least = (
                None if (choice.keep or "best") == "best" else (1.0 if choice.threshold is None else choice.threshold)
            )
            return rft_rows(chosen, samples, scores, threshold=least)
        return extreme_pairs(chosen, samples, scores)

    def _run(self, number: int, current: Path) -> TrainRecipe:
        """The round's run: pairs or chats in rows.jsonl, from the model in `current`."""
        choice, file = self.choice, self.folder(number) / "rows.jsonl"
        if choice.method == "rft":
            objective: Any = SftObjective(files=[file], seq_len=choice.seq_len, packing=choice.packing)
        else:
            assert isinstance(self.recipe.model, SavedModel)
            kind = choice.link or ("hinge" if choice.method == "rso" else "dpo")
            objective = PreferenceObjective(
                kind=kind, beta=choice.beta, sft=choice.sft, files=[file], seq_len=choice.seq_len,
                packing=choice.packing,
            )  # fmt: skip
            if objective.needs_reference and choice.method in ("online_dpo", "rlaif", "rso") and number > 1:
                objective = objective.model_copy(update={"reference": self.recipe.model.path})
        adapter = self.recipe.adapter
        if adapter is not None and number > 1 and adapter.path is not None:
            raise HanlinError(
                "adapter.path continues one adapter; rounds begin with new ones. Merge it, or leave it out."
            )
        seed = derive(self.recipe.seed, "run", number) % 2**31
        quiet = self.recipe.train.model_copy(update={"eval_every": None, "keep_best": False})  # nothing is held out
        return self.recipe.model_copy(
            update={
                "name": "run", "runs": self.folder(number), "model": SavedModel(path=current), "seed": seed,
                "objective": objective, "train": quiet,
            }
        )  # fmt: skip

    def report(self, last: Path) -> None:
        """RUN/report.md: the rounds side by side."""
        rows = [json.loads((self.folder(k) / "round.json").read_text(encoding="utf-8"))
                for k in range(1, int(self.choice.value("rounds")) + 1)]  # fmt: skip
        after = None
        if self.held and self.choice.rewards:
            with _engine(last, self.recipe) as engine:
                reward = _total(reward_set(self.choice.rewards, self.tokenizer, max_tokens=self.choice.max_tokens))
                after = self._measure(engine, reward, derive(self.recipe.seed, "round", len(rows) + 1))
        lines = [f"# {self.choice.method}", "", "| round | answers | rows | left out | reward | held out |",
                 "| ---: | ---: | ---: | --- | ---: | ---: |"]  # fmt: skip
        for row in rows:
            left = ", ".join(f"{count:,} {why}" for why, count in row["left_out"].items() if count) or "none"
            lines.append(
                f"| {row['round']} | {row['answers']:,} | {row['rows']:,} | {left} | {_number(row['score'])} | "
                f"{_number(row['held_out_score'])} |"
            )
        lines += ["", f"Held out, after the last round: {_number(after)}"]
        write_text(self.recipe.out / "report.md", "\n".join(lines) + "\n")


def compared(judge: Judge, samples: Sequence[Sample]) -> list[Score]:
    """Of every prompt's first two answers: how sure the judge is of the first, and of the second (1 - that); None for
    others, and where it gave no judgement."""
    groups: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.group, []).append(place)
    pairs = [places[:2] for places in groups.values() if len(places) > 1]
    said = judge.compare([(samples[a].prompt.text, samples[a].text, samples[b].text) for a, b in pairs])
    scores: list[Score] = [None] * len(samples)
    for (a, b), share in zip(pairs, said, strict=True):
        if share is not None:
            scores[a], scores[b] = share, 1 - share
    return scores


def _total(rewards: Callable[[Sequence[Sample]], Any]) -> Scorer:
    return lambda samples: rewards(samples).total


def _engine(folder: Path, recipe: TrainRecipe) -> Engine:
    return Engine.from_folder(folder, device=recipe.train.device)


def _longest(choice: IteratedObjective, positions: int | None) -> int:
    room = (positions or 2**30) - choice.max_tokens
    if room < 1:
        raise HanlinError(
            f"objective.max_tokens {choice.max_tokens} leaves no room for a prompt in {positions} positions."
        )
    return room


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


ROLE = {"human": "user", "gpt": "assistant"}
