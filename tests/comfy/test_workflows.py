"""Through a running server: the shipped workflows, progress, cancel, and the cache."""
import re
import shutil
import time
from itertools import combinations
from statistics import correlation, mean

import pytest
from helpers.comfy_server import Server, messages
from helpers.dynamic import expanded
from helpers.graphs import (
    MODEL,
    VAE,
    WORKFLOW_NAMES,
    WORKFLOWS,
    WORLD,
    distilling,
    node,
    page_of,
    posted,
    quick,
    sampling,
    titled,
    weighing,
    workflow,
)
from PIL import ImageChops, ImageColor, ImageStat

NODES = {page.stem for page in (WORKFLOWS.parent / "web" / "docs").glob("PPAP*.md")}  # each node has a help page
SMALLEST_WITH_PREVIEW = {"KSampler": 480, "PPAPGuidedKSampler": 550, "SamplerCustomAdvanced": 340,
                         "PPAPGenerateSamples": 530, "PPAPDistilExperts": 540, "PPAPTrainLora": 440, "PPAPBakeGuidance": 440,
                         "PPAPPlugAndPlayPrior": 550, "PPAPSteer": 480, "PPAPBestSeeds": 550}  # height in pixels
GUIDED = WORLD | {
    "2": node("PPAPLoadGuider", guider_name="tinyworld/class"),
    "3": node("PPAPAimAtClass", guider=["2", 0], classes="star"),
    "4": node("PPAPGuidanceTerm", **weighing(["3", 0])),
    "5": node("PPAPApplyGuidance", model=MODEL, terms=["4", 0], max_rms=0.0),
    "6": node("KSampler", **sampling(model=["5", 0])),
    "7": node("VAEDecode", samples=["6", 0], vae=VAE),
    "8": node("SaveImage", images=["7", 0], filename_prefix="guided")}


def test_every_node_is_registered_with_a_help_page(server: Server):
    info = server.get("/object_info")
    assert {name for name in info if name.startswith("PPAP")} == NODES
    for name in NODES:
        assert info[name]["description"], name
        for slot, (kind, settings), _ in expanded(info[name]["input"], info[name]["input_order"]):
            has_neutral = kind == "FLOAT" or "own" in settings.get("options", kind)
            assert not has_neutral or "Neutral" in settings["tooltip"], f"{name}.{slot} names no neutral value"
            assert settings["tooltip"]


def drawn(graph: dict) -> dict[str, int]:
    """The nodes that show what a VAE decoded, and how many pictures each of them shows."""
    found = {}
    for key, each in graph.items():
        if each["class_type"] in ("SaveImage", "PreviewImage"):
            decoded = graph[each["inputs"]["images"][0]]
            while decoded["class_type"] in ("ImageScaleBy", "PPAPFinish"):
                decoded = graph[decoded["inputs"]["image"][0]]
            if decoded["class_type"] == "VAEDecode":
                found[key] = count_of(graph, graph[decoded["inputs"]["samples"][0]])
    return found


def count_of(graph: dict, latent: dict) -> int:
    """How many images come out of a node, behind a sampler or several, one after another."""
    inputs = latent["inputs"]
    if latent["class_type"] == "RepeatLatentBatch":
        return inputs["amount"] * count_of(graph, graph[inputs["samples"][0]])
    return inputs.get("count") or inputs.get("batch_size") or count_of(graph, graph[inputs["latent_image"][0]])


def test_each_workflow_has_a_thumbnail_and_a_line_in_the_readme():
    assert sorted(file.stem for file in WORKFLOWS.glob("*.jpg")) == WORKFLOW_NAMES
    readme = (WORKFLOWS.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in WORKFLOW_NAMES if f"workflows/{name}.json" not in readme] == []


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_workflow_says_what_to_do_with_other_models(name: str):
    [words] = [each["widgets_values"][0] for each in page_of(name)["nodes"] if each.get("title") == "With your own model"]
    assert [model for model in ("SDXL", "FLUX.2 Klein", "Krea 2", "Anima", "Z-Image", "turbo") if model not in words] == []


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_no_node_of_a_workflow_covers_another(name: str):
    """No node covers another one or the preview that it shows while it works."""
    boxes = {each["id"]: box_of(each) for each in page_of(name)["nodes"]}
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        apart = a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
        assert apart, f"the nodes {one} and {other} of {name}"


def box_of(each: dict) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node on the page, with its title and the preview it shows while it works."""
    (x, y), (width, height) = each["pos"], each["size"]
    if each["flags"].get("collapsed"):
        width, height = 100, 0
    return x, y - 30, x + width, y + max(height, SMALLEST_WITH_PREVIEW.get(each["type"], 0))


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_shipped_workflow_runs_and_shows_pictures(server: Server, name: str):
    graph = quick(workflow(name, server.get("/object_info")))
    outputs, shown = server.run(graph), drawn(graph)
    side = 256 if any(each["class_type"] == "PPAPTinyWorld" for each in graph.values()) else 128
    assert len(shown) >= 2
    for key, count in shown.items():
        pictures = server.pictures(outputs[key])
        assert len(pictures) == count
        for picture in pictures:
            assert picture.size == (side, side) and max(ImageStat.Stat(picture).stddev) > 1
    assert {picture.width for key in outputs if key not in shown and "images" in outputs[key]
            for picture in server.pictures(outputs[key])} & {720, 840}, "a plot is 720 pixels wide, the toy 840"


def test_workflows_normalize_terms_and_fix_their_seeds(server: Server):
    info = server.get("/object_info")
    for name in WORKFLOW_NAMES:
        graph = workflow(name, info)
        terms = [each["inputs"] for each in graph.values() if each["class_type"] == "PPAPGuidanceTerm"]
        steered = [each for each in graph.values() if each["class_type"] == "PPAPSteer"]  # which does so by itself
        assert name == "autoguidance" or terms or steered, name
        assert all(term["strength"] == "balanced" and 0.1 <= term["weight"] <= 1 for term in terms), name
        values = [value for each in page_of(name)["nodes"] for value in each.get("widgets_values") or []]
        assert "fixed" in values and "randomize" not in values, f"the seeds of {name} stay the same in all its samplers"


def test_the_workflow_of_latents_steers_and_says_what_it_did(server: Server):
    graph, keys = quick(workflow("latent", server.get("/object_info"))), titled("latent")
    outputs = server.run(graph)
    plain, guided = (server.pictures(outputs[keys[title]]) for title in ("Without guidance", "Steered towards stars"))
    for before, after in zip(plain, guided, strict=True):
        assert mean(ImageStat.Stat(ImageChops.difference(before.convert("RGB"), after.convert("RGB"))).mean) > 1
    [read] = [key for key, each in graph.items() if each["class_type"] == "PPAPReadGuidance"]
    [text] = outputs[read]["text"]
    assert outputs[keys["In words"]]["text"] == [text], "what the node says can be wired"
    steps, first, last = re.search(r"at work in 4 of (\d+) steps, energy (\S+) at first and (\S+) at last", text).groups()
    assert steps == "4" and float(last) < float(first) / 2


def test_the_controlnet_places_and_guidance_colours(server: Server):
    graph, keys = quick(workflow("with_controlnet", server.get("/object_info"))), titled("with_controlnet")
    outputs = server.run(graph)
    control, guidance, both = ([picture.convert("RGB") for picture in server.pictures(outputs[keys[title]])]
                               for title in ("ControlNet alone", "Guidance alone", "Both"))
    [palette] = [each["inputs"]["colours"] for each in graph.values() if each["class_type"] == "PPAPPalette"]
    wall = ImageColor.getrgb(palette.split(":")[0])

    def off(pictures: list) -> float:
        """Mean distance of the wall from the palette's first colour."""
        return mean(abs(a - b) for each in pictures for a, b in zip(each.getpixel((4, 64)), wall, strict=True))

    def alike(pictures: list) -> float:
        """Correlation of the object in front of the wall with the one that the ControlNet alone draws."""
        return mean(correlation(*(thing(each) for each in pair)) for pair in zip(pictures, control, strict=True))

    def thing(picture) -> list[int]:
        wall_alone = picture.crop((0, 60, 8, 68)).resize((1, 1)).resize(picture.size)
        return list(ImageChops.difference(picture, wall_alone).convert("L").tobytes())

    assert off(both) < off(control) / 2
    assert alike(both) > alike(guidance) + 0.1


def test_the_workflows_show_every_useful_node(server: Server):
    """All but those that a fresh install has no use for."""
    info = server.get("/object_info")
    shown = {each["class_type"] for name in WORKFLOW_NAMES for each in workflow(name, info).values()}
    need_files, for_larger_images = {"PPAPDownloadGuider", "PPAPLoadExperts", "PPAPAimAtText"}, {"PPAPCutOuts"}
    for_text_encoders = {"PPAPPromptList"}
    assert shown & NODES == NODES - need_files - for_larger_images - for_text_encoders


def test_an_older_workflow_gets_neutral_values(server: Server):
    """A file from before a node grew lacks the values of its new inputs."""
    page = page_of("quickstart")
    for each in page["nodes"]:
        if each["type"] in ("PPAPLoadGuider", "PPAPDistilExperts"):
            each["widgets_values"].pop()
    graph = posted(page, server.get("/object_info"))
    [guider] = [each["inputs"] for each in graph.values() if each["class_type"] == "PPAPLoadGuider"]
    [distil] = [each["inputs"] for each in graph.values() if each["class_type"] == "PPAPDistilExperts"]
    assert guider == {"guider_name": "tinyworld/class", "answer": "own", "channels": "own", "padding": "own"}
    assert distil["temperature"] == 1.0 and distil["seed"] == 0 and distil["alpha"] == 8


def test_the_same_graph_queued_twice_does_no_work_twice(server: Server):
    server.run(GUIDED)
    history = server.wait(server.queue(GUIDED))
    [cached] = messages(history, "execution_cached")
    assert set(cached["nodes"]) == set(GUIDED)


def test_a_cancelled_job_loses_nothing(server: Server):
    """It reports progress with previews, stops within a second, and goes on where it was stopped."""
    graph = distilling("stopped", steps=60)
    states = server.folder / "output" / "ppap_distillation"
    shutil.rmtree(states, ignore_errors=True)
    with server.listen() as until:
        prompt, seen = server.queue(graph), []
        while not any(kind == "progress" and data["node"] == "4" and data["value"] >= 70 for kind, data in seen):
            seen += until("progress")
        asked = time.monotonic()
        server.post("/interrupt", {})
        seen += until("execution_interrupted")
        assert time.monotonic() - asked < 1.0
    assert {kind for kind, _ in seen} >= {"progress", "preview"}
    assert {data["node"] for kind, data in seen if kind == "progress"} == {"2", "4"}
    assert server.wait(prompt)["status"]["status_str"] == "error"
    assert len(list(states.rglob("expert_*"))) == 2, "both the finished expert and the one in training are kept"

    with server.listen() as until:
        server.queue(graph)
        values = [data["value"] for _ in range(2) for kind, data in until("progress") if kind == "progress"]
        assert min(values) >= 60 and max(values) > 70, "goes on where it was stopped: the first expert is only measured"
        list(until("execution_success"))
    shutil.rmtree(states)
    server.run(distilling("straight", steps=60))
    folder = server.folder / "models" / "ppap_experts"
    assert (folder / "stopped.safetensors").read_bytes() == (folder / "straight.safetensors").read_bytes()


def test_what_guidance_did_is_shown_in_the_node_itself(server: Server):
    """The page expects a kind of message, the length of the node's id, the id and the text."""
    graph = GUIDED | {"9": node("PPAPGuidanceReport", model=["5", 0], latent=["6", 0]),
                      "10": node("PPAPReadGuidance", report=["9", 0])}
    graph["6"]["inputs"] = graph["6"]["inputs"] | {"seed": 4321}
    with server.listen() as until:
        server.queue(graph)
        told = [data for kind, data in until("execution_success") if kind == "preview" and data[:4] == b"\0\0\0\3"]
    assert len(told) == 1 and told[0].endswith(b"at most") and b"10" in told[0][4:14] and b"steps, energy" in told[0]


def test_saved_experts_are_found_and_guide(server: Server):
    server.run(distilling("found", steps=2))
    assert "found.safetensors" in str(server.get("/object_info/PPAPLoadExperts"))
    guided = GUIDED | {"9": node("PPAPLoadExperts", guider=["2", 0], file_name="found.safetensors"),
                       "3": node("PPAPAimAtClass", guider=["9", 0], classes="star, 0")}
    assert server.run(guided)["8"]["images"]
    server.run(distilling("found", steps=2, seed=1))
    [cached] = messages(server.wait(server.queue(guided)), "execution_cached")
    assert "9" not in cached["nodes"] and "2" in cached["nodes"], "a changed file is read again, and nothing else"


@pytest.mark.parametrize(("kind", "inputs", "words"), [
    ("PPAPLoadGuider", {"guider_name": "../secrets"}, ["../secrets", "tinyworld/class"]),
    ("PPAPLoadExperts", {"guider": ["2", 0], "file_name": "absent.safetensors"}, ["absent.safetensors", "ppap_experts"]),
    ("PPAPSaveExperts", {"guider": ["2", 0], "file_name": "../up"}, ["'../up'", "without a folder"]),
    ("PPAPPalette", {"colours": "#1d3557, blue"}, ["'blue'", "six hexadecimal digits"]),
])
def test_a_wrong_name_is_refused_before_anything_runs(server: Server, kind: str, inputs: dict, words: list[str]):
    shows = node("PreviewImage", images=["9", 0])
    ends = shows if kind == "PPAPPalette" else node("PPAPSaveExperts", guider=["9", 0], file_name="x")
    graph = GUIDED | {"9": node(kind, **inputs), "10": ends}
    errors = server.post("/prompt", {"prompt": graph})["node_errors"]["9"]["errors"]
    assert len(errors) == 1 and all(word in errors[0]["details"] + errors[0]["message"] for word in words), errors


def test_an_unknown_class_stops_the_graph_with_one_sentence(server: Server):
    sentence = server.error(GUIDED | {"3": node("PPAPAimAtClass", guider=["2", 0], classes="star, sta")})
    assert sentence == "tinyworld/guider_class has no class 'sta': expected a number below 8 or a name such as star"


def test_a_refusal_is_said_on_its_node_until_it_is_mended(server: Server):
    graph = GUIDED | {"3": node("PPAPAimAtClass", guider=["2", 0], classes="lighthouse")}
    mended = GUIDED | {"3": node("PPAPAimAtClass", guider=["2", 0], classes="moon")}
    with server.listen() as until:
        server.queue(graph)
        told = [data for kind, data in until("execution_error") if kind == "preview"]
        server.queue(mended)
        told += [data for kind, data in until("execution_success") if kind == "preview" and data[:4] == b"\0\0\0\3"]
    assert [data[8:9] for data in told] == [b"3", b"3"]
    assert b"has no class 'lighthouse'" in told[0] and told[1].endswith(b"3 ")


def test_samples_of_other_settings_are_not_mixed(server: Server):
    graph = distilling("recipe", steps=1)
    server.run(graph)
    graph["2"]["inputs"]["steps"] = 3
    assert "other settings (steps is 2, expected 3)" in server.error(graph)
