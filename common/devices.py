"""Devices that a plan computes with: peaks of the makers' data sheets, memory as torch sees it."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UserError


@dataclass(frozen=True)
class Device:
    """Peaks of one accelerator: dense bfloat16 FLOP/s, memory bytes/s, memory in bytes."""

    flops: float
    bandwidth: float
    memory: float
    link: float
    """Bytes/s in each direction between devices of one node, all others together."""


_GIB = 2**30
_NVLINK_A, _NVLINK_H, _NVLINK_B, _PCIE4, _PCIE5 = 300e9, 450e9, 900e9, 25e9, 50e9

DEVICES = {
    "A10-24GB": Device(125e12, 0.6e12, 22.0 * _GIB, _PCIE4),
    "A100-40GB": Device(312e12, 1.555e12, 39.4 * _GIB, _NVLINK_A),
    "A100-80GB": Device(312e12, 2.0e12, 79.1 * _GIB, _NVLINK_A),
    "A6000-48GB": Device(155e12, 0.768e12, 47.4 * _GIB, _PCIE4),
    "B200-180GB": Device(2250e12, 8.0e12, 178.0 * _GIB, _NVLINK_B),
    "H100-80GB": Device(989e12, 3.35e12, 79.1 * _GIB, _NVLINK_H),
    "H200-141GB": Device(989e12, 4.8e12, 139.7 * _GIB, _NVLINK_H),
    "L4-24GB": Device(121e12, 0.3e12, 22.0 * _GIB, _PCIE4),
    "L40S-48GB": Device(362e12, 0.864e12, 44.4 * _GIB, _PCIE4),
    "RTX3090-24GB": Device(71e12, 0.936e12, 23.6 * _GIB, _PCIE4),
    "RTX4080-16GB": Device(97e12, 0.717e12, 15.6 * _GIB, _PCIE4),
    "RTX4090-24GB": Device(165e12, 1.008e12, 23.6 * _GIB, _PCIE4),
    "RTX5090-32GB": Device(210e12, 1.79e12, 31.3 * _GIB, _PCIE5),
}


def device(key: str, name: str | None) -> Device:
    """The device of this name, which the configuration key `key` has."""
    if name not in DEVICES:
        raise UserError(f"{key}={name}: known are {', '.join(sorted(DEVICES))}")
    return DEVICES[name]


def find_device(name: str) -> Device | None:
    """The device that torch calls `name`, as `NVIDIA H100 80GB HBM3`; None for one unknown here."""
    flat = name.upper().replace(" ", "").replace("-", "")
    known = [key for key in DEVICES if key.partition("-")[0] in flat]
    # A100 holds A10, and L40S holds L4.
    return DEVICES[max(known, key=lambda key: len(key.partition("-")[0]))] if known else None
