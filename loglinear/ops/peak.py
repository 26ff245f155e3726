"""What a device's arithmetic can do at best, which utilisation is measured against."""

from __future__ import annotations

import time

import torch

from loglinear.errors import UserError

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets. Part of the name that torch reports: the first match wins.
PEAK_TFLOPS_BF16 = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "L40S": 362.0,
    "A100": 312.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
}


TRAINING_FLOPS = 3  # of a forward pass: itself, and twice as much backward


def peak_flops(device: torch.device, given_tflops: float | None) -> float:
    """The FLOP/s that model FLOP utilisation is measured against, for one rank.

    Args:
        device: a CPU's peak is measured with an fp32 matrix product, a GPU's is looked up.
        given_tflops: the user's own figure, which goes first.

    Raises:
        UserError: the GPU is not in the table.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cpu":
        return _measured_cpu_flops()
    name = torch.cuda.get_device_name(device)
    for part, tflops in PEAK_TFLOPS_BF16.items():
        if part in name:
            return tflops * 1e12
    raise UserError(f"the peak speed of {name!r} is not known: set train.peak_tflops to its dense bf16 TFLOP/s")


def _measured_cpu_flops(size: int = 1024, tries: int = 5) -> float:
    a = torch.randn(size, size)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
