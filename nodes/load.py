"""Nodes that load: the tiny world, guiders, experts."""
from comfy_api.latest import io

from ..ppap_core.bank_file import load_bank, save_bank
from ..ppap_core.download import download
from ..ppap_core.experts import ExpertBank, with_experts
from ..ppap_core.loaders import ANSWERS
from ..ppap_core.rules import RULES, rule_guider
from ..ppap_core.tinyworld import SIZE
from ..ppap_core.tinyworld.latent import class_labels
from ..ppap_core.tinyworld.scenes import CLASSES
from . import bridge, folders, models
from .types import PPAPGuider

CATEGORY = "PPAP/load"


class PPAPTinyWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTinyWorld", display_name="Tiny World", category=CATEGORY,
            description="A real diffusion model small enough for a laptop: it draws one shape in front of a wall, 32 "
                        "pixels wide. Everything the KSampler needs comes with it.",
            inputs=[io.Int.Input("batch_size", default=4, min=1, max=256,
                                 tooltip="How many images are sampled at once."),
                    io.Combo.Input("version", options=list(models.TINY_DENOISERS), default="denoiser", optional=True,
                                   tooltip="bad sibling: half as wide and with a sixteenth of the training, for "
                                           "Autoguidance.")],
            outputs=[io.Model.Output(tooltip="The trained tiny denoiser; any sampler and scheduler samples it."),
                     io.Conditioning.Output(tooltip="Nothing: the model takes no prompt. Connect it as positive and "
                                                    "negative."),
                     io.Latent.Output(tooltip="Empty images of the model's size."),
                     io.Vae.Output(tooltip="Turns its latents, which are pixels already, into images.")])

    @classmethod
    def execute(cls, batch_size, version="denoiser"):
        return io.NodeOutput(models.tinyworld_model(version), bridge.empty_conditioning(),
                             bridge.empty_pixels(batch_size, SIZE), models.pixel_vae())


class PPAPTinyLatentWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTinyLatentWorld", display_name="Tiny Latent World", category=CATEGORY,
            description="Real latent diffusion models small enough for a laptop, that draw the same shapes 128 pixels wide "
                        "and know them by name. The flow model and the VAE are files too, for ComfyUI's own loaders.",
            inputs=[io.Combo.Input("kind", options=list(models.TINY_MODELS),
                                   tooltip="flow: in the layout of Stable Diffusion 3. eps: noise-predicting, with the "
                                           "schedule of Stable Diffusion 1.5. Both diffuse the same latents.")],
            outputs=[io.Model.Output(tooltip="Conditioned by Class Conditioning; any sampler and scheduler samples it."),
                     io.Vae.Output(tooltip="Turns its latents into images, and back.")])

    @classmethod
    def execute(cls, kind):
        return io.NodeOutput(models.TINY_MODELS[kind](), models.tinyworld_vae())


class PPAPClassConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPClassConditioning", display_name="Class Conditioning", category=CATEGORY,
            description="What the latent tiny world is asked to draw, in the place of a text prompt.",
            inputs=[io.String.Input("classes", default="",
                                    tooltip=f"One of {', '.join(CLASSES)}, or one for each image, with commas. Empty: "
                                            "anything, as an empty prompt.")],
            outputs=[io.Conditioning.Output(tooltip="For a sampler's positive or negative.")])

    @classmethod
    def validate_inputs(cls, classes):
        return folders.verdict(class_labels, classes)

    @classmethod
    def execute(cls, classes):
        return io.NodeOutput(models.class_conditioning(class_labels(classes)))


class PPAPLoadGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadGuider", display_name="Load Guider", category=CATEGORY,
            description="A network that judges images and can steer a diffusion model. The tiny world's own come with the "
                        "pack; others are folders in models/ppap_guiders, with config.json and safetensors, as their hub "
                        "pages offer them: of timm any, of transformers classifiers, CLIP and SigLIP, depth, segmentation, "
                        "CLIPSeg and DINO. What cannot be loaded is refused with a sentence that says why.",
            inputs=[io.Combo.Input("guider_name", options=list(bridge.guider_sources()),
                                   tooltip="The network. tinyworld/... come with the pack."),
                    io.Combo.Input("answer", options=list(ANSWERS), default="own", optional=True,
                                   tooltip="What is read of the network. own: its answer, such as classes or depth. Or how "
                                           "it sees an image inside: structure (what is where, without colours; DINO or "
                                           "timm), style (textures and colours, without places; timm, such as VGG), "
                                           "embedding (what it is like as a whole).")],
            outputs=[PPAPGuider.Output(display_name="guider", tooltip="The network, not aimed at anything yet.")])

    @classmethod
    def validate_inputs(cls, guider_name, answer="own"):
        return folders.verdict(bridge.guider_source, guider_name)

    @classmethod
    def fingerprint_inputs(cls, guider_name, answer="own"):
        return folders.guider_state(guider_name)

    @classmethod
    def execute(cls, guider_name, answer="own"):
        return io.NodeOutput(bridge.load_guider(guider_name, answer))


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
        return folders.verdict(folders.downloaded_guider, repo_id)

    @classmethod
    def fingerprint_inputs(cls, repo_id):
        return folders.download_state(repo_id)

    @classmethod
    def execute(cls, repo_id):
        folder = folders.downloaded_guider(repo_id)
        known = folder.exists()
        download(repo_id, folder, bridge.progress_in_shares())
        done = f"{folder.name} is there already" if known else f"downloaded {folder.name}"
        return io.NodeOutput(ui=bridge.show_text(cls, f"{done}: press R and choose it in Load Guider"))


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
            outputs=[PPAPGuider.Output(display_name="guider",
                                       tooltip="The rule, for Aim at Image or Aim at Number, or for Guidance Term at once "
                                               "if it needs no target.")])

    @classmethod
    def execute(cls, rule):
        with bridge.autograd():
            return io.NodeOutput(rule_guider(rule))


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
                                    tooltip="Name of the file, without a folder. A file of the same name is replaced.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, file_name):
        return folders.verdict(folders.new_expert_file, file_name)

    @classmethod
    def execute(cls, guider, file_name):
        if not isinstance(guider.net, ExpertBank):
            raise ValueError(f"{guider.name} has no experts to save: connect the guider that comes out of Distil Experts")
        file = folders.new_expert_file(file_name)
        save_bank(file, guider.net, guider)
        return io.NodeOutput(ui=bridge.show_text(cls, f"saved {file.name}"))


NODES = [PPAPTinyWorld, PPAPTinyLatentWorld, PPAPClassConditioning, PPAPLoadGuider, PPAPDownloadGuider, PPAPRule,
         PPAPLoadExperts, PPAPSaveExperts]
