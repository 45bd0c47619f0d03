"""Which machine: `8xH100-80GB` is read into a `Cluster` of the devices in `devices.yaml`.

parse_gpus("8xH100-80GB", nodes=2)     two nodes of eight, joined by the network, eight joined by links
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from hanlin.core.errors import HanlinError

GPUS = re.compile(r"(?:(?P<count>\d+)\s*[x×*]\s*)?(?P<name>\S+)", re.IGNORECASE)
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator. flops: dense FLOP/s by dtype; memory: bytes; bandwidth: bytes/s of it; link and network:
    bytes/s in one direction, within a node and out of it; per_node: devices of the usual node."""

    name: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float
    link_kind: str
    network: float
    network_kind: str
    per_node: int

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in `dtype`; one that it has no units for is a `HanlinError`."""
        if dtype not in self.flops:
            raise HanlinError(f"{self.name} has no {dtype} products; it has {', '.join(self.flops)}.")
        return self.flops[dtype]


@dataclass(frozen=True)
class Cluster:
    """`nodes` nodes of `per_node` devices."""

    device: Device
    per_node: int
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.per_node * self.nodes

    def bandwidth(self, span: int) -> float:
        """Bytes/s, one direction, a device has towards a group whose ranks lie within `span` neighbouring ranks."""
        return self.device.link if span <= self.per_node else self.device.network

    def __str__(self) -> str:
        one = f"{self.per_node} x {self.device.name}"
        return one if self.nodes == 1 else f"{self.nodes} nodes of {one}"


def parse_gpus(text: str, nodes: int = 1) -> Cluster:
    """`8xH100-80GB`, `H200` (one), `4x4090`; nodes: how many such nodes. An unknown name names its neighbours.

    More devices than a node has are taken as that many nodes: `16xH100` is two nodes of eight. Where `nodes` is given,
    the devices are those of one node, and more than it has are a `HanlinError`.
    """
    found = GPUS.fullmatch(text.strip())
    if found is None:
        raise HanlinError(f"--gpus is {text!r}; it must be a number and a device such as 8xH100-80GB.")
    count = 1 if found["count"] is None else int(found["count"])
    if count < 1 or nodes < 1:
        raise HanlinError(f"--gpus {text!r} on {nodes} nodes: both numbers must be at least 1.")
    device = find_device(found["name"])
    if nodes == 1 and count > device.per_node:
        if count % device.per_node:
            raise HanlinError(
                f"{count} x {device.name} are more than the {device.per_node} of a node and no multiple of them; give "
                f"the devices of one node and --nodes N."
            )
        return Cluster(device, device.per_node, count // device.per_node)
    if count > device.per_node:
        raise HanlinError(
            f"--nodes {nodes} with {count} x {device.name} in each: a node has at most {device.per_node}. Give the "
            f"devices of one node, or all of them without --nodes (such as {nodes * device.per_node}x{device.name})."
        )
    return Cluster(device, count, nodes)


def find_device(name: str) -> Device:
    """The device of this name or alias, in any case."""
    known = _spellings()
    key = _plain(name)
    if key in known:
        return devices()[known[key]]
    near = list(dict.fromkeys(known[k] for k in difflib.get_close_matches(key, known, n=6, cutoff=0.3)))[:3]
    meant = f" Nearest: {', '.join(near)}." if near else ""
    raise HanlinError(f"Unknown device `{name}`.{meant} Known: {', '.join(devices())} (plan/devices.yaml).")


@cache
def devices() -> dict[str, Device]:
    """Every device of `devices.yaml` by its name."""
    return {name: _read(name, row) for name, row in _rows().items()}


@cache
def _rows() -> dict[str, dict]:
    return yaml.safe_load(files("hanlin.plan").joinpath("devices.yaml").read_text(encoding="utf-8"))


@cache
def _spellings() -> dict[str, str]:
    return {_plain(word): name for name, row in _rows().items() for word in (name, *row["aliases"])}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _read(name: str, row: dict) -> Device:
    link, network = row["link"], row["network"]
    return Device(  # YAML 1.1 reads 450e+9, without a point, as a word
        name, {kind: float(flops) for kind, flops in row["flops"].items()}, row["memory"] * GIB,
        float(row["bandwidth"]), float(link["bytes_per_s"]), link["kind"], float(network["bytes_per_s"]),
        network["kind"], row["per_node"],
    )  # fmt: skip
