"""Heads against loops over rows and tokens in fp64, with padding on both sides and NaN standing in it."""

import math

import pytest
import torch

from hanlin.core.errors import HanlinError
from hanlin.nn.heads import (
    NextSentence,
    Pooler,
    SequenceClassifier,
    TokenClassifier,
    ValueHead,
    last_index,
    pool,
    sequence_scores,
)

EXACT = {"rtol": 0, "atol": 1e-10}
VALID = torch.tensor(
    [
        [True, True, True, True, True],
        [True, True, True, False, False],
        [False, False, True, True, True],
        [False, True, False, True, False],
    ]
)


def states() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 5, 6, dtype=torch.float64)


def padded_with_nan() -> torch.Tensor:
    return states().masked_fill(~VALID[..., None], math.nan)


def redraw(module):
    module = module.double()
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.7)
    return module


def pooled_by_loops(hidden, valid, kind):
    rows = []
    for row, real in zip(hidden, valid, strict=True):
        tokens = [token for token, there in zip(row, real, strict=True) if there]
        if kind == "cls":
            rows.append(tokens[0])
        elif kind == "last":
            rows.append(tokens[-1])
        elif kind == "mean":
            rows.append(sum(tokens) / len(tokens))
        else:
            rows.append(torch.stack([max(numbers) for numbers in zip(*tokens, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ["cls", "mean", "max", "last"])
def test_pooling_equals_the_loops(kind, normalise):
    for hidden, valid in ((padded_with_nan(), VALID), (states(), None)):
        expected = pooled_by_loops(hidden, torch.ones_like(VALID) if valid is None else valid, kind)
        if normalise:
            expected = torch.stack([v / math.sqrt(sum(float(n) ** 2 for n in v)) for v in expected])
        torch.testing.assert_close(pool(hidden, valid, kind=kind, normalise=normalise), expected, **EXACT)


def test_the_mean_of_many_is_summed_in_fp32():
    torch.manual_seed(1)
    hidden = (torch.randn(1, 4000, 3) + 8).bfloat16()
    assert (pool(hidden, kind="mean") - hidden.double().mean(1)).abs().max() <= 8 * 2**-8


def test_the_last_token_is_found_on_either_side():
    assert last_index(VALID).tolist() == [4, 2, 4, 3]


def test_a_pooler_is_transformers_berts():
    from transformers.models.bert.modeling_bert import BertConfig, BertPooler

    ours = redraw(Pooler(6))
    theirs = BertPooler(BertConfig(hidden_size=6)).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(states()), theirs(states()), **EXACT)


def test_the_next_sentence_head_reads_the_pooler():
    head, hidden = redraw(NextSentence(6)), padded_with_nan()
    expected = []
    for row, real in zip(hidden, VALID, strict=True):
        first = row[real.tolist().index(True)]
        dense, last = head.pooler.dense, head.classifier
        expected.append(last.weight @ torch.tanh(dense.weight @ first + dense.bias) + last.bias)
    out = head(hidden, VALID)
    assert out.shape == (4, 2)
    torch.testing.assert_close(out, torch.stack(expected), **EXACT)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_a_text_is_classified_by_what_was_pooled(pooling, bias):
    head = redraw(SequenceClassifier(6, 3, pooling=pooling, bias=bias))
    linear = head.classifier
    expected = []
    for vector in pooled_by_loops(padded_with_nan(), VALID, pooling):
        scores = [sum(w * x for w, x in zip(linear.weight[c], vector, strict=True)) for c in range(3)]
        expected.append(torch.stack(scores) + (linear.bias if bias else 0))
    torch.testing.assert_close(head(padded_with_nan(), VALID), torch.stack(expected), **EXACT)


def test_berts_classifier_has_the_pooler_in_between():
    head = redraw(SequenceClassifier(6, 3, pooling="cls", pooler=True, bias=True))
    expected = head.classifier(torch.tanh(head.pooler.dense(states()[:, 0])))
    torch.testing.assert_close(head(states()), expected, **EXACT)
    with pytest.raises(HanlinError, match="cls"):
        SequenceClassifier(6, 3, pooler=True)


def test_llamas_classifier_is_the_same():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=20, num_labels=3, pad_token_id=0, **sizes)
    theirs = LlamaForSequenceClassification(config).double().eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 12, 13, 0]])
    head = SequenceClassifier(16, 3).double()
    head.classifier.load_state_dict(theirs.score.state_dict())
    with torch.no_grad():
        expected = theirs(ids, attention_mask=(ids != 0).long()).logits
        hidden = theirs.model(ids, attention_mask=(ids != 0).long()).last_hidden_state
        torch.testing.assert_close(head(hidden, ids != 0), expected, **EXACT)


def test_tokens_are_classified_one_by_one():
    head, hidden = redraw(TokenClassifier(6, 3)), states()
    out = head(hidden)
    for r in range(4):
        for t in range(5):
            expected = head.classifier.weight @ hidden[r, t] + head.classifier.bias
            torch.testing.assert_close(out[r, t], expected, **EXACT)


def test_values_are_fp32_numbers_that_start_at_0():
    head = ValueHead(6)
    assert torch.equal(head(states().float()), torch.zeros(4, 5))
    redraw(head)
    out = head(states())
    assert out.shape == (4, 5)
    assert out[1, 2].item() == pytest.approx(
        (head.value.weight[0] @ states()[1, 2] + head.value.bias).item(), abs=1e-10
    )
    assert head(states().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("make", [SequenceClassifier, TokenClassifier])
def test_dropout_acts_in_training_only(make):
    head = redraw(make(6, 3, dropout=1.0, bias=True))
    torch.testing.assert_close(head(states()), head.classifier.bias.expand(head(states()).shape), **EXACT)
    bare = make(6, 3, bias=True).double()
    bare.load_state_dict(head.state_dict())
    assert torch.equal(head.eval()(states()), bare(states()))


def test_a_score_is_the_sum_of_the_counted_tokens_logprobs():
    torch.manual_seed(3)
    logits, ids = torch.randn(4, 5, 7, dtype=torch.float64), torch.randint(7, (4, 5))
    total, tokens = sequence_scores(logits, ids, VALID)
    for r in range(4):
        expected, count = 0.0, 0
        for t in range(1, 5):
            if VALID[r, t]:
                row = logits[r, t - 1].tolist()
                expected += row[int(ids[r, t])] - math.log(sum(math.exp(x) for x in row))
                count += 1
        assert float(total[r]) == pytest.approx(expected, abs=1e-10)
        assert int(tokens[r]) == count


def test_all_texts_of_a_length_have_probability_1_together():
    """With logits that do not depend on the text: the scores of all 3^2 continuations sum to 1."""
    logits = torch.randn(3, 3, dtype=torch.float64)
    ids = torch.tensor([[0, a, b] for a in range(3) for b in range(3)])
    total, _ = sequence_scores(logits.expand(9, 3, 3), ids, torch.ones(9, 3, dtype=torch.bool))
    assert float(total.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(HanlinError, match="Row 1"):
        pool(torch.ones(2, 3, 4), torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(HanlinError, match="bool"):
        pool(torch.ones(2, 3, 4), torch.ones(2, 3))
    with pytest.raises(HanlinError, match="median"):
        pool(torch.ones(2, 3, 4), kind="median")
    with pytest.raises(HanlinError, match="do not belong"):
        sequence_scores(torch.ones(2, 3, 4), torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool))
