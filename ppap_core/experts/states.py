"""Distillations under way that go on under another release of the network's library, which has other names in it."""
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..guiders.guider import Guider
from ..io.files import load_tensors, read_json, save_tensors, with_prefix, without_prefix, write_json
from ..io.hashing import digest, weight_digests
from .adapters import LoraSpec
from .bank import ExpertBank, base_network
from .checkpoint import rename_adapters
from .identity import Names, former_identity, libraries, match_layers, match_weights
from .lesson import DistillConfig
from .samples import SampleStore

log = logging.getLogger(__name__)

NOTE = "network.json"  # in a folder of states: what its network is, without names

FolderOf = Callable[[str, LoraSpec], Path]
"""(fingerprint of the network, placement of the adapters) -> folder of the states of a distillation"""


def distillation_digest(guider: Guider, bank: ExpertBank, store: SampleStore, config: DistillConfig, fingerprint: str,
                        lora: LoraSpec) -> str:
    """Name of a distillation's folder, of all that its result depends on.

    guider: the plain one. fingerprint, lora: of the network and of the adapters' placement in it, see `FolderOf`.
    """
    return digest([store.manifest, len(store), guider.name, fingerprint, bank.view, bank.space_name, bank.schedule.edges,
                   lora, config])


def state_folder(guider: Guider, bank: ExpertBank, folder_of: FolderOf) -> Path:
    """The folder in which the distillation of a bank goes on, or begins.

    What another release began is copied into it under the names of this one.
    guider: the plain one. folder_of: gives another folder for any other network or placement, beside the first.
    """
    folder = folder_of(bank.fingerprint, bank.lora)
    if folder.exists():
        return folder
    state = base_network(guider).state_dict()
    weights = weight_digests(state)
    nameless = digest(sorted(value for name, value in weights.items() if state[name].any()))  # zeros may come and go
    places = tuple(sorted(_weights_of(layer, weights) for layer in bank.lora.targets))
    note = {"identity": folder_of(nameless, replace(bank.lora, targets=places)).name,
            "library": libraries(base_network(guider)), "weights": weights}
    for other, names in (*_noted(folder.parent, note), *_former(guider, bank, folder_of)):
        log.info("the distillation of %s goes on from %s, which names the layers differently", guider.name, other.name)
        for file in sorted(other.glob("expert_*.state.safetensors")):
            with suppress(ValueError, LookupError, TypeError, AttributeError):  # an expert of a spoilt state begins anew
                _copy_state(file, folder / file.name, bank, names)
        break
    write_json(folder / NOTE, note)
    return folder


def _weights_of(layer: str, weights: dict[str, str]) -> str:
    return " ".join(value for name, value in weights.items() if name.rpartition(".")[0] == layer)


def _noted(parent: Path, note: dict) -> Iterator[tuple[Path, Names]]:
    """Folders of the same distillation under other names, with the names."""
    for file in sorted(parent.glob(f"*/{NOTE}")):
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a spoilt note is no reason not to train
            other = read_json(file)
            if other.get("identity") == note["identity"]:
                names = match_weights(other["weights"], note["weights"])
                if names:
                    yield file.parent, names


def _former(guider: Guider, bank: ExpertBank, folder_of: FolderOf) -> Iterator[tuple[Path, Names]]:
    """Folders without a note, as version 0.1.0 made them, of the names that the library had before."""
    names, fingerprints = former_identity(base_network(guider))
    own = {name: former for former, name in names.items()}
    lora = replace(bank.lora, targets=tuple(match_layers(bank.lora.targets, own).values()))
    for fingerprint in fingerprints:
        other = folder_of(fingerprint, lora)
        if other.exists():
            yield other, names


def _copy_state(file: Path, copy: Path, bank: ExpertBank, names: Names) -> None:
    """Write a state of the same training anew, with the names and the order of this release."""
    tensors, run_id = load_tensors(file)
    if run_id["index"] not in range(len(bank.schedule)):
        raise ValueError(f"{file.name} is the state of no expert")
    layers = match_layers(run_id["lora"]["targets"], names)
    trained = rename_adapters(without_prefix("trained", tensors), layers)
    order = list(bank.weights(run_id["index"]))
    before = _order(trained, list(layers.values()), order)
    run_id |= {"fingerprint": bank.fingerprint, "lora": run_id["lora"] | {"targets": list(bank.lora.targets)}}
    moved: dict[str, Tensor] = {}
    for key, tensor in without_prefix("optimizer", tensors).items():
        index, part = key.split(".", 1)
        moved[f"{order.index(before[int(index)])}.{part}"] = tensor
    save_tensors(copy, with_prefix("trained", trained) | with_prefix("optimizer", moved), run_id)


def _order(trained: dict[str, Tensor], layers: list[str], order: list[str]) -> list[str]:
    """The order in which weights were trained: by layer as the other release has them, A before B, then the stem's."""
    adapters = [name for layer in layers for name in sorted(trained) if name.startswith(f"{layer}.lora_")]
    return adapters + [name for name in order if name not in adapters]
