"""Training of experts in the arithmetic that a device is fast in; its results differ from float32 by rounding."""
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..guiders.guider import Guider

LARGE = 128  # pixels a side, from which convolutions gain by having the channels last; they lose in smaller images


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16, and does not only imitate them."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def in_fast_arithmetic(device: torch.device) -> AbstractContextManager:
    """Context manager: compute in bfloat16 where a device is fast in it, with weights and losses in their own type."""
    return torch.autocast(device.type, torch.bfloat16) if has_fast_bfloat16(device) else nullcontext()


@dataclass(frozen=True)
class ChannelsLast:
    """A network that gets large images with their channels last in memory, as convolutions like them."""

    net: Callable[..., Tensor]

    def __call__(self, image: Tensor, *inputs: Tensor) -> Tensor:
        is_large = min(image.shape[-2:]) >= LARGE
        return self.net(image.contiguous(memory_format=torch.channels_last) if is_large else image, *inputs)


def fast_output(guider: Guider, image: Tensor, sigma: Tensor) -> Tensor:
    """Output of a guider in float32, computed as fast as the device can. Arguments are those of `Guider.predict`."""
    with in_fast_arithmetic(image.device):
        return replace(guider, net=ChannelsLast(guider.net)).predict(image, sigma).float()
