"""Typical mistakes: what to do next is said on the node, and in the panel that the page's error message opens."""
import pytest
from helpers.frontend import FrontEnd
from helpers.graphs import MODEL, VAE, WORLD, distilling, node, sampling, weighing

CLASSIFIER = {"2": node("PPAPLoadGuider", guider_name="tinyworld/class")}
GUIDED = WORLD | CLASSIFIER | {
    "3": node("PPAPAimAtClass", guider=["2", 0], classes="star"),
    "4": node("PPAPGuidanceTerm", **weighing(["3", 0])),
    "5": node("PPAPApplyGuidance", model=MODEL, terms=["4", 0], max_rms=0.0),
    "6": node("KSampler", **sampling(model=["5", 0])),
    "7": node("VAEDecode", samples=["6", 0], vae=VAE),
    "8": node("PreviewImage", images=["7", 0])}
LATENT_WORLD = {
    "1": node("PPAPTinyLatentWorld", kind="flow"), "10": node("PPAPClassConditioning", classes=""),
    "11": node("EmptyLatentImage", width=128, height=128, batch_size=2),
    "2": node("PPAPGenerateSamples", model=MODEL, positive=["10", 0], latent_image=["11", 0], name="no vae", count=64,
              steps=2, cfg=1.0, sampler_name="euler", scheduler="karras", seed=0)}
MISTAKES = {  # the graph, the node that is wrong, and what it should say
    "no target": (GUIDED | {"4": node("PPAPGuidanceTerm", **weighing(["2", 0]))}, "4", "put an Aim node"),
    "wrong target": (GUIDED | {"3": node("PPAPAimAtNumber", guider=["2", 0], number=0.5, name="")}, "3",
                     "cannot be aimed at a number"),
    "unknown class": (GUIDED | {"3": node("PPAPAimAtClass", guider=["2", 0], classes="lighthouse")}, "3",
                      "such as disk, square"),
    "targets for another batch": (GUIDED | {"3": node("PPAPAimAtClass", guider=["2", 0], classes="star, disk, ring")}, "6",
                                  "give one target for all"),
    "experts of a rule": (distilling("rule") | {"3": node("PPAPRule", rule="colours")}, "4", "no network"),
    "no vae": (distilling("no vae") | LATENT_WORLD, "2", "connect the model's VAE")}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_on_its_node(front: FrontEnd, name: str):
    graph, wrong, words = MISTAKES[name]
    front.drop(name, graph)
    message, panel = front.error()
    assert "failed" in message
    assert words in front.text_on(wrong)
    assert words in panel


def test_a_mended_mistake_takes_its_sentence_away(front: FrontEnd):
    graph, wrong, _ = MISTAKES["unknown class"]
    front.drop("mended", graph)
    front.error()
    front.page.evaluate("id => {app.graph.getNodeById(id).widgets[0].value = 'disk'}", wrong)
    assert front.run()["status"]["status_str"] == "success"
    assert front.text_on(wrong).strip() == "" and front.complaints() == []


def test_a_file_that_is_not_there_is_named(front: FrontEnd):
    load = node("PPAPLoadExperts", guider=["2", 0], file_name="a friend's.safetensors")
    front.drop("missing", GUIDED | {"12": load, "3": node("PPAPAimAtClass", guider=["12", 0], classes="star")})
    _, panel = front.error()
    assert "a friend's.safetensors" in panel and "Load Experts - file_name" in panel
