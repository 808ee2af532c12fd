"""Every shipped workflow at its full settings in a ComfyUI, and its pictures: `make pictures`. One is for the README, with
all that it shows; one stands for it among the templates, with two images before and after.

Not part of the suite, which runs them with few steps: about five minutes on two cores.
"""
import pytest
import torch
from helpers.comfy_server import Server
from helpers.graphs import WORKFLOW_NAMES, WORKFLOWS, titled, workflow
from PIL import Image, ImageStat
from torchvision.transforms.functional import to_tensor
from torchvision.utils import save_image

from ppap_core.viz.drawing import contact_sheet, save_picture

SIDE, LARGEST, COLUMNS = 128, 256, 8  # pixels of a picture on the sheet; larger ones are plots, which the sheet leaves out

BEFORE_AND_AFTER = {"autoguidance": ("Without", "With autoguidance"),
                    "baked": ("Without", "Baked, without Steer"),
                    "best": ("The first four seeds", "Guided, with particles"),
                    "colourise": ("The grey picture", "In colour, exactly"),
                    "depth": ("Without guidance", "Same depth as the reference"),
                    "enlarge": ("The small picture", "Enlarged, exactly"),
                    "latent": ("Without guidance", "Steered towards stars"),
                    "latent_experts": ("Without guidance", "By the experts"),
                    "lora_autoguidance": ("The good LoRA alone", "With autoguidance, same seed"),
                    "masks": ("Without", "A star, lit from the left"),
                    "one_frame": ("Without guidance", "A star, in these colours"),
                    "own_classifier": ("Without", "A blue thing"),
                    "prior": ("As they are", "Made symmetric"),
                    "quickstart": ("Without guidance", "Steered towards stars"),
                    "readout": ("Without guidance", "The readout"),
                    "regions": ("Without guidance", "A disk, low and to the left"),
                    "restore": ("The torn picture", "Made whole, exactly"),
                    "rules": ("Without guidance", "With the three rules"),
                    "seamless": ("ControlNet alone, two by two", "Exactly, two by two"),
                    "segmentation": ("Without guidance", "Same regions as the reference"),
                    "series": ("Without", "The series"),
                    "steer": ("Without", "With these colours"),
                    "strengths": ("Off", "Strong"),
                    "trained_guider": ("Without", "Steered towards close-ups"),
                    "turbo": ("Without guidance", "Steered towards stars"),
                    "variety": ("Much the same", "Unlike each other"),
                    "with_controlnet": ("ControlNet alone", "Both")}


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_workflow_makes_its_picture(server: Server, name: str):
    outputs = server.run(workflow(name, server.get("/object_info")), seconds=1200)
    shown = {title: server.pictures(outputs[key]) for title, key in titled(name).items() if "images" in outputs.get(key, {})}
    keep_grid(shown)
    rows = {title: pictures[:COLUMNS] for title, pictures in shown.items() if pictures[0].width <= LARGEST}
    assert len(rows) >= 2 and all(max(ImageStat.Stat(each).stddev) > 1 for pictures in rows.values() for each in pictures)
    sheet = contact_sheet({title: torch.stack([drawn(each) for each in pictures]) for title, pictures in rows.items()}, 1,
                          max(map(len, rows.values())))
    save_picture(sheet, WORKFLOWS.parent / "docs" / "pictures" / f"{name}.png")
    save_image(torch.stack([drawn(each) for title in BEFORE_AND_AFTER[name] for each in (rows[title] * 2)[:2]]),
               WORKFLOWS / f"{name}.jpg", nrow=2, padding=0, normalize=True, value_range=(-1, 1))


def keep_grid(shown: dict[str, list[Image.Image]]) -> None:
    """Save the grid of a workflow as it is."""
    for grid in shown.get("Guiders and strengths", []):
        grid.save(WORKFLOWS.parent / "docs" / "pictures" / "grid.png")


def drawn(picture: Image.Image) -> torch.Tensor:
    """A picture on the sheet, (3, SIDE, SIDE) in [-1, 1]; pixels stay visible as such."""
    return to_tensor(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) * 2 - 1
