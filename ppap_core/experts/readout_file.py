"""A readout as one safetensors file, with everything needed to refuse a wrong match."""
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ..guiders.guider import Guider
from ..io.files import load_tensors, read_header, save_tensors, with_prefix, without_prefix
from ..io.hashing import weight_digests
from ..schedules import ExpertSchedule
from .bank import base_network
from .checkpoint import match_network, requirements
from .identity import libraries
from .readout import ReadoutNetwork, ReadoutSpec

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
    file, (tensors, header) = Path(path).name, load_tensors(path)
    match_network(file, header, guider, KIND)
    try:
        spec = ReadoutSpec(str(header["place"]), int(header["channels"]), tuple(map(int, header["output"])),
                           bool(header["dense"]))
        readout = ReadoutNetwork(base_network(guider), ExpertSchedule(tuple(map(float, header["edges"]))), spec)
        for index in range(len(readout.schedule)):
            readout.head(index).load_state_dict(without_prefix(f"head_{index}", tensors))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the description in {file} is damaged ({error}): copy or distil it again") from error
    readout.training_info = header.get("recipe", {})
    return readout
