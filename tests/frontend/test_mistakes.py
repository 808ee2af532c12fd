"""Typical mistakes: the page shows what to do next in one sentence of ours."""
import pytest
from helpers.frontend import FrontEnd
from helpers.graphs import CONDITIONING, LATENT, MODEL, WORLD, node, sampling, weighing

CLASSIFIER = {"2": node("PPAPLoadGuider", guider_name="tinyworld/class")}
GUIDED = WORLD | CLASSIFIER | {
    "3": node("PPAPAimAtClass", guider=["2", 0], classes="star"),
    "4": node("PPAPGuidanceTerm", **weighing(["3", 0])),
    "5": node("PPAPGuidedKSampler", **sampling(terms=["4", 0], max_rms=0.0)),
    "6": node("VAEDecode", samples=["5", 0], vae=["1", 3]),
    "7": node("PreviewImage", images=["6", 0])}
SAMPLES = node("PPAPGenerateSamples", model=MODEL, positive=CONDITIONING, latent_image=LATENT, name="mistakes", count=64, steps=2,
               cfg=1.0, sampler_name="euler", scheduler="karras", seed=0)
DISTILLED = WORLD | CLASSIFIER | {
    "8": SAMPLES,
    "9": node("PPAPDistilExperts", samples=["8", 0], guider=["2", 0], view="denoised", experts=1, sigma_min=0.0, sigma_max=0.0,
              steps=1, batch_size=2, learning_rate=1e-3, rank=4, alpha=4.0, seed=0),
    "10": node("PPAPSaveExperts", guider=["9", 0], file_name="mistakes")}
MISTAKES = {
    "no target": GUIDED | {"4": node("PPAPGuidanceTerm", **weighing(["2", 0]))},
    "wrong target": GUIDED | {"3": node("PPAPAimAtNumber", guider=["2", 0], number=0.5, name="")},
    "unknown class": GUIDED | {"3": node("PPAPAimAtClass", guider=["2", 0], classes="lighthouse")},
    "too many masks": GUIDED | {
        "4": node("PPAPGuidanceTerm", **weighing(["3", 0], mask=["11", 0])),
        "11": node("ImageToMask", image=["12", 0], channel="red"),
        "12": node("EmptyImage", width=16, height=16, batch_size=3, color=0)},
    "missing file": GUIDED | {"13": node("PPAPLoadExperts", guider=["2", 0], file_name="a friend's.safetensors"),
                              "3": node("PPAPAimAtClass", guider=["13", 0], classes="star")},
    "experts of a rule": DISTILLED | {"2": node("PPAPRule", rule="colours")},
    "no vae": DISTILLED | {"1": node("PPAPTinyLatentWorld", kind="flow"), "14": node("PPAPClassConditioning", classes=""),
                           "15": node("EmptyLatentImage", width=128, height=128, batch_size=2),
                           "8": node("PPAPGenerateSamples", **{**SAMPLES["inputs"], "positive": ["14", 0],
                                                              "latent_image": ["15", 0]})},
    "not connected": GUIDED | {"6": node("VAEDecode", samples=["5", 0])}}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_on_the_page(front: FrontEnd, name: str):
    front.drop(name, MISTAKES[name])
    message, panel = front.error()
    print("\n@@", name, "|", message.replace("\n", " / "), "|", [l for l in panel.splitlines() if "Message" in l or "Node Type" in l] or panel)
    assert 0
