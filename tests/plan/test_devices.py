"""Machines by name."""

import pytest

from hanlin.core.errors import HanlinError
from hanlin.plan.devices import devices, find_device, parse_gpus
from hanlin.train.monitor import DATA_SHEETS


def test_every_device_is_complete_and_plausible():
    for name, device in devices().items():
        assert set(device.flops) >= {"fp32", "bf16", "fp16"}, name
        assert device.flops["bf16"] >= device.flops["fp32"]
        assert 2**34 < device.memory < 2**38 and 1e10 < device.bandwidth < 1e13, name
        assert 0 < device.network <= device.link and device.per_node >= 1, name


def test_the_trainer_and_the_planner_know_the_same_peaks():
    """`train.monitor` divides by these for the MFU that it logs: equal to 1 %."""
    ours = {"H100 PCIe": "H100-PCIe", "H100 NVL": "H100-NVL", "H100": "H100-80GB", "RTX 4090": "RTX-4090",
            "RTX 3090": "RTX-3090", "A100": "A100-80GB", "H200": "H200", "L40S": "L40S"}  # fmt: skip
    for name, flops in DATA_SHEETS.items():
        assert find_device(ours[name]).flops["bf16"] == pytest.approx(flops, rel=0.01), name


@pytest.mark.parametrize(
    ("text", "nodes", "world", "per_node"),
    [
        ("8xH100-80GB", 1, 8, 8),
        ("h200", 1, 1, 1),
        ("4 x 4090", 1, 4, 4),
        ("8xA100", 2, 16, 8),
        ("64xH100", 1, 64, 8),
        ("2xcpu", 1, 2, 2),
    ],
)
def test_machines_are_read(text, nodes, world, per_node):
    cluster = parse_gpus(text, nodes)
    assert (cluster.world, cluster.per_node) == (world, per_node)
    assert cluster.bandwidth(per_node) == cluster.device.link
    assert cluster.bandwidth(per_node + 1) == cluster.device.network


def test_an_unknown_device_names_its_neighbours():
    with pytest.raises(HanlinError, match="Nearest: H100-80GB"):
        parse_gpus("8xH1000")
    with pytest.raises(HanlinError, match="no multiple"):
        parse_gpus("12xH100")
    with pytest.raises(HanlinError, match="a node has at most 8"):
        parse_gpus("16xH100", nodes=2)
    with pytest.raises(HanlinError, match="has no fp8"):
        find_device("A100").peak("fp8")
