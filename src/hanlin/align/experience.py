"""Experience: the batches of on-policy methods, made with the weights of the moment.

    prompts -> answers (rollout) -> scores (rewards) -> advantages (algorithm) -> packed rows with all of it

A round serves `epochs` passes of `train.batch_size` answers. It is a function of the weights at its beginning, the seed
and its number, so a run that goes on writes the same answers; a round that a checkpoint cuts in two is kept on disk.

With a lag of L the answers of the next L rounds are being written while a round is learnt, each round with the weights
of when it was begun: at most L versions old, which the ratio of the trainer's log-probabilities before the update
(`old`) to those of the drawing corrects (`policy_loss.rollout_weights`). Rounds under way are in no checkpoint: a run
that goes on writes them anew, same prompts and seeds, with the weights that it then has. So with a lag, and only then,
it is not the same to the last bit as one that was never stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanlin.align.algorithms import Algorithm, Scored, discounted_returns
from hanlin.align.critic import critic_of
from hanlin.align.policy_loss import kl_estimate
from hanlin.align.reference import Reference, looking, trained_logprobs
from hanlin.align.rewards import RewardSet, Scores
from hanlin.align.rollout import AGAIN, Pending, Rollout
from hanlin.align.round_file import Numbers, Round, read_round, write_round
from hanlin.align.round_numbers import (
    Clock,
    answer_notes,
    chosen_scores,
    joined_scores,
    mean_of_all,
    moments_of_all,
    most_of_all,
    narrowed,
    of_written,
    padded,
    step_rewards,
)
from hanlin.align.samples import Prompt, Sample
from hanlin.core.errors import HanlinError
from hanlin.core.runs import Run
from hanlin.core.seeds import derive
from hanlin.data.examples import Example
from hanlin.data.packing import PackedExamples
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.engine import SamplingParams
from hanlin.models.transformer import Transformer
from hanlin.rl.advantages import terminal_rewards, whiten


@dataclass(frozen=True)
class Asking:
    """How a round is drawn. prompts: of a round, over all ranks; answers: to each; refills: further draws; lag:
    rounds that are begun before this one is learnt."""

    prompts: int
    answers: int
    params: SamplingParams
    epochs: int
    batch_size: int
    row: int  # tokens of a packed row
    rows_at_once: int | None
    refills: int = 0
    reward_clip: float | None = None
    drop_truncated: bool = False
    gamma: float = 1.0
    lam: float = 0.95
    critic_warmup: int = 0
    lag: int = 0


@dataclass(frozen=True)
class Begun:
    """A round whose answers are being written. cursor: prompts drawn before it."""

    cursor: int
    prompts: list[Prompt]
    answers: Pending


class Experience:
    """A `LiveSource`. show: gets each round's samples with scores and advantages (first rank only, when it is made);
    run: where rounds of several steps are kept; adapt: how beta follows the divergence."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        asking: Asking,
        algorithm: Algorithm,
        *,
        model: Transformer,
        rollout: Rollout,
        rewards: RewardSet,
        seed: int,
        pad_id: int,
        beta: float,
        reference: Reference | None = None,
        adapt: Callable[[float, float, int], float] | None = None,
        run: Run | None = None,
        show: Callable[[int, Round], None] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        n = asking.prompts * asking.answers
        if n % asking.batch_size:
            raise HanlinError(
                f"A round has {asking.prompts} x {asking.answers} = {n} answers, which train.batch_size "
                f"{asking.batch_size} does not divide."
            )
        self.prompts, self.asking, self.algorithm = prompts, asking, algorithm
        self.model, self.rollout, self.rewards, self.reference = model, rollout, rewards, reference
        self.seed, self.pad_id, self.beta, self._adapt, self._run, self._show = seed, pad_id, beta, adapt, run, show
        self.live = True
        self.rows_per_step = asking.batch_size
        self.minibatches = n // asking.batch_size
        self.steps_a_round = self.minibatches * asking.epochs
        self.steps_per_epoch = max(1, len(prompts) // asking.prompts) * self.steps_a_round
        self.cursor = 0  # prompts drawn so far, over all ranks
        self._begun: dict[int, Begun] = {}  # by number of the round, in order
        self._at, self._round = -1, Round([], {}, {}, {})
        self._about = dict(about or {})

    # --- what the trainer asks ---

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> SequenceBatch:
        stop = self.rows_per_step if stop is None else stop
        share = stop - start
        rank, ranks = start // share, self.rows_per_step // share
        if self.asking.prompts % ranks:
            raise HanlinError(
                f"A round has {self.asking.prompts} prompts, which {ranks} processes cannot share evenly: "
                f"make objective.prompts_a_round a multiple of {ranks}."
            )
        number, part = divmod(step, self.steps_a_round)
        if number != self._at:
            self._round, self._at = self._find_round(number, resumed=part > 0, rank=rank, ranks=ranks), number
        epoch, mini = divmod(part, self.minibatches)
        chosen = self._minibatch(number, epoch, mini, share)
        return self._pack(chosen, first=part == 0, learns=number >= self.asking.critic_warmup)

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "experience", "seed": self.seed, "prompts": len(self.prompts), **self._about}

    def state(self) -> dict[str, Any]:
        cursor = next((begun.cursor for begun in self._begun.values()), self.cursor)
        return {"cursor": cursor, "beta": self.beta, "round": self._at}

    def load(self, state: dict[str, Any]) -> None:
        if state:
            self.cursor, self.beta = int(state["cursor"]), float(state["beta"])
            self._at = -1
            self._begun.clear()

    # --- a round ---

    def _find_round(self, number: int, *, resumed: bool, rank: int, ranks: int) -> Round:
        folder = None if self._run is None else self._run.path / "rounds"
        file = None if folder is None else folder / f"round-{number}-{rank}-of-{ranks}.safetensors"
        if resumed:
            if file is None or not file.exists():
                raise HanlinError(
                    f"The run goes on in the middle of round {number}, whose answers are not in {file or 'any file'}: "
                    "continue with as many processes as before, or from an earlier checkpoint."
                )
            return read_round(file, self.prompts)
        made = self._make_round(number, rank, ranks)
        if file is not None and self.steps_a_round > 1:
            write_round(file, made)
            self._forget_rounds(file.parent)
        return made

    def _forget_rounds(self, folder: Path) -> None:
        """Those before the oldest checkpoint."""
        assert self._run is not None
        oldest = min((step for step, _ in self._run.checkpoints()), default=0) // self.steps_a_round
        for file in folder.glob("round-*.safetensors"):
            if int(file.name.split("-")[1]) < oldest:
                file.unlink(missing_ok=True)

    def _make_round(self, number: int, rank: int, ranks: int) -> Round:
        clock = Clock()
        with clock("refresh"):
            self.rollout.refresh(number)
        with clock("rollout"):
            self._begin(number, rank, ranks)
        samples, scores, drawn, silent = self._answers(number, rank, ranks, clock)
        with clock("logprobs"), looking(self.model):
            numbers, tokens = self._looked_up(samples)
        notes = answer_notes(samples, scores)
        if self.asking.answers > 1:
            notes["groups/silent"] = (float(silent), float(drawn))
        if self.asking.lag:
            notes["rollout/lag"] = (float(sum(number - s.version for s in samples)), float(len(samples)))
        if again := sum(AGAIN in s.notes for s in samples):
            notes["rollout/asked_again"] = (float(again), 1.0)
        advantages = self._advantages(number, samples, scores, tokens, notes)
        tokens |= advantages
        counts = [float(bool(s.length) and not (self.asking.drop_truncated and s.finish == "length")) for s in samples]
        numbers |= {"counts": counts, "score": scores.total}
        notes |= {f"seconds/{name}": (value, 1.0) for name, value in clock.seconds.items()}
        made = Round(samples, numbers, tokens, notes)
        if self._show is not None and rank == 0:
            self._show(number, made)
        return made

    def _begin(self, number: int, rank: int, ranks: int) -> None:
        """Have answers written to this round and to those that may lie ahead of it, as far as they are not begun."""
        for ahead in range(number, number + 1 + self.asking.lag):
            if ahead not in self._begun:
                cursor, seed = self.cursor, derive(self.seed, "rollout", ahead, 0)
                asked = self._next_prompts(self.asking.prompts, rank, ranks)
                answers = self.rollout.begin(asked, self.asking.params, copies=self.asking.answers, seed=seed)
                self._begun[ahead] = Begun(cursor, asked, answers)

    def _drawn(
        self, number: int, draw: int, missing: int, rank: int, ranks: int, clock: Clock
    ) -> tuple[list[Prompt], list[Sample]]:
        """A draw of prompts and the answers to them; the first was begun before."""
        with clock("rollout"):
            if draw == 0:
                begun = self._begun.pop(number)
                samples = begun.answers()
                self._refuse_stale(number, samples)
                return begun.prompts, samples
            asked = self._next_prompts(missing * ranks, rank, ranks)
            seed = derive(self.seed, "rollout", number, draw)
            return asked, self.rollout.write(asked, self.asking.params, copies=self.asking.answers, seed=seed)

    def _refuse_stale(self, number: int, samples: list[Sample]) -> None:
        oldest = min((sample.version for sample in samples), default=number)
        if oldest < number - self.asking.lag:
            raise HanlinError(
                f"Round {number} got answers of version {oldest} of the weights; with a lag of {self.asking.lag} the "
                f"oldest may be {number - self.asking.lag}. The rollout did not take the new weights."
            )

    def _answers(self, number: int, rank: int, ranks: int, clock: Clock) -> tuple[list[Sample], Scores, int, int]:
        """This rank's answers and their scores. With `refill`, groups that say nothing are replaced by others while
        draws are left; (samples, scores, groups drawn, groups of equal scores among them)."""
        wanted = self.asking.prompts // ranks
        kept: list[tuple[list[Sample], list[int]]] = []
        spare: list[tuple[list[Sample], list[int]]] = []
        drawn = silent = 0
        everything: list[Sample] = []
        scores = Scores([], {}, None)
        for draw in range(1 + (self.asking.refills if self.algorithm.refill else 0)):
            missing = most_of_all(wanted - len(kept))
            if not missing:
                break
            asked, samples = self._drawn(number, draw, missing, rank, ranks, clock)
            with clock("reward"):
                found = self.rewards(samples)
            base = len(everything)
            everything += samples
            scores = joined_scores(scores, found)
            for group in range(len(asked)):
                own = range(group * self.asking.answers, (group + 1) * self.asking.answers)
                drawn, silent = drawn + 1, silent + (len({found.total[i] for i in own}) == 1)
                main = found.by_name[self.rewards.main]  # the length's shaping does not make a group worth keeping
                equal = len({main[i] for i in own}) == 1
                (spare if equal and self.algorithm.refill else kept).append(
                    ([samples[i] for i in own], [base + i for i in own])
                )
        kept = (kept + spare)[:wanted]  # a round is never short: what says nothing adds nothing
        order = [place for _, places in kept for place in places]
        samples = [replace(sample, group=group) for group, (members, _) in enumerate(kept) for sample in members]
        if self.algorithm.greedy:
            self._add_greedy(samples, clock)
        return samples, chosen_scores(scores, order), drawn, silent

    def _add_greedy(self, samples: list[Sample], clock: Clock) -> None:
        """The score of the greedy answer to each prompt, in the notes of its samples."""
        asked = [samples[i].prompt for i in range(0, len(samples), self.asking.answers)]
        with clock("rollout"):
            params = replace(self.asking.params, temperature=0.0, top_k=0, top_p=1.0)
            best = self.rollout.write(asked, params, copies=1, seed=0)
        with clock("reward"):
            scores = self.rewards(best).total
        for place, sample in enumerate(samples):
            samples[place] = replace(sample, notes={**sample.notes, "greedy": scores[place // self.asking.answers]})

    def _next_prompts(self, count: int, rank: int, ranks: int) -> list[Prompt]:
        """This rank's share of the next `count` prompts; every pass over them has an order of its own."""
        places = range(self.cursor, self.cursor + count)
        self.cursor += count
        found = []
        for place in places[rank * count // ranks : (rank + 1) * count // ranks]:
            epoch, at = divmod(place, len(self.prompts))
            found.append(replace(self.prompts[self._order(epoch)[at]], place=place))
        return found

    def _order(self, epoch: int) -> list[int]:
        chance = torch.Generator().manual_seed(derive(self.seed, "prompts", epoch) % 2**63)
        return torch.randperm(len(self.prompts), generator=chance).tolist()

    def _looked_up(self, samples: list[Sample]) -> tuple[dict[str, list[float]], Numbers]:
        """What the model, its reference and its critic say of the answers, without gradient."""
        row = self.algorithm
        temperature = self.asking.params.temperature
        tokens: Numbers = {"drawn": [of_written(s, s.logp) for s in samples]}
        wants: dict[str, Callable[[SequenceBatch], Tensor]] = {}
        if self._needs_old:
            wants["old"] = lambda part: trained_logprobs(self.model, part, temperature=temperature)
        if self.reference is not None:
            wants["reference"] = lambda part: self._of_reference(part, temperature)
        if row.critic:
            wants["value"] = lambda part: critic_of(self.model)(part, dtype=self.model.compute_dtype)
        if wants:
            batch = self._lay(samples, {}, {"place": [float(i) for i in range(len(samples))]})
            size = self.asking.rows_at_once or len(batch)
            parts = [batch.rows(i, min(i + size, len(batch))).to(self.model.device) for i in range(0, len(batch), size)]
            order = batch.of_sequences("place").long().tolist()
            sequence = batch.trained.sequence
            for name, ask in wants.items():
                flat = torch.cat([ask(part).cpu() for part in parts])
                by_place: list[list[float]] = [[] for _ in samples]
                for index, values in enumerate(flat.split(torch.bincount(sequence, minlength=len(order)).tolist())):
                    by_place[order[index]] = values.tolist()
                tokens[name] = by_place
        return {}, tokens

    @property
    def _needs_old(self) -> bool:
        """Whether the policy's own log-probabilities before the update are wanted: they are no longer those of the
        drawing (older weights), will change within the round, or are compared with the reference's, which filters of
        the drawing do not cut."""
        params = self.asking.params
        cut = params.top_p < 1 or params.top_k > 0
        return self.steps_a_round > 1 or self.asking.lag > 0 or (cut and self.algorithm.kl_in_reward is not None)

    def _of_reference(self, part: SequenceBatch, temperature: float) -> Tensor:
        assert self.reference is not None
        with self.reference.model() as reference:
            return trained_logprobs(reference, part, temperature=temperature)

    def _advantages(
        self, number: int, samples: list[Sample], scores: Scores, tokens: Numbers, notes: dict[str, tuple[float, float]]
    ) -> Numbers:
        row, asking = self.algorithm, self.asking
        lengths = [s.length for s in samples]
        most = max(max(lengths, default=0), 1)
        mask = torch.tensor([[t < length for t in range(most)] for length in lengths])
        total = torch.tensor(scores.total, dtype=torch.float64)
        greedy = torch.tensor([s.notes["greedy"] for s in samples], dtype=torch.float64) if row.greedy else None
        if asking.reward_clip is not None:
            total = total.clamp(-asking.reward_clip, asking.reward_clip)
            greedy = None if greedy is None else greedy.clamp(-asking.reward_clip, asking.reward_clip)
        kl = None
        if row.kl_in_reward is not None and self.reference is not None:
            now, before = (padded(tokens[name], most) for name in ("old" if "old" in tokens else "drawn", "reference"))
            kl = kl_estimate(now, before, row.kl_in_reward) * mask
            spent = mean_of_all(float((now - before).mul(mask).sum()), len(samples))
            notes["kl/answer"] = (spent, 1.0)
            notes["beta"] = (self.beta, 1.0)
        answer = total if kl is None or not row.by_answer else total - self.beta * kl.sum(1)
        scored = Scored(
            answer,
            terminal_rewards(total, mask, None if row.by_answer else kl, self.beta),
            mask,
            torch.tensor([s.group for s in samples]),
            asking.gamma,
            asking.lam,
            greedy,
            padded(tokens["value"], most) if row.critic else None,
            step_rewards(samples, scores),
        )
        advantage = row.advantage(scored)
        if row.whiten:
            even = whiten(advantage[mask], moments=moments_of_all(advantage[mask]))
            advantage = torch.zeros_like(advantage).masked_scatter(mask, even)
        made: Numbers = {"advantage": [advantage[i, :length].tolist() for i, length in enumerate(lengths)]}
        if row.critic:
            returns = discounted_returns(scored)
            made["return"] = [returns[i, :length].tolist() for i, length in enumerate(lengths)]
            values, wanted = padded(tokens["value"], most)[mask], returns[mask]
            if len(wanted) > 1:
                spread = float(wanted.var())
                notes["explained_variance"] = (1 - float((wanted - values).var()) / spread if spread else 0.0, 1.0)
        if kl is not None and self._adapt is not None:
            self.beta = self._adapt(self.beta, notes["kl/answer"][0], asking.prompts * asking.answers)
        return made

    # --- rows ---

    def _minibatch(self, number: int, epoch: int, mini: int, share: int) -> list[int]:
        """Which answers of this rank's round a step learns from."""
        n = len(self._round.samples)
        if self.minibatches == 1:
            return list(range(n))
        chance = torch.Generator().manual_seed(derive(self.seed, "minibatch", number, epoch) % 2**63)
        return torch.randperm(n, generator=chance).tolist()[mini * share : (mini + 1) * share]

    def _pack(self, chosen: list[int], *, first: bool, learns: bool) -> SequenceBatch:
        made = self._round
        numbers = {name: [values[i] for i in chosen] for name, values in made.numbers.items()}
        numbers["learns"] = [float(learns)] * len(chosen)
        tokens = {name: [values[i] for i in chosen] for name, values in made.tokens.items()}
        batch = self._lay([made.samples[i] for i in chosen], tokens, numbers)
        return replace(batch, notes=made.notes if first else {})

    def _lay(self, samples: Sequence[Sample], tokens: Numbers, numbers: dict[str, list[float]]) -> SequenceBatch:
        """Packed rows of these samples; an answer of no token is left out."""
        examples = []
        for place, sample in enumerate(samples):
            ids = [*sample.prompt.ids, *sample.ids]
            trained = [*[False] * len(sample.prompt.ids), *sample.written]
            own = {name: values[place] for name, values in numbers.items()}
            name = f"the answer to prompt {sample.prompt.number}"
            examples.append([Example(ids, trained, name, {**own, "at": float(place)})])
        packed = PackedExamples(examples, seq_len=self.asking.row, rows_per_step=1, seed=0, pad_id=self.pad_id)
        batch = packed.batch(0, 0, packed.rows_per_epoch)
        assert isinstance(batch, SequenceBatch)
        width = -(-int((batch.documents >= 0).sum(1).max()) // 32) * 32
        batch = narrowed(batch, min(width, self.asking.row))
        order = batch.of_sequences("at").long().tolist()
        laid = {
            name: batch.lay_trained(torch.tensor([v for place in order for v in values[place]], dtype=torch.float32))
            for name, values in tokens.items()
        }
        return batch.with_numbers(tokens=laid)
