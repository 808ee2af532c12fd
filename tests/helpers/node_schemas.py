"""The parts of the nodes that saved workflows depend on: ids, inputs in order, their types and ranges, outputs."""
from collections.abc import Callable
from typing import Any

from .dynamic import expanded

EQUAL = ("type", "optional", "default", "step", "round", "multiline", "control_after_generate")


def schemas_of(registered: dict[str, Any]) -> dict[str, dict]:
    """The schema of every node of the pack, as /object_info tells it, in the order in which files keep the widgets."""
    return {name: _schema(kind.GET_NODE_INFO_V1(), registered["KSampler"]) for name, kind in sorted(registered.items())
            if name.startswith("PPAP")}


def _schema(info: dict, sampler: Any) -> dict:
    inputs = [_input(name, spec, optional, sampler) for name, spec, optional in expanded(info["input"], info["input_order"])]
    return {"inputs": inputs, "outputs": list(info["output"]), "output_node": info["output_node"]}


def _input(name: str, spec: tuple, optional: bool, sampler: Any) -> dict:
    kind, *more = spec
    settings = dict(more[0]) if more else {}
    options = list(kind) if isinstance(kind, list) else settings.pop("options", None)
    stock = [part.get("options") if isinstance(part, dict) else part
             for part in sampler.INPUT_TYPES()["required"].get(name, ())]
    schema = {"name": name, "type": "COMBO" if isinstance(kind, list) else kind, "optional": optional}
    schema |= {key: settings[key] for key in ("min", "max", *EQUAL) if key in settings}
    if options is not None and options not in stock:  # ComfyUI's own samplers and schedulers are not the pack's
        schema["options"] = options
    return schema


def lost(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """Losses that would break workflows of the old nodes; empty where nodes have only grown."""
    return [loss for name, schema in old.items() for loss in _lost_of(name, schema, new.get(name))]


def _lost_of(name: str, old: dict, new: dict | None) -> list[str]:
    if new is None:
        return [f"the node {name} is gone"]
    names, now = ([slot["name"] for slot in schema["inputs"]] for schema in (old, new))
    losses = []
    if now[:len(names)] != names:
        losses.append(f"{name}: the inputs were {names} and are {now}, expected new ones at the end")
    losses += [f"{name}.{slot['name']}: new inputs must be optional" for slot in new["inputs"]
               if slot["name"] not in names and not slot["optional"]]
    if new["outputs"][:len(old["outputs"])] != old["outputs"]:
        losses.append(f"{name}: the outputs were {old['outputs']} and are {new['outputs']}, expected new ones at the end")
    if new["output_node"] != old["output_node"]:
        losses.append(f"{name}: output_node was {old['output_node']}")
    by_name = {slot["name"]: slot for slot in new["inputs"]}
    return losses + [f"{name}.{slot['name']}: {loss}" for slot in old["inputs"] if slot["name"] in by_name
                     for loss in _lost_of_input(slot, by_name[slot["name"]])]


def _lost_of_input(old: dict, new: dict) -> list[str]:
    equal = EQUAL if old["optional"] else [key for key in EQUAL if key != "default"]  # saved work has all required values
    losses = [f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in equal if old.get(key) != new.get(key)]
    bounds: dict[str, Callable] = {"min": float.__le__, "max": float.__ge__}
    losses += [f"{key} was {old[key]} and is {new[key]}" for key, allows in bounds.items()
               if key in old and key in new and not allows(float(new[key]), float(old[key]))]
    losses += [f"{key} {new[key]} is new" for key in bounds if key in new and key not in old]
    options = old.get("options", [])
    missing = [slot for slot in options if slot not in new.get("options", [])]
    losses += [f"the options {missing} are gone"] if missing else []
    if options and not missing and "default" not in old and new["options"][0] != options[0]:
        losses.append(f"the first option, which is the default, was {options[0]!r}")
    return losses
