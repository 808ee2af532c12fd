"""Draw the banner of the pack's page in the registry, 21:9, from the thumbnails of workflows: `make pictures`."""
from pathlib import Path

from PIL import Image

from ppap_core.viz.drawing import font, new_canvas

ROOT = Path(__file__).parents[1]
SIZE, MARGIN, SIDE = (540, 1260), 30, 200  # pixels: height and width, around everything, of a picture
SHOWN = ("steer", "own_classifier", "one_frame", "masks")
BACKGROUND, WORDS, FAINT = (26, 26, 32), (245, 245, 248), (170, 170, 182)
LINES = ((72, "PPAP", WORDS), (28, "Any network steers", WORDS), (28, "any diffusion model", WORDS),
         (20, "above: as it is", FAINT), (20, "below: steered", FAINT))


def draw() -> Image.Image:
    """One image of each workflow as it is, and below it the same seed steered."""
    canvas, pen = new_canvas(*SIZE)
    canvas.paste(BACKGROUND, (0, 0, *canvas.size))
    top = MARGIN + 70
    for size, line, ink in LINES:
        pen.text((MARGIN, top), line, fill=ink, font=font(size))
        top += size + 30 if ink == WORDS and size > 30 else size + 14
    left = canvas.width - len(SHOWN) * (SIDE + 16) - MARGIN + 16
    for column, name in enumerate(SHOWN):
        thumbnail = Image.open(ROOT / "workflows" / f"{name}.jpg")
        half = thumbnail.width // 2
        for row in range(2):
            picture = thumbnail.crop((0, row * half, half, (row + 1) * half)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            canvas.paste(picture, (left + column * (SIDE + 16), (canvas.height - 2 * SIDE - 16) // 2 + row * (SIDE + 16)))
    return canvas


if __name__ == "__main__":
    draw().save(ROOT / "docs" / "pictures" / "banner.png", optimize=True)
