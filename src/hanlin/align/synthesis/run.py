"""`synthesize(recipe)`: the rounds of one method, on disk as they come, then the conversations.

synthesis.json     what the folder was made from; another recipe is refused there
rounds.jsonl       a line a round: kept, dropped with the reason (`synthesis.rounds`)
conversations.jsonl   all that was kept, in order: what `objective: {kind: sft, files: [...]}` reads
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hanlin.align.synthesis.evol_instruct import EvolInstructMethod
from hanlin.align.synthesis.recipe import EvolInstruct, OwnEngine, SelfInstruct, SynthesisRecipe
from hanlin.align.synthesis.rejection import RejectionMethod
from hanlin.align.synthesis.rounds import Chat, Method, Round
from hanlin.align.synthesis.seeds import Seed, read_seeds
from hanlin.align.synthesis.self_instruct import SelfInstructMethod
from hanlin.align.synthesis.verifiers import VERIFIERS, find_verifier
from hanlin.align.synthesis.writers import EndpointWriter, EngineWriter, Writer
from hanlin.core.errors import HanlinError
from hanlin.core.files import read_json, sweep_partial, write_json, write_text
from hanlin.core.metrics import MetricsFile, read_metrics
from hanlin.core.progress import Progress, say
from hanlin.core.seeds import derive
from hanlin.engine import SamplingParams

EVERY_ROUND = 1 << 62


@dataclass(frozen=True)
class Synthesis:
    """What came of it. dropped: how many, by reason; asked: chats that the writer was given in all runs."""

    file: Path
    kept: int
    asked: int
    dropped: dict[str, int]

    def lines(self) -> list[str]:
        """For people."""
        why = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items()) or "nothing"
        return [f"{self.file}: {self.kept:,} conversations, {self.asked:,} requests", f"dropped: {why}"]


def synthesize(recipe: SynthesisRecipe, *, writer: Writer | None = None, quiet: bool = False) -> Synthesis:
    """Go on where the folder stands, to the method's total. writer: instead of the recipe's (it stays open)."""
    seeds = read_seeds(recipe.seeds)
    method = _method(recipe, seeds)
    _begin(recipe, seeds)
    rounds = [Round.read(row) for row in read_metrics(recipe.out / "rounds.jsonl")]
    for made in rounds:
        method.absorb(made)
    if rounds and method.done() < method.total:
        say(f"{recipe.out}: going on after {len(rounds)} rounds.", quiet=quiet)
    if method.done() < method.total:
        if writer is not None:
            _go_on(recipe, method, writer, rounds, quiet)
        else:
            with _open_writer(recipe) as own:
                _go_on(recipe, method, own, rounds, quiet)
    kept = [made for each in rounds for made in each.kept]
    reasons = Counter(re.split(r" ['\"]", drop["reason"])[0] for each in rounds for drop in each.dropped)
    file = recipe.out / "conversations.jsonl"
    write_text(file, "".join(json.dumps(made.row(), ensure_ascii=False) + "\n" for made in kept))
    return Synthesis(file, len(kept), sum(each.asked for each in rounds), dict(reasons.most_common()))


def _go_on(recipe: SynthesisRecipe, method: Method, writer: Writer, rounds: list[Round], quiet: bool) -> None:
    drawing = recipe.sampling
    sampling = SamplingParams(max_tokens=drawing.max_tokens, temperature=drawing.temperature, top_p=drawing.top_p)
    log = MetricsFile(recipe.out / "rounds.jsonl", resume_step=EVERY_ROUND)  # a torn last line goes
    title, done = recipe.method.kind, method.done()
    with Progress(title, total=method.total, unit=method.unit, done=done, quiet=quiet) as bar:
        try:
            while method.done() < method.total:
                number = len(rounds)

                def ask(
                    step: str, chats: Sequence[Chat], *, cut: bool = False, number: int = number
                ) -> list[str | None]:
                    seeded = replace(sampling, seed=derive(recipe.seed, "round", number, step))
                    return writer.ask(chats, seeded, cut=cut or drawing.cut)

                made = method.round(number, ask)
                log.write(made.row(number))
                log.sync()
                rounds.append(made)
                before = method.done()
                method.absorb(made)
                bar.advance(method.done() - before, kept=sum(len(each.kept) for each in rounds))
        finally:
            log.close()


def _method(recipe: SynthesisRecipe, seeds: Sequence[Seed]) -> Method:
    kind = recipe.method
    if isinstance(kind, SelfInstruct):
        return SelfInstructMethod(kind, seeds, seed=recipe.seed, language=recipe.language)
    if isinstance(kind, EvolInstruct):
        return EvolInstructMethod(kind, seeds, seed=recipe.seed, language=recipe.language)
    without = next((seed.name for seed in seeds if seed.reference is None), None)
    if kind.verifier in VERIFIERS and without is not None:
        raise HanlinError(
            f"The seed {without} has no answer, and the verifier {kind.verifier!r} compares with one. Give rows with "
            "`answer`, or a verifier of your own (module:function) that needs none."
        )
    return RejectionMethod(kind, seeds, find_verifier(kind.verifier))


def _open_writer(recipe: SynthesisRecipe) -> Writer:
    given = recipe.writer
    if isinstance(given, OwnEngine):
        from hanlin.models.places import find_model

        folder = find_model(str(given.path))
        return EngineWriter.open(folder, dtype=given.dtype, device=given.device, max_batch=given.max_batch)
    return EndpointWriter(
        given.url, given.model, concurrency=given.concurrency, retries=given.retries, timeout=given.timeout
    )


def _begin(recipe: SynthesisRecipe, seeds: Sequence[Seed]) -> None:
    """Make the folder ready for this recipe: new, to be continued, or refused."""
    folder = recipe.out
    free = {"writer": {"concurrency", "retries", "timeout", "max_batch"}, "method": {"target", "epochs", "patience"}}
    left_out = {"name": True, "runs": True, "seeds": True, "overwrite": True, **free}  # none changes a finished round
    told = json.dumps([[seed.messages, seed.reference, seed.name] for seed in seeds])
    plan = recipe.model_dump(mode="json", exclude=left_out)
    plan["seeds"] = hashlib.sha256(told.encode()).hexdigest()
    if recipe.overwrite and (folder / "synthesis.json").exists():
        shutil.rmtree(folder)
    if (folder / "synthesis.json").exists():
        sweep_partial(folder)
        before = read_json(folder / "synthesis.json")
        if differing := [key for key in plan if before.get(key) != plan[key]]:
            raise HanlinError(
                f"{folder} holds conversations that were made otherwise (other {', '.join(differing)}). Give another "
                "`name`, or begin anew with `--overwrite true`."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise HanlinError(f"{folder} is not empty and holds no synthesis. Give another `name`.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "synthesis.json", plan)
