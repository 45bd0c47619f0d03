"""What one optimizer step sends, traced and planned, in every layout of the training tests.

A tiny model (8 layers, width 32, fp32, 16 rows of 24 tokens) is trained by the real `Trainer` over 2 to 8 processes of
this machine over gloo. Payload: what the process-group tracer sees in the step's calls, of the rank that gives most;
planned: what `plan.communication` says of that rank. Wire: bytes that it sends where each call is done as a ring.
Nothing here depends on the machine.

    python benchmarks/bench_wire.py
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the layouts are the tests'


def main() -> None:
    from tests.train.layout_cases import CASES
    from tests.train.traced_steps import trace_layouts

    import harness

    with tempfile.TemporaryDirectory() as folder:
        found = trace_layouts(list(CASES), Path(folder))
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for name, ranks in found.items():
        busiest = max(range(len(ranks)), key=lambda rank: sum(call.payload for call in ranks[rank].calls))
        step = ranks[busiest]
        traced, planned, wire = Counter(), Counter(), Counter()
        for call in step.calls:
            traced[call.op] += call.payload
            wire[call.op] += call.wire
        for sent in step.planned:
            planned[sent.op] += sent.payload
        for op in sorted(traced | planned):
            rows.append(
                {
                    "layout": name,
                    "processes": len(ranks),
                    "collective": op,
                    "payload traced": f"{traced[op]:,}",
                    "payload planned": f"{planned[op]:,}",
                    "wire bytes": f"{wire[op]:,.0f}",
                }
            )
        raw[name] = [
            {
                "rank": rank,
                "traced": sum(call.payload for call in one.calls),
                "planned": sum(sent.payload for sent in one.planned),
                "wire": sum(call.wire for call in one.calls),
                "planned by what": {f"{s.axis}: {s.what}, {s.op}": s.payload for s in one.planned},
            }
            for rank, one in enumerate(ranks)
        ]
    harness.write_results("wire", rows, raw)


if __name__ == "__main__":
    main()
