"""NEFTune's noise and DFT's loss: the papers' formulas, the same for every packing, in training only, and resumed."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_training import LENGTH, TinySource, assert_same_bits, tiny_model, train, weights
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.core.runs import Run
from hanlin.data.batch import Batch, document_positions, next_token_targets
from hanlin.models.transformer import Transformer
from hanlin.nn.chunked_head import Head
from hanlin.nn.losses import IGNORE, linear_dft
from hanlin.train import CausalLM
from hanlin.train.balance import Balance
from hanlin.train.gradient import Gradient
from hanlin.train.objective import step_loss
from hanlin.train.objectives.supervised import Supervised, noise_scale, noisy_embeddings, uniform

BATCH = TinySource(8).batch(1)


def dft_oracle(logits: Tensor, targets: Tensor) -> Tensor:
    """Equation and stop-gradient as the paper has them, over whole logits."""
    keep = targets != IGNORE
    log_p = logits[keep].log_softmax(-1).gather(-1, targets[keep][:, None])[:, 0]
    return -(log_p.exp().detach() * log_p).sum()


def gradients(model: Transformer, objective: CausalLM, parts: list[Batch]) -> list[Tensor]:
    totals: dict[str, float] = {}
    for part in parts:
        for name, count in objective.count(part).items():
            totals[name] = totals.get(name, 0.0) + count
    model.zero_grad()
    for part in parts:
        step_loss(objective.loss(model, part)[0], totals).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(one: list[Tensor], other: list[Tensor], *, rtol: float = 1e-12) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a - b).norm() <= rtol * max(float(a.norm()), 1e-3)


def documents_alone(batch: Batch) -> list[tuple[Batch, int, Tensor]]:
    """Each document of a batch as a row of its own, with its row and its places there."""
    found = []
    for row in range(len(batch)):
        for number in range(int(batch.documents[row].max()) + 1):
            places = (batch.documents[row] == number).nonzero()[:, 0]
            ids = batch.ids[row, places][None]
            zeros = torch.zeros_like(ids)
            alone = Batch(ids, next_token_targets(ids, zeros), document_positions(zeros), zeros)
            found.append((alone, row, places))
    return found


# --- DFT ---


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.5, 0.8)])
def test_dft_through_the_head_is_the_papers_formula_over_all_logits(chunk, softcap, scale):
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 7))
    targets[1, 2:5] = IGNORE
    logits = (hidden @ weight.T + bias) * scale
    expected = dft_oracle(logits if softcap is None else torch.tanh(logits / softcap) * softcap, targets)
    found = linear_dft(hidden, Head(weight, bias, softcap, scale), targets, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    inputs = (hidden, weight, bias)
    assert_same(list(torch.autograd.grad(found * 3, inputs)), list(torch.autograd.grad(expected * 3, inputs)))
    with torch.no_grad():
        torch.testing.assert_close(linear_dft(hidden, Head(weight, bias, softcap, scale), targets), expected)


def test_the_objective_with_dft_equals_the_oracle():
    model = tiny_model().double()
    found, metrics = Supervised(loss="dft").loss(model, BATCH)
    hidden = CausalLM().run(model, BATCH).hidden
    expected = dft_oracle(model.logits(hidden), BATCH.targets)
    torch.testing.assert_close(found[0][0], expected, rtol=1e-12, atol=0)
    assert metrics["loss"] == (pytest.approx(expected.item(), rel=1e-12), CausalLM().count(BATCH)["tokens"])
    assert 0 < expected.item() < CausalLM().loss(model, BATCH)[0][0][0].item()
    oracle = torch.autograd.grad(expected / CausalLM().count(BATCH)["tokens"], list(model.parameters()))
    assert_same(gradients(model, Supervised(loss="dft"), [BATCH]), list(oracle))


def test_dft_is_one_loss_for_every_packing_and_every_split_into_micro_batches():
    model, objective = tiny_model().double(), Supervised(loss="dft")
    whole = gradients(model, objective, [BATCH])
    assert_same(whole, gradients(model, objective, [BATCH.rows(i, i + 1) for i in range(8)]))
    assert_same(whole, gradients(model, objective, [alone for alone, _, _ in documents_alone(BATCH)]))


def test_tokens_further_ahead_have_the_same_loss():
    torch.manual_seed(0)
    model = Transformer(replace(tiny_model().config, predict_ahead=1)).double()
    _, metrics = Supervised(loss="dft", ahead=1).loss(model, BATCH)
    _, plain = Supervised(ahead=1).loss(model, BATCH)
    assert 0 < metrics["loss_1_ahead"][0] < plain["loss_1_ahead"][0]


# --- NEFTune ---


def test_the_size_of_the_noise_is_that_of_the_paper_for_each_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    three, two, six = (5 / math.sqrt(length * 32) for length in (3, 2, 6))
    expected = torch.tensor([[three, three, three, two, two, 0.0], [six] * 6])
    torch.testing.assert_close(noise_scale(documents, 32, 5.0), expected)


def test_the_noise_is_uniform_within_its_bounds_and_padding_has_none():
    model = tiny_model().train()
    torch.manual_seed(0)
    with noisy_embeddings(model, BATCH.documents, 10.0):
        noise = model.embed(BATCH.ids) - model.model.embed_tokens.weight[BATCH.ids]
    scale = noise_scale(BATCH.documents, 32, 10.0)[..., None]
    assert (noise.abs() <= scale * (1 + 1e-5) + 1e-6).all()
    assert (noise[BATCH.documents < 0] == 0).all() and (BATCH.documents < 0).any()
    share = (noise / scale).detach()[BATCH.documents >= 0]  # uniform in [-1, 1]: mean 0, variance 1/3
    assert abs(float(share.mean())) < 5 * math.sqrt(1 / 3 / share.numel())
    assert float(share.var()) == pytest.approx(1 / 3, rel=0.05)


def test_noise_is_the_same_packed_and_alone():
    """Given the same draw for the same token, loss and gradients agree to 1e-12 in fp64, with both losses."""
    model = tiny_model().double().train()
    drawn = uniform(torch.empty(*BATCH.ids.shape, 32, dtype=torch.float64))
    for objective in (CausalLM(), Supervised(loss="dft")):

        def noisy(batch: Batch, draw: Tensor, objective: CausalLM = objective) -> Tensor:
            with noisy_embeddings(model, batch.documents, 5.0, draw=lambda vectors: draw):
                return objective.loss(model, batch)[0][0][0]

        together = noisy(BATCH, drawn)
        alone = sum(noisy(part, drawn[row, places][None]) for part, row, places in documents_alone(BATCH))
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)
        assert abs((together - objective.loss(model, BATCH)[0][0][0]).item()) > 1e-3
        parameters = list(model.parameters())
        assert_same(list(torch.autograd.grad(together, parameters)), list(torch.autograd.grad(alone, parameters)))


def test_there_is_noise_in_training_and_none_in_an_evaluation():
    model, objective = tiny_model(), Supervised(neftune=5.0)
    exact = CausalLM().loss(model.eval(), BATCH)[0][0][0]
    assert torch.equal(objective.loss(model, BATCH)[0][0][0], exact)
    first, second = (objective.loss(model.train(), BATCH)[0][0][0] for _ in range(2))
    assert not torch.equal(first, exact) and not torch.equal(first, second)
    assert torch.equal(CausalLM().loss(model, BATCH)[0][0][0], exact)  # and nothing of it stays in the model
    with pytest.raises(RuntimeError), noisy_embeddings(model, BATCH.documents, 5.0):
        raise RuntimeError
    assert torch.equal(CausalLM().loss(model, BATCH)[0][0][0], exact)


def test_without_noise_and_dft_it_is_causal_lm():
    model = tiny_model().train()
    assert torch.equal(Supervised().loss(model, BATCH)[0][0][0], CausalLM().loss(model, BATCH)[0][0][0])


# --- what does not go together ---


@pytest.mark.parametrize("axis", ["pipeline", "context"])
def test_noise_is_refused_where_a_process_has_no_whole_documents(axis):
    cluster = SimpleNamespace(**{"pipeline": None, "context": None, axis: object()})
    make = partial(Gradient, tiny_model(), cluster=cluster, balance=Balance(tiny_model(), None))
    with pytest.raises(HanlinError, match=r"objective\.neftune needs whole documents"):
        make(Supervised(neftune=5.0))
    make(Supervised(loss="dft"))


def test_what_a_process_alone_cannot_do_is_refused():
    model = tiny_model().train()
    model.part = SimpleNamespace()
    with pytest.raises(HanlinError, match=r"parallel\.tensor"):
        Supervised(neftune=5.0).run(model, BATCH)
    with pytest.raises(HanlinError, match=r"dft .*parallel\.tensor"):
        Supervised(loss="dft").cost(model, torch.zeros(1, 32), torch.zeros(1, dtype=torch.int64))
    compiled = tiny_model().train()
    compiled._compiled_call_impl = compiled._call_impl  # as `compile` leaves it, without its two seconds
    with pytest.raises(HanlinError, match=r"train\.compile"):
        Supervised(neftune=5.0).run(compiled, BATCH)
    with pytest.raises(HanlinError, match=r"z_loss belongs to the loss nll"):
        Supervised(loss="dft", z_loss=1e-4)
    for size in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(HanlinError, match="neftune"):
            Supervised(neftune=size)


# --- resuming ---


def test_a_run_with_noise_goes_on_bit_for_bit(tmp_path):
    settings = {"steps": 8, "save_every": 3, "keep_last": 9, "micro_batch_size": 4}
    train(tmp_path / "whole", settings, objective=Supervised(neftune=5.0))
    (tmp_path / "cut" / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole/checkpoints/step-3").rename(tmp_path / "cut/checkpoints/step-3")
    train(tmp_path / "cut", settings, objective=Supervised(neftune=5.0), model=tiny_model(seed=7))
    assert [step for step, _ in Run.open(tmp_path / "cut").checkpoints()] == [3, 6, 8]
    assert_same_bits(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    train(tmp_path / "quiet", settings)
    assert not torch.equal(*(weights(tmp_path / name)["model.embed_tokens.weight"] for name in ("quiet", "whole")))


@pytest.mark.parametrize(
    ("first", "then", "field"),
    [
        (Supervised(neftune=5.0), Supervised(neftune=10.0), r"objective_settings\.neftune was 5\.0, now 10\.0"),
        (Supervised(neftune=5.0), Supervised(loss="dft"), r"objective_settings\.loss was 'nll', now 'dft'"),
        (CausalLM(), Supervised(loss="dft"), r"objective was 'CausalLM', now 'Supervised'"),
    ],
)
def test_another_objective_is_another_run(tmp_path, first, then, field):
    train(tmp_path, {"steps": 2}, objective=first)
    with pytest.raises(HanlinError, match=field):
        train(tmp_path, {"steps": 2}, objective=then)
    train(tmp_path, {"steps": 2}, objective=first)


def test_the_weight_of_further_tokens_is_part_of_a_run():
    assert CausalLM().fingerprint() == CausalLM(ahead=1).fingerprint() == CausalLM(ahead_weight=0.5).fingerprint() == {}
    assert CausalLM(ahead=1, ahead_weight=0.5).fingerprint() == {"ahead_weight": 0.5}


def test_the_batch_holds_what_these_tests_are_about():
    """Rows of several documents, of unequal lengths, padded, and some without a target."""
    assert BATCH.ids.shape == (8, LENGTH) and int(BATCH.documents.max()) >= 2
    assert len({len(places) for _, _, places in documents_alone(BATCH)}) >= 4
