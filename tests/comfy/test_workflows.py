"""Through a running server: the shipped workflows, progress, cancel, and the cache."""
import json
import re
import shutil
import time

import pytest
from comfy_server import Server, messages
from graphs import MODEL, VAE, WORKFLOWS, WORLD, distilling, node, quick, sampling, weighing, workflow
from PIL import ImageStat

NODES = {"PPAPTinyWorld", "PPAPLoadGuider", "PPAPDownloadGuider", "PPAPRule", "PPAPLoadExperts", "PPAPSaveExperts",
         "PPAPAimAtClass", "PPAPAimAtText", "PPAPAimAtImage", "PPAPAimAtMask", "PPAPAimAtNumber", "PPAPPalette",
         "PPAPCutOuts", "PPAPGuidanceTerm", "PPAPCombineTerms", "PPAPApplyGuidance", "PPAPGuidedKSampler",
         "PPAPGenerateSamples", "PPAPDistilExperts", "PPAPPlotLosses", "PPAPPlotGuidance", "PPAPGuidanceReport",
         "PPAPLookThrough"}
WORKFLOW_NAMES = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
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
        assert info[name]["description"] and (WORKFLOWS.parent / "web" / "docs" / f"{name}.md").is_file(), name
        for each in (spec for group in ("required", "optional") for spec in info[name]["input"].get(group, {}).items()):
            tooltip = each[1][1]["tooltip"]
            assert each[1][0] != "FLOAT" or "Neutral" in tooltip, f"{name}.{each[0]} names no neutral value"


def test_the_pack_adds_at_most_a_fifth_of_a_second_to_the_start(server: Server):
    log = (server.folder / "log.txt").read_text()
    seconds = re.search(r"([\d.]+) seconds.*ComfyUI-PPAP", log)
    assert seconds and float(seconds[1]) <= 0.2, log[-2000:]


@pytest.mark.parametrize("name", WORKFLOW_NAMES)
def test_a_shipped_workflow_runs_and_saves_pictures(server: Server, name: str):
    graph = quick(workflow(name, server.get("/object_info")))
    outputs = server.run(graph)
    saved = [key for key, each in graph.items() if each["class_type"] == "SaveImage"]
    assert len(saved) == 2
    for key in saved:
        pictures = server.pictures(outputs[key])
        assert len(pictures) == graph["1"]["inputs"]["batch_size"]
        for picture in pictures:
            assert picture.size == (32, 32) and max(ImageStat.Stat(picture).stddev) > 1
    assert {picture.width for key in outputs if key not in saved and "images" in outputs[key]
            for picture in server.pictures(outputs[key])} >= {720}, "a plot is 720 pixels wide"


def test_the_workflows_show_every_node_but_those_that_a_fresh_install_has_no_use_for(server: Server):
    info = server.get("/object_info")
    shown = {each["class_type"] for name in WORKFLOW_NAMES for each in workflow(name, info).values()}
    need_files, for_larger_images = {"PPAPDownloadGuider", "PPAPLoadExperts", "PPAPAimAtText"}, {"PPAPCutOuts"}
    assert shown & NODES == NODES - need_files - for_larger_images


def test_a_workflow_from_before_a_node_grew_runs_with_neutral_values(server: Server):
    graph = workflow("quickstart", server.get("/object_info"))
    [guider] = [each["inputs"] for each in graph.values() if each["class_type"] == "PPAPLoadGuider"]
    [distil] = [each["inputs"] for each in graph.values() if each["class_type"] == "PPAPDistilExperts"]
    page = json.loads((WORKFLOWS / "quickstart.json").read_text())
    assert ["tinyworld/class"] in [each.get("widgets_values") for each in page["nodes"]], "the file knows no answer"
    assert guider == {"guider_name": "tinyworld/class", "answer": "own"}
    assert distil["temperature"] == 1.0 and distil["seed"] == 0 and distil["alpha"] == 8


def test_the_same_graph_queued_twice_does_no_work_twice(server: Server):
    server.run(GUIDED)
    history = server.wait(server.queue(GUIDED))
    [cached] = messages(history, "execution_cached")
    assert set(cached["nodes"]) == set(GUIDED)


def test_a_long_job_reports_progress_and_previews_and_cancel_loses_nothing(server: Server):
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
        first = next(data["value"] for _ in range(1000) for kind, data in until("progress") if kind == "progress")
        assert first > 70, "goes on where it was stopped"
        list(until("execution_success"))
    shutil.rmtree(states)
    server.run(distilling("straight", steps=60))
    folder = server.folder / "models" / "ppap_experts"
    assert (folder / "stopped.safetensors").read_bytes() == (folder / "straight.safetensors").read_bytes()


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


def test_samples_of_another_recipe_are_not_mixed(server: Server):
    graph = distilling("recipe", steps=1)
    server.run(graph)
    graph["2"]["inputs"]["steps"] = 3
    assert "another recipe (steps is 2, expected 3)" in server.error(graph)
