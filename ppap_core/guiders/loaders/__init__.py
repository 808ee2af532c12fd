"""Guiders from local folders of off-the-shelf networks. Safetensors only; nothing is downloaded and no code is run."""
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...io.values import bare
from ..guider import Guider
from ..preprocess import OF_ANOTHER_KIND
from .contents import file_names, read_config, read_index, require_config, weight_names
from .timm import check_timm, load_timm
from .trained import FindBackbone, is_trained, load_trained
from .transformers import check_transformers, load_transformers

OUTPUTS = ("own", "structure", "style", "embedding")
"""Outputs that a guider can take from a network: its own, or features of its inner layers. Saved workflows hold these."""


class Loader(NamedTuple):
    """Loader of one library's folders: what it refuses before any weight is read, and how it makes a guider."""

    check: Callable[[Path, str], None]
    load: Callable[[Path, str], Guider]


UNREADABLE = (*OF_ANOTHER_KIND, AssertionError, RuntimeError)
"""Errors of the libraries, and of networks that are tried, where files hold something else than they should."""

LOADERS = {"architecture": Loader(check_timm, load_timm), "architectures": Loader(check_transformers, load_transformers)}
"""Key of config.json by which a library is recognised -> loader of its folders."""


def load_guider(folder: Path | str, output: str = "own", find_backbone: FindBackbone | None = None) -> Guider:
    """The guider in a folder with config.json and safetensors.

    output: one of OUTPUTS; "own" is what the network was made to predict. find_backbone: gives the network that a trained
    guider in the folder reads; None: from the folder of its name beside this one. ValueError or FileNotFoundError for a
    folder that no loader knows, that is incomplete, or whose network has no such output.
    """
    if output not in OUTPUTS:
        raise ValueError(f"there is no output '{output}': expected one of {', '.join(OUTPUTS)}")
    folder = Path(folder)
    try:
        if is_trained(folder):
            return load_trained(folder, output, find_backbone or partial(_beside, folder.parent))
        return require_loadable(folder, file_names(folder), folder.name).load(folder, output)
    except UNREADABLE as error:
        raise ValueError(f"the files of {folder.name} do not say what they should ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}): copy the folder again from the network's own page"
                         ) from error


def _beside(root: Path, name: str, output: str) -> Guider:
    """The guider of a folder among others, by a name such as "timm/resnet18"."""
    library, _, folder = name.partition("/")
    if library not in ("timm", "transformers") or Path(folder).name != folder or is_trained(root / folder):
        raise ValueError(f"{bare(name)} is no network of a folder beside it: give the function that finds it")
    return load_guider(root / folder, output)


def require_loadable(folder: Path, names: Collection[str], name: str) -> Loader:
    """The loader for a network, judged by config.json and the other small files in a folder and by the names of all files.

    names: of all files that the folder has or will have. name: of the network, for sentences. ValueError or
    FileNotFoundError for what no loader can load whatever its weights are; ImportError where a library is missing.
    """
    if folder.is_dir():
        require_config(name, names)
    config = read_config(folder)
    loader = next((loader for key, loader in LOADERS.items() if key in config), None)
    if loader is None:
        keys = ", ".join(map(bare, list(config)[:6]))
        raise ValueError(f"{name}/config.json has the keys {keys}: expected 'architecture' (timm) or 'architectures' "
                         "(transformers); copy the network's whole folder")
    loader.check(folder, name)
    weight_names(name, names, read_index(folder))
    return loader
