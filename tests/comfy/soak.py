"""A soak: 500 prompts through one ComfyUI, with guidance by several guiders and views of several models, cancels and errors.

Not part of the suite: `make soak`, eight minutes of one core. PPAP_SOAK says another number of prompts.
"""
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.comfy_server import Server, messages
from helpers.graphs import MODEL, VAE, WORLD, distilling, node, sampling, weighing

PROMPTS = int(os.environ.get("PPAP_SOAK", 500))
WARM_UP = PROMPTS * 3 // 10  # prompts until all has been loaded, and memory has found its size
GROWTH = 0.01                # of memory, from the first half after that to the second
ANSWER = 1.0                 # seconds until a cancelled prompt has ended
NAME = "soak"                # of samples and experts

Prompt = Callable[[int], dict]
"""seed -> graph"""


def shown(graph: dict, samples: list, vae: list) -> dict:
    return graph | {"8": node("VAEDecode", samples=samples, vae=vae), "9": node("PreviewImage", images=["8", 0])}


def guided(seed: int, guider: dict, steps: int = 4, **term: object) -> dict:
    """A sampling of the tiny world of pixels. guider: its nodes, of which the last is "5"."""
    graph = WORLD | guider | {"6": node("PPAPGuidanceTerm", **weighing(["5", 0], 0.5, strength="balanced", **term)),
                              "7": node("PPAPApplyGuidance", model=MODEL, terms=["6", 0], max_rms=0.0),
                              "10": node("KSampler", **sampling(model=["7", 0], seed=seed, steps=steps))}
    return shown(graph, ["10", 0], VAE)


def class_guider(name: str = "tinyworld/class") -> dict:
    return {"4": node("PPAPLoadGuider", guider_name=name), "5": node("PPAPAimAtClass", guider=["4", 0], classes="star")}


def of_class(seed: int) -> dict:
    return guided(seed, class_guider())


def through_the_model(seed: int) -> dict:
    return guided(seed, class_guider(), gradient="through the model")


def of_rule(seed: int) -> dict:
    return guided(seed, {"5": node("PPAPRule", rule="symmetry left-right")})


def of_experts(seed: int, guider: str = "tinyworld/class") -> dict:
    return guided(seed, class_guider(guider) | {
        "3": node("PPAPLoadExperts", guider=["4", 0], file_name=f"{NAME}.safetensors"),
        "5": node("PPAPAimAtClass", guider=["3", 0], classes="disk")})


def of_latents(seed: int, kind: str = "flow") -> dict:
    graph = class_guider() | {
        "1": node("PPAPTinyLatentWorld", kind=kind), "2": node("PPAPClassConditioning", classes=""),
        "3": node("EmptySD3LatentImage", width=128, height=96, batch_size=2),
        "6": node("PPAPGuidanceTerm", **weighing(["5", 0], 0.5, strength="balanced")),
        "7": node("PPAPApplyGuidance", model=MODEL, terms=["6", 0], max_rms=0.0, vae=["1", 1]),
        "10": node("KSampler", **sampling(model=["7", 0], seed=seed, positive=["2", 0], negative=["2", 0],
                                          latent_image=["3", 0], scheduler="simple"))}
    return shown(graph, ["10", 0], ["1", 1])


def of_other_latents(seed: int) -> dict:
    return of_latents(seed, "eps")


def unguided(seed: int) -> dict:
    return shown(WORLD | {"10": node("KSampler", **sampling(seed=seed))}, ["10", 0], VAE)


def wrong(seed: int) -> dict:
    """Experts of another network."""
    return of_experts(seed, "tinyworld/segmentation")


def endless(seed: int) -> dict:
    return guided(seed, class_guider(), steps=1000)


KINDS: tuple[Prompt, ...] = (of_class, of_latents, of_rule, of_experts, wrong, through_the_model, of_other_latents, unguided,
                             of_class, endless)


def memory(server: Server) -> int:
    """Bytes that the server holds."""
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(server: Server) -> set[str]:
    """Files that the server has open, without sockets and pipes."""
    names = set()
    for handle in Path(f"/proc/{server.pid}/fd").iterdir():
        try:
            names.add(os.readlink(handle))
        except FileNotFoundError:  # closed in the meantime
            continue
    return {name for name in names if name.startswith("/") and not name.startswith("/dev/")}


def handles(server: Server) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def cancel(server: Server, prompt: str, after: float) -> float:
    """Cancel a prompt some seconds after it began; returns the seconds until it had ended."""
    while not any(prompt in running for running in server.get("/queue")["queue_running"]):
        time.sleep(0.01)
    time.sleep(after)
    begun = time.monotonic()
    server.post("/interrupt", {})
    while prompt not in server.get(f"/history/{prompt}"):
        time.sleep(0.01)
    return time.monotonic() - begun


def run(server: Server, number: int, draws: random.Random) -> float:
    """Run a prompt to the end that it should have; returns the seconds that a cancel took."""
    kind = KINDS[number % len(KINDS)]
    prompt, seconds = server.queue(kind(number)), 0.0
    if kind is endless:
        seconds = cancel(server, prompt, draws.uniform(0.1, 1.0))
    history = server.wait(prompt)
    ended = {"execution_error": wrong, "execution_interrupted": endless}
    assert all(bool(messages(history, name)) == (kind is expected) for name, expected in ended.items()), history
    return seconds


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_handles_and_cancels(server: Server):
    server.run(distilling(NAME, experts=2, steps=2))
    draws, levels, cancels = random.Random(0), [], []
    for number in range(PROMPTS):
        if number == WARM_UP:
            files, count = open_files(server), handles(server)
        cancels.append(run(server, number, draws))
        levels.append(memory(server))
        if number % 50 == 49:
            print(f"{number + 1} prompts: {levels[-1] / 2**20:.0f} MiB, {handles(server)} handles, cancelled in at most "
                  f"{max(cancels):.2f} s", flush=True)
    middle = (WARM_UP + PROMPTS) // 2
    first, second = (statistics.median(part) for part in (levels[WARM_UP:middle], levels[middle:]))
    print(f"median memory {first / 2**20:.1f} MiB, then {second / 2**20:.1f} MiB: {second / first - 1:+.2%}")
    assert open_files(server) <= files and handles(server) <= count + 1  # the connection that asked last
    assert max(cancels) < ANSWER
    assert second < first * (1 + GROWTH)
