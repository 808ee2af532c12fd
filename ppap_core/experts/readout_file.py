"""A readout as one safetensors file, with everything needed to refuse a wrong match."""
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..guiders.guider import Guider
from ..io.files import read_header, save_tensors, with_prefix, without_prefix
from ..io.hashing import weight_digests
from ..schedules import ExpertSchedule
from .bank import base_network
from .checkpoint import damaged, match_network, requirements
from .header import READOUT_FIELDS, check_count, check_fields, read_expert_file
from .identity import libraries
from .readout import ReadoutHead, ReadoutNetwork, ReadoutSpec

KIND = "readout"


def is_readout_file(path: Path | str) -> bool:
    """Whether a file says that it holds a readout."""
    with suppress(ValueError, RecursionError):  # those who read all of it say what is wrong with it
        header = json.loads(read_header(path)[1].get("ppap", "null"))
        return isinstance(header, dict) and header.get("kind") == KIND
    return False


def save_readout(path: Path | str, readout: ReadoutNetwork, guider: Guider) -> None:
    """Write the heads, what they belong to and how they were made. OSError if the file cannot be written.

    guider: the one that the readout was distilled for, plain or with the readout.
    """
    tensors = {name: tensor for index in range(len(readout.schedule))
               for name, tensor in with_prefix(f"head_{index}", readout.head(index).state_dict()).items()}
    save_tensors(path, tensors, requirements(guider, KIND) | {
        "fingerprint": readout.fingerprint, "guider": guider.name, "edges": list(readout.schedule.edges),
        **asdict(readout.spec), "output": list(readout.spec.output), "recipe": readout.training_info,
        "library": libraries(readout.plain), "weights": weight_digests(readout.plain.state_dict())})


def load_readout(path: Path | str, guider: Guider) -> ReadoutNetwork:
    """Read a readout for a plain guider.

    FileNotFoundError without the file; ValueError if it is damaged or, naming both values, belongs to something else.
    """
    file, (tensors, header) = Path(path).name, read_expert_file(path)
    match_network(file, header, guider, KIND)
    with damaged(file):
        check_fields(header, READOUT_FIELDS)
        schedule = ExpertSchedule(tuple(map(float, header["edges"])))
        check_count(tensors, "head", len(schedule))
        spec = ReadoutSpec(header["place"], header["channels"], tuple(header["output"]), header["dense"])
        _require_shapes(tensors, spec)
        readout = ReadoutNetwork(base_network(guider), schedule, spec)
        for index in range(len(schedule)):
            _load_head(readout, index, without_prefix(f"head_{index}", tensors))
    readout.training_info = header.get("recipe", {})
    return readout


def _require_shapes(tensors: dict[str, Tensor], spec: ReadoutSpec) -> None:
    """ValueError unless the file's own weights are of the sizes that it says, before a head of these sizes is made."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in ReadoutHead(spec).state_dict().items()}
    for name, shape in expected.items():
        if (held := tensors[f"head_0.{name}"]).shape != shape:
            raise ValueError(f"the weight {name} has the shape {tuple(held.shape)}, expected {tuple(shape)}")


def _load_head(readout: ReadoutNetwork, index: int, weights: dict[str, Tensor]) -> None:
    try:
        readout.head(index).load_state_dict(weights)
    except RuntimeError as error:  # torch's own words are many lines
        raise ValueError(f"the weights of head {index} are not those of a readout of this kind") from error
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise ValueError(f"head {index} has weights that are no numbers")
