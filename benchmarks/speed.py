"""What guidance adds to a sampling step of networks of full size: operations counted anywhere, seconds measured on a GPU.

All weights are random: what a step costs does not depend on them.
"""
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ppap_core.guidance.gradients import Prediction, energy_at, energy_gradient
from ppap_core.guidance.shift import GuidanceSettings, guidance_shift
from ppap_core.guidance.terms import Term
from ppap_core.guiders.guider import Guider, IgnoreSigma
from ppap_core.guiders.latents import LatentSpace, Stem
from ppap_core.guiders.preprocess import timm_preprocess
from ppap_core.noise import expand, to_vp
from ppap_core.sampling import Denoiser

from .costs import once

NETWORKS = {
    "SD 1.5": {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
               "attention_head_dim": 8},
    "SDXL": {"block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
             "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
}
"""The published configurations, as far as they differ from what diffusers takes without one."""

VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
CLASSIFIER = "resnet50"
SIZES = {"SD 1.5": 512, "SDXL": 1024}  # pixels
TARGETS = {"SD 1.5": 1.10, "SDXL": 1.05}
REDUCED = ("SD 1.5", 256)              # what two cores do a step of in seconds; the guider stays as large as it is
BUDGET = 75.0                          # seconds for what is measured of one network, without making it
ROUNDS = 25                            # at most
SIGMA = 1.0
ROWS = {
    "plain": "plain step with classifier-free guidance",
    "colours": "guided, latent seen through linear colours",
    "stem": "guided, latent seen through a trained stem",
    "taesd": "guided, latent seen through a TAESD decoder",
    "vae": "guided, latent seen through the whole VAE decoder",
    "through": "gradient back through the denoiser, linear colours",
}

Step = Callable[[], Tensor]
Report = Callable[[str], None]


def speed(report: Report) -> list[dict]:
    """One column for each network and way to measure. ImportError naming the package that is missing."""
    columns = []

    def add(name: str, pixels: int, column: Callable[[str, int], dict]) -> None:
        columns.append(column(name, pixels))
        report(title(columns[-1]))

    for name, pixels in SIZES.items():
        add(name, pixels, counted)
    if torch.cuda.is_available():
        for name, pixels in SIZES.items():
            add(name, pixels, lambda *which: timed(*which, "cuda", best_half()))
    else:
        add(*REDUCED, counted)
        cheap = [way for way in ROWS if way != "vae"]  # which alone would take as long as all others
        add(*REDUCED, lambda *which: timed(*which, ways=cheap))
    return columns


def best_half() -> torch.dtype:
    """The 16-bit type that the GPU is fast in and that overflows least."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def counted(name: str, pixels: int) -> dict:
    """Operations of one step in every way: on the meta device, which has shapes without numbers, so in no time."""
    costs = {way: float(operations(step)) for way, step in steps(name, pixels, "meta").items()}
    return {"network": name, "pixels": pixels, "measure": "operations", "plain": costs["plain"],
            "ratios": {way: cost / costs["plain"] for way, cost in costs.items()}}


def timed(name: str, pixels: int, device: str = "cpu", dtype: torch.dtype = torch.float32, budget: float = BUDGET,
          ways: Collection[str] = tuple(ROWS)) -> dict:
    """Seconds of one step in these ways, as ratios to a plain one taken in turn; None for what does not fit into memory."""
    rounds = in_turn({way: step for way, step in steps(name, pixels, device, dtype).items() if way in ways}, budget)
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    return {"network": name, "pixels": pixels, "measure": "seconds", "place": place, "dtype": str(dtype).split(".")[-1],
            "rounds": len(rounds), "plain": _median(costs["plain"] for costs in rounds),
            "ratios": {way: _median(costs[way] / costs["plain"] for costs in rounds) for way in rounds[0]}}


def _median(values: Iterable[float]) -> float | None:
    median = statistics.median(values)
    return None if math.isnan(median) else median


def operations(function: Callable[[], object]) -> int:
    """Floating point operations of the convolutions and matrix products in a call; to multiply and to add are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def in_turn(functions: dict[str, Callable[[], object]], budget: float, most: int = ROUNDS) -> list[dict[str, float]]:
    """Seconds of each in rounds over all, as many as the budget in seconds allows; the first counts only if it is alone."""
    seconds_of(next(iter(functions.values())))  # so that even then it does not pay for what the others share with it
    rounds, started = [], time.perf_counter()
    while len(rounds) <= most:
        rounds.append({name: seconds_of(function) for name, function in functions.items()})
        spent = time.perf_counter() - started
        if spent * (len(rounds) + 1) / len(rounds) > budget:
            break
    return rounds[1:] or rounds


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds of a call, NaN where it does not fit into memory."""
    try:
        return once(function)
    except torch.OutOfMemoryError:
        return math.nan


def steps(name: str, pixels: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, Step]:
    """A step of one image in every way, on a network of NETWORKS with weights of this type."""
    x = torch.zeros(1, 4, pixels // 8, pixels // 8, device=device)
    sigma = torch.full((1,), SIGMA, device="cpu" if device == "meta" else device)  # guidance reads its value: meta has none
    denoise, guiders = denoiser(name, device, dtype), classifiers(device, dtype)
    return {"plain": lambda: plain_step(denoise, x, sigma),
            **{way: lambda guider=guider: guided_step(denoise, guider, x, sigma, dtype) for way, guider in guiders.items()},
            "through": lambda: through_step(denoise, guiders["colours"], x, sigma, dtype)}


@torch.no_grad()
def plain_step(denoise: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    """The prediction (B, C, h, w)."""
    return denoise(x, sigma)


def guided_step(denoise: Denoiser, guider: Guider, x: Tensor, sigma: Tensor, compute: torch.dtype | None = None) -> Tensor:
    """The prediction with guidance, as samplers get it."""
    denoised = plain_step(denoise, x, sigma)
    if x.is_meta:  # guidance_shift asks whether the gradient is finite; what it does beyond the gradient has no products
        return denoised - energy_gradient(guider, x if guider.view == "noisy" else denoised, sigma, compute)[1]
    settings = GuidanceSettings(sigma_data=1.0, compute_dtype=compute)
    return denoised + guidance_shift([Term(guider)], Prediction(x, sigma, denoised), settings).delta


def through_step(denoise: Denoiser, guider: Guider, x: Tensor, sigma: Tensor, compute: torch.dtype | None = None) -> Tensor:
    """The prediction, moved along -sigma^2 times the gradient of its energy in x, as training-free guidance takes it."""
    with torch.enable_grad():
        point = x.clone().requires_grad_(True)
        denoised = denoise(point, sigma)
        gradient = torch.autograd.grad(energy_at(guider, denoised, sigma, compute).sum(), point)[0]
    return denoised.detach() - expand(sigma, x) ** 2 * gradient


def denoiser(name: str, device: str, dtype: torch.dtype = torch.float32, scale: float = 7.5) -> Denoiser:
    """A network of NETWORKS with classifier-free guidance by 77 tokens, both halves in one batch (scale 1: as without)."""
    config, kwargs = NETWORKS[name], {"device": device, "dtype": dtype}
    unet = built(lambda: from_diffusers("UNet2DConditionModel")(**config), **kwargs)
    words = torch.zeros(2, 77, config["cross_attention_dim"], **kwargs)
    level = torch.full((2,), 500, device=device)
    added = {"text_embeds": torch.zeros(2, 1280, **kwargs), "time_ids": torch.zeros(2, 6, **kwargs)} \
        if "addition_embed_type" in config else None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen = to_vp(x, sigma).to(dtype).repeat(2, 1, 1, 1)
        noise = unet(seen, level, encoder_hidden_states=words, added_cond_kwargs=added).sample.float()
        without, within = noise.chunk(2)
        return x - expand(sigma, x) * (without + scale * (within - without))
    return denoise


def classifiers(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Guider]:
    """A classifier as guider of latents, aimed at a class, for every way to see an image in a latent."""
    try:
        import timm
        from timm.data import resolve_data_config
    except ImportError as error:
        raise ImportError(f"to measure what a guided step costs, the package timm is needed ({error}): install it with "
                          "'pip install timm>=1.0.15'") from error

    net = built(lambda: timm.create_model(CLASSIFIER, pretrained=False), device)
    plain = Guider(f"timm/{CLASSIFIER}", IgnoreSigma(net), timm_preprocess(resolve_data_config({}, model=net)), "class",
                   target=torch.zeros(1, dtype=torch.long, device=device))
    space = LatentSpace("four channels", torch.full((4, 3), 0.2, device=device), torch.zeros(3, device=device))
    stem = built(lambda: Stem(space, torch.Generator()), device)
    tiny = built(from_diffusers("AutoencoderTiny"), device, dtype)
    whole = built(lambda: from_diffusers("AutoencoderKL")(**VAE), device, dtype)
    ways = {"colours": space.colors, "stem": stem, "taesd": lambda latent: tiny.decode(latent).sample,
            "vae": lambda latent: whole.decode(latent).sample}
    # a view, because the counter cannot follow a gradient that ends at what a module was given; images are never half
    return {way: replace(plain, decode=lambda latent, sigma, decode=decode: decode(latent.view_as(latent)).float())
            for way, decode in ways.items()}


def from_diffusers(name: str) -> Callable[..., nn.Module]:
    """A class of diffusers. ImportError saying what to install."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"to measure what a guided step costs, the package diffusers is needed ({error}): install it with "
                          "'pip install diffusers>=0.32'") from error
    return getattr(diffusers, name)


def built(make: Callable[[], nn.Module], device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen network with random weights, made where it will be, without a moment at twice its size."""
    with torch.device("meta"):
        net = nn.Module.to(make().eval().requires_grad_(False), dtype)  # that of diffusers warns about nothing
    if device == "meta":
        return net
    net, generator = net.to_empty(device=device), torch.Generator(device).manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            bound = (3 / weight[0].numel()) ** 0.5  # what goes in and what comes out have about the same size
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.fill_(name.endswith("weight"))
    for name, buffer in net.named_buffers():
        buffer.fill_(name.endswith("var"))
    return net


def title(column: dict) -> str:
    """What a column holds, in words."""
    what = f"{column['network']} at {column['pixels']} pixels"
    if column["measure"] == "operations":
        return f"{what}, operations"
    return f"{what}, seconds ({column['place']}; {column['dtype']}; median of {column['rounds']})"


def table(columns: list[dict]) -> str:
    """The columns as a Markdown table: a plain step's own cost, all else as its multiple."""
    lines = ["| one step of one image | " + " | ".join(title(column) for column in columns) + " |",
             "|---|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join([words, *(_cell(column, way) for column in columns)]) + " |" for way, words in ROWS.items()]
    targets = (f"{TARGETS[column['network']]:.2f}" if SIZES[column["network"]] == column["pixels"] else ""
               for column in columns)
    return "\n".join([*lines, "| " + " | ".join(["target for a guided step, at most", *targets]) + " |"])


def _cell(column: dict, way: str) -> str:
    if way not in column["ratios"]:
        return "not measured"
    if column["ratios"][way] is None:
        return "out of memory"
    if way != "plain":
        return f"{column['ratios'][way]:.3f}"
    return f"{column['plain'] / 1e12:.3g} · 10¹²" if column["measure"] == "operations" else f"{column['plain']:.3g} s"
