"""Every pretraining objective trained for real at test size: English and Chinese sentences, a small model, the Trainer.

The loss must fall well below what is known without reading the row (the tokens' frequencies).
"""

import math
from collections import Counter

import numpy as np
import pytest
import tiny_families
import torch

from hanlin.core.metrics import read_metrics
from hanlin.core.runs import Run
from hanlin.data.corruption.boundaries import SentenceTable, WordTable, spellings
from hanlin.data.corruption.rows import (
    DenoisingRows,
    MaskedRows,
    PairRows,
    PermutationRows,
    PrefixRows,
    SpanRows,
)
from hanlin.data.pretraining_batches import CorruptedText, ListedDocuments
from hanlin.tokens import Tokenizer
from hanlin.train import Trainer, TrainSettings
from hanlin.train.objectives.masked_lm import MaskedLM
from hanlin.train.objectives.permutation_lm import PermutationLM
from hanlin.train.objectives.prefix_lm import PrefixLM
from hanlin.train.objectives.seq2seq import Seq2Seq

SENTENCES = [
    "The model reads the text and writes numbers.",
    " Students of the academy read books every day.",
    " It learns from words that stand before and after.",
    "翰林院里的书很多,学生们每天都在读书。",
    "语言模型把文字变成数字,再把数字变成文字。",
    "今天天气很好,我们一起去公园散步。",
]
MARKERS = ["[CLS]", "[SEP]", "[MASK]", *(f"<extra_{n}>" for n in range(12))]
SEQ_LEN = 48


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_iterator(SENTENCES * 4, vocab_size=480, special=MARKERS)


@pytest.fixture(scope="module")
def documents(tokenizer) -> ListedDocuments:
    """Stories of three sentences in a row that always follow one another: what comes next can be learnt."""
    ids = [tokenizer.encode(sentence) for sentence in SENTENCES]
    stories = [[*ids[first], *ids[(first + 1) % 6], *ids[(first + 2) % 6]] for first in range(6)]
    return ListedDocuments(stories * 4, [f"story-{n}" for n in range(24)])


@pytest.fixture(scope="module")
def makers(tokenizer):
    special, spelt = tokenizer.special, spellings(tokenizer)
    cls, sep, mask = (special[name] for name in MARKERS[:3])
    end, pad = tokenizer.eos_id, tokenizer.pad_id
    ordinary = np.setdiff1d(np.arange(tokenizer.size), list(special.values()))
    masked = {
        "seq_len": SEQ_LEN,
        "cls_id": cls,
        "sep_id": sep,
        "mask_id": mask,
        "pad_id": pad,
        "replacements": ordinary,
    }
    sentinels = tuple(special[name] for name in MARKERS[3:])
    table = SentenceTable(spelt)
    return {
        "masked": MaskedRows(**masked, words=WordTable.of(spelt)),
        "pairs": PairRows(**masked, sentences=table),
        "prefix": PrefixRows(SEQ_LEN, end_id=end, pad_id=pad),
        "t5": SpanRows(SEQ_LEN, end_id=end, start_id=pad, pad_id=pad, sentinels=sentinels),
        "bart": DenoisingRows(SEQ_LEN, cls, end, end, mask, pad, table),
        "xlnet": PermutationRows(SEQ_LEN, pad, (sep, cls)),
    }


METHODS = {  # objective, model, steps
    "masked": (MaskedLM, tiny_families.bert, 120),
    "pairs": (MaskedLM, lambda vocabulary: tiny_families.bert(vocabulary, pairs=True), 240),
    "prefix": (PrefixLM, tiny_families.decoder, 60),
    "t5": (Seq2Seq, tiny_families.t5, 180),
    "bart": (Seq2Seq, tiny_families.bart, 60),
    "xlnet": (PermutationLM, tiny_families.xlnet, 100),
}


def unigram_entropy(documents: ListedDocuments) -> float:
    """Nats a token that frequencies alone leave open."""
    counts = Counter(token for ids in documents._ids for token in ids.tolist())
    return -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_far_below_what_frequencies_know(method, documents, makers, tokenizer, tmp_path):
    objective, build, steps = METHODS[method]
    torch.manual_seed(0)
    model = build(tokenizer.size)
    source = CorruptedText(documents, makers[method], rows_per_step=12, seed=1)
    settings = TrainSettings.model_validate(
        {"batch_size": 12, "steps": steps, "lr": 1e-2, "precision": "fp32", "log_every": 20}
    )
    run = Run.open(tmp_path / method)
    result = Trainer(model, objective(), source, settings, run=run, seed=0, quiet=True).fit()
    rows = read_metrics(run.path / "metrics.jsonl")
    name = "mlm_loss" if method == "pairs" else "loss"
    first, last = rows[0][name], rows[-1][name]
    assert result.finished and first > 0.9 * unigram_entropy(documents)
    assert last < 0.5 * unigram_entropy(documents), [row[name] for row in rows]
    if method == "pairs":
        assert rows[-1]["nsp_accuracy"] > 0.75
