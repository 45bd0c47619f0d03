"""Scaling laws: which size and how many tokens a budget of FLOPs is best spent on (Chinchilla, arXiv:2203.15556).

    L(N, D) = E + A / N^alpha + B / D^beta                         N parameters, D tokens, L nats a token
    C = 6 N D    N_opt = G (C / 6)^(beta / (alpha + beta))    D_opt = (C / 6)^(alpha / (alpha + beta)) / G
                 G = (alpha A / (beta B))^(1 / (alpha + beta))

`fit_law` is the paper's approach 3: the sum of Huber losses (delta 1e-3) of log L_predicted - log L, here minimised by
Levenberg-Marquardt with Huber weights from a grid of exponents, for each of which E, A and B begin at their linear
least squares. `isoflop` is approach 2: at each budget a parabola in log N. `bootstrap` refits resampled runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hanlin.core.errors import HanlinError

NAMES = ("E", "A", "B", "alpha", "beta")
LEAST_RUNS = 6  # five constants and one to spare
DELTA = 1e-3


@dataclass(frozen=True)
class Point:
    """One finished run. name: for messages; parameters N, tokens D, loss in nats a token."""

    name: str
    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class ScalingLaw:
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) of the lowest loss that `flops` = 6 N D buy."""
        both = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return g * (flops / 6) ** (self.beta / both), (flops / 6) ** (self.alpha / both) / g

    @property
    def values(self) -> tuple[float, ...]:
        return self.E, self.A, self.B, self.alpha, self.beta


CHINCHILLA = ScalingLaw(1.69, 406.4, 410.7, 0.34, 0.28)  # arXiv:2203.15556, eq. 10
REPLICATION = ScalingLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # Besiroglu et al. on the same runs, arXiv:2404.10102
TOKENS_A_PARAMETER = 20.0  # the rule that approaches 1 and 2 of the paper come to


def rule_of_twenty(flops: float) -> tuple[float, float]:
    """(parameters, tokens) with D = 20 N: N = sqrt(C / 120)."""
    parameters = (flops / (6 * TOKENS_A_PARAMETER)) ** 0.5
    return parameters, TOKENS_A_PARAMETER * parameters


@dataclass(frozen=True)
class Fit:
    """law; objective: the sum of Huber losses; rms: of log L_predicted - log L; intervals: {name: (low, high)} of the
    bootstrap, empty if it was not asked for."""

    law: ScalingLaw
    objective: float
    rms: float
    intervals: dict[str, tuple[float, float]]


def fit_law(points: Sequence[Point], *, bootstrap: int = 0, level: float = 0.9, seed: int = 0) -> Fit:
    """The law of these runs; bootstrap: how many resamplings (0: no intervals); level: mass of an interval.

    `HanlinError` where the runs cannot tell the constants apart: fewer than six, or fewer than three sizes or three
    numbers of tokens.
    """
    _check(points)
    N, D, L = np.array([(p.parameters, p.tokens, p.loss) for p in points], dtype=np.float64).T
    starts = _starts(N, D, L)
    weights = np.ones((len(starts), len(L)))
    found, objective = _minimise(starts, np.log(N), np.log(D), np.log(L), weights)
    best = int(np.argmin(objective))
    law = _law(found[best])
    rms = float(np.sqrt(np.mean((np.log(law.loss(N, D)) - np.log(L)) ** 2)))
    intervals: dict[str, tuple[float, float]] = {}
    if bootstrap:
        random = np.random.default_rng(seed)
        draws = random.multinomial(len(L), np.full(len(L), 1 / len(L)), size=bootstrap).astype(np.float64)
        again, _ = _minimise(np.repeat(found[best][None], bootstrap, 0), np.log(N), np.log(D), np.log(L), draws)
        again[:, :3] = np.exp(again[:, :3])  # e, a, b are logarithms
        edges = np.quantile(again, [(1 - level) / 2, (1 + level) / 2], axis=0)
        intervals = {name: (float(edges[0, i]), float(edges[1, i])) for i, name in enumerate(NAMES)}
    return Fit(law, float(objective[best]), rms, intervals)


@dataclass(frozen=True)
class Budget:
    """What an isoFLOP curve says: at `flops` the lowest loss is at `parameters` and `tokens`. inside: whether the
    minimum lies between the runs, and not beyond the smallest or the largest."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    runs: int
    inside: bool


def isoflop(points: Sequence[Point], *, spread: float = 0.1) -> list[Budget]:
    """Approach 2: runs whose 6 N D lie within `spread` of each other are one budget; a parabola in log N through
    three or more of them, opening upwards, has the budget's best size. Budgets that have none are left out."""
    budgets: list[list[Point]] = []
    for point in sorted(points, key=lambda p: p.flops):
        if budgets and point.flops <= budgets[-1][0].flops * (1 + spread):
            budgets[-1].append(point)
        else:
            budgets.append([point])
    found = []
    for runs in budgets:
        x = np.log([p.parameters for p in runs])
        if len(set(x.tolist())) < 3:
            continue
        square, slope, level = np.polyfit(x - x.mean(), [p.loss for p in runs], 2)
        if square <= 0:
            continue
        at = -slope / (2 * square)
        flops = float(np.exp(np.mean([np.log(p.flops) for p in runs])))
        size = float(np.exp(at + x.mean()))
        inside = bool(x.min() <= at + x.mean() <= x.max())
        found.append(Budget(flops, size, flops / (6 * size), float(level + slope * at / 2), len(runs), inside))
    return found


def exponent(budgets: Sequence[Budget]) -> float | None:
    """a of N_opt = k C^a over several budgets (Chinchilla: 0.49); None with fewer than two."""
    if len(budgets) < 2:
        return None
    return float(np.polyfit(np.log([b.flops for b in budgets]), np.log([b.parameters for b in budgets]), 1)[0])


def _check(points: Sequence[Point]) -> None:
    wrong = [p.name for p in points if not (p.parameters > 0 and p.tokens > 0 and p.loss > 0)]
    if wrong:
        raise HanlinError(f"Parameters, tokens and loss must be positive; they are not in {', '.join(wrong[:4])}.")
    sizes, lengths = len({p.parameters for p in points}), len({p.tokens for p in points})
    if len(points) < LEAST_RUNS or sizes < 3 or lengths < 3:
        raise HanlinError(
            f"{len(points)} runs of {sizes} sizes and {lengths} numbers of tokens cannot tell five constants apart; "
            f"give at least {LEAST_RUNS} runs with three sizes and three numbers of tokens, such as the product of "
            "three by three."
        )


def _starts(N: np.ndarray, D: np.ndarray, L: np.ndarray) -> np.ndarray:
    """(starts, 5) of e, a, b (logarithms), alpha, beta: for each pair of exponents the E, A, B of least squares."""
    grid = np.linspace(0.1, 1.2, 12)
    rows = []
    n, d = N / np.exp(np.log(N).mean()), D / np.exp(np.log(D).mean())
    for alpha in grid:
        for beta in grid:
            columns = np.stack([np.ones_like(L), n**-alpha, d**-beta], 1) / L[:, None]
            found, *_ = np.linalg.lstsq(columns, np.ones_like(L), rcond=None)
            e, a, b = np.log(np.maximum(found, 1e-3 * L.min()))
            rows.append([e, a + alpha * np.log(N).mean(), b + beta * np.log(D).mean(), alpha, beta])
    return np.array(rows)


def _minimise(
    start: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray, copies: np.ndarray, steps: int = 300
) -> tuple[np.ndarray, np.ndarray]:
    """Many fits at once: start (fits, 5); n, d, loss: logarithms (runs,); copies (fits, runs): how often a run counts.
    -> where each ended, and its sum of Huber losses."""
    x, damping = start.copy(), np.full(len(start), 1e-3)
    r, J = _residuals(x, n, d, loss)
    value = (copies * _huber(r)).sum(1)
    for _ in range(steps):
        w = copies * np.minimum(1.0, DELTA / np.maximum(np.abs(r), 1e-300))
        gradient = np.einsum("fr,frk->fk", w * r, J)
        H = np.einsum("fr,frk,frl->fkl", w, J, J)
        scale = np.einsum("fkk->fk", H) + 1e-12
        H[:, range(5), range(5)] += damping[:, None] * scale
        trial = x - np.linalg.solve(H, gradient[..., None])[..., 0]
        r2, J2 = _residuals(trial, n, d, loss)
        new = (copies * _huber(r2)).sum(1)
        better = np.isfinite(new) & (new < value)
        x[better], r[better], J[better] = trial[better], r2[better], J2[better]
        value = np.where(better, new, value)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
    return x, value


def _residuals(x: np.ndarray, n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L_predicted - log L (fits, runs), and its slopes (fits, runs, 5)."""
    e, a, b, alpha, beta = (column[:, None] for column in x.T)
    with np.errstate(over="ignore", invalid="ignore"):
        terms = np.stack(np.broadcast_arrays(e + 0 * n, a - alpha * n, b - beta * d))  # (3, fits, runs)
        top = terms.max(0)
        share = np.exp(terms - top)
        total = share.sum(0)
        share = share / total
        slopes = np.stack([share[0], share[1], share[2], -share[1] * n, -share[2] * d], -1)
        return top + np.log(total) - loss, slopes


def _huber(r: np.ndarray) -> np.ndarray:
    size = np.abs(r)
    return np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))


def _law(x: np.ndarray) -> ScalingLaw:
    e, a, b, alpha, beta = (float(v) for v in x)
    return ScalingLaw(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta)
