"""The flow model of the latent tiny world, in the layout of Stable Diffusion 3's transformer (Esser et al. 2024).

ComfyUI's own loader reads its file. Image tokens and condition tokens, each with weights of their own, attend together.
"""
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

HEAD, PATCH = 64, 2  # width of an attention head; side of a token's patch of the latent


def frequencies(value: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of numbers at width / 2 frequencies from 1 down to 1/10000, (...) -> (..., width)."""
    scale = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=value.device) / (width // 2))
    angle = value.float()[..., None] * scale
    return torch.cat([angle.cos(), angle.sin()], -1)


def positions(height: int, width: int, features: int, device: torch.device) -> Tensor:
    """Position features of each token, (height * width, features): sines and cosines along x, then along y.

    The short side spans 0 to 15, so that larger images are read at the scale of the trained ones.
    """
    short = min(height, width)
    y, x = (7.5 + 7.5 * torch.linspace(-1, 1, size, device=device) * size / short for size in (height, width))
    cos_y, sin_y = frequencies(y, features // 2).chunk(2, -1)
    cos_x, sin_x = frequencies(x, features // 2).chunk(2, -1)
    along_x = torch.cat([sin_x, cos_x], -1).expand(height, -1, -1)
    along_y = torch.cat([sin_y, cos_y], -1)[:, None].expand(-1, width, -1)
    return torch.cat([along_x, along_y], -1).flatten(0, 1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normed tokens (B, N, width), scaled and shifted by the condition (B, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Embedder(nn.Module):
    """Two layers that embed numbers (B, inputs) as a condition (B, width)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Stream(nn.Module):
    """The weights for one kind of tokens in a block. The last block needs no output for condition tokens."""

    def __init__(self, width: int, last: bool = False):
        super().__init__()
        self.last = last
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (2 if last else 6) * width))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width)})
        if not last:
            self.attn["proj"] = nn.Linear(width, width)
            self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def queries_keys_values(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Projections of tokens (B, N, width), (3, B, heads, N, HEAD)."""
        shift, scale = modulation[:2]
        return rearrange(self.attn["qkv"](modulated(x, shift, scale)), "b n (three h d) -> three b h n d", three=3, d=HEAD)

    def forward(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        _, _, gate, shift, scale, mlp_gate = modulation
        x = x + gate[:, None] * self.attn["proj"](attended)
        hidden = F.gelu(self.mlp["fc1"](modulated(x, shift, scale)), approximate="tanh")
        return x + mlp_gate[:, None] * self.mlp["fc2"](hidden)


class JointBlock(nn.Module):
    """Joint attention of image tokens and condition tokens."""

    def __init__(self, width: int, last: bool):
        super().__init__()
        self.context_block, self.x_block = Stream(width, last), Stream(width)

    def forward(self, context: Tensor, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        modulations = [stream.adaLN_modulation(condition).unflatten(1, (-1, x.shape[-1])).unbind(1)
                       for stream in (self.context_block, self.x_block)]
        parts = [self.context_block.queries_keys_values(context, modulations[0]),
                 self.x_block.queries_keys_values(x, modulations[1])]
        attended = rearrange(F.scaled_dot_product_attention(*torch.cat(parts, 3)), "b h n d -> b n (h d)")
        tokens = context.shape[1]
        if not self.context_block.last:
            context = self.context_block(context, attended[:, :tokens], modulations[0])
        return context, self.x_block(x, attended[:, tokens:], modulations[1])


class Head(nn.Module):
    """Tokens (B, N, width) to patches (B, N, outputs)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.adaLN_modulation(condition).chunk(2, 1)))


def patch_embedder(channels: int, width: int) -> nn.ModuleDict:
    """A convolution that turns patches into tokens, under the name that stock loaders know."""
    return nn.ModuleDict({"proj": nn.Conv2d(channels, width, PATCH, PATCH)})


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)"""
    return rearrange(x, "b c h w -> b (h w) c")


class FlowTrunk(nn.Module):
    """The embeddings and joint blocks that a flow model and its ControlNet share."""

    def __init__(self, channels: int, conditions: int, blocks: int):
        super().__init__()
        self.width = HEAD * blocks
        self.x_embedder = patch_embedder(channels, self.width)
        self.t_embedder, self.y_embedder = Embedder(256, self.width), Embedder(conditions, self.width)
        self.context_embedder = nn.Linear(conditions, self.width)
        self.joint_blocks = nn.ModuleList(JointBlock(self.width, last=i == blocks - 1) for i in range(blocks))

    def embed(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens (B, N, width), condition tokens (B, n, width) and the condition of all blocks (B, width)."""
        height, width = (side // PATCH for side in x.shape[-2:])
        tokens = as_tokens(self.x_embedder["proj"](x))
        tokens = tokens + positions(height, width, self.width, x.device).to(tokens)
        condition = self.t_embedder(frequencies(1000 * t, 256).to(pooled)) + self.y_embedder(pooled)
        return tokens, self.context_embedder(context), condition


class TinyFlow(FlowTrunk):
    """A rectified flow's velocity: noise - latent, at x = (1 - t) latent + t noise.

    x (B, channels, H, W) of even sides; t (B,) in [0, 1]; context (B, N, conditions); pooled (B, conditions) -> like x
    """

    def __init__(self, channels: int = 16, conditions: int = 16, blocks: int = 2):
        super().__init__(channels, conditions, blocks)
        self.final_layer = Head(self.width, PATCH**2 * channels)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name:  # every block starts as the identity
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, control: Sequence[Tensor] = ()) -> Tensor:
        """Velocity like x. control: residuals (B, N, width) of a ControlNet for the image tokens after each block."""
        tokens, context, condition = self.embed(x, t, context, pooled)
        for block, residual in zip_longest(self.joint_blocks, control):
            context, tokens = block(context, tokens, condition)
            tokens = tokens if residual is None else tokens + residual
        height = x.shape[-2] // PATCH
        patches = self.final_layer(tokens, condition)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=PATCH, q=PATCH)


class TinyControl(FlowTrunk):
    """A ControlNet of the flow model: a copy of its first block that also sees a hint, an encoded picture such as of depth.

    x, t, context as the flow model's; hint like x -> residuals for the tokens after its first block, [(B, N, width)]
    """

    def __init__(self, channels: int = 16, conditions: int = 16, blocks: int = 2):
        super().__init__(channels, conditions, blocks)
        self.joint_blocks = self.joint_blocks[:1]
        self.pos_embed_input = patch_embedder(channels, self.width)
        self.controlnet_blocks = nn.ModuleList([nn.Linear(self.width, self.width)])
        for name, parameter in self.named_parameters():  # starts as no control at all
            if "adaLN_modulation" in name or name.startswith("controlnet_blocks"):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        tokens, context, condition = self.embed(x, t, context, context.new_zeros(len(x), context.shape[-1]))
        tokens = tokens + as_tokens(self.pos_embed_input["proj"](hint))
        _, tokens = self.joint_blocks[0](context, tokens, condition)
        return [self.controlnet_blocks[0](tokens)]


DIFFUSERS = {  # names here -> those of the diffusers library, by which stock loaders know such ControlNets
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj", "joint_blocks": "transformer_blocks",
    "context_block.adaLN_modulation.1": "norm1_context.linear", "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out", "x_block.attn.proj": "attn.to_out.0",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2"}
QKV = {  # weights that are one here and three in diffusers
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `TinyControl` under the names of diffusers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = _diffusers_names(name)
        renamed |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    return renamed


def _diffusers_names(name: str) -> list[str]:
    fused = next((part for part in QKV if part in name), None)
    names = [name.replace(fused, part) for part in QKV[fused]] if fused else [name]
    for ours, theirs in DIFFUSERS.items():
        names = [part.replace(ours, theirs) for part in names]
    return names


def from_diffusers(tensors: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Weights under the names of diffusers as those of a `TinyControl`, whose names are `own`."""
    return {name: torch.cat([tensors[part] for part in _diffusers_names(name)]) for name in own}
