"""Costs of a bank of experts on a full-size network: memory, switching, and time in each step."""
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ppap_core import ExpertBank, ExpertSchedule, LoraSpec


def seconds_of_call(call: Callable[[], object]) -> float:
    """Seconds of one call, with the work that it queues on a GPU."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after a warm-up."""
    function()
    return statistics.median(seconds_of_call(function) for _ in range(repeats))


def ratio_in_turn(function: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """Median ratio of run times, alternated, after a warm-up of the first function."""
    seconds_of_call(function)
    return statistics.median(seconds_of_call(function) / seconds_of_call(other) for _ in range(repeats))


def bytes_of(*nets: nn.Module) -> int:
    """Bytes of all weights and buffers; shared ones count once."""
    tensors = {tensor.data_ptr(): tensor for net in nets for tensor in (*net.parameters(), *net.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def gradient_of(net: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Gradient in the image (B, 3, H, W) of the sum of a network's squared outputs: the work of a guided step."""
    with torch.enable_grad():
        image = image.clone().requires_grad_(True)
        return torch.autograd.grad(net(image).square().sum(), image)[0]


def bank_costs(architecture: str = "resnet50", experts: int = 10, rank: int = 8, size: int = 224) -> dict[str, float]:
    """Costs of a bank on a timm network with random weights, compared with the plain network.

    size: side of the image in pixels.
    """
    import timm

    base = timm.create_model(architecture, pretrained=False).eval().requires_grad_(False)
    bank = ExpertBank(base, ExpertSchedule.log_spaced(experts, 0.05, 20.0), LoraSpec(rank, float(rank)))
    image, sigma = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.full((1,), 0.06)
    turns = itertools.count()
    plain = median_seconds(lambda: gradient_of(base, image), 9)
    adapted = median_seconds(lambda: gradient_of(lambda x: bank(x, sigma), image), 9)
    return {"memory_ratio": bytes_of(base, bank) / bytes_of(base),
            "switch_ms": 1000 * median_seconds(lambda: bank.select(next(turns) * 3 % experts), 50),
            "plain_gradient_ms": 1000 * plain, "expert_gradient_ms": 1000 * adapted,
            "trainable_share": bank.trainable_share()}
