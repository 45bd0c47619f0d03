"""Muon over flat shares on three real processes is Muon in one."""

import multiprocessing

import torch
from exchange_ranks import CHOICE, STEPS, gradient, step_on_shares
from safetensors.torch import load_file
from tiny_training import tiny_model

from hanlin.train.optim import build_optimizer


def test_three_ranks_move_as_one_process_does(tmp_path):
    """fp64, to 1e-12."""
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=step_on_shares, args=(rank, 3, str(tmp_path / "meeting"), str(tmp_path)))
        for rank in range(3)
    ]
    for process in ranks:
        process.start()
    model = tiny_model().double()
    optimizer = build_optimizer(model, CHOICE, 0.02)
    for step in range(STEPS):
        for index, p in enumerate(model.parameters()):
            p.grad = gradient(p, step, index)
        optimizer.step(1.0)
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    shares = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(3)]
    assert all(len(share) < len(list(model.parameters())) for share in shares)  # no rank has a part of everything
    for name, p in model.named_parameters():
        joined = torch.cat([share[name] for share in shares if name in share]).view(p.shape)
        torch.testing.assert_close(joined, p.detach(), rtol=0, atol=1e-12)
