"""Lengths of a distillation that need no numbers."""
from dataclasses import replace
from typing import Any

from .lesson import DistillConfig

AS_SET = "as set"
PRESETS: dict[str, dict[str, Any]] = {
    AS_SET: {},
    "as set, fast": {"fast": True},
    "quick look": {"steps": 300, "fast": True, "varied": True},
    "good": {"steps": 1000, "patience": 3, "fast": True, "varied": True},
    "thorough": {"steps": 4000, "patience": 6, "fast": True, "varied": True},
}
"""Name -> fields of a `DistillConfig`."""


def with_preset(config: DistillConfig, name: str) -> DistillConfig:
    """The training of an expert with the length of a preset; "as set" changes nothing. ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset '{name}': expected one of {', '.join(PRESETS)}")
    return replace(config, **PRESETS[name])
