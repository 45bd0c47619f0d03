"""How good a reward model is, on judgements that it never saw: numbers, `report.md` and `reward.png`.

    accuracy      share of pairs in which the better answer has the higher reward; equal rewards count half
    calibration   sigmoid(r_a - r_b) is meant as the chance that a is better: expected error over bins of that chance
                  (ECE, arXiv:1706.04599)
    length bias   correlation of reward and length; accuracy where the better answer is the shorter one: a model that
                  counts words is right elsewhere and wrong there (arXiv:2310.03716)

Judged steps and answers with a label take the place of pairs with r_b = 0; answers with a score are compared by rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hanlin.align.reference import looking
from hanlin.align.reward_data import LABEL, LENGTH
from hanlin.align.reward_objective import Reward, pairs_of
from hanlin.core.figures import save_figure
from hanlin.core.files import write_text
from hanlin.data.batch import BatchSource
from hanlin.data.sequence_batch import SequenceBatch
from hanlin.evaluate.perplexity import rows_once
from hanlin.models import Transformer, load_config
from hanlin.models.accounting import count_parameters
from hanlin.train.monitor import add_metrics
from hanlin.train.objective import Metrics, Term

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Judgements whose confidence is alike. confidence, accuracy: means over `count` of them."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Judged:
    """What a reward model says of held-out answers (of process rows: of steps), on the CPU in fp64.

    rewards, lengths (answers,); better, worse (pairs,): places of compared ones; truth (answers,): score or label where
    there are no pairs; loss: of the objective, a mean.
    """

    rewards: Tensor
    lengths: Tensor
    better: Tensor
    worse: Tensor
    truth: Tensor | None
    labelled: bool
    loss: float

    @property
    def margins(self) -> Tensor:
        """By how much the truth leads: of the better over the worse answer, or of the right label over the other."""
        if self.truth is None:
            return self.rewards[self.better] - self.rewards[self.worse]
        return torch.where(self.truth > 0.5, self.rewards, -self.rewards)

    @property
    def length_leads(self) -> Tensor:
        """(pairs,) tokens that the better answer has more than the worse one."""
        return self.lengths[self.better] - self.lengths[self.worse]


def judge(model: Transformer, objective: Reward, source: BatchSource, *, rows: int | None = None) -> Judged:
    """One pass over the source's rows (None: all) without gradients."""
    said, lengths, truth, better, worse = [], [], [], [], []
    terms: Metrics = {}
    totals: dict[str, float] = {}
    seen = 0
    with looking(model):
        for part in rows_once(source, rows):
            assert isinstance(part, SequenceBatch)
            part = part.to(model.device)
            raw = objective.say(model, part)
            found, _ = objective.compare(raw, part)
            add_metrics(terms, _sums(found))
            for name, number in objective.count(part).items():
                totals[name] = totals.get(name, 0.0) + number
            rewards = raw if raw.ndim == 1 else raw[:, 1] - raw[:, 0]
            said.append(rewards.double().cpu())
            if objective.form == "process":
                truth.append(part.of_trained(LABEL).double().cpu())
                lengths.append(torch.zeros_like(said[-1]))
                continue
            lengths.append(part.of_sequences(LENGTH).double().cpu())
            if objective.form == "pointwise":
                truth.append(part.of_sequences(objective.truth).double().cpu())
                continue
            high, low = pairs_of(part, objective.form)
            better.append(high.cpu() + seen)
            worse.append(low.cpu() + seen)
            seen += part.sequences
    none = torch.zeros(0, dtype=torch.long)
    loss = sum(value / totals[name] for name, (value, _) in terms.items() if totals[name])
    labelled = objective.form == "process" or objective.truth == LABEL
    return Judged(
        torch.cat(said), torch.cat(lengths), torch.cat([none, *better]), torch.cat([none, *worse]),
        torch.cat(truth) if truth else None, labelled, loss,
    )  # fmt: skip


def figures(judged: Judged) -> dict[str, float]:
    """The numbers of an evaluation by name, without those that these data do not give."""
    rewards, lengths = judged.rewards, judged.lengths
    found = {"loss": judged.loss, "reward_mean": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
    if judged.truth is not None and not judged.labelled:
        found["squared_error"] = float((rewards - judged.truth).square().mean())
        found["correlation"] = correlation(rewards, judged.truth)
        found["rank_correlation"] = correlation(_ranks(rewards), _ranks(judged.truth))
    else:
        margins = judged.margins
        found |= {"accuracy": accuracy(margins), "margin": float(margins.mean())}
        found["calibration_error"] = calibration_error(reliability(margins))
    if bool(lengths.any()):
        found["length_correlation"] = correlation(rewards, lengths)
    if len(judged.better):
        leads = judged.length_leads
        for name, where in (("accuracy_better_shorter", leads < 0), ("accuracy_better_longer", leads > 0)):
            if bool(where.any()):
                found[name] = accuracy(judged.margins[where])
    return found


def accuracy(margins: Tensor) -> float:
    """Share of positive ones; a zero counts half."""
    return float((margins > 0).double().mean() + 0.5 * (margins == 0).double().mean())


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 0.0


def reliability(margins: Tensor, *, bins: int = BINS) -> list[Bin]:
    """How often the model is right, by how sure it is: confidence sigmoid(|margin|) from 0.5 to 1 in equal bins; empty
    ones are left out."""
    sure = torch.sigmoid(margins.abs().double())
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((sure - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    found = []
    for number in range(bins):
        here = place == number
        if bool(here.any()):
            low, high = 0.5 + number / (2 * bins), 0.5 + (number + 1) / (2 * bins)
            found.append(Bin(low, high, int(here.sum()), float(sure[here].mean()), float(right[here].mean())))
    return found


def calibration_error(table: Sequence[Bin]) -> float:
    """Expected calibration error: the distance of confidence and accuracy, over the judgements."""
    total = sum(row.count for row in table)
    return sum(row.count * abs(row.confidence - row.accuracy) for row in table) / total if total else 0.0


def accuracy_by_length(judged: Judged, *, bins: int = 5) -> list[tuple[float, float, int, float]]:
    """(least lead, greatest lead, pairs, accuracy) by how many tokens the better answer is longer, in bins of equally
    many pairs."""
    leads, margins = judged.length_leads.sort().values, judged.margins[judged.length_leads.argsort(stable=True)]
    found = []
    for own, own_margins in zip(leads.tensor_split(bins), margins.tensor_split(bins), strict=True):
        if len(own):
            found.append((float(own[0]), float(own[-1]), len(own), accuracy(own_margins)))
    return found


def sizes(model: Transformer, actor: Path | None) -> list[str]:
    """Of the reward model, without the output head for words, and of the policy it is for."""
    unused = 0 if model.lm_head is None or model.config.tied_embeddings else model.lm_head.weight.numel()
    own = model.parameter_count() - unused
    lines = [f"The reward model has {own / 1e6:.2f} million parameters."]
    if actor is not None:
        other = count_parameters(load_config(actor)).total
        lines.append(
            f"The policy that it is for has {other / 1e6:.2f} million, {other / own:.2f} times as many (InstructGPT: "
            "6 billion for a policy of 175; arXiv:2203.02155)."
        )
    return lines


def write_reward_report(folder: Path, judged: Judged, about: Sequence[str]) -> None:
    """`report.md` and `reward.png` in the run folder. about: lines on what was trained."""
    lines = ["# Reward model", "", *about, "", "| held out | |", "| --- | ---: |"]
    lines += [f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in figures(judged).items()]
    lines += ["", f"{len(judged.rewards):,} rewards, {_judgements(judged):,} judgements.", ""]
    if judged.truth is None or judged.labelled:
        lines += ["## Calibration", "", "| sure | judgements | confidence | right |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {row.low:.2f} to {row.high:.2f} | {row.count:,} | {row.confidence:.3f} | {row.accuracy:.3f} |"
            for row in reliability(judged.margins)
        ]
    if len(judged.better):
        lines += ["", "## Length", "", "| the better answer is longer by | pairs | right |", "| --- | ---: | ---: |"]
        lines += [
            f"| {low:.0f} to {high:.0f} tokens | {n:,} | {a:.3f} |" for low, high, n, a in accuracy_by_length(judged)
        ]
    draw(judged, folder / "reward.png")
    write_text(folder / "report.md", "\n".join([*lines, "", "![](reward.png)"]) + "\n")


def draw(judged: Judged, path: Path) -> None:
    """What there is to see: calibration, margins, accuracy by length, reward over length or over the truth."""
    from matplotlib.figure import Figure

    panels = []
    if judged.truth is None or judged.labelled:
        panels += [_draw_calibration, _draw_margins]
    if len(judged.better):
        panels.append(_draw_length)
    if bool(judged.lengths.any()):
        panels.append(_draw_rewards)
    if judged.truth is not None and not judged.labelled:
        panels.append(_draw_scores)
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes, judged)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=130)


def _draw_calibration(axes, judged: Judged) -> None:
    table = reliability(judged.margins)
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, linestyle="--")
    largest = max(row.count for row in table)
    axes.scatter(
        [r.confidence for r in table], [r.accuracy for r in table], s=[15 + 120 * r.count / largest for r in table]
    )
    axes.set(title="calibration", xlabel="how sure", ylabel="how often right", xlim=(0.48, 1.02), ylim=(-0.03, 1.03))


def _draw_margins(axes, judged: Judged) -> None:
    axes.hist(judged.margins.tolist(), bins=30)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set(title=f"margins, {accuracy(judged.margins):.1%} right", xlabel="lead of the better", ylabel="judgements")


def _draw_length(axes, judged: Judged) -> None:
    table = accuracy_by_length(judged)
    axes.bar(range(len(table)), [a for *_, a in table], width=0.7)
    axes.set_xticks(range(len(table)), [f"{low:.0f} to {high:.0f}" for low, high, *_ in table], fontsize=7)
    axes.axhline(0.5, color="0.3", linewidth=1, linestyle="--")
    axes.set(title="accuracy by length", xlabel="tokens that the better is longer", ylabel="right", ylim=(0, 1.03))


def _draw_rewards(axes, judged: Judged) -> None:
    axes.scatter(judged.lengths.tolist(), judged.rewards.tolist(), s=6, alpha=0.5)
    of = correlation(judged.rewards, judged.lengths)
    axes.set(title=f"reward and length, correlation {of:.2f}", xlabel="tokens of the answer", ylabel="reward")


def _draw_scores(axes, judged: Judged) -> None:
    assert judged.truth is not None
    axes.scatter(judged.truth.tolist(), judged.rewards.tolist(), s=6, alpha=0.5)
    axes.set(title=f"correlation {correlation(judged.rewards, judged.truth):.2f}", xlabel="score", ylabel="reward")


def _judgements(judged: Judged) -> int:
    return len(judged.better) if judged.truth is None else len(judged.truth)


def _sums(terms: Sequence[Term]) -> Metrics:
    found: dict[str, tuple[float, float]] = {}
    for value, name in terms:
        found[name] = (found.get(name, (0.0, 0.0))[0] + float(value), 0.0)
    return found


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
