"""The registry's archive holds what the pack needs at run time, and nothing else; metadata stands in one place."""
import ast
import re
from pathlib import Path

import pytest

pytest.importorskip("pathspec")
from ppap_core.guiders.loaders.hub import folder_name  # noqa: E402
from ppap_core.guiders.loaders.suggested import SUGGESTED  # noqa: E402
from tools.archive import LARGEST, ROOT, build, published_files  # noqa: E402

if not (ROOT / ".git").exists():
    pytest.skip("the archive is made of what git tracks: run this in a clone", allow_module_level=True)
SHIPPED = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "nodes", "ppap_core", "workflows",
           "web", "locales", "subgraphs"}


@pytest.fixture(scope="module")
def names() -> set[str]:
    return set(published_files())


def imported(name: str) -> set[str]:
    """The files of ours that a file imports by relative imports."""
    files = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = Path(*Path(name).parts[:-node.level], *(node.module or "").split("."))
            places = [module, *(module / alias.name for alias in node.names)]
            files |= {str(file) for place in places for file in (place.with_suffix(".py"), place / "__init__.py")
                      if (ROOT / file).is_file()}
    return files


def test_it_holds_every_module_that_is_imported(names: set[str]):
    modules = [name for name in names if name.endswith(".py")]
    assert "nodes/schemas/guidance.py" in modules and "ppap_core/cli.py" in modules
    assert not set().union(*map(imported, modules)) - names


def test_it_holds_weights_workflows_and_help_pages(names: set[str]):
    needed = [file for pattern in ("ppap_core/tinyworld/weights/**/*.safetensors", "ppap_core/tinyworld/guiders/*/*",
                                    "workflows/*.*", "subgraphs/*.json", "web/docs/*.md")
              for file in ROOT.glob(pattern)]
    assert len(needed) > 50 and not {file.relative_to(ROOT).as_posix() for file in needed} - names


def test_it_holds_nothing_else(names: set[str]):
    assert {name.split("/")[0] for name in names} <= SHIPPED


def test_it_is_small_enough(tmp_path: Path):
    unpacked, packed = build(tmp_path / "archive.zip")
    assert packed <= unpacked <= LARGEST


@pytest.fixture(scope="module")
def metadata() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_requirements_are_those_of_the_project(metadata: dict):
    assert (ROOT / "requirements.txt").read_text().split() == metadata["project"]["dependencies"]


def test_one_owner_is_named_everywhere(metadata: dict):
    """The address of the repository stands in two files, as the comment on top of pyproject.toml says."""
    owner = metadata["tool"]["comfy"]["PublisherId"]
    texts = [name for name in published_files() if name.endswith((".md", ".toml"))]
    named = {name: set(re.findall(r"([\w-]+)/ComfyUI-PPAP", (ROOT / name).read_text(encoding="utf-8"))) for name in texts}
    assert {name: owners for name, owners in named.items() if owners} == {"pyproject.toml": {owner}, "README.md": {owner}}


@pytest.mark.parametrize(("key", "ratio"), [("Icon", 1), ("Banner", 21 / 9)])
def test_the_registry_s_pictures_are_in_the_repository(metadata: dict, key: str, ratio: float):
    image, url = pytest.importorskip("PIL.Image"), metadata["tool"]["comfy"][key]
    place = f"{metadata['project']['urls']['Repository'].replace('github.com', 'raw.githubusercontent.com')}/main/"
    assert url.startswith(place)
    width, height = image.open(ROOT / url.removeprefix(place)).size
    assert width == round(height * ratio) and (key == "Banner" or width <= 400)


def test_the_registry_s_models_go_where_load_guider_looks(metadata: dict):
    folders: dict[str, set[str]] = {}
    for model in metadata["tool"]["comfy"]["Models"]:
        repo, file = model["model_url"].removeprefix("https://huggingface.co/").split("/resolve/main/")
        assert model["location"] == f"/ppap_guiders/{folder_name(repo)}/{file}"
        folders.setdefault(repo, set()).add(file)
    assert folders.keys() <= {suggestion.repo for suggestion in SUGGESTED.values()}
    assert all(files >= {"config.json", "model.safetensors"} for files in folders.values())
