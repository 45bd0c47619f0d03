"""The roofline of `plan.serving` beside what the engine does here: one request of a model folder, on this CPU.

prefill   prompt tokens / seconds to the first token
decode    further tokens / seconds between the first and the last
"""

import os
import random
from statistics import median
from typing import Any

from hanlin.core.errors import HanlinError
from hanlin.engine import Engine, SamplingParams
from hanlin.plan.devices import Cluster
from hanlin.plan.serving import serve

PROMPT, ANSWER, REPEATS = 256, 32, 3
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def beside_engine(folder: str | os.PathLike[str], cluster: Cluster, *, dtype: str | None = None) -> dict[str, Any]:
    """Predicted and measured tokens/s of a single request: 256 tokens read, 32 written (fewer where the model has no
    room for them). Medians of three requests after one that warms up.

    dtype: fp32 or bf16 (None: whichever the engine finds faster); another one, and a cluster of several devices, are a
    `HanlinError`.
    """
    if cluster.world != 1 or not cluster.device.name.startswith("CPU"):
        raise HanlinError(
            f"--serve --measure runs the engine on this processor: it belongs to --gpus cpu, not {cluster}."
        )
    if dtype is not None and dtype not in NAMES:
        raise HanlinError(f"--measure runs the engine in {' or '.join(NAMES)}, not in {dtype}.")
    with Engine.from_folder(folder, dtype="auto" if dtype is None else NAMES[dtype], device="cpu") as engine:
        config = engine.model.config
        used = next(short for short, name in NAMES.items() if name in str(engine.model.dtype))
        answer = min(ANSWER, engine.max_context // 2)
        prompt = min(PROMPT, engine.max_context - answer)
        if answer < 2:
            raise HanlinError(f"{folder} has room for {engine.max_context} tokens: too few to time.")
        params = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        draw = random.Random(0)
        uses = [
            engine.generate([draw.randrange(config.vocab_size) for _ in range(prompt)], params)[0].usage
            for _ in range(1 + REPEATS)
        ][1:]
    service = serve(config, cluster, dtype=used, cache_dtype=used)
    step = service.decode(1, prompt + answer // 2)
    rows = {
        "prefill": (service.prefill(prompt), median(prompt / use.first_token_s for use in uses)),
        "decode": (step.each, median((use.completion_tokens - 1) / (use.total_s - use.first_token_s) for use in uses)),
    }
    return {
        "dtype": used,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "tokens_per_s": {
            name: {"predicted": said, "measured": found, "measured_of_predicted": found / said}
            for name, (said, found) in rows.items()
        },
    }
