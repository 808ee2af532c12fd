"""Every shipped workflow at its full settings in a ComfyUI, and the README's picture of it: `make pictures`.

Not part of the suite, which runs them with few steps: about five minutes on two cores.
"""
import pytest
import torch
from comfy_server import Server
from graphs import WORKFLOW_NAMES, WORKFLOWS, titled, workflow
from PIL import Image, ImageStat
from torchvision.transforms.functional import to_tensor

from ppap_core.plots import contact_sheet, save_picture

SIDE, LARGEST, COLUMNS = 128, 256, 8  # pixels of a picture on the sheet; larger ones are plots, which the sheet leaves out


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_workflow_makes_its_picture(server: Server, name: str):
    outputs = server.run(workflow(name, server.get("/object_info")), seconds=1200)
    shown = {title: server.pictures(outputs[key]) for title, key in titled(name).items() if "images" in outputs.get(key, {})}
    rows = {title: pictures[:COLUMNS] for title, pictures in shown.items() if pictures[0].width <= LARGEST}
    assert len(rows) >= 2 and all(max(ImageStat.Stat(each).stddev) > 1 for pictures in rows.values() for each in pictures)
    sheet = contact_sheet({title: torch.stack([drawn(each) for each in pictures]) for title, pictures in rows.items()}, 1,
                          max(map(len, rows.values())))
    save_picture(sheet, WORKFLOWS.parent / "docs" / "pictures" / f"{name}.png")


def drawn(picture: Image.Image) -> torch.Tensor:
    """A picture on the sheet, (3, SIDE, SIDE) in [-1, 1]; pixels stay visible as such."""
    return to_tensor(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) * 2 - 1
