"""An expert bank as one safetensors file, with everything needed to refuse a wrong match."""
from pathlib import Path

from .experts import ExpertBank, LoraSpec, base_network, fingerprint
from .files import load_tensors, save_tensors, with_prefix, without_prefix
from .guider import Guider
from .noise import ExpertSchedule

FORMAT = 1
KIND = "expert bank"


def save_bank(path: Path | str, bank: ExpertBank, guider: Guider) -> None:
    """Write the adapters of all experts, what they belong to and how they were made."""
    tensors = {}
    for index in range(len(bank.schedule)):
        tensors |= with_prefix(f"expert_{index}", bank.weights(index))
    save_tensors(path, tensors, {
        "format": FORMAT, "kind": KIND, "guider": guider.name, "task": guider.task, "fingerprint": bank.fingerprint,
        "preprocess": guider.preprocess.about(), "view": bank.view, "space": bank.space,
        "noise": "sigma of x = image + sigma noise", "edges": list(bank.schedule.edges),
        "rank": bank.lora.rank, "alpha": bank.lora.alpha, "targets": list(bank.lora.targets), "recipe": bank.recipe})


def load_bank(path: Path | str, guider: Guider) -> ExpertBank:
    """The bank of a file, on the network of a plain guider.

    ValueError naming both values if format, task, network or preprocessing differ from the guider's.
    """
    tensors, about = load_tensors(path)
    expected = {"kind": KIND, "format": FORMAT, "task": guider.task, "guider": guider.name,
                "fingerprint": fingerprint(base_network(guider)), "preprocess": guider.preprocess.about()}
    for key, value in expected.items():
        if about.get(key) != value:
            raise ValueError(f"{Path(path).name} does not fit: its {key} is {about.get(key)!r}, expected {value!r}; load "
                             "the guider that these experts were distilled for, or distil new ones")
    try:
        schedule = ExpertSchedule(tuple(map(float, about["edges"])))
        lora = LoraSpec(int(about["rank"]), float(about["alpha"]), tuple(map(str, about["targets"])))
        view, space = str(about["view"]), str(about["space"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the description in {Path(path).name} is damaged ({error}): copy or distil it again") from error
    bank = ExpertBank(base_network(guider), schedule, lora, view, space)
    bank.recipe = about.get("recipe", {})
    for index in range(len(schedule)):
        bank.load(index, without_prefix(f"expert_{index}", tensors))
    return bank
