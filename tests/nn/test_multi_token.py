"""Multi-token prediction against a twin that reads every document by itself and only tokens that exist, and against
transformers' module."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_layers import MtpLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from hanlin.core.errors import HanlinError
from hanlin.nn.losses import IGNORE, count_targets
from hanlin.nn.masks import Causal, SameDocument
from hanlin.nn.multi_token import MultiTokenPrediction, losses_ahead, targets_ahead
from hanlin.nn.norms import RMSNorm

WIDTH, VOCABULARY, DEPTH = 6, 11, 3
TOLERANCE = {"rtol": 0, "atol": 1e-10}


class Block(nn.Module):
    """A layer that lets tokens see each other: one attention head, a residual, a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf"))
        return x + torch.tanh(self.out(scores.softmax(-1) @ v))


class Model:
    """What a decoder gives to the module: embedding, head, and how a layer is run."""

    def __init__(self, depth: int = DEPTH) -> None:
        torch.manual_seed(0)
        self.ahead = MultiTokenPrediction(depth, WIDTH, layer=lambda k: Block(), norm=lambda: RMSNorm(WIDTH)).double()
        self.embedding, self.head = (
            torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2)
        )
        for name, parameter in self.ahead.named_parameters():
            norm = "norm.weight" in name
            parameter.data.normal_(1.0 if norm else 0.0, 0.1 if norm else 0.5)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.embedding, self.head, *self.ahead.parameters()]

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.head.T

    def run(self, visible: Tensor):
        return lambda layer, x: layer(x, visible)


def one_step(model: Model, k: int, hidden: list[Tensor], tokens: list[int]) -> list[Tensor]:
    """Equations 21 and 22 for one document: hidden[i] is h^{k-1} of token i, of which the first T - k go on."""
    step: Any = model.ahead.steps[k - 1]

    def norm(vector: Tensor, module: RMSNorm) -> Tensor:
        return vector / (vector.square().mean() + module.eps).sqrt() * module.weight

    rows = []
    for i in range(len(tokens) - k):
        ahead = norm(model.embedding[tokens[i + k]], step.enorm)
        rows.append(step.eh_proj.weight @ torch.cat([ahead, norm(hidden[i], step.hnorm)]))
    if not rows:
        return []
    seen = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
    return [norm(row, step.norm) for row in step.layer(torch.stack(rows), seen)]


def by_documents(model: Model, hidden: Tensor, ids: Tensor, documents: Tensor, depth: int) -> list[Tensor]:
    """The sum of each step's losses, document by document."""
    sums = [torch.zeros((), dtype=torch.float64) for _ in range(depth)]
    for r in range(len(ids)):
        for document in set(documents[r].tolist()) - {-1}:
            where = (documents[r] == document).nonzero()[:, 0].tolist()
            tokens = [int(ids[r, t]) for t in where]
            states = [hidden[r, t] for t in where]
            for k in range(1, depth + 1):
                states = one_step(model, k, states, tokens)
                for i in range(len(tokens) - k - 1):  # predicts token i + k + 1
                    sums[k - 1] = sums[k - 1] - (model.head @ states[i]).log_softmax(-1)[tokens[i + k + 1]]
    return sums


def packed(rows: int, length: int, seed: int, borders: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids, documents (the first row ends in padding) and the decoder's targets."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=g)
    documents = (torch.rand(rows, length, generator=g) < borders).long().cumsum(-1)
    documents[0, length - length // 4 :] = -1
    targets = torch.full_like(ids, IGNORE)
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    targets[:, :-1] = torch.where(same, ids[:, 1:], IGNORE)
    return ids, documents, targets


def visible(documents: Tensor) -> Tensor:
    index = torch.arange(documents.shape[1])
    return (Causal() & SameDocument(documents)).dense(index, index)


@given(length=st.integers(1, 9), seed=st.integers(0, 10_000), borders=st.sampled_from([0.0, 0.2, 0.5]))
@settings(max_examples=60, deadline=None)
def test_packed_losses_equal_separate_documents(length, seed, borders):
    model = Model()
    ids, documents, targets = packed(2, length, seed, borders)
    hidden = torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    outputs = model.ahead(hidden, ids, embed=model.embed, run=model.run(visible(documents)))
    found = losses_ahead(outputs, model.head, targets, documents)
    expected = by_documents(model, hidden, ids, documents, DEPTH)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_gradients_equal_those_of_separate_documents():
    model = Model()
    ids, documents, targets = packed(2, 10, 5, 0.2)
    hidden = torch.randn(2, 10, WIDTH, dtype=torch.float64, requires_grad=True)
    outputs = model.ahead(hidden, ids, embed=model.embed, run=model.run(visible(documents)))
    inputs = [hidden, *model.parameters]
    weights = torch.rand(DEPTH, dtype=torch.float64)
    found = torch.autograd.grad(weights @ torch.stack(losses_ahead(outputs, model.head, targets, documents)), inputs)
    by_twin = by_documents(model, hidden, ids, documents, DEPTH)
    expected = torch.autograd.grad(weights @ torch.stack(by_twin), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
        assert b.abs().max() > 0


def test_every_step_counts_one_target_less_a_document():
    ids = torch.arange(9)[None]
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, -1]])
    targets = torch.tensor([[1, 2, 3, 4, IGNORE, 6, 7, IGNORE, IGNORE]])
    assert targets_ahead(targets, 1, documents).tolist() == [[2, 3, 4, *[IGNORE] * 2, 7, *[IGNORE] * 3]]
    counts = [count_targets(targets_ahead(targets, k, documents)) for k in range(6)]
    assert counts == [4 + 2, 3 + 1, 2, 1, 0, 0]
    assert targets_ahead(targets, 20, documents).tolist() == [[IGNORE] * 9]
    assert targets_ahead(ids, 2).tolist() == [[2, 3, 4, 5, 6, 7, 8, IGNORE, IGNORE]]


def test_a_target_that_is_not_trained_is_not_trained_ahead_either():
    targets = torch.tensor([[1, IGNORE, 3, IGNORE, 5]])  # as of a prompt
    assert targets_ahead(targets, 1).tolist() == [[IGNORE, 3, IGNORE, 5, IGNORE]]


def test_a_draft_equals_the_chain_by_hand():
    """Step k of the last token reads the proposal of step k - 1; the tokens before read what was really written."""
    model = Model()
    text = torch.randint(0, VOCABULARY, (2, 8))
    hidden = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    draft = model.ahead.draft(
        hidden, text[:, 1:], embed=model.embed, head=model.logits, run=model.run(visible(torch.zeros(2, 7)[:].long()))
    )
    assert draft.ids.shape == (2, DEPTH) and draft.logits.shape == (2, DEPTH, VOCABULARY)
    for r in range(2):
        tokens, states = text[r].tolist(), list(hidden[r])
        for k in range(1, DEPTH + 1):
            states = one_step(model, k, states, [*tokens[: 7 + k]])
            logits = model.head @ states[-1]
            torch.testing.assert_close(draft.logits[r, k - 1], logits, **TOLERANCE)
            assert int(draft.ids[r, k - 1]) == int(logits.argmax())
            tokens.append(int(logits.argmax()))


def test_a_draft_of_known_text_is_what_training_computes():
    model = Model(depth=2)
    text, hidden = torch.randint(0, VOCABULARY, (1, 9)), torch.randn(1, 9, WIDTH, dtype=torch.float64)
    outputs = model.ahead(hidden, text, embed=model.embed, run=model.run(visible(torch.zeros(1, 9).long())))
    forced = iter([text[:, 7], text[:, 8]])
    draft = model.ahead.draft(
        hidden[:, :6], text[:, 1:7], embed=model.embed, head=model.logits,
        run=model.run(visible(torch.zeros(1, 6).long())), choose=lambda logits: next(forced),
    )  # fmt: skip
    torch.testing.assert_close(draft.logits[:, 0], model.logits(outputs[0][:, 5]), **TOLERANCE)
    torch.testing.assert_close(draft.logits[:, 1], model.logits(outputs[1][:, 5]), **TOLERANCE)
    assert draft.ids.tolist() == text[:, 7:].tolist()


def test_a_step_equals_transformers():
    """Its norms compute in fp32."""
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=8, num_attention_heads=1, num_key_value_heads=1)
    config._attn_implementation = "sdpa"
    theirs: Any = MtpLayer(config, LlamaDecoderLayer, LlamaRMSNorm, 0)
    for parameter in theirs.parameters():
        parameter.data.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    ours = MultiTokenPrediction(1, WIDTH, layer=lambda k: theirs.mtp_block, norm=lambda: RMSNorm(WIDTH))
    for name, part in {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "norm": "post_norm"}.items():
        ours.steps[0].get_submodule(name).load_state_dict(theirs.get_submodule(part).state_dict())
    ids, hidden = torch.randint(0, VOCABULARY, (2, 5)), torch.randn(2, 5, WIDTH)
    embedding = torch.randn(VOCABULARY, WIDTH)
    places = torch.arange(5)[None]
    rest = {"position_embeddings": LlamaRotaryEmbedding(config)(hidden, places), "attention_mask": None}
    (out,) = ours(hidden, ids, embed=lambda i: F.embedding(i, embedding), run=lambda layer, x: layer(x, **rest))
    shifted = F.embedding(torch.cat([ids[:, 1:], ids.new_zeros(2, 1)], 1), embedding)
    expected = theirs(shifted, hidden, position_ids=places, past_key_values=None, **rest)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused():
    with pytest.raises(HanlinError, match="at least 1, found 0"):
        Model(depth=0)
    model = Model()
    with pytest.raises(HanlinError, match=r"\(2, 5\) tokens do not fit ids of \(2, 4\)"):
        model.ahead(torch.zeros(2, 5, WIDTH), torch.zeros(2, 4).long(), embed=model.embed, run=model.run)
