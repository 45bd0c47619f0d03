"""A model cut over two processes is the model: logits, gradients, loss; each rank holds about half of it."""

import torch.multiprocessing as multiprocessing
from tests.parallel.ranks import FAMILIES, compare


def test_two_ranks_compute_what_one_does(tmp_path):
    """fp64: logits within 1e-12, gradients within 1e-9 of their length; nothing is missing after gathering."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compare, args=(r, str(tmp_path / "meeting"), str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    lines = [line.split("\t") for line in (tmp_path / "0").read_text().splitlines()]
    told = {line[0]: line[1:] for line in lines}
    print(*lines, sep="\n")
    assert float(told.pop("loss")[0]) <= 1e-9
    assert set(told) == set(FAMILIES)
    for name, (gap, slope, lost, part) in told.items():
        assert gap != "refused", (name, slope)
        assert float(gap) <= 1e-12 and float(slope) <= 1e-9 and lost == "0", (name, gap, slope, lost)
        assert float(part) < 0.75, (name, part)
