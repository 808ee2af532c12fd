"""ComfyUI-PPAP: any off-the-shelf network steers any diffusion model."""
from comfy_api.latest import ComfyExtension, io

from .nodes import autoguide, folders, guide, load, prior, report, train

WEB_DIRECTORY = "./web"
NODES: list[type[io.ComfyNode]] = [*load.NODES, *guide.NODES, *autoguide.NODES, *prior.NODES,
                                   *train.NODES, *report.NODES]

folders.register_folders()


class PPAP(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> PPAP:
    return PPAP()
