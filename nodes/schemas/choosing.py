"""Nodes that choose: the best images of a batch, and the seeds that lead to the best ones."""
from comfy_api.latest import io

from ..bridge import choosing, progress, seeds
from ..bridge.sampler import SamplerSettings
from .inputs import also_found_as, folded, model_input, negative_input, positive_input, sampler_inputs, vae_input
from .io_types import TermsType

CATEGORY = "PPAP/guidance"
SHOWN = 8  # lines on the node itself


def _terms_input() -> io.Input:
    return TermsType.Input("terms", tooltip="What makes an image good, from Guidance Term. Of several terms each counts by "
                                            "its weight, in the spread of its own energies, so that units do not matter; a "
                                            "negative weight prefers what is far from the target. Windows and masks have no "
                                            "effect here, and no gradient is needed. Neutral: weights of 0, the order is "
                                            "kept.")


class PPAPRankImages(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPRankImages", display_name="Rank Images", category=CATEGORY,
            **also_found_as("best of a batch", "best of N", "choose best", "pick the best image", "sort images by score",
                            "score images", "aesthetic score filter"),
            description="Sorts images by how well they meet the targets of terms, and hands on the best.",
            inputs=[io.Image.Input("image", tooltip="The images to compare, such as a decoded batch."), _terms_input(),
                    io.Int.Input("count", default=1, min=1, max=4096, tooltip="How many of the best to hand on."),
                    io.Latent.Input("latent", optional=True, tooltip="The latent that the images were decoded from, to go "
                                                                     "on with the latents of the best.")],
            outputs=[io.Image.Output(display_name="best", tooltip="The best images, the best one first."),
                     io.Latent.Output(display_name="latent", tooltip="The latents of the best images; blocked where no "
                                                                     "latent is connected."),
                     io.Image.Output(display_name="sorted", tooltip="All images, the best one first."),
                     io.String.Output(display_name="text", tooltip="A line for each image, the best one first."),
                     io.Float.Output(display_name="scores", is_output_list=True,
                                     tooltip="How much better than the mean each image is, in standard deviations, the best "
                                             "one first."),
                     io.Mask.Output(display_name="mask", tooltip="A mask for each image as it came: white all over for the "
                                                                 "best, black for the others. Inverted, in Set Latent Noise "
                                                                 "Mask, it samples all but the best again.")])

    @classmethod
    def execute(cls, image, terms, count, latent=None):
        ranking = choosing.rank_images(image, terms)
        best = ranking.order[:count]
        picked = choosing.pick_latent(latent, best, len(image)) if latent else choosing.blocked("latent")
        return io.NodeOutput(choosing.pick_images(image, best), picked, choosing.pick_images(image, ranking.order),
                             ranking.describe(), ranking.standing[ranking.order].tolist(), choosing.mask_of(image, best),
                             ui=progress.show_note(ranking.describe(most=SHOWN)))


class PPAPBestSeeds(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PPAPBestSeeds", display_name="Best Seeds", category=CATEGORY,
            **also_found_as("seed search", "best seed", "look-ahead", "golden noise", "inference-time search", "best of N",
                            "pick seeds"),
            description="Samples many candidates in a few steps each, and hands on the latent of the best: a KSampler with "
                        "the same seed then makes just these in full.",
            inputs=[model_input(), _terms_input(),
                    io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True,
                                 tooltip="The seed of the noise. Give the KSampler that follows the same one."),
                    io.Int.Input("candidates", default=16, min=1, max=4096,
                                 tooltip="How many images are tried: those of a batch of this size."),
                    io.Int.Input("count", default=4, min=1, max=4096, tooltip="How many of the best to hand on."),
                    io.Int.Input("steps", default=5, min=1, max=10000,
                                 tooltip="Denoising steps of a candidate, over the whole noise schedule. As few as still "
                                         "show what the terms look at."),
                    *sampler_inputs(), positive_input(), negative_input(),
                    io.Latent.Input("latent_image", tooltip="An empty latent, or one to start from. Its first image counts; "
                                                            "so many as it holds are sampled at once."),
                    io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, **folded(),
                                   tooltip="As in the KSampler that follows. Neutral for new images: 1, all is made anew."),
                    vae_input()],
            outputs=[io.Latent.Output(tooltip="For a KSampler with the same seed, which makes the best candidates in full."),
                     io.Image.Output(display_name="candidates", tooltip="A picture of all candidates, the best one first."),
                     io.String.Output(display_name="text", tooltip="A line for each candidate, the best one first.")])

    @classmethod
    def execute(cls, model, terms, seed, candidates, count, steps, cfg, sampler_name, scheduler, positive, negative,
                latent_image, denoise, vae=None):
        settings = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, positive, negative, denoise)
        search = seeds.SeedSearch(model, terms, latent_image, settings, vae)
        ranking, images = search.rank(candidates)
        picture = choosing.blocked("vae") if images is None else seeds.draw_candidates(ranking, images)
        return io.NodeOutput(search.chosen(ranking, count), picture, ranking.describe("candidate"),
                             ui=progress.show_note(ranking.describe("candidate", SHOWN)))


NODES = [PPAPRankImages, PPAPBestSeeds]
