"""Names that weights of timm have had: of wrappers and of earlier releases, turned into those that a network has now."""
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .weights import unwrapped

log = logging.getLogger(__name__)


def best_layout(net: Any, weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Weights under the names that fit a network best: as they are, out of a wrapper, or by timm's own conversion.

    net: of timm. weights: name -> tensor, as a file holds them. architecture: its name in timm.
    """
    own, best = net.state_dict(), without_tables(net, weights)
    for layout in _layouts(net, weights, architecture):
        layout = without_tables(net, layout)
        if _misfits(own, layout) < _misfits(own, best):
            best = layout
        if not _misfits(own, best):
            break
    return best


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int:
    wrong = sum(own[name].shape != weights[name].shape for name in own.keys() & weights.keys())
    return len(own.keys() ^ weights.keys()) + wrong


def _layouts(net: Any, weights: dict[str, Tensor], architecture: str) -> Iterator[dict[str, Tensor]]:
    for inner in (weights, *unwrapped(weights)):
        yield inner
        yield _with_named_head(net, inner)
        for convert in _conversions(architecture):
            try:
                yield _with_named_head(net, convert(dict(inner), net))
            except Exception as error:  # written for files that its author had at hand
                log.debug("timm's %s does not take these weights: %s", convert, error)


def _conversions(architecture: str) -> Iterator[Callable[..., dict[str, Tensor]]]:
    """Functions (weights, net) -> weights that timm has for older files of an architecture."""
    import timm

    for name, function in vars(sys.modules[timm.model_entrypoint(architecture).__module__]).items():
        if "filter_fn" in name and callable(function):
            yield function
            if "adapt_layer_scale" in inspect.signature(function).parameters:
                yield partial(function, adapt_layer_scale=True)


def _with_named_head(net: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the classifier's name as this release has it, where another is all that is missing."""
    own = net.state_dict()
    missing, unexpected = (sorted(a.keys() - b.keys()) for a, b in ((own, weights), (weights, own)))
    if [own[name].shape for name in missing] != [weights[name].shape for name in unexpected]:
        return weights
    heads = _classifiers(net)
    if not all(name.rpartition(".")[0] in heads for name in missing):
        return weights
    return {dict(zip(unexpected, missing, strict=True)).get(name, name): tensor for name, tensor in weights.items()}


def _classifiers(net: Any) -> tuple[str, ...]:
    named = net.default_cfg.get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def without_tables(net: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights (name -> tensor) without what a network makes itself, and without the head of one that has no classes."""
    own = net.state_dict()
    buffers = {name for name, _ in net.named_buffers()}
    heads = tuple(f"{name}." for name in _classifiers(net)) if not net.num_classes else ()
    return {name: tensor for name, tensor in weights.items()
            if name in own or not (name in buffers or not tensor.is_floating_point() or (heads and name.startswith(heads)))}
