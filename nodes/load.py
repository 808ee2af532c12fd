"""Nodes that load: the tiny world, guiders, experts."""
from comfy_api.latest import io

from ..ppap_core.bank_file import load_bank, save_bank
from ..ppap_core.experts import ExpertBank, with_experts
from ..ppap_core.tinyworld import SIZE
from . import bridge, folders
from .types import PPAPGuider

CATEGORY = "PPAP/load"


class PPAPTinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTinyWorld", display_name="Tiny World", category=CATEGORY,
            description="A real diffusion model small enough for a laptop: it draws one shape in front of a wall, 32 "
                        "pixels wide. Everything the KSampler needs comes with it.",
            inputs=[io.Int.Input("batch_size", default=4, min=1, max=256, tooltip="How many images are sampled at once.")],
            outputs=[io.Model.Output(tooltip="The trained tiny denoiser; any sampler and scheduler samples it."),
                     io.Conditioning.Output(tooltip="Nothing: the model takes no prompt. Connect it as positive and "
                                                    "negative."),
                     io.Latent.Output(tooltip="Empty images of the model's size."),
                     io.Vae.Output(tooltip="Turns its latents, which are pixels already, into images.")])

    @classmethod
    def execute(cls, batch_size):
        return io.NodeOutput(bridge.tinyworld_model(), bridge.empty_conditioning(), bridge.empty_pixels(batch_size, SIZE),
                             bridge.pixel_vae())


class PPAPLoadGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadGuider", display_name="Load Guider", category=CATEGORY,
            description="A network that judges images and can steer a diffusion model. The tiny world's own come with the "
                        "pack; others are folders in models/ppap_guiders, such as a timm classifier with config.json and "
                        "model.safetensors.",
            inputs=[io.Combo.Input("guider_name", options=list(bridge.guider_sources()),
                                   tooltip="The network. tinyworld/... come with the pack.")],
            outputs=[PPAPGuider.Output(display_name="guider", tooltip="The network, not aimed at anything yet.")])

    @classmethod
    def validate_inputs(cls, guider_name):
        return folders.verdict(folders.choose, bridge.guider_sources(), guider_name, "guider",
                              "put its folder into models/ppap_guiders")

    @classmethod
    def fingerprint_inputs(cls, guider_name):
        return folders.guider_state(guider_name)

    @classmethod
    def execute(cls, guider_name):
        return io.NodeOutput(bridge.load_guider(guider_name))


class PPAPLoadExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadExperts", display_name="Load Experts", category=CATEGORY,
            description="Give a guider the experts that were distilled for it: one small adapter for each range of noise.",
            inputs=[PPAPGuider.Input("guider", tooltip="The plain guider that the experts were distilled for."),
                    io.Combo.Input("file_name", options=list(folders.expert_files()),
                                   tooltip="A file in models/ppap_experts.")],
            outputs=[PPAPGuider.Output(display_name="guider", tooltip="The guider with its experts.")])

    @classmethod
    def validate_inputs(cls, file_name):
        return folders.verdict(folders.expert_file, file_name)

    @classmethod
    def fingerprint_inputs(cls, file_name, **linked):
        return folders.expert_state(file_name)

    @classmethod
    def execute(cls, guider, file_name):
        with bridge.autograd():
            return io.NodeOutput(with_experts(guider, load_bank(folders.expert_file(file_name), guider)))


class PPAPSaveExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPSaveExperts", display_name="Save Experts", category=CATEGORY, is_output_node=True,
            description="Write a guider's experts into models/ppap_experts, for Load Experts and for other people. "
                        "Only the adapters are written, not the network.",
            inputs=[PPAPGuider.Input("guider", tooltip="A guider with experts, from Distil Experts."),
                    io.String.Input("file_name", default="my experts",
                                    tooltip="Name of the file, without a folder. A file of the same name is replaced.")])

    @classmethod
    def validate_inputs(cls, file_name):
        return folders.verdict(folders.new_expert_file, file_name)

    @classmethod
    def execute(cls, guider, file_name):
        if not isinstance(guider.net, ExpertBank):
            raise ValueError(f"{guider.name} has no experts to save: connect the guider that comes out of Distil Experts")
        file = folders.new_expert_file(file_name)
        save_bank(file, guider.net, guider)
        return io.NodeOutput(ui={"text": [f"saved {file.name}"]})


NODES = [PPAPTinyWorld, PPAPLoadGuider, PPAPLoadExperts, PPAPSaveExperts]
