"""Nodes that make guiders: load a network, download one, choose a rule."""
from comfy_api.latest import io

from ...ppap_core.guiders.copies import COPIES, guider_of_rule
from ...ppap_core.guiders.guider import with_input
from ...ppap_core.guiders.loaders import OUTPUTS
from ...ppap_core.guiders.loaders.hub import download
from ...ppap_core.guiders.loaders.suggested import SUGGESTED, repository
from ...ppap_core.guiders.preprocess import CHANNELS, PADDINGS
from ...ppap_core.guiders.rules import RULES
from ..bridge import autograd, guider_cache, paths, progress, trained_guiders
from .inputs import also_found_as, folded
from .io_types import GuiderType

CATEGORY = "PPAP/guiders"


class PPAPLoadGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPLoadGuider", display_name="Load Guider", category=CATEGORY,
            **also_found_as("load classifier", "CLIP guidance", "classifier guidance", "aesthetic predictor",
                            "depth control", "segmentation model", "style reference", "reward model"),
            description="Loads a network that judges images and can guide a diffusion model. Those of the tiny world come "
                        "with the pack. Others are folders in models/ppap_guiders, with config.json and safetensors, as "
                        "their hub pages offer them: any network of timm, and classifiers, CLIP, SigLIP, depth, "
                        "segmentation, CLIPSeg and DINO of transformers. Others are refused with the reason.",
            inputs=[io.Combo.Input("guider_name", options=list(guider_cache.guider_sources()),
                                   tooltip="The network. Those of tinyworld/ come with the pack."),
                    io.Combo.Input("answer", options=list(OUTPUTS), default="own", optional=True,
                                   tooltip="Which output of the network is used. own: that of its task, such as classes or "
                                           "depth. Or features from inside it: structure (what is where, without colours; "
                                           "DINO or timm), style (textures and colours, without places; timm, such as VGG), "
                                           "embedding (the image as a whole). Neutral: own."),
                    io.Combo.Input("channels", options=list(CHANNELS), default="own", optional=True,
                                   tooltip="The order of the colours in which the network reads an image. own: as its files "
                                           "say; taggers with a selected_tags.csv, whose files do not say it, read blue "
                                           "first. Neutral: own.", **folded()),
                    io.Combo.Input("padding", options=list(PADDINGS), default="own", optional=True,
                                   tooltip="What is put around an image to make it square before the network reads it. "
                                           "own: as its files say; white for taggers with a selected_tags.csv. none: the "
                                           "image is resized as it is. Neutral: own.", **folded())],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The network, without a target.")])

    @classmethod
    def validate_inputs(cls, guider_name):
        return paths.validate(guider_cache.guider_source, guider_name)

    @classmethod
    def fingerprint_inputs(cls, guider_name, answer="own", channels="own", padding="own"):
        return paths.guider_stamp(guider_name)

    @classmethod
    def execute(cls, guider_name, answer="own", channels="own", padding="own"):
        return io.NodeOutput(with_input(guider_cache.load_guider(guider_name, answer), channels, padding))


SUGGESTIONS = "\n".join(f"{purpose}: {repo}, {megabytes} MB. Licence: {licence}."
                        for purpose, (repo, megabytes, licence) in SUGGESTED.items())


class PPAPDownloadGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPDownloadGuider", display_name="Download Guider", category=CATEGORY, is_output_node=True,
            **also_found_as("download model", "Hugging Face download", "get a classifier", "download CLIP",
                            "download depth model"),
            description="Downloads a network from the Hugging Face hub into models/ppap_guiders: its safetensors and the "
                        "small files that describe it, nothing that can hold code. Only when this node is queued.",
            inputs=[io.String.Input("repo_id", default="",
                                    tooltip="Owner and name of the network, as at the top of its page, such as: "
                                            "timm/resnet18.a1_in1k. Empty: the suggestion is downloaded."),
                    io.Combo.Input("suggestion", options=["none", *SUGGESTED], default="none", optional=True,
                                   tooltip="A network to begin with, where repo_id is empty. Neutral: none.\n"
                                           f"{SUGGESTIONS}")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, repo_id, suggestion="none"):
        return paths.validate(_downloaded_guider, repo_id, suggestion)

    @classmethod
    def fingerprint_inputs(cls, repo_id, suggestion="none"):
        return paths.download_stamp(None if repo_id is None else repository(repo_id, suggestion))

    @classmethod
    def execute(cls, repo_id, suggestion="none"):
        folder = _downloaded_guider(repo_id, suggestion)
        existed = folder.exists()
        download(repository(repo_id, suggestion), folder, progress.ShareProgress())
        outcome = f"{folder.name} is there already" if existed else f"downloaded {folder.name}"
        return io.NodeOutput(ui=progress.show_text(cls, f"{outcome}: press R and choose it in Load Guider"))


def _downloaded_guider(repo_id, suggestion):
    return paths.downloaded_guider(repository(repo_id, suggestion))


AIMS = {"image": "Aimed at an image", "number": "Aimed at a number", "itself": "Without a target"}


def _rules_aimed_at(aim: str) -> str:
    return "; ".join(f"{name} ({rule.asks})" for name, rule in RULES.items() if rule.aim == aim)


RESTORING = "; ".join(f"{name} ({copy.asks})" for name, copy in COPIES.items())


class PPAPRule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPRule", display_name="Rule", category=CATEGORY,
            **also_found_as("color match", "seamless texture", "tileable", "brightness and contrast", "symmetry",
                            "sharpness", "palette", "edges", "blur", "colorize", "super resolution", "deblur",
                            "restore a photo", "outpaint"),
            description="A guider without a network: something that can be measured in any image. It needs no download and "
                        "no training, and costs next to nothing.",
            inputs=[io.Combo.Input("rule", options=[*RULES, *COPIES], default="colours",
                                   tooltip="\n".join(f"{words}: {_rules_aimed_at(aim)}." for aim, words in AIMS.items())
                                           + f"\nAimed at what is left of a picture: {RESTORING}."),
                    io.Float.Input("blur", default=2.0, min=0.0, max=100.0, step=0.1, optional=True,
                                   tooltip="For the blurred copy: how blurred it is, the standard deviation of a Gaussian "
                                           "in its pixels. Neutral: 0, it is sharp.", **folded())],
            outputs=[GuiderType.Output(display_name="guider",
                                       tooltip="The rule, for Aim at Image or Aim at Number, or directly for Guidance Term "
                                               "if it needs no target.")])

    @classmethod
    def execute(cls, rule, blur=2.0):
        with autograd.outside_inference_mode():
            return io.NodeOutput(guider_of_rule(rule, blur))


MORE_CLASSES = "Pictures of a further class; its name is the next one in names."


class PPAPTrainGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPTrainGuider", display_name="Train Guider", category=CATEGORY, is_output_node=True,
            **also_found_as("train a classifier", "my taste", "few-shot classifier", "like and unlike", "own classifier",
                            "train aesthetic predictor", "linear probe"),
            description="Makes a guider of your own from a few pictures: some that you like and some that you do not, or "
                        "up to eight kinds. It learns in seconds to tell them apart by what a network sees in them, and "
                        "says how well, judged by pictures that were left out. Use it as any classifier: Aim at Class, "
                        "Distill Experts. It is saved in models/ppap_guiders for Load Guider.",
            inputs=[GuiderType.Input("backbone", tooltip="The network that looks: from Load Guider with the answer "
                                                         "embedding, or any whose answer is one vector. It stays as it is."),
                    io.Image.Input("like", tooltip="Pictures of the first class; some twenty are good."),
                    io.Image.Input("unlike", tooltip="Pictures of the second class, which differ from the first ones in "
                                                     "what matters and in nothing else."),
                    io.String.Input("names", default="like, unlike",
                                    tooltip="Names of the classes in their order, separated by commas, for Aim at Class."),
                    io.String.Input("name", default="my taste",
                                    tooltip="Name of the folder in models/ppap_guiders. A trained guider of that name is "
                                            "replaced; any other folder is kept, and the name refused. Neutral: empty, "
                                            "nothing is saved."),
                    io.Int.Input("copies", default=4, min=0, max=64, optional=True,
                                 tooltip="Altered copies of each picture to learn from, cut out of it and mirrored. Where "
                                         "they make it worse, it learns without them. Neutral: 0, none.", **folded()),
                    io.Int.Input("seed", default=0, min=0, max=2**48, optional=True,
                                 tooltip="Seed of the places that the copies show.", **folded()),
                    io.Image.Input("class_3", optional=True, tooltip=MORE_CLASSES),
                    io.Image.Input("class_4", optional=True, tooltip=MORE_CLASSES),
                    io.Image.Input("class_5", optional=True, tooltip=MORE_CLASSES),
                    io.Image.Input("class_6", optional=True, tooltip=MORE_CLASSES),
                    io.Image.Input("class_7", optional=True, tooltip=MORE_CLASSES),
                    io.Image.Input("class_8", optional=True, tooltip=MORE_CLASSES)],
            outputs=[GuiderType.Output(display_name="guider", tooltip="The trained guider, for Aim at Class."),
                     io.String.Output(display_name="report", tooltip="How well it tells the classes apart, in words."),
                     io.Image.Output(display_name="wrong", tooltip="The pictures that it did not recognise while they were "
                                                                   "left out.")],
            hidden=[io.Hidden.unique_id])

    @classmethod
    def validate_inputs(cls, name, names):
        checked = paths.validate(paths.new_guider_folder, name or None)
        return paths.validate(trained_guiders.read_names, names) if checked is True else checked

    @classmethod
    def execute(cls, backbone, like, unlike, names, name, copies=4, seed=0, class_3=None, class_4=None, class_5=None,
                class_6=None, class_7=None, class_8=None):
        connected = like, unlike, class_3, class_4, class_5, class_6, class_7, class_8
        batches = trained_guiders.named_batches(names, connected)
        trained = trained_guiders.train_on_images(backbone, batches, name, copies, seed)
        return io.NodeOutput(*trained, ui=progress.show_text(cls, trained.report))


NODES = [PPAPLoadGuider, PPAPDownloadGuider, PPAPRule, PPAPTrainGuider]
