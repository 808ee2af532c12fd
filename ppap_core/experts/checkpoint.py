"""An expert bank as one safetensors file, with everything needed to refuse a wrong match."""
from pathlib import Path

from torch import Tensor

from ..guiders.guider import Guider
from ..guiders.latents import PIXELS, LatentSpace
from ..io.files import load_tensors, save_tensors, with_prefix, without_prefix
from ..io.hashing import fingerprint_network
from ..schedules import ExpertSchedule
from .bank import ExpertBank, LoraSpec, base_network

FORMAT = 1
KIND = "expert bank"
NOISE = "sigma of x = image + sigma noise"


def _belongs(guider: Guider, weights: str) -> dict:
    """What must agree between a file and a guider: everything that would silently make experts useless."""
    return {"kind": KIND, "format": FORMAT, "noise": NOISE, "task": guider.task, "fingerprint": weights,
            "preprocess": guider.preprocess.to_dict()}


def save_bank(path: Path | str, bank: ExpertBank, guider: Guider) -> None:
    """Write the adapters of all experts, what they belong to and how they were made."""
    tensors = {}
    for index in range(len(bank.schedule)):
        tensors |= with_prefix(f"expert_{index}", bank.weights(index))
    if bank.space:
        tensors |= {"space.factors": bank.space.factors, "space.bias": bank.space.bias}
    save_tensors(path, tensors, _belongs(guider, bank.fingerprint) | {
        "guider": guider.name, "space": bank.space_name, "shuffle": bank.space.shuffle if bank.space else 1,
        "view": bank.view, "edges": list(bank.schedule.edges), "rank": bank.lora.rank, "alpha": bank.lora.alpha,
        "targets": list(bank.lora.targets), "recipe": bank.training_info})


def load_bank(path: Path | str, guider: Guider) -> ExpertBank:
    """The bank of a file, on the network of a plain guider.

    ValueError naming both values where the file belongs to something else.
    """
    tensors, about = load_tensors(path)
    for key, value in _belongs(guider, fingerprint_network(base_network(guider))).items():
        if about.get(key) != value:
            raise ValueError(f"{Path(path).name} does not fit: its {key} is {about.get(key)!r}, expected {value!r}; load "
                             "the guider that these experts were distilled for, or distil new ones")
    try:
        schedule = ExpertSchedule(tuple(map(float, about["edges"])))
        lora = LoraSpec(int(about["rank"]), float(about["alpha"]), tuple(map(str, about["targets"])))
        view, space = str(about["view"]), _space(tensors, about)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the description in {Path(path).name} is damaged ({error}): copy or distil it again") from error
    bank = ExpertBank(base_network(guider), schedule, lora, view, space=space)
    bank.training_info = about.get("recipe", {})
    for index in range(len(schedule)):
        bank.load(index, without_prefix(f"expert_{index}", tensors))
    return bank


def _space(tensors: dict[str, Tensor], about: dict) -> LatentSpace | None:
    name = str(about["space"])
    if name == PIXELS:
        return None
    factors, bias = (tensors[f"space.{part}"].clone() for part in ("factors", "bias"))  # else the file stays open
    shuffle = int(about["shuffle"])
    if factors.shape[1:] != (3,) or bias.shape != (3,) or not 1 <= shuffle <= 8:
        raise ValueError(f"the colours of its latents have the shapes {tuple(factors.shape)} and {tuple(bias.shape)}")
    return LatentSpace(name, factors, bias, shuffle)
