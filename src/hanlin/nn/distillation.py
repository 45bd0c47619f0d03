"""Distillation: how far a student's next-token distribution is from its teacher's.

    forward KL   KL(P || Q) = sum P (log P - log Q)      P the teacher, Q the student: covers all the teacher does
    reverse KL   KL(Q || P)                              keeps to what the teacher does most (MiniLLM, arXiv:2306.08543)
    JSD(beta)    beta KL(P || M) + (1 - beta) KL(Q || M),   M = beta P + (1 - beta) Q      (GKD, arXiv:2306.13649)

JSD(beta) / beta tends to the forward KL for beta -> 0, JSD(beta) / (1 - beta) to the reverse one for beta -> 1. With a
temperature T both logits are divided by T and the sum is multiplied by T^2, so that gradients keep their size
(arXiv:1503.02531, section 2). All are sums over tokens; no gradient goes to the teacher.

A logit of -inf is a probability of 0 and adds 0; where P forbids what Q allows, the forward KL is finite and the
reverse one infinite, as the definition says.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hanlin.core.errors import HanlinError
from hanlin.nn.chunked_head import Head, through_head

Divergence = Callable[[Tensor, Tensor], Tensor]  # student's logits, teacher's logits (n, vocabulary) -> sum


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Sum of KL(teacher || student): logits (..., vocabulary) each, keep (...) bool -> fp32 scalar (fp64 for fp64)."""
    log_q, log_p = _log_probabilities(student, teacher, temperature, keep)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """Sum of KL(student || teacher): logits (..., vocabulary) each, keep (...) bool -> fp32 scalar (fp64 for fp64)."""
    log_q, log_p = _log_probabilities(student, teacher, temperature, keep)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(
    student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """Sum of JSD(beta), 0 < beta < 1, beta the teacher's share of the mixture; at 0.5 it is symmetric and at most
    log 2. logits (..., vocabulary) each, keep (...) bool -> fp32 scalar (fp64 for fp64)."""
    if not 0 < beta < 1:
        raise HanlinError(
            f"`beta` is {beta}; it must lie between 0 and 1. Its limits are `forward_kl` and `reverse_kl`."
        )
    log_q, log_p = _log_probabilities(student, teacher, temperature, keep)
    forbidden = (log_p == -torch.inf) & (log_q == -torch.inf)  # by both: the slope of logaddexp would be 0 / 0
    parts = [x.masked_fill(forbidden, 0.0) for x in (log_p, log_q)]
    log_m = torch.logaddexp(parts[0] + math.log(beta), parts[1] + math.log1p(-beta))
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def linear_distillation(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    *,
    divergence: Divergence = forward_kl,
    keep: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """A divergence through both output heads, a chunk of tokens at a time: neither matrix of logits is ever whole.

    hidden (..., width) and teacher_hidden (..., its width) of the same tokens; keep (...) bool: which count.
    divergence: e.g. `partial(jensen_shannon, beta=0.1, temperature=2.0)`. Gradients go to hidden and head.
    """
    if len(head.weight) != len(teacher_head.weight):
        raise HanlinError(
            f"The student knows {len(head.weight)} tokens and the teacher {len(teacher_head.weight)}; distillation "
            "compares the same tokens. Use models with one tokenizer, and cut padded rows off the larger head."
        )

    def loss(logits: Tensor, told: Tensor) -> Tensor:
        return divergence(logits, teacher_head.logits(told))

    return through_head(hidden, head, loss, teacher_hidden.detach(), keep=keep, chunk=chunk)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of P (log P - log Q). A P of 0 adds 0; its -inf - -inf must not reach the product, nor the gradient."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum()


def _log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(n, vocabulary) each, student first."""
    if student.shape != teacher.shape:
        raise HanlinError(f"Student's logits {list(student.shape)} and teacher's {list(teacher.shape)} must be alike.")
    if not temperature > 0:
        raise HanlinError(f"`temperature` is {temperature}; it must be positive.")
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    both = (student, teacher.detach()) if keep is None else (student[keep], teacher.detach()[keep])
    log_q, log_p = ((logits.to(wide) / temperature).log_softmax(-1) for logits in both)
    return log_q, log_p
