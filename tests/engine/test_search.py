"""Beam search equals transformers'; diverse beams and contrastive search equal a slow twin; both share pages safely."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.engine.tiny import make_model
from tests.models.oracle import make_oracle

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.models import load_model

END = 7


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    model = make_oracle("llama", max_position_embeddings=128).double()
    with torch.no_grad():
        model.lm_head.weight[END] *= 2.0  # ends come now and then
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    "options",
    [
        {"beams": 3},
        {"beams": 5, "n": 4, "max_tokens": 20},
        {"beams": 4, "n": 2, "length_penalty": 2.0},
        {"beams": 4, "n": 4, "early_stopping": True},
        {"beams": 3, "n": 2, "repetition_penalty": 1.4},
        {"beams": 2, "n": 2, "min_tokens": 6, "length_penalty": 0.0},
    ],
    ids=str,
)
def test_beams_are_those_of_transformers(theirs, tokenizer, options):
    reference, folder = theirs
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(10, 131, (1, n), generator=generator) for n in (5, 12, 3, 8)]
    params = SamplingParams(
        **{"temperature": 0, "max_tokens": 12, "stop_token_ids": (END,), "ignore_eos": True} | options
    )
    with Engine(load_model(folder, dtype=torch.float64), tokenizer, max_batch=8, page_size=4) as engine:
        engine._worker.checking = True
        got = engine.generate([p[0].tolist() for p in prompts], params)
    more = {
        "length_penalty": params.length_penalty,
        "early_stopping": params.early_stopping,
        "repetition_penalty": params.repetition_penalty,
        "min_new_tokens": params.min_tokens or None,
    }
    for prompt, mine in zip(prompts, _many(got, params.n), strict=True):
        want = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), num_beams=params.beams, num_return_sequences=params.n,
            max_new_tokens=params.max_tokens, do_sample=False, eos_token_id=END, pad_token_id=0, output_scores=True,
            return_dict_in_generate=True, **more,
        )  # fmt: skip
        for row, score, completion in zip(want.sequences, want.sequences_scores, mine, strict=True):
            ids = row[prompt.shape[1] :].tolist()
            ids = ids[: ids.index(END) + 1] if END in ids else ids[: params.max_tokens]
            assert completion.token_ids == ids
            assert completion.score == pytest.approx(float(score), abs=1e-5)


def _many(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def test_diverse_beams_are_those_of_a_slow_twin(model, tokenizer):
    prompt, ends = tokenizer.encode("The quick 敏捷"), {5, 9}
    for groups, beams, penalty in [(2, 4, 0.7), (3, 3, 5.0), (1, 2, 9.0)]:
        params = SamplingParams(
            temperature=0, max_tokens=9, beams=beams, beam_groups=groups, diversity_penalty=penalty, n=beams,
            stop_token_ids=tuple(ends), ignore_eos=True,
        )  # fmt: skip
        with Engine(model, tokenizer, max_batch=8, page_size=4) as engine:
            got = [(c.token_ids, c.score) for c in engine.generate([prompt], params)]
        want = slow_diverse_beams(model, prompt, ends, groups, beams // groups, penalty, 9)
        assert [ids for ids, _ in got] == [ids for ids, _ in want]
        assert [score for _, score in got] == pytest.approx([score for _, score in want], abs=1e-6)


@torch.inference_mode()
def slow_diverse_beams(model, prompt, ends, groups, size, penalty, longest):
    """arXiv:1610.02424 with whole sequences through the model for every beam and step."""
    running = [[([], 0.0)] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    done = [False] * groups
    for length in range(1, longest + 1):
        used = []
        for g in range(groups):
            if done[g]:
                continue
            options = []
            for ids, score in running[g]:
                row = model(torch.tensor([prompt + ids]), logits="last").logits[0, -1].float().log_softmax(-1)
                for token in used:
                    row[token] -= penalty
                options += [(score + value, [*ids, token]) for token, value in enumerate(row.tolist())]
            options.sort(key=lambda option: -option[0])
            going = []
            for rank, (score, ids) in enumerate(options[: max(2, 1 + len(ends)) * size]):
                if ids[-1] in ends or length == longest:
                    if rank < size:
                        finished[g].append((ids, score / length))
                elif len(going) < size:
                    going.append((ids, score))
            finished[g] = sorted(finished[g], key=lambda answer: -answer[1])[:size]
            done[g] = not going or (len(finished[g]) == size and going[0][1] / length <= finished[g][-1][1])
            running[g] = going or running[g]
            used += [ids[-1] for ids, _ in running[g]]
    return sorted(itertools.chain(*finished), key=lambda answer: -answer[1])


@pytest.mark.parametrize(("k", "contrast"), [(4, 0.6), (3, 0.2), (6, 1.0), (1, 0.5)])
def test_contrastive_search_is_that_of_a_slow_twin(model, tokenizer, k, contrast):
    prompts = [tokenizer.encode(text) for text in ("The quick brown", "世界你好！ def", "f")]
    params = SamplingParams(temperature=0, top_k=k, contrast=contrast, max_tokens=14, ignore_eos=True)
    with Engine(model, tokenizer, max_batch=16, step_tokens=16, page_size=4) as engine:
        got = [c.token_ids for c in engine.generate(prompts, params)]
    assert got == [slow_contrastive(model, prompt, k, contrast, 14) for prompt in prompts]
    if contrast == 0.6:
        greedy = slow_contrastive(model, prompts[0], 1, 0.5, 14)
        assert got[0] != greedy


@torch.inference_mode()
def slow_contrastive(model, prompt, k, contrast, count):
    """arXiv:2202.06417, eq. 5, with whole sequences through the model for every candidate."""
    ids = list(prompt)
    for _ in range(count):
        out = model(torch.tensor([ids]))
        chances, tokens = out.logits[0, -1].float().softmax(-1).topk(k)
        scores = []
        for chance, token in zip(chances.tolist(), tokens.tolist(), strict=True):
            hidden = F.normalize(model(torch.tensor([[*ids, token]])).hidden[0].float(), dim=-1)
            scores.append((1 - contrast) * chance - contrast * float((hidden[:-1] @ hidden[-1]).max()))
        ids.append(tokens[max(range(len(scores)), key=scores.__getitem__)].item())
    return ids[len(prompt) :]


def test_searches_are_the_same_under_preemption_and_beside_others(tokenizer):
    model = make_model(tokenizer)
    prompts = [tokenizer.encode(text) for text in ("lazy dog. " * 3, "世界你好！", "def f(x)", "The quick brown fox")]
    beams = SamplingParams(temperature=0, beams=3, n=3, max_tokens=12, ignore_eos=True)
    contrast = SamplingParams(temperature=0, contrast=0.5, top_k=3, max_tokens=12, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    params = [beams, contrast, greedy, beams]
    with Engine(model, tokenizer, page_size=4) as engine:
        alone = [engine.generate([p], each) for p, each in zip(prompts, params, strict=True)]
    per_token = model.config.kv_bytes_per_token(8)
    with Engine(model, tokenizer, page_size=4, max_batch=8, step_tokens=12, cache_bytes=96 * per_token) as engine:
        engine._worker.checking = True
        together = engine.generate(prompts, params)
        assert engine.stats().preemptions > 0
    assert [c.token_ids for c in together] == [c.token_ids for many in alone for c in many]


def test_best_of_returns_the_likeliest_of_what_was_drawn(engine, tokenizer):
    params = SamplingParams(temperature=1.2, seed=5, max_tokens=8, ignore_eos=True, logprobs=0)
    drawn = engine.generate("The quick", SamplingParams(**vars(params) | {"n": 6}))
    best = engine.generate("The quick", SamplingParams(**vars(params) | {"n": 2, "best_of": 6, "logprobs": None}))
    means = {tuple(c.token_ids): sum(t.logprob for t in c.logprobs) / len(c.logprobs) for c in drawn}
    want = sorted(means.items(), key=lambda item: -item[1])[:2]
    assert [tuple(c.token_ids) for c in best] == [ids for ids, _ in want]
    assert [c.score for c in best] == pytest.approx([mean for _, mean in want])
    assert [c.index for c in best] == [0, 1] and all(c.logprobs is None for c in best)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"beams": 3, "stop": ("x",)}, "stop"),
        ({"beams": 3, "logprobs": 1}, "logprobs"),
        ({"contrast": 0.5, "top_k": 4, "prompt_logprobs": 0}, "prompt_logprobs"),
        ({"beams": 99}, "beams"),
    ],
)
def test_what_a_search_does_not_do_is_refused_by_name(engine, options, name):
    with pytest.raises(HanlinError, match=name):
        engine.submit("The quick", SamplingParams(temperature=0, **options))
