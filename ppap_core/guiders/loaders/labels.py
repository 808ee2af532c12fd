"""What the outputs of a classifier are, and the names of its classes, from the files of its folder."""
import csv
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..guider import short_labels

log = logging.getLogger(__name__)

TAGS_FILE = "selected_tags.csv"
"""Names of the outputs of a tagger, a row for each in their order, in a column `name`."""
PROBLEMS = {"multi.?label": "tags", "regression": "number"}
"""Patterns of `problem_type` in config.json, of which transformers defines the values -> the task that they mean."""
CODE = r"[nN]\d{4,}|/\w/\w+|Q?\d+"  # of a class in WordNet, OpenImages, Wikidata or a list, which tells nobody what it is
IMAGENET_1K = r"in1k|ilsvrc|imagenet(?!.?(12|2\d))"  # in the name of a data set, or in the tag of weights


class Head(NamedTuple):
    """What the outputs (B, K) of a network are."""

    task: str
    labels: tuple[str, ...]


def read_head(folder: Path, count: int, problem_type: str | None, names: object, descriptions: object = None) -> Head:
    """Task of a network with `count` outputs: independent tags, numbers, or classes of which one is true; and their names.

    problem_type: what config.json says of it; None: one output is a number, several are classes, or tags where a table
    names them. names, descriptions: see `class_labels`. ValueError for a damaged table of tags.
    """
    task = "number" if count == 1 else "class"
    if (folder / TAGS_FILE).exists():
        task, names = "tags", tag_names(folder / TAGS_FILE)
    task = next((meant for pattern, meant in PROBLEMS.items() if re.search(pattern, str(problem_type), re.I)), task)
    if task == "number" and count == 1:
        return Head(task, ())
    return Head(task, class_labels(folder.name, count, names, descriptions))


def count_labels(named: int, shapes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Outputs of a network by its weights, where config.json names another number of them.

    shapes: of each tensor that does not fit, in the file and in the network for `named` labels. The heads tell: all have as
    many rows more or less. Else the number stays as it is.
    """
    more = {saved[0] - own[0] for saved, own in shapes if saved and own and saved[1:] == own[1:]}
    fits = len(more) == 1 and all(len(saved) == len(own) and saved[1:] == own[1:] for saved, own in shapes)
    return max(named + more.pop(), 1) if fits else named


def class_labels(folder: str, count: int, names: object, descriptions: object = None) -> tuple[str, ...]:
    """Unique short labels of `count` classes from names in any form that config files have; numbers where there are none.

    names: a sequence in the order of the classes, {class: name} or {name: class}, or None. descriptions: {name: words}, used
    where the names are codes; or names themselves where there are no others. The log says what is missing or does not fit.
    """
    named = _by_class(names, count) or _by_class(descriptions, count)
    if all(name == f"LABEL_{index}" for index, name in named.items()):  # those that transformers makes up
        named = {}
    if isinstance(names, (list, tuple)) and len(names) != count:  # of another network, or shifted: nobody knows
        log.warning("%s answers with %d classes but its files name %d, so no name is trusted: aim it at numbers", folder,
                    count, len(names))
        return tuple(map(str, range(count)))
    _warn(folder, count, named)
    if isinstance(descriptions, Mapping) and all(re.fullmatch(CODE, name) for name in named.values()):
        named = {index: _text(descriptions.get(name, name)) for index, name in named.items()}
    return short_labels([named.get(index, str(index)) for index in range(count)])


def _warn(folder: str, count: int, named: Mapping[int, str]) -> None:
    right = len(set(named) & set(range(count)))
    if not named:
        log.warning("%s has no names for its %d classes in its files: aim it at numbers", folder, count)
    elif right != count or len(named) != count:
        log.warning("%s answers with %d classes, and of the %d that its files name %d are among them: aim it at numbers "
                    "where a name is missing", folder, count, len(named), right)


def _by_class(names: object, count: int) -> dict[int, str]:
    """{class: name} of names in any form; empty where they do not say which class is which."""
    if isinstance(names, Mapping):
        orders = (names.items(), [(index, name) for name, index in names.items()])
        readings = [reading for order in orders if (reading := _by_index(order))]
        return min(readings, key=lambda reading: len(set(reading) - set(range(count))), default={})
    return _by_index(enumerate(names)) if isinstance(names, (list, tuple)) else {}


def _by_index(pairs: Iterable[tuple[object, object]]) -> dict[int, str]:
    """Names by number, without empty ones; empty if something else than a number is in its place."""
    named = [(str(index), name) for index, name in pairs]
    if not all(re.fullmatch(r"-?\d+", index) for index, _ in named):
        return {}
    return {int(index): _text(name) for index, name in named if name not in (None, "")}


def _text(name: object) -> str:
    """A name in words; synonyms are separated by commas."""
    return ", ".join(map(str, name)) if isinstance(name, list) else str(name)


def tag_names(file: Path) -> list[str]:
    """The names in a table of tags, in their order. ValueError in words for a file that is no such table."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as rows:
            return [row["name"] or "" for row in csv.DictReader(rows)]
    except (OSError, UnicodeDecodeError, csv.Error, KeyError) as error:
        raise ValueError(f"{file.parent.name}/{file.name} cannot be read ({type(error).__name__}: {error}): expected a "
                         "table with a column 'name'; copy it again from the network's own page") from error


def imagenet_labels(folder: str, said: Mapping[str, Any], count: int) -> list[str] | None:
    """Names and synonyms of ImageNet's classes; None unless the network was trained on it by number or by its files.

    said: all that config.json of a timm network says, on one level. There are many sets of 1000 classes, but few of 21843.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None or (count == 1000 and not _says_imagenet(folder, said)):
        return None
    return list(ImageNetInfo(subset).label_descriptions())


def _says_imagenet(folder: str, said: Mapping[str, Any]) -> bool:
    names = [said["dataset"]] if said.get("dataset") else [folder, *map(said.get, ("architecture", "tag", "hf_hub_id"))]
    last = [str(name).rpartition("/")[2].rpartition("_ft_")[2] for name in names]  # of several data sets the last one counts
    return any(re.search(IMAGENET_1K, name, re.IGNORECASE) for name in last)
