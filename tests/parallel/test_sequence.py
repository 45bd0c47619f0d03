"""Sequence parallelism: a model whose ranks share the tokens between its blocks is the model, in logits, gradients and
over a training."""

import torch.multiprocessing as multiprocessing
from tests.parallel.ranks import FAMILIES, MORE, compare


def test_every_family_computes_what_one_process_does(tmp_path):
    """fp64, 9 tokens over 2 ranks: logits within 1e-12, gradients within 1e-9 of their length."""
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "meeting"), str(tmp_path), True)
    processes = [context.Process(target=compare, args=(r, *arguments)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=600)
        assert process.exitcode == 0
    lines = [line.split("\t") for line in (tmp_path / "0").read_text().splitlines()]
    told = {line[0]: line[1:] for line in lines}
    assert float(told.pop("loss")[0]) <= 1e-9
    assert set(told) == {*FAMILIES, *MORE}
    for name, (gap, slope, lost, _) in told.items():
        assert gap != "refused", (name, slope)
        assert float(gap) <= 1e-12 and float(slope) <= 1e-9 and lost == "0", (name, gap, slope, lost)
