"""Number types that guiders compute in: half precision as far as it goes, else a wider type for the rest of a run."""
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..guiders.guider import Guider, has_network
from .gradients import HALF, energy_gradient, is_finite, slice_decoder
from .moments import Moments, MomentState

log = logging.getLogger(__name__)


class TermGradient(NamedTuple):
    """Energy (B,) and gradient (B, C, H, W) of a guider or a term, and how it was found."""

    energy: Tensor
    gradient: Tensor
    fallback: torch.dtype | None = None  # type that the network fell back to; None: it did not
    unguided: int = 0                    # images whose gradient was not finite


@dataclass
class RunState:
    """Memory of one run of guidance: the types that terms fell back to, by index, what the log has said, and moments."""

    fallbacks: dict[int, torch.dtype] = field(default_factory=dict)
    said: set[tuple[str, str]] = field(default_factory=set)
    moments: dict[str, MomentState] = field(default_factory=dict)

    def moments_of(self, name: str, moments: Moments) -> MomentState:
        """The moments of the gradient of this name, which begin at its first call."""
        return self.moments.setdefault(name, MomentState(moments))

    def warn_once(self, name: str, message: str, *values: Any) -> None:
        """Warn about something of this name, once for each message."""
        if (name, message) not in self.said:
            self.said.add((name, message))
            log.warning(message, *values)

    def zero_nonfinite(self, gradient: Tensor, name: str, sigma: float) -> Tensor:
        """The gradient (B, C, H, W) with zeros for images where it is not finite, so that a fault never blackens an image.

        name: whose gradient it is, sigma: the noise level; both for the warning in the log.
        """
        bad = ~is_finite(gradient)
        if not bool(bad.any()):
            return gradient
        self.warn_once(name, "the gradient of %s is not finite at sigma %.4g for %d of %d images: left unguided in this "
                       "step and wherever it happens again", name, sigma, int(bad.sum()), len(gradient))
        return torch.where(bad.reshape(-1, *(1,) * (gradient.ndim - 1)), torch.zeros_like(gradient), gradient)

    def energy_gradient(self, term: int, guider: Guider, point: Tensor, sigma: Tensor,
                        compute_dtype: torch.dtype | None) -> TermGradient:
        """`energy_gradient`, in a wider type for the rest of the run once that makes images finite that were not.

        term: index by which the type is remembered. compute_dtype: the type to begin with. An image that is not finite
        itself, or that is not in any type, changes nothing.
        """
        known = self.fallbacks.get(term)
        result = _gradient_in(known or compute_dtype, known is not None, guider, point, sigma)
        for dtype in [] if known == torch.float32 else wider_types(known or compute_dtype, guider, point.device):
            missing = is_finite(point) & ~_is_finite_result(result)
            if not bool(missing.any()):
                break
            wider = _wider_if_it_fits(dtype, guider, point, sigma)
            if wider and bool((_is_finite_result(wider) & missing).any()):
                self._remember(term, guider.name, known or compute_dtype or _type_of(guider), dtype, float(sigma[0]))
                result = wider
        return result

    def as_computed(self, term: int, guider: Guider,
                    compute_dtype: torch.dtype | None) -> tuple[Guider, torch.dtype | None]:
        """A guider, and the type, in which `energy_gradient` has come to compute a term."""
        known = self.fallbacks.get(term)
        return in_full_precision(guider) if known == torch.float32 else guider, known or compute_dtype

    def _remember(self, term: int, name: str, narrow: torch.dtype, wide: torch.dtype, sigma: float) -> None:
        self.fallbacks[term] = wide
        self.warn_once(name, "%s is not finite in %s at sigma %.4g: it computes in %s for the rest of the run", name,
                       dtype_name(narrow), sigma, dtype_name(wide))


def wider_types(dtype: torch.dtype | None, guider: Guider, device: torch.device) -> list[torch.dtype]:
    """Types to try where a guider is not finite in `dtype`, narrow ones first; float32 includes the weights."""
    if dtype not in HALF or not has_network(guider):
        return [torch.float32] if _half_parts(guider) else []
    return [torch.bfloat16, torch.float32] if dtype == torch.float16 and _has_bfloat16(device) else [torch.float32]


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a type without the library's, such as float16."""
    return str(dtype).removeprefix("torch.")


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)  # others emulate it
    return torch.amp.is_autocast_available(device.type)


def _gradient_in(dtype: torch.dtype | None, is_fallback: bool, guider: Guider, point: Tensor, sigma: Tensor) -> TermGradient:
    if is_fallback and dtype == torch.float32:
        guider = in_full_precision(guider)
    return TermGradient(*energy_gradient(guider, point, sigma, dtype), dtype if is_fallback else None)


def _wider_if_it_fits(dtype: torch.dtype, guider: Guider, point: Tensor, sigma: Tensor) -> TermGradient | None:
    try:
        return _gradient_in(dtype, True, guider, point, sigma)
    except torch.OutOfMemoryError:
        return None


def _is_finite_result(result: TermGradient) -> Tensor:
    return result.energy.isfinite() & is_finite(result.gradient)


def in_full_precision(guider: Guider) -> Guider:
    """The guider with the network and the decoder computing in float32, also where their weights are of half precision."""
    return replace(guider, net=_with_float32_weights(guider.net), decode=_with_float32_weights(guider.decode))


def _with_float32_weights(net: Any) -> Any:
    return FullPrecision(net) if _half_weights(net) else net


def _half_parts(guider: Guider) -> bool:
    return bool(_half_weights(guider.net) or _half_weights(guider.decode))


def _half_weights(net: Any) -> list[str]:
    if not isinstance(net, nn.Module):
        return []
    return [name for name, tensor in (*net.named_parameters(), *net.named_buffers()) if tensor.dtype in HALF]


def _type_of(guider: Guider) -> torch.dtype:
    [net] = [net for net in (guider.net, guider.decode) if _half_weights(net)][:1]
    assert isinstance(net, nn.Module)
    return next(tensor.dtype for tensor in (*net.parameters(), *net.buffers()) if tensor.dtype in HALF)


@dataclass(frozen=True)
class FullPrecision:
    """A network whose weights of half precision are read as float32 in each call; the weights themselves stay."""

    net: Callable[..., Tensor]

    def sliced(self, part: slice) -> "FullPrecision":
        """The decoder for a part of a batch."""
        return FullPrecision(slice_decoder(self.net, part))

    def __call__(self, *inputs: Tensor) -> Tensor:
        assert isinstance(self.net, nn.Module)
        tensors = dict((*self.net.named_parameters(), *self.net.named_buffers()))
        wide = {name: tensors[name].float() for name in _half_weights(self.net)}
        return torch.func.functional_call(self.net, wide, inputs)
