"""Many adapters in one batch say what each merged model says alone; they come and go while the engine runs."""

import gc
import threading
import weakref
from copy import deepcopy

import pytest
import torch
from tests.engine.adapting import make_adapter
from tests.engine.test_families import agrees, last_logits
from tests.engine.tiny import greedy_uncached, make_model
from tests.models.cases import all_cases, inputs_of, reference_model
from tests.models.ours import load_ours

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.engine.adapters import Adapters
from hanlin.engine.embedding import mean_pooled
from hanlin.models import AttentionConfig, FeedForwardConfig, ModelConfig, Transformer
from hanlin.nn.frozen import freeze

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The quick brown fox", "敏捷的棕色狐狸", "f", "lazy dog. " * 6]
TARGETS = {
    "fr": "all", "zh": ("q_proj", "v_proj"), "de": ("gate_proj", "down_proj"), "la": "all", "it": "all",
    "es": ("k_proj", "o_proj", "up_proj"),
}  # fmt: skip
DORA = ("it", "es")


@pytest.fixture(scope="module")
def base(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """name -> (folder, merged model)."""
    found = {}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder, make_adapter(base, folder, seed=seed, rank=2 + seed, targets=targets, dora=name in DORA)
    return found


def mixed(engine, names, prompts, params=GREEDY):
    """One batch of every prompt under every adapter."""
    handles = [(name, prompt, engine.submit(prompt, params, adapter=name)) for prompt in prompts for name in names]
    return {(name, prompt): list(handle)[-1].completion.token_ids for name, prompt, handle in handles}


@pytest.mark.parametrize("limits", [{}, {"step_tokens": 5, "max_batch": 3, "page_size": 4}], ids=str)
def test_a_batch_of_many_adapters_equals_each_merged_model(base, adapters, tokenizer, limits):
    with Engine(deepcopy(base), tokenizer, **limits) as engine:
        for name, (folder, _) in adapters.items():
            engine.load_adapter(name, folder)
        assert engine.adapters() == list(TARGETS)
        for _ in range(2):  # the second time with known beginnings
            got = mixed(engine, [None, *adapters], PROMPTS)
            for (name, prompt), ids in got.items():
                alone = base if name is None else adapters[name][1]
                assert ids == greedy_uncached(alone, tokenizer.encode(prompt), 12), (name, prompt)
    assert len({tuple(got[name, PROMPTS[0]]) for name in [None, *adapters]}) == 7  # they do say different things


def test_adapters_on_a_frozen_model_equal_the_merged_ones(base, adapters, tokenizer):
    model = deepcopy(base).float()
    if not freeze(model):
        pytest.skip("nothing freezes here")
    with Engine(model, tokenizer) as engine:
        for name, (folder, _) in adapters.items():
            engine.load_adapter(name, folder)
        for (name, prompt), ids in mixed(engine, [None, *adapters], PROMPTS).items():
            alone = (base if name is None else adapters[name][1]).float()
            prompt = torch.tensor(tokenizer.encode(prompt))
            want = greedy_uncached(alone, prompt.tolist(), 12)
            assert agrees(want, ids, lambda ids, m=alone, p=prompt: last_logits(m, p, ids)), (name, want, ids)
            alone.double()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
def test_the_lengths_of_dora_are_found_behind_frozen_weights(tokenizer, tmp_path, dtype, close):
    """And behind biases a thousand times the weights, beside which a product in bf16 would have no digits left."""
    attention = AttentionConfig(heads=4, kv_heads=2, head_dim=8, qkv_bias=True)
    config = ModelConfig.uniform(
        "qwen2", depth=1, attention=attention, feed_forward=FeedForwardConfig(48), vocab_size=64, width=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 100 if parameter.ndim == 1 else 0.1)
    make_adapter(model, tmp_path, seed=1, dora=True)
    model, frozen = model.to(dtype), deepcopy(model).to(dtype)
    if not freeze(frozen):
        pytest.skip("nothing freezes here")
    found = []
    for each in (model, frozen):
        adapters = Adapters(each)
        adapters.load("it", tmp_path)
        found.append(adapters.find("it").factors)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 7
    for name, plain in found[0].items():
        assert (plain.bias is not None) == ("q_proj" in name or "k_proj" in name or "v_proj" in name)
        for one, other in zip(plain, found[1][name], strict=True):
            assert one is other is None or (one.float() - other.float()).norm() <= close * one.float().norm(), name


def test_an_adapter_unloaded_in_use_ends_with_its_requests_and_its_memory_is_free(base, adapters, tokenizer):
    folder, merged = adapters["fr"]
    with Engine(deepcopy(base), tokenizer) as engine:
        engine.load_adapter("fr", folder)
        alive = weakref.ref(engine._runner.adapters.find("fr"))
        long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        begun = threading.Event()
        got, done = [], threading.Event()

        def hear(event):
            begun.set()
            got.extend(event.token_ids)
            if event.completion is not None:
                done.set()

        engine.submit(PROMPTS[0], long, adapter="fr", on_event=hear)
        begun.wait(10)
        engine.unload_adapter("fr")
        assert engine.adapters() == []
        with pytest.raises(HanlinError, match=r"no adapter `fr`.*none is loaded"):
            engine.submit(PROMPTS[0], GREEDY, adapter="fr")
        assert done.wait(30)
        assert got == greedy_uncached(merged, tokenizer.encode(PROMPTS[0]), 60)
        assert engine.generate(PROMPTS[0], GREEDY)[0].token_ids == greedy_uncached(
            base, tokenizer.encode(PROMPTS[0]), 12
        )
        gc.collect()
        assert alive() is None


def test_adapters_come_and_go_while_others_run(base, adapters, tokenizer):
    with Engine(deepcopy(base), tokenizer, max_batch=4) as engine:
        engine.load_adapter("zh", adapters["zh"][0])
        wrong, stop = [], threading.Event()
        want = greedy_uncached(adapters["zh"][1], tokenizer.encode(PROMPTS[1]), 12)

        def ask():
            while not stop.is_set():
                ids = engine.generate(PROMPTS[1], GREEDY, adapter="zh")[0].token_ids
                if ids != want:
                    wrong.append(ids)

        thread = threading.Thread(target=ask)
        thread.start()
        for _ in range(5):
            engine.load_adapter("fr", adapters["fr"][0])
            ids = engine.generate(PROMPTS[0], GREEDY, adapter="fr")[0].token_ids
            assert ids == greedy_uncached(adapters["fr"][1], tokenizer.encode(PROMPTS[0]), 12)
            engine.unload_adapter("fr")
        stop.set()
        thread.join(20)
        assert not wrong


def test_a_name_that_is_loaded_again_finds_no_pages_of_the_old_one(base, adapters, tokenizer):
    prompt = PROMPTS[3]
    with Engine(deepcopy(base), tokenizer, page_size=4) as engine:
        for name in ("fr", "la"):
            engine.load_adapter("mine", adapters[name][0])
            first = engine.generate(prompt, GREEDY, adapter="mine")[0]
            again = engine.generate(prompt, GREEDY, adapter="mine")[0]
            assert first.usage.cached_tokens == 0
            assert again.usage.cached_tokens > 0
            assert first.token_ids == greedy_uncached(adapters[name][1], tokenizer.encode(prompt), 12)
            engine.unload_adapter("mine")
        engine.load_adapter("another name", adapters["fr"][0])  # the same numbers
        assert engine.generate(prompt, GREEDY, adapter="another name")[0].usage.cached_tokens > 0


def test_mistakes_are_explained(base, adapters, tokenizer, tmp_path):
    with Engine(deepcopy(base), tokenizer) as engine:
        engine.load_adapter("fr", adapters["fr"][0])
        with pytest.raises(HanlinError, match=r"no adapter `pt`.*there is: fr"):
            engine.generate("f", GREEDY, adapter="pt")
        with pytest.raises(HanlinError, match="`fr` already"):
            engine.load_adapter("fr", adapters["la"][0])
        with pytest.raises(HanlinError):
            engine.load_adapter("la", tmp_path)
        with pytest.raises(HanlinError, match="no adapter `la`"):
            engine.unload_adapter("la")
        assert engine.adapters() == ["fr"]


def test_embeddings_are_those_of_the_model_without_adapters(base, adapters, tokenizer):
    """Whatever was computed in the step before."""
    with Engine(deepcopy(base), tokenizer) as engine:
        engine.load_adapter("fr", adapters["fr"][0])
        engine.generate(PROMPTS[0], GREEDY, adapter="fr")
        got = engine.embed(PROMPTS[0])[0]
    with torch.inference_mode():
        want = mean_pooled(base, tokenizer.encode(PROMPTS[0]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_reads_with_the_adapter_of_its_request(name, tokenizer, tmp_path):
    case = next(case for case in all_cases() if case.kind == "encoder-decoder" and case.family == name)
    model = load_ours(case, reference_model(case), tmp_path).double()
    merged = {None: deepcopy(model)}
    for seed, adapter in enumerate(("a", "b")):
        merged[adapter] = make_adapter(model, tmp_path / adapter, seed=seed)
    sources = [row[:11].tolist() for row in inputs_of(case).source]
    with Engine(deepcopy(model), tokenizer, page_size=4) as engine:
        for adapter in ("a", "b"):
            engine.load_adapter(adapter, tmp_path / adapter)
        handles = [(a, s, engine.submit(s, GREEDY, adapter=a)) for s in sources for a in merged]
        got = [(a, s, list(handle)[-1].completion.token_ids) for a, s, handle in handles]
    for adapter, source, ids in got:
        with Engine(deepcopy(merged[adapter]), tokenizer, page_size=4) as alone:
            assert ids == alone.generate(source, GREEDY)[0].token_ids, adapter
