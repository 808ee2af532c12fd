"""Lengths of a training that need no numbers."""
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ..training.finetune import FineTune
from .lesson import DistillConfig

Config = TypeVar("Config", DistillConfig, FineTune)
AS_SET = "as set"
PRESETS: dict[str, dict[str, Any]] = {
    AS_SET: {},
    "as set, fast": {"fast": True},
    "quick look": {"steps": 300, "fast": True, "varied": True},
    "good": {"steps": 1000, "patience": 3, "fast": True, "varied": True},
    "thorough": {"steps": 4000, "patience": 6, "fast": True, "varied": True},
}
"""Name -> fields of a `DistillConfig`."""

BAKING_PRESETS: dict[str, dict[str, Any]] = {
    AS_SET: {},
    "quick look": {"steps": 150, "rank": 16},
    "good": {"steps": 600, "rank": 16},
    "thorough": {"steps": 1500, "rank": 64},
}
"""Name -> fields of a `FineTune`, for baking guidance into a LoRA."""


def with_preset(config: Config, name: str, presets: Mapping[str, Mapping[str, Any]] = PRESETS) -> Config:
    """The training of an expert, or another one, with the length of a preset; "as set" changes nothing.

    presets: for this kind of training. ValueError for an unknown name.
    """
    if name not in presets:
        raise ValueError(f"there is no preset '{name}': expected one of {', '.join(presets)}")
    return replace(config, **presets[name])
