"""Guiders from a folder or from the bundle: safetensors only, nothing is ever downloaded."""
from collections.abc import Callable
from pathlib import Path

from .files import read_json, read_safetensors
from .guider import Guider, IgnoreSigma, Preprocess


def load_timm(folder: Path) -> Guider:
    """A timm classifier saved with config.json and model.safetensors, as its model cards and `save_for_hf` write them."""
    try:
        import timm
        from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config
    except ImportError as error:
        raise ImportError(f"this guider needs the package timm ({error}): install it with 'pip install timm'") from error

    config = read_json(folder / "config.json")
    architecture = config.get("architecture")
    if not timm.is_model(architecture or ""):
        raise ValueError(f"timm {timm.__version__} knows no architecture {architecture!r} (from {folder.name}/config.json): "
                         "expected one of timm.list_models(); a newer timm may have it")
    net = timm.create_model(architecture, **{"num_classes": config.get("num_classes", 1000)} | config.get("model_args", {}))
    weights, _ = read_safetensors(folder / "model.safetensors")
    own = net.state_dict()
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"{folder.name}/model.safetensors does not fit {architecture}: {wrong[0]} is "
                         f"{tuple(weights[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}; copy the folder again")
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"{folder.name}/model.safetensors does not fit {architecture}: {len(missing)} weights are missing "
                         f"and {len(unexpected)} unexpected, such as {(missing + unexpected)[0]}; copy the folder again")
    data = resolve_data_config(config.get("pretrained_cfg", {}), model=net)
    labels = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if not labels:
        subset = infer_imagenet_subset(net)
        labels = _short(ImageNetInfo(subset).label_descriptions()) if subset else map(str, range(net.num_classes))
    preprocess = Preprocess(tuple(data["input_size"][1:]), data["mean"], data["std"], _mode(data["interpolation"]))
    return Guider(f"timm/{folder.name}", IgnoreSigma(net), preprocess, "class", tuple(labels))


def load_tinyworld(task: str) -> Guider:
    """The bundled tiny guider of a task."""
    from .tinyworld import load_guider

    return load_guider(task)


def _short(descriptions: list[str]) -> list[str]:
    """The first name of each class that no class before it has; 'crane 517' where there is none: without commas."""
    names: dict[str, str] = {}  # by what they are when case does not count: 'Cardigan' the dog, 'cardigan' the coat
    for index, description in enumerate(descriptions):
        choices = [*(part.strip() for part in description.split(",")), f"{description.split(',')[0]} {index}"]
        name = next(name for name in choices if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


def _mode(interpolation: str) -> str:
    return interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"


LOADERS: dict[str, Callable[[Path], Guider]] = {"architecture": load_timm}
"""Key of config.json that tells the library -> loader of a folder."""


def load_guider(folder: Path | str) -> Guider:
    """The guider in a folder, by what its config.json says. ValueError in words when no loader knows it."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for key, load in LOADERS.items():
        if key in config:
            return load(folder)
    raise ValueError(f"{folder.name}/config.json has the keys {', '.join(list(config)[:6])}: expected 'architecture' (timm)")
