"""What a bank of experts costs on a full-size network: memory, switching, and time in each step."""
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ppap_core.experts.bank import ExpertBank, LoraSpec
from ppap_core.schedules import ExpertSchedule


def once(call: Callable[[], object]) -> float:
    """Seconds of a call, with what it leaves a GPU to do."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one that does not count."""
    function()
    return statistics.median(once(function) for _ in range(repeats))


def ratio_in_turn(function: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """Seconds of a call over seconds of another, taken in turn: the median, after one of the first that does not count."""
    once(function)
    return statistics.median(once(function) / once(other) for _ in range(repeats))


def bytes_of(*nets: nn.Module) -> int:
    """Memory of all weights and buffers; what networks share counts once."""
    tensors = {tensor.data_ptr(): tensor for net in nets for tensor in (*net.parameters(), *net.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def gradient_of(net: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """What a guided step asks of a guider: the gradient of one output in the image."""
    with torch.enable_grad():
        image = image.clone().requires_grad_(True)
        return torch.autograd.grad(net(image).square().sum(), image)[0]


def bank_costs(architecture: str = "resnet50", experts: int = 10, rank: int = 8, size: int = 224) -> dict[str, float]:
    """Costs of a bank on a timm network with random weights, against the plain network."""
    import timm

    base = timm.create_model(architecture, pretrained=False).eval().requires_grad_(False)
    bank = ExpertBank(base, ExpertSchedule.log_spaced(experts, 0.05, 20.0), LoraSpec(rank, float(rank)))
    image, sigma = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.full((1,), 0.06)
    turn = iter(range(10**9))
    plain = seconds(lambda: gradient_of(base, image), 9)
    adapted = seconds(lambda: gradient_of(lambda x: bank(x, sigma), image), 9)
    return {"memory_ratio": bytes_of(base, bank) / bytes_of(base),
            "switch_ms": 1000 * seconds(lambda: bank.select(next(turn) * 3 % experts), 50),
            "plain_gradient_ms": 1000 * plain, "expert_gradient_ms": 1000 * adapted,
            "trainable_share": bank.trainable_share()}
