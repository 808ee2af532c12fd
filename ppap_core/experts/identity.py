"""Networks recognised by their values, since the next release of a library gives their modules other names."""
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from math import isqrt

from torch import Tensor, nn

from ..io.hashing import fingerprint_network, fingerprint_state

Names = dict[str, str]
"""Name of a weight or layer in a file -> its name in the network that is here."""


def libraries(net: nn.Module) -> str:
    """The packages that a network's modules come from, with their releases, such as "transformers 4.57.6"."""
    packages = {type(module).__module__.partition(".")[0] for module in net.modules()} - {"torch", "peft"}
    found = []
    for package in sorted(packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # a module of this library or of the user
            continue
    return ", ".join(found)


def match_weights(saved: Mapping[str, str], own: Mapping[str, str]) -> Names | None:
    """Pair the weights of a file's network with those of the one that is here by value; None if they differ.

    saved, own: as `weight_digests` gives them, in the order of registration. Equal values are paired by name, then in
    order. Vectors that only one of the two has are let through: a release adds or drops norms that nobody asks for.
    """
    names = {name: name for name, value in saved.items() if own.get(name) == value}
    left: dict[str, list[str]] = {}
    for name, value in own.items():
        if name not in names:
            left.setdefault(value, []).append(name)
    for name in [name for name in saved if name not in names]:
        if left.get(saved[name]):
            names[name] = left[saved[name]].pop(0)
    lost, added = (saved[name] for name in saved if name not in names), (value for value in left for _ in left[value])
    unpaired = [*lost], [*added]
    return None if all(unpaired) or any("x" in value.split()[0] for side in unpaired for value in side) else names


def match_former_names(fingerprint: str, net: nn.Module) -> Names | None:
    """Pair the weights with those of a file that knows its network by a hash over names and values only.

    None unless the network gives the hash under its own names, or under those that its library's files have.
    """
    if fingerprint == fingerprint_network(net):
        return {name: name for name in net.state_dict()}
    names, fingerprints = former_identity(net)
    return names if fingerprint in fingerprints else None


def former_identity(net: nn.Module) -> tuple[Names, list[str]]:
    """Former name of each weight -> its own, and the hashes over names that the network may have had under them.

    Former names are those that its library says the weights have in files: most networks of transformers 4 had them.
    """
    former: Names = getattr(net, "names_in_files", dict)()
    tables = {_former_name(name, former): _former_table(buffer) for name, buffer in net.named_buffers()
              if not buffer.is_floating_point()}
    state = {former.get(name, name): tensor for name, tensor in net.state_dict().items()}
    states = state, tables | state, tables | _without_empty_modules(state)  # tables were saved once, and are computed now
    return {former.get(name, name): name for name in net.state_dict()}, list(map(fingerprint_state, states))


def _without_empty_modules(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors but those of modules that hold zeros only, as norms do that a release added and no file holds."""
    filled = {name.rpartition(".")[0] for name, tensor in state.items() if tensor.any()}
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in filled}


def _former_name(buffer: str, former: Names) -> str:
    """Name of a buffer that no file holds: it was where a weight beside it was."""
    module, _, leaf = buffer.rpartition(".")
    beside = next((name for name in former if name.rpartition(".")[0] == module), None)
    return f"{former[beside].rpartition('.')[0]}.{leaf}" if beside else buffer


def _former_table(buffer: Tensor) -> Tensor:
    """An index of pairs of places as it was before it was flattened."""
    side = isqrt(buffer.numel())
    return buffer.reshape(side, side) if buffer.ndim == 1 and side**2 == buffer.numel() else buffer


def match_layers(layers: Iterable[str], weights: Names) -> Names:
    """Pair the layers of a file with those of a network, by their weights. KeyError for a layer without a counterpart."""
    pairs = {}
    for layer in layers:
        weight = next((name for name in weights if name.startswith(f"{layer}.")), None)
        if weight is None:
            raise KeyError(layer)
        pairs[layer] = weights[weight].removesuffix(weight.removeprefix(layer))
    return pairs
