"""Prompt List, with ComfyUI's own tokenizer and a small text encoder of random weights."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import says

CONFIG = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_act": "gelu",
          "eos_token_id": 49407, "max_position_embeddings": 77, "vocab_size": 49408}


@pytest.fixture(scope="module")
def clip(comfy):
    import comfy.sd
    from comfy import sd1_clip
    model = partial(sd1_clip.SD1ClipModel, clip_model=partial(sd1_clip.SDClipModel, textmodel_json_config=CONFIG))
    clip = comfy.sd.CLIP(SimpleNamespace(params={}, clip=model, tokenizer=sd1_clip.SD1Tokenizer))
    generator = torch.Generator().manual_seed(0)
    for weight in clip.cond_stage_model.parameters():
        weight.data.normal_(0, 0.1, generator=generator)
    return clip


def test_each_line_is_the_prompt_that_a_text_node_makes(comfy, clip):
    from nodes import CLIPTextEncode
    [prompts] = comfy("PPAPPromptList", clip=clip, text="a red star\n\n  a harbour, (misty:1.2) \n")
    alone = [CLIPTextEncode().encode(clip, line)[0][0] for line in ("a red star", "a harbour, (misty:1.2)")]
    assert len(prompts) == 2 and not torch.equal(prompts[0][0], prompts[1][0])
    for (tokens, rest), (expected, others) in zip(prompts, alone, strict=True):
        assert torch.equal(tokens, expected) and torch.equal(rest["pooled_output"], others["pooled_output"])


@pytest.mark.parametrize("text, words", [("", "list of prompts is empty"), (" \n\n", "list of prompts is empty")])
def test_an_empty_list_is_refused(comfy, clip, text, words):
    with says(ValueError, words):
        comfy("PPAPPromptList", clip=clip, text=text)


def test_a_checkpoint_without_text_encoder_is_refused(comfy):
    with says(ValueError, "no text encoder"):
        comfy("PPAPPromptList", clip=None, text="a star")


def test_a_schedule_of_hooks_is_refused(comfy, clip):
    from comfy.hooks import HookKeyframe, HookKeyframeGroup, create_hook_lora
    keyframes = HookKeyframeGroup()
    for strength, start in ((1.0, 0.0), (0.5, 0.5)):
        keyframes.add(HookKeyframe(strength, start))
    hooks = create_hook_lora({"x": torch.zeros(1)}, 1.0, 1.0)
    hooks.set_keyframes_on_hooks(keyframes)
    scheduled = clip.clone()
    scheduled.apply_hooks_to_conds, scheduled.use_clip_schedule, scheduled.patcher.forced_hooks = hooks, True, hooks
    with says(ValueError, "1 prompts became 2 conditionings", "schedule of hooks"):
        comfy("PPAPPromptList", clip=scheduled, text="a star")
