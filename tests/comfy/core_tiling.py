"""ComfyUI's own Seamless Tiling beside a rule of ours: the seam, the time, and what becomes of a ControlNet.

Not part of the suite, since only newer ones have it: `python -m pytest tests/comfy/core_tiling.py -s`, two minutes.
"""
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.worlds import LatentWorld
from torch.nn.functional import avg_pool2d

from benchmarks.costs import seconds_of_call
from benchmarks.report import Column, markdown

COUNT, FEW, STEPS, SIDE, REPEATS = 16, 4, 20, 16, 7  # images, those that are timed, steps, latent pixels, timings
BOTH = {"tiling": "x and y", "context_size": 8}  # as new nodes of the core have it
COLUMNS = (Column("way", "{way}", numeric=False), Column("seam", "{seam:.2g}"), Column("8 times smaller", "{wide:.2g}"),
           Column("finished", "{finished:.1g}"), Column("sampling, times plain", "{ratio:.2f}"))


class Ways:
    """Ways to sample and decode images that tile."""

    def __init__(self, world: LatentWorld, load_extras: Callable[..., None]):
        load_extras("seamless_tiling")
        if "ModelPatchSeamlessTiling" not in world.comfy.registered:
            pytest.skip("this ComfyUI has no Seamless Tiling of its own")
        self.world, self.comfy, self.plain = world, world.comfy, world.model("flow")
        [self.rule] = self.comfy("PPAPRule", rule="seamless tiling")
        [self.tiled] = self.comfy("ModelPatchSeamlessTiling", model=self.plain, **BOTH)
        self.ours, self.both = self.guided(self.plain), self.guided(self.tiled)
        [net] = self.comfy("ControlNetLoader", control_net_name="tinyworld_depth.safetensors")
        depth = self.comfy.pack.ppap_core.tinyworld.scenes.draw(range(COUNT), (8 * SIDE, 8 * SIDE)).depth
        self.depth = partial(self.comfy, "ControlNetApplyAdvanced", positive=world.nothing, negative=world.nothing,
                             control_net=net, strength=1.0, start_percent=0.0, end_percent=1.0, vae=world.vae,
                             image=depth.movedim(1, -1).expand(-1, -1, -1, 3))

    def guided(self, model: Any) -> Any:
        """A MODEL that the rule guides by a new term."""
        [terms] = self.comfy("PPAPGuidanceTerm", guider=self.rule, weight=0.7, start_percent=0.0, end_percent=1.0,
                             factor_at_start=2.0, factor_at_end=0.0, view="own", strength="balanced")
        return self.comfy("PPAPApplyGuidance", model=model, terms=terms, max_rms=0.0)[0]

    def sample(self, model: Any, controlled: bool = False, count: int = COUNT) -> torch.Tensor:
        conditioning = dict(zip(("positive", "negative"), self.depth(), strict=True)) if controlled else {}
        return self.world.sample(model, steps=STEPS, latent_image={"samples": torch.zeros(count, 16, SIDE, SIDE)},
                                 **conditioning)

    def seconds(self, **inputs: Any) -> float:
        """Of a sampling of few images, after one that loads the model."""
        few = partial(self.sample, **inputs, count=FEW)
        few()
        return seconds_of_call(few)

    def seam(self, images: torch.Tensor, times: int = 1) -> float:
        """Of images that are first made so many times smaller, so that a steep ramp at the border counts as a jump."""
        off_by = self.comfy.pack.ppap_core.guiders.exact.off_by
        with self.comfy.pack.nodes.bridge.autograd.outside_inference_mode():
            return float(off_by(self.rule, avg_pool2d(images.clone().movedim(-1, 1) * 2 - 1, times)).mean())

    def row(self, way: str, decode: str = "VAEDecode", **inputs: Any) -> dict:
        settings = {} if decode == "VAEDecode" else BOTH
        [made] = self.comfy(decode, samples={"samples": self.sample(**inputs)}, vae=self.world.vae, **settings)
        [finished] = self.comfy("PPAPFinish", image=made, guider=self.rule, strength=1.0)
        ratio = statistics.median(self.seconds(**inputs) / self.seconds(model=self.plain) for _ in range(REPEATS))
        return {"way": way, "seam": self.seam(made), "wide": self.seam(made, 8), "finished": self.seam(finished),
                "ratio": ratio}


def test_seams_of_all_ways(latents: LatentWorld, load_extras: Callable[..., None]):
    ways = Ways(latents, load_extras)
    tiled = {"decode": "VAEDecodeSeamlessTiling"}
    rows = [ways.row("plain", model=ways.plain), ways.row("plain, Seamless Tiling VAE Decode", model=ways.plain, **tiled),
            ways.row("Seamless Tiling and its VAE Decode", model=ways.tiled, **tiled),
            ways.row("ours", model=ways.ours), ways.row("ours, Seamless Tiling VAE Decode", model=ways.ours, **tiled),
            ways.row("ours on Seamless Tiling and its VAE Decode", model=ways.both, **tiled),
            ways.row("ControlNet", model=ways.plain, controlled=True),
            ways.row("ControlNet and ours", model=ways.ours, controlled=True),
            ways.row("ControlNet and ours, Seamless Tiling VAE Decode", model=ways.ours, controlled=True, **tiled)]
    print("\n" + markdown(COLUMNS, rows))
    with pytest.raises(ValueError, match="ControlNet"):
        ways.sample(ways.tiled, controlled=True)
    seams = {row["way"]: row["seam"] for row in rows}
    assert seams["ours"] < seams["plain"] / 3 and seams["ControlNet and ours"] < seams["ControlNet"] / 2
    assert seams["ours, Seamless Tiling VAE Decode"] < seams["Seamless Tiling and its VAE Decode"]
    assert all(row["finished"] < 1e-5 for row in rows)
