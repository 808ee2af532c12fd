"""Inputs that follow a choice, where a ComfyUI has them, and the same inputs side by side where it has not."""
from collections.abc import Iterator
from typing import Any

CHOICE = "COMFY_DYNAMICCOMBO_V3"


def expanded(inputs: dict[str, dict], order: dict[str, list[str]]) -> Iterator[tuple[str, Any, bool]]:
    """Name, specification and whether it is optional, of the inputs that /object_info tells.

    An input that others follow is a list of its options; the others come last, with its name and a dot before theirs.
    """
    followers: dict[str, Any] = {}
    for group in ("required", "optional"):
        for name in order.get(group, ()):
            kind, *more = inputs[group][name]
            if kind == CHOICE:
                options = more[0]["options"]
                keys = [option["key"] for option in options]
                followers |= {key: spec for chosen in keys for key, spec in following(name, options, chosen)}
                yield name, ("COMBO", {**more[0], "options": keys}), group == "optional"
            else:
                yield name, inputs[group][name], group == "optional"
    yield from ((name, spec, True) for name, spec in followers.items())


def following(name: str, options: list[dict], chosen: str) -> list[tuple[str, Any]]:
    """The inputs that follow a choice: their names, with that of the choice and a dot before, and their specifications."""
    [option] = [option for option in options if option["key"] == chosen]
    return [(f"{name}.{key}", spec) for part in option["inputs"].values() for key, spec in part.items()]


def towards(name: str, **values: Any) -> dict:
    """The inputs of Steer for one choice, as the ComfyUI of this process hands them to a node."""
    from comfy_api.latest import io

    if hasattr(io, "DynamicCombo"):
        return {"towards": {"towards": name, **values}}
    return {"towards": name, **{f"towards.{key}": value for key, value in values.items()}}
