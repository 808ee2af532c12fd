"""Guiders from local folders of off-the-shelf networks. Safetensors only; nothing is downloaded and no code is run."""
from collections.abc import Callable
from pathlib import Path

from ...io.files import read_json
from ..guider import Guider
from .timm import load_timm
from .transformers import load_transformers

OUTPUTS = ("own", "structure", "style", "embedding")
"""Outputs that a guider can take from a network: its own, or features of its inner layers. Saved workflows hold these."""
LOADERS: dict[str, Callable[[Path, str], Guider]] = {"architecture": load_timm, "architectures": load_transformers}
"""Key of config.json by which a library is recognised -> loader of a folder."""


def load_guider(folder: Path | str, output: str = "own") -> Guider:
    """The guider in a folder with config.json and safetensors.

    output: one of OUTPUTS; "own" is what the network was made to predict. ValueError or FileNotFoundError for a folder that
    no loader knows, that is incomplete, or whose network has no such output.
    """
    if output not in OUTPUTS:
        raise ValueError(f"there is no output '{output}': expected one of {', '.join(OUTPUTS)}")
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for key, load in LOADERS.items():
        if key in config:
            return load(folder, output)
    raise ValueError(f"{folder.name}/config.json has the keys {', '.join(list(config)[:6])}: expected 'architecture' (timm) "
                     "or 'architectures' (transformers); copy the network's whole folder")
