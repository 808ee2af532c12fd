"""Guiders by what they come from: a folder, the bundle, a rule. Safetensors only; nothing is downloaded here."""
from collections.abc import Callable
from pathlib import Path

from ...io.files import read_json
from ..guider import Guider
from .timm import load_timm
from .transformers import load_transformers

ANSWERS = ("own", "structure", "style", "embedding")
"""What is read of a network: its own answer, or how it sees an image inside."""
LOADERS: dict[str, Callable[[Path, str], Guider]] = {"architecture": load_timm, "architectures": load_transformers}
"""Key of config.json that tells the library -> loader of a folder."""


def load_guider(folder: Path | str, answer: str = "own") -> Guider:
    """The guider in a folder, by what its config.json says. ValueError in words when no loader knows it."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for key, load in LOADERS.items():
        if key in config:
            return load(folder, answer)
    raise ValueError(f"{folder.name}/config.json has the keys {', '.join(list(config)[:6])}: expected 'architecture' (timm) "
                     "or 'architectures' (transformers); copy the network's whole folder")
