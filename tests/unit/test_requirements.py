"""What the pack asks pip for leaves alone what ComfyUI brings."""
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

pytest.importorskip("packaging")
from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

OF_COMFYUI = {"torch", "torchvision", "torchaudio", "torchsde", "numpy", "transformers", "tokenizers", "safetensors",
              "huggingface-hub", "pillow", "einops", "scipy", "kornia", "diffusers"}
FILE = Path(__file__).parents[2] / "requirements.txt"
LISTED = [Requirement(line) for line in FILE.read_text().splitlines()]


def needed(package: str) -> list[Requirement]:
    """The requirements of a package and of all that it needs itself, but not of what ComfyUI brings."""
    found, left, seen = [], [package], set(OF_COMFYUI)
    while left:
        name = left.pop()
        seen.add(name)
        lines = map(Requirement, requires(name) or [])
        found += (own := [line for line in lines if not line.marker or line.marker.evaluate({"extra": ""})])
        left += {canonicalize_name(line.name) for line in own} - seen
    return found


def upper_limits(requirement: Requirement) -> set[str]:
    return {limit.operator for limit in requirement.specifier} - {">=", ">", "!="}


def test_requirements_name_nothing_that_comfyui_brings():
    names = {canonicalize_name(line.name) for line in LISTED}
    assert names and not names & OF_COMFYUI and not [name for name in names if "opencv" in name]


def test_requirements_are_lower_bounds():
    assert not [str(line) for line in LISTED if upper_limits(line) or not line.specifier]


@pytest.mark.parametrize("package", [line.name for line in LISTED])
def test_no_requirement_limits_what_comfyui_brings(package: str):
    """Nor does what it requires itself: an upper limit would take a newer release away from ComfyUI and other packs."""
    try:
        lines = needed(package)
    except PackageNotFoundError as error:
        pytest.skip(f"{error}")
    assert lines and not [str(line) for line in lines if canonicalize_name(line.name) in OF_COMFYUI and upper_limits(line)]
