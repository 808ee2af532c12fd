"""The front page of the library: its example runs, its names exist, and importing it is cheap."""
import subprocess
import sys
import textwrap
from pathlib import Path

import ppap_core

ROOT = Path(__file__).parents[2]


def run_python(code: str, folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, check=True, capture_output=True,
                          text=True, timeout=120).stdout


def test_every_name_of_the_api_is_there_once():
    names = ppap_core.__all__
    assert len(names) == len(set(names)) and all(hasattr(ppap_core, name) for name in names)


def test_the_version_is_that_of_the_package():
    assert f'\nversion = "{ppap_core.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_example_of_the_front_page_runs():
    example = "\n".join(line for line in ppap_core.__doc__.splitlines() if not line or line.startswith("    "))
    assert run_python(textwrap.dedent(example) + "print(*images.shape, bool(images.isfinite().all()))", ROOT) \
        == "4 3 32 32 True\n"


def test_importing_the_api_loads_no_heavy_library():
    loaded = run_python("import sys, ppap_core; print(*sys.modules)", ROOT).split()
    assert not {"timm", "peft", "transformers", "PIL", "huggingface_hub", "diffusers", "comfy"} & set(loaded)


def test_the_api_also_works_as_a_part_of_another_package(tmp_path: Path):
    """ComfyUI loads the library as <pack>.ppap_core, beside any other that is installed."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").touch()
    (tmp_path / "pack/ppap_core").symlink_to(ROOT / "ppap_core", target_is_directory=True)
    loaded = run_python("import sys; from pack.ppap_core import Guider; print(*sys.modules)", tmp_path).split()
    assert "pack.ppap_core.guiders.guider" in loaded and "ppap_core" not in loaded
