"""A network that remembers what it said, so that it can be shown without asking again."""
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from .guider import Guider


class Watched(nn.Module):
    """A network that keeps what it saw and said of the first image in its first pass: of the whole, before any cut-outs."""

    def __init__(self, net: Callable[..., Tensor]):
        super().__init__()
        self.net = net
        self.seen: tuple[Tensor, Tensor] | None = None  # an input (1, ...) and its output (1, ...); None before that pass

    def forward(self, image: Tensor, *inputs: Tensor) -> Tensor:
        output = self.net(image, *inputs)
        if self.seen is None:
            self.seen = _first(image), _first(output)
        return output


def _first(batch: Tensor) -> Tensor:
    return batch[:1].detach().clone()


def watched(guider: Guider) -> Guider:
    """The guider with a network that computes the same, and remembers what it said."""
    return replace(guider, net=Watched(guider.net))


def seen_by(guider: Guider) -> tuple[Tensor, Tensor]:
    """What the network of a watched guider saw and said, (1, ...) each. ValueError if it has not run."""
    if not isinstance(guider.net, Watched) or guider.net.seen is None:
        raise ValueError(f"{guider.name} has seen nothing yet: expected a watched guider that has judged an image")
    return guider.net.seen
