"""Token-level DPO (arXiv:2404.11999): beside the log-probabilities, how far the policy has moved at every token.

    D(y) = sum over the answer's tokens of KL(pi_ref(. | y_<t) || pi(. | y_<t))       over the whole vocabulary
    loss = -log sigmoid(beta * [u(w) - u(l) - alpha * (D(l) - stop_gradient(D(w)))])  TDPO 2; TDPO 1: alpha 1, no stop

Both distributions of a chunk of tokens are made from hidden states, so memory is one chunk's, not T times vocabulary.
"""

import torch
from torch import Tensor

from hanlin.models.transformer import Transformer
from hanlin.nn.chunked_head import Head
from hanlin.nn.token_values import logits_through_head, values_through_head
from hanlin.train.token_loss import head_of


def logprobs_and_divergence(
    model: Transformer, hidden: Tensor, ids: Tensor, reference_states: Tensor, reference_head: Head
) -> tuple[Tensor, Tensor]:
    """log p(id) of tokens under the policy, and KL(reference || policy) there; both (n,) with gradient for the policy.

    hidden (n, width): what each token was predicted from; ids (n,); reference_states (n, width) and reference_head:
    what `head_of` gives of the reference for the same tokens.
    """
    states, head = head_of(model, hidden)

    def log_q(rows: Tensor) -> Tensor:
        return logits_through_head(rows, reference_head).log_softmax(-1)

    def values(z: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        log_p, wanted = z.log_softmax(-1), log_q(rows)
        apart = (wanted.exp() * (wanted - log_p)).sum(-1)
        return torch.stack([log_p.gather(-1, target[:, None]).squeeze(-1), apart], -1)

    def slope(z: Tensor, gradient: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        of_logp, of_kl = gradient[:, :1], gradient[:, 1:]
        out = z.softmax(-1).mul_(of_kl - of_logp)
        out.sub_(log_q(rows).exp_().mul_(of_kl))
        return out.scatter_add_(-1, target[:, None], of_logp)

    found = values_through_head(states, head, values, ids, reference_states.detach(), slope=slope)
    return found[:, 0], found[:, 1]
