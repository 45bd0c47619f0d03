"""Serving: weights and caches by hand, the roofline's limits, and a published table of DeepSeek-R1."""

from dataclasses import replace

import pytest

from hanlin.core.errors import HanlinError
from hanlin.plan.devices import GIB, parse_gpus
from hanlin.plan.known import known_config
from hanlin.plan.published import PROMPTS, beside_published
from hanlin.plan.serving import serve


def test_weights_and_caches_of_llama_by_hand():
    """Llama-3-70B in bf16: 141.1 GB; a token's cache 80 layers x 2 x 8 x 128 x 2 = 327,680 bytes, cut without copies
    over 8 devices and stored twice over 16."""
    config = known_config("llama-3-70b")
    service = serve(config, parse_gpus("8xH100"), tensor=8)
    assert service.weights == 2 * 70_553_706_496
    assert service.token == 327_680
    assert serve(config, parse_gpus("16xH100"), tensor=16).token == 2 * 327_680
    assert service.users(8192) == service.tokens // 8192


def test_decoding_alone_reads_the_weights_and_many_users_reach_the_peak():
    """One user on one H100: at most bandwidth / weights. More users: more tokens in all, fewer for each."""
    service = serve(known_config("llama-3-8b"), parse_gpus("1xH100"))
    alone = service.decode(1, 16)
    read = service.weights - 2 * 128256 * 4096  # the embedding is looked up, not read
    assert alone.each == pytest.approx(3.35e12 * 0.85 / read, rel=0.01)
    many = [service.decode(n, 1024) for n in (1, 8, 64)]
    assert [s.total for s in many] == sorted(s.total for s in many)
    assert [s.each for s in many] == sorted((s.each for s in many), reverse=True)


def test_a_model_that_does_not_fit_is_refused_with_its_size():
    with pytest.raises(HanlinError, match="141 GB of weights"):
        serve(known_config("llama-3-70b"), parse_gpus("1xH100"))
    with pytest.raises(HanlinError, match="no dtype for serving"):
        serve(known_config("llama-3-8b"), parse_gpus("1xH100"), dtype="nf4")


def test_a_model_that_does_not_decode_is_refused():
    config = known_config("llama-3-8b")
    layer = replace(config.layers[0], attention=replace(config.layers[0].attention, bidirectional=True))
    for encoder in (replace(config, layers=(layer,) * 32), replace(config, head=None)):
        with pytest.raises(HanlinError, match="writes no text"):
            serve(encoder, parse_gpus("1xH100"))


@pytest.mark.parametrize(("gpus", "rows"), [("8xH200", 4), ("16xH200", 3)])
def test_the_published_table_of_deepseek_r1(gpus, rows):
    """Weights within 2 % (their GB are GiB). The roofline is an upper bound: published speeds are 25 to 55 % of it."""
    service = serve(known_config("deepseek-r1"), parse_gpus(gpus), dtype="fp8", tensor=16 if "16" in gpus else 8,
                    set_aside=PROMPTS)  # fmt: skip
    table = beside_published(service)
    assert len(table) == rows
    assert float(table[0]["ratio"]) == pytest.approx(1.0, abs=0.02)
    for row in table[2:]:
        assert 1 / 0.55 < float(row["ratio"]) < 1 / 0.25, row
    if "16" not in gpus:
        assert 200e9 < service.room < 400e9
    assert service.weights / GIB < 640
