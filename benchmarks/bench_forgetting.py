"""Does replay keep what a model knew? Continued pretraining with and without it, on two real held-out sets.

A small model is pretrained on English novels (general) and then goes on with a domain: a textbook of deep learning in
English, or poems of the Song dynasty. Each time alone, and with five rows of novels for each row of the domain
(domain : general = 1 : 5), with equally many rows of the domain and the same rate. Both held-out losses, in nats a
token, from before the first step: the last tenth of each collection's documents is never trained.

    python benchmarks/bench_forgetting.py [--data ../shared/data/pretrain] [--folder runs/forgetting] [--minutes 4]

Everything is done by the command line, as a user would: tokenizer, shards, pretraining, continued pretraining.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hanlin.core.metrics import read_metrics

GENERAL, DOMAINS = "en_novels", ("en_d2l_book", "zh_song_ci")
BATCH, LENGTH, DOMAIN_ROWS = 12, 256, 960
PIECE = 4000  # characters of a document: a novel is cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/pretrain"))
    parser.add_argument("--folder", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--minutes", type=float, default=4.0, help="of the first pretraining")
    options = parser.parse_args()
    prepare(options.data, options.folder)
    base = pretrain(options.folder, options.minutes)
    rows = [continued(options.folder, base, domain, ratio) for domain in DOMAINS for ratio in (0, 5)]
    show(rows)
    from hanlin.core.device import machine_summary
    from harness import RESULTS

    found = {"machine": machine_summary(), "minutes": options.minutes, "rows": rows}
    (RESULTS / "forgetting.json").write_text(json.dumps(found, indent=1) + "\n")


def prepare(data: Path, folder: Path) -> None:
    """Texts with their last tenth apart, one tokenizer for all, shards."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (GENERAL, *DOMAINS)
    for name in names:
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
        kept = len(pieces) * 9 // 10
        for part, chosen in (("", pieces[:kept]), ("-held-out", pieces[kept:])):
            rows = (json.dumps({"text": text}, ensure_ascii=False) for text in chosen)
            (folder / f"{name}{part}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    files = [str(folder / f"{name}.jsonl") for name in names]
    hanlin("tokenizer", "train", *files, "--vocab-size", "8192", "--out", str(folder / "tokenizer"))
    for name in names:
        for part in ("", "-held-out"):
            recipe = {
                "out": f"{folder}/shards/{name}{part}", "tokenizer": f"{folder}/tokenizer",
                "sources": [{"paths": [f"{folder}/{name}{part}.jsonl"]}],
            }  # fmt: skip
            hanlin("data", "build", write(folder / f"data-{name}{part}.yaml", recipe))


def pretrain(folder: Path, minutes: float) -> Path:
    recipe = {
        "name": "base", "runs": str(folder), "tokenizer": f"{folder}/tokenizer",
        "model": {"kind": "new", "depth": 6, "width": 192, "heads": 3, "kv_heads": 1, "hidden": 512},
        "objective": {
            "kind": "causal_lm", "seq_len": LENGTH, "shards": [{"path": f"{folder}/shards/{GENERAL}"}],
            "held_out": [f"{folder}/shards/{GENERAL}-held-out"],
        },
        "train": {"steps": round(minutes * 400), "batch_size": 8, "lr": 4e-3, "optimizer": {"kind": "muon"}},
    }  # fmt: skip
    hanlin("train", write(folder / "base.yaml", recipe))
    return folder / "base" / "model"


def continued(folder: Path, base: Path, domain: str, ratio: int) -> dict[str, Any]:
    name = f"{domain}-{ratio}"
    recipe = {
        "name": name, "runs": str(folder), "model": {"kind": "saved", "path": str(base)},
        "objective": {
            "kind": "continued", "domain": [{"path": f"{folder}/shards/{domain}"}], "ratio": ratio, "seq_len": LENGTH,
            "held_out": [f"{folder}/shards/{domain}-held-out"],
            "held_out_general": [f"{folder}/shards/{GENERAL}-held-out"],
            **({"general": [{"path": f"{folder}/shards/{GENERAL}"}]} if ratio else {}),
        },
        "train": {
            "steps": DOMAIN_ROWS * (1 + ratio) // BATCH, "batch_size": BATCH, "lr": 2e-3, "optimizer": {"kind": "muon"},
        },
    }  # fmt: skip
    hanlin("train", write(folder / f"{name}.yaml", recipe))
    lines = [row for row in read_metrics(folder / name / "metrics.jsonl") if "eval/loss" in row]
    curves = {key: [row[key] for row in lines] for key in ("eval/loss", "eval_general/loss")}
    return {"domain": domain, "ratio": ratio, "steps": recipe["train"]["steps"], **curves}


def show(rows: list[dict[str, Any]]) -> None:
    print("| domain | domain : general | domain before | after | novels before | after | forgotten |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        a, b = row["eval/loss"], row["eval_general/loss"]
        mix = f"1 : {row['ratio']}"
        print(
            f"| {row['domain']} | {mix} | {a[0]:.3f} | {a[-1]:.3f} | {b[0]:.3f} | {b[-1]:.3f} | {b[-1] - b[0]:+.3f} |"
        )


def write(path: Path, recipe: dict[str, Any]) -> str:
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return str(path)


def hanlin(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "hanlin", *arguments], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
