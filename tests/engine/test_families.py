"""Greedy text of the engine is that of `transformers.generate`, for every family that generates."""

import pytest
import torch
from tests.models.cases import Case, all_cases, inputs_of, reference_model
from tests.models.ours import load_ours

from hanlin.engine import Engine, SamplingParams
from hanlin.models.transformer import Transformer

NEW = 16
CLOSE = 1e-4  # two best logits nearer than this may change places: products of other heights round otherwise
CASES = {
    case.name: case
    for case in all_cases()
    if case.kind != "encoder" and case.cached and case.reference == "transformers" and not case.ours(inputs_of(case))
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_text_is_that_of_transformers(name, tokenizer, tmp_path):
    case = CASES[name]
    theirs = reference_model(case)
    model = load_ours(case, theirs, tmp_path)
    inputs = inputs_of(case, rows=3, length=11)
    prompts = inputs.ids if inputs.source is None else inputs.source[:, :11]
    greedy = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    with Engine(model, tokenizer, step_tokens=16, page_size=4) as engine:
        got = [c.token_ids for c in engine.generate(prompts.tolist(), greedy)]
    for prompt, mine in zip(prompts, got, strict=True):
        want = generate_theirs(case, theirs, model, prompt[None], NEW)
        assert agrees(want, mine, lambda ids, p=prompt: last_logits(model, p, ids)), (want, mine)


def generate_theirs(case: Case, theirs, model: Transformer, prompt: torch.Tensor, new: int) -> list[int]:
    start = model.config.extra.get("decoder_start_token_id")
    # without its cache: that of its T5 needs a config which names the decoder's layers twice
    more = {} if case.kind == "decoder" else {"decoder_start_token_id": start, "use_cache": False}
    settings = theirs.generation_config
    settings.eos_token_id = settings.bos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    settings.pad_token_id = 0
    with torch.no_grad():
        out = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, num_beams=1, **more
        )
    return out[0, prompt.shape[1] if case.kind == "decoder" else 1 :].tolist()


@torch.inference_mode()
def last_logits(model: Transformer, prompt: torch.Tensor, ids: list[int]) -> torch.Tensor:
    if model.encoder is None:
        return model(torch.tensor([[*prompt.tolist(), *ids]]), logits="last").logits[0, -1]
    start = model.config.extra["decoder_start_token_id"]
    return model(torch.tensor([[start, *ids]]), source=model.encode(prompt[None]), logits="last").logits[0, -1]


def agrees(want: list[int], got: list[int], logits_after) -> bool:
    """Whether two greedy texts are the same up to a place where the two best logits are too close to tell."""
    for at, (a, b) in enumerate(zip(want, got, strict=True)):
        if a != b:
            best = logits_after(want[:at])
            return bool((best.amax() - best[b]) <= CLOSE)
    return True
