"""Conditioning of several prompts."""
import comfy.sd


def encode_lines(clip: comfy.sd.CLIP | None, text: str) -> list:
    """Return the CONDITIONING of all lines of a text, one entry for each; empty lines do not count.

    ValueError without a CLIP or a line, and for a CLIP that makes more of a line than one entry, as LoRA hooks with a
    schedule do: of these one would be drawn without the others.
    """
    if clip is None:
        raise ValueError("there is no text encoder: this checkpoint holds none, load it by a node for text encoders")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("the list of prompts is empty: write one prompt in each line")
    conditioning = [entry for line in lines for entry in clip.encode_from_tokens_scheduled(clip.tokenize(line))]
    if len(conditioning) != len(lines):
        raise ValueError(f"{len(lines)} prompts became {len(conditioning)} conditionings, as with a schedule of hooks: "
                         "take a CLIP without one")
    return conditioning
