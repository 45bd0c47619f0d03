"""What each of two processes of the tests computes: a model cut over both, beside what one process said."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from tests.models.cases import all_cases, inputs_of, reference_model
from tests.models.ours import load_ours, run_ours

from hanlin.core.errors import HanlinError
from hanlin.parallel import gather, shard, shard_logits, vocabulary_parallel_cross_entropy

FAMILIES = (
    "llama", "qwen3", "gpt2", "bloom", "mixtral", "deepseek-v2", "gemma2", "gpt-oss", "t5", "glm4", "phi3", "mistral"
)  # fmt: skip


MORE = ("bert-segments", "bart", "qwen2-moe", "llama4", "switch-capacity", "deepseek-v3")


def loss_of(model, case, inputs):
    return (run_ours(case, model, inputs).logits.double() ** 2).mean()


def compare(rank: int, meeting: str, folder: str, sequence: bool = False, ranks: int = 2) -> None:
    """Writes what was found, a line a family, to `folder`/rank. Nine tokens: no ranks share them equally."""
    torch.set_num_threads(1)
    made = []  # before the group is there: transformers would save on its first rank only
    for case in [case for case in all_cases() if case.name in (*FAMILIES, *(MORE if sequence else ()))]:
        theirs, place = reference_model(case), Path(folder) / f"{case.name}-{rank}"
        made.append((case, *[load_ours(case, theirs, place, torch.float64) for _ in range(2)]))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    lines = []
    for case, whole, cut in made:
        inputs = inputs_of(case, rows=2, length=9)
        try:
            shard(cut, sequence=sequence)
        except HanlinError as error:
            lines.append(f"{case.name}\trefused\t{error}")
            continue
        small = sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in whole.parameters())
        with torch.no_grad():
            gap = (run_ours(case, cut, inputs).logits - run_ours(case, whole, inputs).logits).abs().max()
        loss_of(whole, case, inputs).backward()
        loss_of(cut, case, inputs).backward()
        wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        found = gather(cut, of=lambda p: p.grad)
        slope = max(float((found[name] - grad).norm() / grad.norm().clamp_min(1e-6)) for name, grad in wanted.items())
        lost = len(wanted.keys() - found.keys())
        lines.append(f"{case.name}\t{float(gap):.2e}\t{slope:.2e}\t{lost}\t{small:.2f}")
        if case.name == "llama":
            lines.append(f"loss\t{loss_gap(case, whole, cut, inputs):.2e}")
    Path(folder, str(rank)).write_text("\n".join(lines))
    dist.destroy_process_group()


def loss_gap(case, whole, cut, inputs) -> float:
    """The vocabulary-parallel loss against the whole one."""
    targets = inputs.ids.roll(-1, 1)
    hidden = run_ours(case, cut, replace(inputs), logits=None).hidden
    mine = vocabulary_parallel_cross_entropy(shard_logits(cut, hidden), targets, cut.config.vocab_size)
    logits = run_ours(case, whole, inputs).logits
    other = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return float((mine - other).detach().abs())
