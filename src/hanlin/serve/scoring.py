"""Log-probabilities of a prompt's own tokens: log p(t_i | t_0 … t_{i-1}) for i ≥ 1."""

from collections.abc import Sequence

import torch

from hanlin.engine import TokenLogprob
from hanlin.models.transformer import Transformer

CHUNK = 256  # positions whose logits exist at one time: a chunk of 150k words in fp32 is 150 MB


@torch.inference_mode()
def score_prompt(model: Transformer, ids: Sequence[int], *, top: int) -> list[TokenLogprob]:
    """One entry a token from the second on, each with the `top` likeliest alternatives, best first."""
    tokens = torch.tensor([ids], device=model.device)
    hidden = model(tokens, logits=None).hidden[0, :-1]  # (len - 1, width)
    scored = []
    for begin in range(0, len(ids) - 1, CHUNK):
        logits = model.logits(hidden[begin : begin + CHUNK]).float()
        logprobs = logits.log_softmax(-1)  # (chunk, vocabulary)
        chosen = tokens[0, begin + 1 : begin + 1 + len(logprobs)]
        values, alternatives = logprobs.topk(min(top, logprobs.shape[-1]))
        own = logprobs.gather(1, chosen[:, None])[:, 0]
        rows = zip(chosen.tolist(), own.tolist(), alternatives.tolist(), values.tolist(), strict=True)
        scored += [TokenLogprob(t, p, tuple(zip(others, q, strict=True))) for t, p, others, q in rows]
    return scored
