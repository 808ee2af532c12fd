"""An expert bank as one safetensors file, with everything needed to refuse a wrong match."""
from pathlib import Path
from typing import cast

from torch import Tensor

from ..guiders.guider import Guider
from ..guiders.latents import PIXELS, LatentSpace, View
from ..io.files import load_tensors, save_tensors, with_prefix, without_prefix
from ..io.hashing import fingerprint_network
from ..schedules import ExpertSchedule
from .adapters import LoraSpec
from .bank import ExpertBank, base_network

FORMAT = 1
KIND = "expert bank"
NOISE = "sigma of x = image + sigma noise"


def save_bank(path: Path | str, bank: ExpertBank, guider: Guider) -> None:
    """Write the weights of all experts, what they belong to and how they were made.

    guider: the one the bank was distilled for, plain or with the bank. OSError if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for index in range(len(bank.schedule)):
        tensors |= with_prefix(f"expert_{index}", bank.weights(index))
    if bank.space:
        tensors |= {"space.factors": bank.space.factors, "space.bias": bank.space.bias}
    save_tensors(path, tensors, _requirements(guider, bank.fingerprint) | {
        "guider": guider.name, "space": bank.space_name, "shuffle": bank.space.shuffle if bank.space else 1,
        "view": bank.view, "edges": list(bank.schedule.edges), "rank": bank.lora.rank, "alpha": bank.lora.alpha,
        "targets": list(bank.lora.targets), "recipe": bank.training_info})


def load_bank(path: Path | str, guider: Guider) -> ExpertBank:
    """Read a bank onto the network of a plain guider.

    FileNotFoundError without the file; ValueError if it is damaged or, naming both values, belongs to something else.
    """
    tensors, header = load_tensors(path)
    for key, expected in _requirements(guider, fingerprint_network(base_network(guider))).items():
        if header.get(key) != expected:
            raise ValueError(f"{Path(path).name} does not fit: its {key} is {header.get(key)!r}, expected {expected!r}; "
                             "load the guider that these experts were distilled for, or distil new ones")
    try:
        schedule = ExpertSchedule(tuple(map(float, header["edges"])))
        lora = LoraSpec(int(header["rank"]), float(header["alpha"]), tuple(map(str, header["targets"])))
        view, space = cast(View, str(header["view"])), _space(tensors, header)  # ExpertBank refuses an unknown view
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the description in {Path(path).name} is damaged ({error}): copy or distil it again") from error
    bank = ExpertBank(base_network(guider), schedule, lora, view, space=space)
    bank.training_info = header.get("recipe", {})
    for index in range(len(schedule)):
        bank.load(index, without_prefix(f"expert_{index}", tensors))
    return bank


def _requirements(guider: Guider, fingerprint: str) -> dict:
    """Entries that must agree between a file and a guider: any other value would silently make the experts useless."""
    return {"kind": KIND, "format": FORMAT, "noise": NOISE, "task": guider.task, "fingerprint": fingerprint,
            "preprocess": guider.preprocess.to_dict()}


def _space(tensors: dict[str, Tensor], header: dict) -> LatentSpace | None:
    name = str(header["space"])
    if name == PIXELS:
        return None
    factors, bias = (tensors[f"space.{part}"].clone() for part in ("factors", "bias"))  # else the file stays open
    shuffle = int(header["shuffle"])
    if factors.shape[1:] != (3,) or bias.shape != (3,) or not 1 <= shuffle <= 8:
        raise ValueError(f"the colours of its latents have the shapes {tuple(factors.shape)} and {tuple(bias.shape)}")
    return LatentSpace(name, factors, bias, shuffle)
