"""Nodes that load: the tiny world, guiders, experts."""
from comfy_api.latest import io

from ...ppap_core.guiders.loaders import OUTPUTS
from ...ppap_core.guiders.loaders.hub import download
from ...ppap_core.guiders.rules import RULES, rule_guider
from ..bridge import autograd, guider_cache, paths, progress
from .io_types import GuiderType

CATEGORY = "PPAP/guiders"


class PPAPLoadGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadGuider", display_name="Load Guider", category=CATEGORY,
            description="A network that judges images and can steer a diffusion model. The tiny world's own come with the "
                        "pack; others are folders in models/ppap_guiders, with config.json and safetensors, as their hub "
                        "pages offer them: of timm any, of transformers classifiers, CLIP and SigLIP, depth, segmentation, "
                        "CLIPSeg and DINO. What cannot be loaded is refused with a sentence that says why.",
            inputs=[io.Combo.Input("guider_name", options=list(guider_cache.guider_sources()),
                                   tooltip="The network. tinyworld/... come with the pack."),
                    io.Combo.Input("answer", options=list(OUTPUTS), default="own", optional=True,
                                   tooltip="What is read of the network. own: its answer, such as classes or depth. Or how "
                                           "it sees an image inside: structure (what is where, without colours; DINO or "
                                           "timm), style (textures and colours, without places; timm, such as VGG), "
                                           "embedding (what it is like as a whole).")],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The network, not aimed at anything yet.")])

    @classmethod
    def validate_inputs(cls, guider_name, answer="own"):
        return paths.validate(guider_cache.guider_source, guider_name)

    @classmethod
    def fingerprint_inputs(cls, guider_name, answer="own"):
        return paths.guider_state(guider_name)

    @classmethod
    def execute(cls, guider_name, answer="own"):
        return io.NodeOutput(guider_cache.load_guider(guider_name, answer))


class PPAPDownloadGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPDownloadGuider", display_name="Download Guider", category=CATEGORY, is_output_node=True,
            description="Fetch a network from the Hugging Face hub into models/ppap_guiders: its safetensors and the small "
                        "files that say what it is, nothing that can hold code. Only when this node is queued.",
            inputs=[io.String.Input("repo_id", default="",
                                    tooltip="Owner and name of the network, as the head of its page has them, such as: "
                                            "timm/resnet18.a1_in1k")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, repo_id):
        return paths.validate(paths.downloaded_guider, repo_id)

    @classmethod
    def fingerprint_inputs(cls, repo_id):
        return paths.download_state(repo_id)

    @classmethod
    def execute(cls, repo_id):
        folder = paths.downloaded_guider(repo_id)
        known = folder.exists()
        download(repo_id, folder, progress.ShareProgress())
        done = f"{folder.name} is there already" if known else f"downloaded {folder.name}"
        return io.NodeOutput(ui=progress.show_text(cls, f"{done}: press R and choose it in Load Guider"))


class PPAPRule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPRule", display_name="Rule", category=CATEGORY,
            description="A guider without a network: something that can be measured in any image. Nothing needs to be "
                        "downloaded or trained, and it costs next to nothing.",
            inputs=[io.Combo.Input("rule", options=list(RULES), default="colours",
                                   tooltip="colours, layout and edges are aimed at an image; brightness, contrast, "
                                           "saturation and sharpness at a number; symmetry, seamless tiling and smoothness "
                                           "need no target.")],
            outputs=[GuiderType.Output(display_name="guider",
                                       tooltip="The rule, for Aim at Image or Aim at Number, or for Guidance Term at once "
                                               "if it needs no target.")])

    @classmethod
    def execute(cls, rule):
        with autograd.outside_inference_mode():
            return io.NodeOutput(rule_guider(rule))


NODES = [PPAPLoadGuider, PPAPDownloadGuider, PPAPRule]
