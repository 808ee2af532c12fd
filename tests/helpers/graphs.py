"""Graphs for the tests, in the form that ComfyUI's API takes."""
import json
from pathlib import Path

from .dynamic import CHOICE, following

WORKFLOWS = Path(__file__).parents[2] / "workflows"
WORKFLOW_NAMES = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
WORLD = {"1": {"class_type": "PPAPTinyWorld", "inputs": {"batch_size": 2}}}
MODEL, CONDITIONING, LATENT, VAE = (["1", slot] for slot in range(4))
QUICK = {"KSampler": {"steps": 4}, "PPAPGuidedKSampler": {"steps": 4}, "PPAPGenerateSamples": {"count": 64, "steps": 8},
         "PPAPDistilExperts": {"steps": 2, "batch_size": 4}, "PPAPDistillReadout": {"steps": 2, "batch_size": 4},
         "PPAPAutoguidanceToy": {"steps": 64}, "PPAPTrainLora": {"steps": 4}, "PPAPPlugAndPlayPrior": {"steps": 8},
         "PPAPBakeGuidance": {"steps": 4}, "PPAPBestSeeds": {"steps": 2, "candidates": 6}}
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def node(kind: str, /, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def quick(graph: dict) -> dict:
    """A copy of a graph with few steps."""
    return {key: {**node, "inputs": {**node["inputs"], **QUICK.get(node["class_type"], {})}} for key, node in graph.items()}


def sampling(**changes) -> dict:
    """The settings of a sampler node on the tiny world."""
    return {"model": MODEL, "seed": 1, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras",
            "positive": CONDITIONING, "negative": CONDITIONING, "latent_image": LATENT, "denoise": 1.0, **changes}


def weighing(guider: list, weight: float = 4.0, **changes) -> dict:
    """The settings of a term."""
    return {"guider": guider, "weight": weight, "start_percent": 0.0, "end_percent": 1.0, "factor_at_start": 1.0,
            "factor_at_end": 1.0, "view": "own", "strength": "raw", **changes}


def distilling(name: str, **changes) -> dict:
    """Samples, two experts from them, and a file of the same name."""
    return WORLD | {
        "2": node("PPAPGenerateSamples", model=MODEL, positive=CONDITIONING, latent_image=LATENT, name=name, count=64,
                  steps=2, cfg=1.0, sampler_name="euler", scheduler="karras", seed=0),
        "3": node("PPAPLoadGuider", guider_name="tinyworld/class"),
        "4": node("PPAPDistilExperts", **{"samples": ["2", 0], "guider": ["3", 0], "view": "denoised", "experts": 2,
                  "sigma_min": 0.0, "sigma_max": 0.0, "steps": 30, "batch_size": 4, "learning_rate": 1e-3, "rank": 4,
                  "alpha": 4.0, "seed": 0, **changes}),
        "5": node("PPAPSaveExperts", guider=["4", 0], file_name=name),
        "6": node("PPAPPlotLosses", losses=["4", 1]),
        "7": node("PreviewImage", images=["6", 0])}


def page_of(name: str) -> dict:
    """A workflow file."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def titled(name: str) -> dict[str, str]:
    """The nodes of a workflow file by their titles."""
    return {node["title"]: str(node["id"]) for node in page_of(name)["nodes"] if "title" in node}


def workflow(name: str, info: dict) -> dict:
    """A workflow file as its page would post it. info: /object_info, which names the widgets in their order."""
    return posted(page_of(name), info)


def posted(page: dict, info: dict) -> dict:
    """The API graph of a workflow file's content."""
    origin = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    return {str(node["id"]): _api(node, origin, info[node["type"]]) for node in page["nodes"] if node["type"] in info}


def inside(blueprint: dict, info: dict, given: dict) -> tuple[dict, list]:
    """The API graph inside a subgraph blueprint, and where its first output is. given: values or links of its inputs."""
    [definition] = blueprint["definitions"]["subgraphs"]
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[field] for field in fields] for link in definition["links"]]
    graph = posted({"nodes": definition["nodes"], "links": links}, info)
    for each in graph.values():
        for name, value in list(each["inputs"].items()):
            if isinstance(value, list):
                each["inputs"][name] = (given.get(definition["inputs"][value[1]]["name"]) if value[0] == "-10" else
                                        [f"inside {value[0]}", value[1]])
        each["inputs"] = {name: value for name, value in each["inputs"].items() if value is not None}
    [source] = [link[1:3] for link in links if link[3] == -20]
    return {f"inside {key}": each for key, each in graph.items()}, [f"inside {source[0]}", source[1]]


def _api(node: dict, origin: dict, info: dict) -> dict:
    specs = [*info["input"].get("required", {}).items(), *info["input"].get("optional", {}).items()]
    values, inputs = iter(node.get("widgets_values", [])), {}
    while specs:
        name, (kind, *options) = specs.pop(0)
        if isinstance(kind, list) or kind in (*WIDGETS, CHOICE):
            options_of = options[0] if options else {}
            inputs[name] = next(values, options_of.get("default"))  # a file may be older than the last inputs of a node
            if options_of.get("control_after_generate") or name in ("seed", "noise_seed"):
                next(values, None)  # what the page does with a seed after each run
        if kind == CHOICE:  # the widgets of the chosen option follow its own
            specs[:0] = following(name, options[0]["options"], inputs[name])
    inputs |= {slot["name"]: origin[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
    return {"class_type": node["type"], "inputs": inputs}
