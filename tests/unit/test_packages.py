"""Packages that are not there are told from packages that are, and do not go with one another."""
import builtins
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from helpers import SmallNet, says

from ppap_core.experts.bank import ExpertBank
from ppap_core.guiders.loaders import load_guider
from ppap_core.guiders.loaders.hub import download
from ppap_core.io.packages import importing
from ppap_core.schedules import ExpertSchedule

RENAMED = ImportError("cannot import name 'HybridCache' from 'transformers'")
BROKEN = [RENAMED, RuntimeError("Failed to import it:\noperator torchvision::nms does not exist"),
          AttributeError("no attribute 'int4'"),
          ModuleNotFoundError("No module named 'accelerate'", name="accelerate")]


def folder_of(tmp_path: Path, config: dict) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "preprocessor_config.json").write_text("{}")
    return tmp_path


USES = {
    "peft": lambda folder: ExpertBank(SmallNet(), ExpertSchedule((0.1, 1.0))),
    "timm": lambda folder: load_guider(folder_of(folder, {"architecture": "resnet10t"})),
    "transformers": lambda folder: load_guider(folder_of(folder, {"architectures": ["ViTForImageClassification"]})),
    "huggingface_hub": lambda folder: download("owner/name", folder / "new", print)}


def breaks(monkeypatch: pytest.MonkeyPatch, package: str, error: Exception) -> None:
    """Let the import of a package raise."""
    imported = builtins.__import__

    def fails(name: str, *args: object) -> ModuleType:
        if name.partition(".")[0] == package:
            raise error
        return imported(name, *args)
    monkeypatch.setattr(builtins, "__import__", fails)


@pytest.mark.parametrize("package", USES)
@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
def test_a_package_that_is_there_but_broken(package: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The sentence names both releases and what is wrong."""
    pytest.importorskip(package)
    breaks(monkeypatch, package, error)
    beside = "torch" if package in ("timm", "transformers") else "transformers"
    with says(ImportError, f"{package} {version(package)} is installed but", f"with {beside} {version(beside)}",
              " ".join(str(error).split()), "that go together", f"pip install -U {package}"):
        USES[package](tmp_path)


@pytest.mark.parametrize("package", USES)
def test_a_package_that_is_not_there(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with says(ImportError, f"the package {package} (", f"pip install {package}"):
        USES[package](tmp_path)


def test_a_class_that_its_package_cannot_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Transformers imports a class when it is asked for, and raises only then."""
    transformers = pytest.importorskip("transformers")
    kind, find = type(transformers), type(transformers).__getattr__

    def fails(self: object, name: str) -> object:
        if name == "ViTForImageClassification":
            raise RuntimeError("operator torchvision::nms does not exist")
        return find(self, name)
    monkeypatch.setattr(kind, "__getattr__", fails)
    monkeypatch.delitem(vars(transformers), "ViTForImageClassification", raising=False)
    with says(ImportError, "torchvision::nms", f"transformers {transformers.__version__} is installed"):
        USES["transformers"](tmp_path)


def test_a_package_that_works_is_imported():
    with importing("json", "nothing needs", "json"):
        import json as found
    assert found is json


def test_what_stops_a_program_is_no_missing_package():
    with pytest.raises(KeyboardInterrupt), importing("json", "nothing needs", "json"):
        raise KeyboardInterrupt
