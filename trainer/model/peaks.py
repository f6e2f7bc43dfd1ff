"""Highest dense bf16 rate of each accelerator, by the exact name that its driver reports. No torch here.

An accelerator that is not in the table has no peak, hence no MFU: a guess would be wrong by a factor.
Vendors' headline figures with structured sparsity are twice these.
"""

_A100 = 312e12
"""NVIDIA A100 datasheet (2022): 312 TFLOP/s bf16 dense, the same for 40 and 80 GB, SXM and PCIe."""
_H100_SXM = 989.4e12
"""NVIDIA H100 datasheet: 1,979 TFLOP/s bf16 with sparsity for SXM, half of it dense."""
_MI250X_GCD = 191.5e12
"""AMD MI250X datasheet: 383 TFLOP/s bf16 per card of two dies (GCDs); software sees each die as a device."""

PEAK_BF16_FLOPS: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    # Leonardo's custom part, with the stock A100's figure: more SMs would give more; no rate is published.
    "NVIDIA A100-SXM-64GB": _A100,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    # MareNostrum 5's SXM part with HBM2e. The stock H100 SXM's figure: BSC states no other clock.
    "NVIDIA H100 64GB": _H100_SXM,
    "NVIDIA H100 PCIe": 756.5e12,  # NVIDIA H100 datasheet: 1,513 with sparsity
    "NVIDIA H100 NVL": 835.5e12,  # NVIDIA H100 NVL datasheet: 1,671 with sparsity
    "NVIDIA H200": _H100_SXM,  # NVIDIA H200 datasheet: the same 1,979 with sparsity
    "NVIDIA H200 NVL": 835.5e12,  # NVIDIA H200 datasheet: 1,671 with sparsity
    # The name says the host's memory; the GPU has 96 GB. NVIDIA GH200 datasheet: 1,979 with sparsity at full
    # power; JUPITER runs the superchip at 680 W, which lowers what can be reached, not the peak.
    "NVIDIA GH200 120GB": _H100_SXM,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA GH200 144G HBM3e": _H100_SXM,
    "AMD Instinct MI250X": _MI250X_GCD,
    "AMD Instinct MI250X / MI250": _MI250X_GCD,
    "AMD Instinct MI300X": 1307.4e12,  # AMD MI300X datasheet: 1,307.4 bf16 dense
}
"""Name as `torch.cuda.get_device_name()` gives it -> dense bf16 FLOP/s of one device as software sees it."""


def peak_bf16_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of the device with exactly this name; None for any other."""
    return PEAK_BF16_FLOPS.get(device_name)
