"""Models of transformers from the config and the weights of a local folder, whatever release wrote them."""
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ...io.files import write_json
from ...io.packages import release
from .contents import read_config
from .labels import count_labels
from .offline import offline, settled
from .weights import Loaded, no_larger_than, read_weights, tensors_without_weights, unwrapped

log = logging.getLogger(__name__)


def load_model(folder: Path, architecture: str) -> Loaded:
    """The frozen model in a folder. Nothing is downloaded, only safetensors are read, no code of the folder is run.

    ImportError without a package that it needs; ValueError or FileNotFoundError for weights that do not fit.
    """
    config = settled(read_config(folder), folder.name)
    weights = read_weights(folder)
    try:
        with offline(), no_larger_than(weights):
            model, loading = _with_all_labels(architecture, _config(architecture, config), weights)
    except ImportError as error:  # a part of the network is of another package
        raise ImportError(f"{folder.name} needs a package that is missing, or that does not fit "
                          f"{release('transformers')}: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:  # each release and each architecture has errors of its own
        raise ValueError(f"{folder.name} cannot be loaded as {architecture} ({' '.join(str(error).split())[:300]}): "
                         "copy the folder again from the network's own page") from error
    wrong = _mismatched(loading)
    if wrong:
        raise ValueError(f"{misfit(folder, architecture)}: {len(wrong)} are of another shape than config.json says, such "
                         f"as {min(wrong)}; copy the folder again")
    _require_values(model, folder.name)
    model = model.float().eval().requires_grad_(False)
    _warn_of_unused(folder.name, weights, loading["unexpected_keys"])
    return Loaded(model, tensors_without_weights(model, loading["missing_keys"]))


def misfit(folder: Path, architecture: str) -> str:
    """How a sentence begins that refuses the weights of a folder."""
    return f"the weights in {folder.name} do not fit {architecture}"


def _config(architecture: str, config: Mapping[str, Any]) -> Any:
    import transformers

    kind = getattr(transformers, architecture).config_class
    config = {key: value for key, value in config.items() if key != "problem_type"}  # of losses only; some is refused
    with TemporaryDirectory() as place:  # only from a file is it read as the library reads it
        write_json(Path(place) / "config.json", config)
        return kind.from_pretrained(place, local_files_only=True)


def _with_all_labels(architecture: str, config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """`_filled` with as many labels as the weights have, where the names in the file are fewer or more."""
    model, loading = _filled(architecture, config, weights)
    own = model.state_dict()
    shapes = [(weights[key].shape, own[key].shape) for key in _mismatched(loading) if key in weights and key in own]
    count = count_labels(config.num_labels, shapes)
    if count == config.num_labels:
        return model, loading
    config.num_labels = count
    return _filled(architecture, config, weights)


def _mismatched(loading: Mapping[str, Any]) -> list[str]:
    return [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]


def _filled(architecture: str, config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """A model with its weights, and what the library says of how they fit: of all wrappers the one that fits best."""
    import transformers

    filled = []
    for layout in (weights, *unwrapped(weights)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what no file holds is the same each time
            filled.append(getattr(transformers, architecture).from_pretrained(
                None, config=config, state_dict=dict(layout), output_loading_info=True, ignore_mismatched_sizes=True))
        if not filled[-1][1]["missing_keys"]:
            break
    return min(filled, key=_count_missing)


def _require_values(model: nn.Module, name: str) -> None:
    """ValueError for a model that the library left with tensors on no device."""
    empty = [part for part, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(f"this release of transformers leaves {len(empty)} tensors of {name} without values, such as "
                         f"{empty[0]}: expected a network that it can load; another release may load it")


def _count_missing(filled: tuple[Any, dict[str, Any]]) -> int:
    return len(filled[1]["missing_keys"])


def _warn_of_unused(name: str, weights: Mapping[str, Tensor], unexpected: Collection[str]) -> None:
    unused = sorted(key for key in unexpected if key not in weights or weights[key].is_floating_point())
    if unused:
        log.warning("%s: the network that config.json describes has no place for %d of its weights, such as %s; it was "
                    "loaded without them", name, len(unused), unused[0])
