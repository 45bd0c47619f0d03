"""An engine over a folder: the tokens of transformers' greedy generation, the dtype asked for, mistakes explained."""

from dataclasses import replace

import pytest
import torch
from tests.engine.tiny import make_model
from tests.models.oracle import load_theirs
from transformers import AutoTokenizer

from hanlin.core.device import choose_dtype
from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.engine.opening import faster_dtype
from hanlin.models import Transformer, save_model


@pytest.fixture(scope="module", params=[None, 6], ids=["full", "window"])
def folder(request, tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("model")
    save_model(make_model(tokenizer, window=request.param).float(), path)
    tokenizer.save(path)
    return path


def test_greedy_equals_transformers_for_64_tokens(folder):
    theirs, tokenizer = load_theirs(folder), AutoTokenizer.from_pretrained(folder)
    with Engine.from_folder(folder, dtype="float32") as engine:
        for prompt in ("The quick brown", "敏捷的棕色狐狸", "def f(x):"):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()
            got = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))[0]
            assert got.token_ids == expected
            assert got.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_the_dtype_is_the_one_asked_for(folder):
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)):
        with Engine.from_folder(folder, dtype=name, max_batch=2) as engine:
            assert engine.model.lm_head.weight.dtype == dtype
            assert len(engine.generate("f", SamplingParams(max_tokens=5, ignore_eos=True))[0].token_ids) == 5
    with pytest.raises(HanlinError, match=r"float31.*float32"):
        Engine.from_folder(folder, dtype="float31")


def test_auto_is_fp32_for_a_small_model_and_the_same_every_time(folder, tokenizer):
    with Engine.from_folder(folder, device="cpu") as engine:
        assert engine.model.lm_head.weight.dtype == torch.float32
    with torch.device("meta"):
        large = Transformer(replace(make_model(tokenizer).config, vocab_size=200_000))
    assert large.parameter_count() > 6_000_000
    large = large.to_empty(device="cpu")
    assert faster_dtype(large) == choose_dtype("auto", torch.device("cpu"))


def test_no_folder_is_explained(tmp_path):
    with pytest.raises(HanlinError, match="nowhere"):
        Engine.from_folder(tmp_path / "nowhere")
