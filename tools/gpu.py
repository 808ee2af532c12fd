"""Seconds and memory of guidance on a graphics card, in at most ten minutes.

    python -m tools.gpu PATH_TO_COMFYUI [--out gpu.json] [--only WORDS] [--minutes 10] [--tiny]

measures SD 1.5 and SDXL at their full size in half precision, with random weights and nothing downloaded: without
guidance, with a gradient in the prediction, and with one through the model; with dynamic VRAM and without, with low VRAM,
and with fp8 weights. Each part is a ComfyUI of its own, started with its own options. Parts that are in the file already are
left out, and what a part said when it failed is its row. Prints a table. --tiny measures tiny networks on the CPU, to try
the script.
"""
import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
        "model_channels": 320}
NETWORKS: dict[str, dict[str, Any]] = {
    "SD15": {**UNET, "context_dim": 768, "num_heads": 8, "num_head_channels": -1, "channel_mult": [1, 2, 4, 4],
             "num_res_blocks": [2] * 4, "transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_middle": 1,
             "transformer_depth_output": [1] * 9 + [0] * 3},
    "SDXL": {**UNET, "context_dim": 2048, "num_heads": -1, "num_head_channels": 64, "channel_mult": [1, 2, 4],
             "num_res_blocks": [2] * 3, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
             "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
             "num_classes": "sequential", "adm_in_channels": 2816}}
"""The published settings of the networks."""

SMALL = {"model_channels": 32, "num_heads": 2, "num_head_channels": -1, "transformer_depth_middle": 1}
TINY: dict[str, dict[str, Any]] = {"SD15": SMALL, "SDXL": {**SMALL, "transformer_depth": [0, 0, 1, 1, 1, 1],
                                                            "transformer_depth_output": [0] * 3 + [1] * 6}}
STEPS, CFG, PART_SECONDS = 4, 7.0, 150
WAYS = {"unguided": {}, "in the prediction": {"gradient": "in the prediction"},
        "through the model": {"gradient": "through the model"}}


@dataclass(frozen=True)
class Part:
    """A ComfyUI with its options, and the model that is measured in it."""

    kind: str                     # of ComfyUI's supported_models
    size: int                     # of the square latent
    options: tuple[str, ...] = ()
    weights: str = "float16"      # type of the weights; the network computes in float16


VARIANTS = {"as it starts": {}, "without dynamic VRAM": {"options": ("--disable-dynamic-vram",)},
            "low VRAM": {"options": ("--disable-dynamic-vram", "--lowvram")}, "fp8 weights": {"weights": "float8_e4m3fn"}}
PARTS = {f"{name}, {variant}": Part(kind, size, **changes) for name, kind, size in (("SD 1.5", "SD15", 64),
                                                                                    ("SDXL", "SDXL", 128))
         for variant, changes in VARIANTS.items()}


# One part, in a ComfyUI of its own

def random_model(part: Part, is_tiny: bool, disable_dynamic: bool = False) -> Any:
    """A MODEL of random weights, loaded as ComfyUI loads a file; it can be loaded a second time."""
    import comfy.memory_management as memory
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    def config() -> Any:
        kind = getattr(comfy.supported_models, part.kind)
        made = kind({**NETWORKS[part.kind], **(TINY[part.kind] if is_tiny else {})})
        compute = torch.float32 if is_tiny else torch.float16
        weights = getattr(torch, part.weights) if part.weights != "float16" else compute
        made.set_inference_dtype(weights, None if weights == compute else compute)
        return made

    streams = getattr(memory, "aimdo_enabled", False)
    try:
        memory.aimdo_enabled = False  # under dynamic VRAM, layers have no weights before some are loaded
        state = random_weights(config().get_model({}, "").diffusion_model)
    finally:
        memory.aimdo_enabled = streams
    model = config().get_model(state, "")
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher",
                                                                            comfy.model_patcher.ModelPatcher)
    patcher = kind(model, management.get_torch_device(), management.unet_offload_device())
    model.load_model_weights(state, "", **({"assign": True} if streams and not disable_dynamic else {}))
    patcher.cached_patcher_init = (random_model, (part, is_tiny))
    return patcher


def random_weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a network as if trained, the same each time: one row of random numbers over and over, for speed."""
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))

    def weight(tensor: torch.Tensor) -> torch.Tensor:
        scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
        repeated = numbers.repeat(tensor.numel() // len(numbers) + 1)[:tensor.numel()]
        return (scale * repeated).reshape(tensor.shape).to(tensor.dtype)
    return {name: weight(tensor) for name, tensor in net.state_dict().items()}


def measure(nodes: dict[str, Any], part: Part, is_tiny: bool) -> dict[str, Any]:
    """Seconds of a step and memory in GiB of each way. nodes: by id, of ComfyUI and this pack."""
    with torch.inference_mode():
        model = random_model(part, is_tiny)
        rows = {way: measured(nodes, model, part, is_tiny, settings) for way, settings in WAYS.items()}
        if hasattr(model, "is_dynamic") and model.is_dynamic():
            model.cached_patcher_init = None
            rows["through the model, streamed"] = measured(nodes, model, part, is_tiny, WAYS["through the model"])
    return rows


def measured(nodes: dict[str, Any], model: Any, part: Part, is_tiny: bool, settings: dict) -> dict[str, float]:
    """Seconds of a step after a warm-up, the most memory of torch's, and what is not given back. settings: of the term."""
    sample = sampler(nodes, guided(nodes, model, settings) if settings else model, part, is_tiny)
    free = free_memory()
    if has_gpu := torch.cuda.is_available() and not is_tiny:
        torch.cuda.reset_peak_memory_stats()
    sample()
    start = time.perf_counter()
    sample()
    seconds = (time.perf_counter() - start) / STEPS
    peak = torch.cuda.max_memory_allocated() / 2**30 if has_gpu else 0.0
    return {"seconds": seconds, "peak": peak, "left": free - free_memory()}


def sampler(nodes: dict[str, Any], model: Any, part: Part, is_tiny: bool) -> Any:
    """A function that samples one image by the stock KSampler, to its end."""
    network = NETWORKS[part.kind]
    size = 8 if is_tiny else part.size
    cond = [[torch.zeros(1, 77, network["context_dim"]), {"pooled_output": torch.zeros(1, 1280)}]]
    latent = {"samples": torch.zeros(1, 4, size, size)}
    inputs = {"model": model, "positive": cond, "negative": cond, "latent_image": latent, "seed": 1, "steps": STEPS,
              "cfg": CFG, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}

    def sample() -> None:
        nodes["KSampler"]().sample(**inputs)  # its latent comes back to main memory, which waits for the device
    return sample


def guided(nodes: dict[str, Any], model: Any, settings: dict) -> Any:
    """The MODEL guided by the bundled classifier, on linear colours."""
    def run(node: str, **inputs: Any) -> Any:
        return nodes[node].execute(**inputs).args[0]
    guider = run("PPAPAimAtClass", guider=run("PPAPLoadGuider", guider_name="tinyworld/class"), classes="star")
    terms = run("PPAPGuidanceTerm", guider=guider, weight=0.3, start_percent=0.0, end_percent=1.0, factor_at_start=1.0,
                factor_at_end=1.0, view="denoised", **settings)
    return run("PPAPApplyGuidance", model=model, terms=terms, max_rms=0.0)


def free_memory() -> float:
    """GiB of the device that are free once ComfyUI has unloaded all models."""
    import comfy.model_management as management

    management.unload_all_models()
    management.soft_empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0


def nodes_of(comfyui: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """Start ComfyUI's own code in this process, with options, and load this pack. Returns all nodes by id."""
    sys.argv = ["main.py", "--disable-all-custom-nodes", *options]
    sys.path.insert(0, str(comfyui))
    import main  # noqa: F401  sets up dynamic VRAM

    import nodes

    if not asyncio.run(nodes.load_custom_node(str(ROOT))):
        raise RuntimeError("this pack does not load")
    return nodes.NODE_CLASS_MAPPINGS


# All parts

def run_part(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of a part, measured in a process of its own; "error" where that fails."""
    command = [sys.executable, "-m", "tools.gpu", str(arguments.comfyui), "--part", name, *["--tiny"] * arguments.tiny]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PART_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {PART_SECONDS} seconds"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it said nothing"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]}


def table(rows: dict[str, dict]) -> str:
    """The rows as Markdown."""
    lines = ["| part | way | seconds a step | most memory (GiB) | not given back (GiB) |", "|---|---|---|---|---|"]
    for name, ways in rows.items():
        if "error" in ways:
            lines.append(f"| {name} | {ways['error']} | | | |")
        else:
            lines += [f"| {name} | {way} | {row['seconds']:.3f} | {row['peak']:.2f} | {row['left']:.2f} |"
                      for way, row in ways.items()]
    return "\n".join(lines)


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description="Seconds and memory of guidance on a GPU.")
    parser.add_argument("comfyui", type=Path, help="folder of a ComfyUI")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"),
                        help="where rows are kept; a begun file is gone on with")
    parser.add_argument("--only", default="", help="parts whose name has these words")
    parser.add_argument("--minutes", type=float, default=10.0, help="no part begins after so many")
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parsed(argv)
    if not arguments.tiny and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing was measured.")
        return
    if arguments.part:
        part = PARTS[arguments.part]
        nodes = nodes_of(arguments.comfyui.resolve(), (*part.options, *["--cpu"] * arguments.tiny))
        print(json.dumps(measure(nodes, part, arguments.tiny)))
        return
    rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    end = time.monotonic() + 60 * arguments.minutes
    for name in PARTS:
        if arguments.only in name and name not in rows and time.monotonic() < end:
            rows[name] = run_part(name, arguments)
            arguments.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
