"""A table that people cite for DeepSeek-R1 671B in FP8 on eight and sixteen H200, and what this planner says of it.

    weights ~640 GB, prompts kept ~140 GB, caches of requests 200-300 GB
    8 x H200: 128 users 11 tokens/s each, 256 users 7;   2 x 8 x H200: 300-350 users 7-10

The table says neither the engine nor how long prompts and answers were. `CONTEXT` is what 200-300 GB of caches for 128
users come to on eight devices that each keep the whole latent.
"""

from dataclasses import dataclass
from typing import Any

from hanlin.plan.devices import GIB
from hanlin.plan.serving import Service, weight_bytes

CONTEXT = 3500
PROMPTS = 140e9
SAYS = "roofline: no prompts between decoding steps, no scheduler, full bandwidth of small expert products"


@dataclass(frozen=True)
class Row:
    """users in all over so many devices; lowest and highest tokens/s of one."""

    devices: int
    users: tuple[int, int]
    each: tuple[float, float]


ROWS = (Row(8, (128, 128), (11, 11)), Row(8, (256, 256), (7, 7)), Row(16, (300, 350), (7, 10)))


def beside_published(service: Service) -> list[dict[str, Any]]:
    """The rows of the table for a machine of as many devices; the first lines for any."""
    whole = weight_bytes(service.sizes, "fp8", ahead=True)
    rows = [
        _row("weights in FP8", "~640 GB", f"{whole / GIB:,.0f} GiB ({whole / 1e9:,.0f} GB)", whole / GIB / 640,
             "their GB are GiB; the module that predicts ahead counted"),
        _row("room for caches", "200-300 GB", f"{service.room / 1e9:,.0f} GB", service.room / 250e9,
             f"after {service.set_aside / 1e9:,.0f} GB for prompts; they leave some free"),
    ]  # fmt: skip
    for row in ROWS:
        if row.devices != service.cluster.world:
            continue
        low, high = (service.decode(-(-n // service.replicas), CONTEXT).each for n in (row.users[1], row.users[0]))
        said = sum(row.each) / 2
        rows.append(
            _row(f"{_range(row.users)} users, tokens/s each", _range(row.each),
                 f"{low:.1f}" if low == high else f"{low:.1f}-{high:.1f}", (low + high) / 2 / said, SAYS)
        )  # fmt: skip
    return rows


def implied_efficiency(service: Service, users: int, each: float) -> float:
    """Which share of the roofline a measured speed is."""
    return each / service.decode(users, CONTEXT).each


def _row(what: str, published: str, here: str, ratio: float, why: str) -> dict[str, Any]:
    return {"what": what, "published": published, "here": here, "ratio": f"{ratio:.2f}", "why": why}


def _range(pair: tuple[float, float]) -> str:
    return f"{pair[0]:g}" if pair[0] == pair[1] else f"{pair[0]:g}-{pair[1]:g}"
