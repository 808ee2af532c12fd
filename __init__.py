"""ComfyUI-PPAP: any off-the-shelf network steers any diffusion model."""
from comfy_api.latest import ComfyExtension, io

from .nodes.bridge import paths, progress
from .nodes.schemas import (
    autoguidance,
    baking,
    choosing,
    experts,
    guidance,
    guiders,
    priors,
    reports,
    steer,
    targets,
    tinyworld,
)

WEB_DIRECTORY = "./web"
NODES: list[type[io.ComfyNode]] = [*steer.NODES, *tinyworld.NODES, *guiders.NODES, *targets.NODES, *guidance.NODES,
                                   *choosing.NODES, *experts.NODES, *autoguidance.NODES, *baking.NODES, *priors.NODES,
                                   *reports.NODES]

paths.register_folders()
for node in NODES:
    node.execute = classmethod(progress.errors_on_node()(node.execute.__func__))


class PPAP(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> PPAP:
    return PPAP()
