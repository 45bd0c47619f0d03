"""From the logits of a step to the next tokens, in the order that `SamplingParams` states:

    logit bias, bans → repetition → presence, frequency → DRY → temperature → top-k → top-p → min-p → typical → draw

A step has many places at which a token is chosen, and each asks for something else. What is asked for is done for those
places together, and only for those: a greedy place costs one pass over its logits. A place's token depends on its own
row only, to the last bit.

A place may stand behind guessed tokens (speculation): penalties, bans and `min_tokens` see these as if they were
written, and the draw is the one that the token at this position has anyway.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.engine.filters import (
    apply_temperature,
    block_sums,
    draw,
    drop_below,
    drop_untypical,
    min_p_floor,
    top_k_floor,
    top_p_floor,
    uniform,
)
from hanlin.engine.penalties import (
    History,
    Ints,
    Words,
    dry_penalties,
    forbid,
    index_words,
    ngram_bans,
    occurrence_penalties,
    penalise_repetition,
    word_bans,
)
from hanlin.engine.types import EVERY, SamplingParams, TokenLogprob

BROKEN = -1  # the "token" of a place whose logits are not finite numbers, or where nothing is allowed
FEW = 1024  # a top-k up to here is taken out of the vocabulary before anything else is done
CHUNK = 64  # prompt tokens whose log-probabilities are computed at once: 64 x 150k take 39 MB


@dataclass(eq=False)
class Row:
    """What sampling knows of one sequence. ids: prompt and output, growing; prompt: tokens of the prompt;
    ends: tokens that would end it, which cannot be drawn before `min_tokens`; seed: of its draws."""

    params: SamplingParams
    ids: list[int]
    prompt: int
    ends: list[int] = field(default_factory=list)
    seed: int = 0
    history: History = field(init=False, repr=False)
    words: Words = field(init=False, repr=False)
    bias: tuple[Ints, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        p = self.params
        bias: dict[int, float] = {}
        for token, added in p.logit_bias:
            bias[token] = bias.get(token, 0.0) + added
        self.bias = np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float64)
        self.words = index_words(p.bad_words)
        self.history = History(p, self.prompt)
        self.penalised = bool(
            p.repetition_penalty != 1
            or p.presence_penalty
            or p.frequency_penalty
            or p.no_repeat_ngram
            or p.dry_multiplier
        )
        self._edited = self.penalised or bool(bias or self.words)

    def edits(self, drafted: Sequence[int] = ()) -> bool:
        """Whether anything is done to the logits behind `drafted`, before the temperature."""
        return self._edited or self.held_open(drafted)

    def held_open(self, drafted: Sequence[int] = ()) -> bool:
        """Whether it is too short to end behind `drafted`."""
        return len(self.ids) + len(drafted) - self.prompt < self.params.min_tokens and bool(self.ends)


@dataclass(frozen=True)
class Place:
    """Where a token is chosen: behind the row's tokens and `drafted`."""

    row: Row
    drafted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """token: `BROKEN` where there is none to choose. logprob: if the row asks for it."""

    token: int
    logprob: TokenLogprob | None = None


class Sampler:
    """Chooses the tokens of steps; all state is the rows'."""

    def __init__(self, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self.vocabulary, self.device = vocabulary, torch.device(device)

    def choose(self, logits: Tensor, places: Sequence[Place], allowed: Tensor | None = None) -> list[Choice]:
        """A token for each place: logits (M, V), which stay as they are.

        allowed: (M, ceil(V / 32)) int32, bit t % 32 of word t // 32 says whether token t may come; all ones where the
        place is not constrained.
        """
        bound = [False] * len(places) if allowed is None else (allowed != -1).any(-1).tolist()
        params = [place.row.params for place in places]
        easy = [
            i for i, p in enumerate(params) if not (p.temperature or bound[i] or places[i].row.edits(places[i].drafted))
        ]
        tokens, reports = [BROKEN] * len(places), dict[int, tuple[float, float]]()  # of a place: kept, drawn
        if easy:
            self._take_best(tokens, easy, logits if len(easy) == len(places) else logits[easy])
        if len(easy) < len(places):
            skip = set(easy)
            hard = [i for i in range(len(places)) if i not in skip]
            masks = None if allowed is None else allowed[hard]
            edited = self._edit(logits[hard].float(), [places[i] for i in hard], masks)
            best = [n for n, i in enumerate(hard) if not params[i].temperature]
            drawn = [n for n, i in enumerate(hard) if params[i].temperature]
            if best:
                self._take_best(tokens, [hard[n] for n in best], edited[best] if drawn else edited)
            if drawn:
                at = [hard[n] for n in drawn]
                reports = self._draw(tokens, at, edited[drawn] if best else edited, [places[i] for i in at])
        logprobs = self._report(logits, tokens, params, reports)
        return [Choice(token, logprobs.get(i)) for i, token in enumerate(tokens)]

    def log_probs(self, logits: Tensor, places: Sequence[Place], allowed: Tensor | None = None) -> Tensor:
        """What a search adds up: logits (M, V) -> (M, V), the log-softmax after everything that `choose` does before it
        draws. It is not normalised again, as in transformers' beam search; temperature 0 leaves it untempered and
        unfiltered. With contrastive search it is, and top-k is left to the search, which counts its candidates so."""
        scores = logits.float().log_softmax(-1)
        contrastive = [i for i, place in enumerate(places) if place.row.params.contrast]
        if contrastive:
            scores[contrastive] = logits[contrastive].float()
        scores = self._edit(scores, places, allowed)
        shaped = [i for i, place in enumerate(places) if place.row.params.temperature and not place.row.params.contrast]
        if shaped:
            params = [places[i].row.params for i in shaped]
            scores[shaped] = self._filter(scores[shaped], params)
        if contrastive:
            scores[contrastive] = scores[contrastive].log_softmax(-1)
        return scores

    @staticmethod
    def _take_best(tokens: list[int], at: Sequence[int], logits: Tensor) -> None:
        best, index = logits.max(-1)
        for i, value, token in zip(at, best.tolist(), index.tolist(), strict=True):
            tokens[i] = token if math.isfinite(value) else BROKEN

    def _draw(
        self, tokens: list[int], at: Sequence[int], edited: Tensor, places: Sequence[Place]
    ) -> dict[int, tuple[float, float]]:
        """Draw, and say how likely it was: {place: (kept, drawn)} where log-probabilities are asked for.

        Of places with top-k, the k likeliest are taken out first, and all else is done on those few. Places with one k
        go together, and with ties at the last one into the whole vocabulary: so nobody depends on a neighbour's k.
        """
        groups: dict[int, list[int]] = {}
        for n, place in enumerate(places):
            k = place.row.params.top_k
            groups.setdefault(k if k <= FEW and k < edited.shape[-1] else 0, []).append(n)
        whole, reports = groups.pop(0, []), dict[int, tuple[float, float]]()

        def draw_from(few: Tensor, ids: Tensor | None, rows: Sequence[int]) -> None:
            mine = [places[n] for n in rows]
            reports.update(self._draw_among(tokens, [at[n] for n in rows], few, ids, edited, rows, mine))

        for k, rows in groups.items():
            values, ids = (edited if len(rows) == len(places) else edited[rows]).topk(k + 1)
            tied = ((values[:, k] == values[:, k - 1]) & values[:, k].isfinite()).tolist()
            whole += [n for n, tie in zip(rows, tied, strict=True) if tie]
            clear = [i for i, tie in enumerate(tied) if not tie]
            if clear:
                ids, order = ids[clear, :k].sort(-1)  # in the order of the vocabulary, as everybody draws
                draw_from(values[clear].gather(-1, order), ids, [rows[i] for i in clear])
        if whole:
            draw_from(edited if whole == [*range(len(places))] else edited[whole], None, whole)
        return reports

    def _draw_among(
        self, tokens: list[int], at: Sequence[int], logits: Tensor, ids: Tensor | None,
        edited: Tensor, rows: Sequence[int], places: Sequence[Place],
    ) -> dict[int, tuple[float, float]]:  # fmt: skip
        """logits, ids (R, W): the tokens that may come (None: all); edited[rows] (R, V): those of the vocabulary."""
        params = [place.row.params for place in places]
        final = self._filter(logits - logits.amax(-1, keepdim=True), params)  # a tiny temperature overflows nothing
        numbers = [uniform(place.row.seed, len(place.row.ids) + len(place.drafted)) for place in places]
        chosen, finite = draw(final, torch.tensor(numbers, dtype=torch.float64, device=final.device))
        drawn = chosen if ids is None else ids.gather(-1, chosen[:, None])[:, 0]
        for i, token in zip(at, torch.where(finite, drawn, BROKEN).tolist(), strict=True):
            tokens[i] = token
        told = [n for n, i in enumerate(at) if params[n].logprobs is not None and tokens[i] != BROKEN]
        if not told:
            return {}
        final = final[told]
        logprob = final.log_softmax(-1).gather(-1, chosen[told][:, None])[:, 0]
        temperature = self._column([params[n].temperature for n in told])
        chance = apply_temperature(edited[[rows[n] for n in told]], temperature).exp()
        total = block_sums(chance).sum(-1)
        among = chance if ids is None else chance.gather(-1, ids[told])
        left = block_sums(torch.where(final > -math.inf, among, 0.0)).sum(-1)
        pairs = zip(told, (left / total).clamp_max_(1.0).tolist(), logprob.tolist(), strict=True)
        return {at[n]: (kept if _filtered(params[n]) else 1.0, value) for n, kept, value in pairs}

    def _filter(self, logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """Temperature and filters, each for the rows that ask for it: (R, V) -> (R, V)."""

        def only(asking: Sequence[bool], change: Callable[[Tensor, list[SamplingParams]], Tensor]) -> None:
            nonlocal logits
            rows = [i for i, asks in enumerate(asking) if asks]
            if len(rows) == len(params):
                logits = change(logits, list(params))
            elif rows:
                logits = logits.index_put((self._index(rows),), change(logits[rows], [params[i] for i in rows]))

        def temper(x: Tensor, p: list[SamplingParams]) -> Tensor:
            return x / self._column([one.temperature for one in p]).clamp_min(1e-30)

        def top_k(x: Tensor, p: list[SamplingParams]) -> Tensor:
            widest = min(max(one.top_k for one in p), x.shape[-1])
            return drop_below(x, top_k_floor(x.topk(widest).values, self._column([one.top_k for one in p]).long()))

        def top_p(x: Tensor, p: list[SamplingParams]) -> Tensor:
            return drop_below(x, top_p_floor(x, self._column([one.top_p for one in p], torch.float64)))

        def min_p(x: Tensor, p: list[SamplingParams]) -> Tensor:
            return drop_below(x, min_p_floor(x, self._column([one.min_p for one in p])))

        def typical(x: Tensor, p: list[SamplingParams]) -> Tensor:
            return drop_untypical(x, self._column([one.typical_p for one in p], torch.float64))

        only([p.temperature != 1 and not p.filters_first for p in params], temper)
        only([p.top_k > 0 for p in params], top_k)
        only([p.top_p < 1 for p in params], top_p)
        only([p.min_p > 0 for p in params], min_p)
        only([p.typical_p < 1 for p in params], typical)
        only([p.temperature != 1 and p.filters_first for p in params], temper)
        return logits

    def _edit(self, logits: Tensor, places: Sequence[Place], allowed: Tensor | None) -> Tensor:
        """Everything that comes before the temperature; logits (M, V) fp32 may be changed in place."""
        bias, bans, repetition, occurrence, dry = ([], [], [], [], [])
        for i, place in enumerate(places):
            row, drafted = place.row, place.drafted
            if not row.edits(drafted):
                continue
            if len(row.bias[0]):
                bias.append((i, *row.bias))
            if row.held_open(drafted):
                bans.append((i, np.array(row.ends, dtype=np.int64), -math.inf))
            if row.words:
                bans.append((i, np.array(word_bans(row.ids, drafted, row.words), dtype=np.int64), -math.inf))
            if not row.penalised:
                continue
            row.history.follow(row.ids)
            seen, params = row.history.seen(drafted), row.params
            if params.no_repeat_ngram:
                bans.append((i, ngram_bans(seen.ids, params.no_repeat_ngram), -math.inf))
            if params.repetition_penalty != 1:
                repetition.append((i, seen.distinct, params.repetition_penalty))
            if params.presence_penalty or params.frequency_penalty:
                values = occurrence_penalties(seen.times, params.presence_penalty, params.frequency_penalty)
                occurrence.append((i, seen.said, values))
            if params.dry_multiplier:
                dry.append((i, *dry_penalties(seen.ids, seen.runs, params)))
        self._change(logits, bias, torch.add)
        self._change(logits, bans, torch.add)
        if allowed is not None:
            bound = (allowed != -1).any(-1).nonzero()[:, 0]
            if len(bound) == len(allowed):
                logits = forbid(logits, allowed.to(logits.device))
            elif len(bound):
                at = bound.to(logits.device)
                logits[at] = forbid(logits[at], allowed[bound].to(logits.device))
        self._change(logits, repetition, penalise_repetition)
        self._change(logits, occurrence, torch.sub)
        self._change(logits, dry, torch.sub)
        return logits

    def _change(
        self,
        logits: Tensor,
        changes: Sequence[tuple[int, Ints, np.ndarray | float]],
        how: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Change some logits in place: (row, tokens, a value each or one for all), by how(logits, values)."""
        if not changes:
            return
        rows = np.repeat([i for i, _, _ in changes], [len(tokens) for _, tokens, _ in changes])
        tokens = np.concatenate([tokens for _, tokens, _ in changes])
        values = np.concatenate([np.broadcast_to(value, tokens.shape) for _, tokens, value in changes])
        inside = tokens < logits.shape[-1]  # of a prompt's tokens, the model may have some that it never says
        if not inside.all():
            rows, tokens, values = rows[inside], tokens[inside], values[inside]
        where = self._index(rows), self._index(tokens)
        logits[where] = how(logits[where], torch.tensor(values, dtype=logits.dtype, device=logits.device))

    def _report(
        self,
        logits: Tensor,
        tokens: Sequence[int],
        params: Sequence[SamplingParams],
        reports: dict[int, tuple[float, float]],
    ) -> dict[int, TokenLogprob]:
        groups: dict[int, list[int]] = {}
        for i, (token, p) in enumerate(zip(tokens, params, strict=True)):
            if p.logprobs is not None and token != BROKEN:
                groups.setdefault(p.logprobs, []).append(i)
        found: dict[int, TokenLogprob] = {}
        for count, at in groups.items():
            pairs = [reports.get(i, (1.0, 0.0)) for i in at]
            found |= zip(at, report_logprobs(logits[at], [tokens[i] for i in at], count, pairs), strict=True)
        return found

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)[:, None]  # (rows, 1)

    def _index(self, values: Sequence[int] | Ints) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int64, device=self.device)


def check_tokens(params: SamplingParams, vocabulary: int) -> None:
    """Refuse parameters that name tokens which the model does not have, or biases that are no numbers."""
    named = {
        "logit_bias": [token for token, _ in params.logit_bias],
        "bad_words": [token for word in params.bad_words for token in word],
        "stop_token_ids": params.stop_token_ids,
        "dry_breakers": params.dry_breakers,
    }
    for name, tokens in named.items():
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise HanlinError(f"{name} has the token {wrong[0]}; this model's ids go from 0 to {vocabulary - 1}.")
    if wrong := [added for _, added in params.logit_bias if not math.isfinite(added)]:
        raise HanlinError(f"logit_bias adds {wrong[0]}; it must be a finite number. To forbid a token, use bad_words.")


def report_logprobs(
    logits: Tensor, tokens: Sequence[int], count: int, pairs: Sequence[tuple[float, float]] | None = None
) -> list[TokenLogprob]:
    """Tokens under the model's own distribution: logits (rows, V) unfiltered; count: alternatives to report, -1 all;
    pairs: (kept, drawn) of each."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    size = logits.shape[-1]
    values, ids = logprobs.topk(size if count == EVERY else min(count, size))
    rows = zip(tokens, own, ids.tolist(), values.tolist(), pairs or [(1.0, 0.0)] * len(tokens), strict=True)
    return [TokenLogprob(t, lp, tuple(zip(i, v, strict=True)), *pair) for t, lp, i, v, pair in rows]


def prompt_logprobs(logits: Tensor, ids: Sequence[int] | Tensor, count: int) -> list[TokenLogprob]:
    """The log-probability of each of ids (T,), with `count` alternatives, -1 all: logits (T, V), each row that before
    its token. kept is 1 and drawn 0: nobody drew them."""
    tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), CHUNK):
        end = start + CHUNK
        found += report_logprobs(logits[start:end], tokens[start:end], count)
    return found


def _filtered(params: SamplingParams) -> bool:
    return bool(params.top_k or params.top_p < 1 or params.min_p or params.typical_p < 1)
