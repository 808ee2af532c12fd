"""An expert bank as one safetensors file, with everything needed to refuse a wrong match."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from ..guiders.guider import Guider
from ..guiders.latents import PIXELS, LatentSpace
from ..io.files import save_tensors, with_prefix, without_prefix
from ..io.hashing import fingerprint_network, weight_digests
from ..io.values import shown
from ..schedules import ExpertSchedule
from .adapters import LoraSpec
from .bank import ExpertBank, base_network
from .header import COMMON, FIELDS, check_count, check_fields, read_expert_file
from .identity import Names, libraries, match_former_names, match_layers, match_weights

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
    save_tensors(path, tensors, requirements(guider, KIND) | {
        "fingerprint": bank.fingerprint, "guider": guider.name, "space": bank.space_name,
        "shuffle": bank.space.shuffle if bank.space else 1, "view": bank.view, "edges": list(bank.schedule.edges),
        "rank": bank.lora.rank, "alpha": bank.lora.alpha, "targets": list(bank.lora.targets), "recipe": bank.training_info,
        "library": libraries(bank.net), "weights": weight_digests(bank.adapted.plain_state(bank.net))})


def load_bank(path: Path | str, guider: Guider) -> ExpertBank:
    """Read a bank onto the network of a plain guider, which another release of its library may have named differently.

    FileNotFoundError without the file; ValueError if it is damaged or, naming both values, belongs to something else.
    """
    file, (tensors, header) = Path(path).name, read_expert_file(path)
    base = base_network(guider)
    weights = match_network(file, header, guider, KIND)
    with damaged(file):
        check_fields(header, FIELDS)
        if len(header["targets"]) > len(weights):
            raise ValueError(f"it names {len(header['targets'])} layers, and the network has {len(weights)} weights")
        layers = match_layers(header["targets"], weights)
        schedule, space = ExpertSchedule(tuple(map(float, header["edges"]))), _space(tensors, header)
        check_count(tensors, "expert", len(schedule))
        lora = LoraSpec(header["rank"], float(header["alpha"]), tuple(layers.values()))
        bank = ExpertBank(base, schedule, lora, header["view"], space=space)
        for index in range(len(schedule)):
            bank.load(index, rename_adapters(without_prefix(f"expert_{index}", tensors), layers))
            if not all(bool(weight.isfinite().all()) for weight in bank.weights(index).values()):
                raise ValueError(f"expert {index} has weights that are no numbers")
    bank.training_info = header.get("recipe", {})
    return bank


@contextmanager
def damaged(file: str) -> Iterator[None]:
    """Context manager: errors of a file's description name the file, and say what to do."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the description in {file} is damaged ({error}): copy or distil it again") from error


def match_network(file: str, header: dict, guider: Guider, kind: str) -> Names:
    """Pair the weights of the network that a file belongs to with those of a plain guider's.

    header: of the file. kind: that it should have. ValueError, naming both values, if it belongs to something else.
    """
    for key, expected in requirements(guider, kind).items():
        if header.get(key) != expected:
            raise _unfit(file, key, header, expected)
    with damaged(file):
        check_fields(header, COMMON)
    return _match_weights(file, header, base_network(guider))


def _match_weights(file: str, header: dict, base: nn.Module) -> Names:
    found = match_former_names(str(header.get("fingerprint")), base)
    if found is None and isinstance(header.get("weights"), dict):
        found = match_weights(header["weights"], weight_digests(base.state_dict()))
    if found is None:
        release = f" (made with {header.get('library') or 'a release that it does not name'}; here is {libraries(base)})"
        raise _unfit(file, "fingerprint", header, fingerprint_network(base), release if libraries(base) else "")
    return found


def _unfit(file: str, key: str, header: dict, expected: object, release: str = "") -> ValueError:
    return ValueError(f"{file} does not fit: its {key} is {shown(header.get(key))}{release}, expected {expected!r}; load "
                      "the guider that these experts were distilled for, or distil new ones")


def rename_adapters(weights: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Weights of an expert with the layers' names in a file replaced by those in the network."""
    layers = {name: name.partition(".lora_") for name in weights}
    return {f"{names.get(layer, layer)}{mark}{rest}": weights[name] for name, (layer, mark, rest) in layers.items()}


def requirements(guider: Guider, kind: str) -> dict:
    """Entries that must agree between a file and a guider: any other value would silently make the experts useless."""
    return {"kind": kind, "format": FORMAT, "noise": NOISE, "task": guider.task,
            "preprocess": guider.preprocess.to_dict()}


def _space(tensors: dict[str, Tensor], header: dict) -> LatentSpace | None:
    if header["space"] == PIXELS:
        return None
    factors, bias = (tensors[f"space.{part}"].clone() for part in ("factors", "bias"))  # else the file stays open
    if factors.shape[1:] != (3,) or bias.shape != (3,) or not (factors.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"the colours of its latents have the shapes {tuple(factors.shape)} and {tuple(bias.shape)}, or "
                         "are no numbers")
    return LatentSpace(header["space"], factors, bias, header["shuffle"])
