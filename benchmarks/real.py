"""Real pretrained networks and photographs, which belong to others and lie in a folder beside this repository.

PPAP_REAL says where; without it `../shared/real` is tried. The folder holds a module `real` that loads them.
"""
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

BESIDE = Path(__file__).parents[2] / "shared" / "real"


def real_folder() -> Path | None:
    """The folder of real networks, if there is one."""
    folder = Path(os.environ.get("PPAP_REAL") or BESIDE)
    return folder if (folder / "real.py").is_file() else None


@cache
def real_networks() -> ModuleType:
    """The module that loads the real networks. ValueError where there is none."""
    folder = real_folder()
    spec = importlib.util.spec_from_file_location("real", folder / "real.py") if folder else None
    if spec is None or spec.loader is None:
        raise ValueError("no folder of real networks: set PPAP_REAL to one that holds real.py")
    module = sys.modules["real"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
