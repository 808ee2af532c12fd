"""Fetch one network from the Hugging Face hub, only when asked to: its safetensors and the small files that say what it is.

Nothing that can hold code is fetched: no pickles, no Python.
"""
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Report = Callable[[int, int], None]
"""(bytes done, bytes in all), after every piece; may raise to stop."""

WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors"  # what loaders read; anything in safetensors where there is none of it
BESIDE = {"config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json",
          "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model"}
SMALLEST, LARGEST = 2**20, 2**26  # bytes of a piece; a piece should take about a second


def folder_name(repo: str) -> str:
    """owner/name -> owner--name, for a folder. ValueError for anything else."""
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo, re.ASCII) or ".." in repo or "--" in repo:
        raise ValueError(f"'{repo}' is not the name of a network on the hub: expected owner/name, such as "
                         "timm/resnet18.a1_in1k; copy it from the head of the network's page")
    return repo.replace("/", "--")


def wanted(names: list[str]) -> list[str]:
    """Of a repository's files those to fetch. ValueError without a config.json or without safetensors."""
    weights = [name for name in names if re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII)]
    weights = [name for name in weights if re.fullmatch(WEIGHTS, name)] or weights
    if not weights:
        raise ValueError("no weights in safetensors, only such as can hold code or none at all: expected model.safetensors; "
                         "choose another network, or a copy of this one that has them")
    if "config.json" not in names:
        raise ValueError("no config.json, which says what network it is: expected one beside the weights; choose another "
                         "network")
    return sorted(BESIDE & set(names)) + sorted(weights)


def download(repo: str, folder: Path, report: Report, endpoint: str | None = None) -> Path:
    """Fetch owner/name from the hub into a folder, which appears when all of it is there. An existing folder is left alone.

    A download that was stopped goes on where it stopped. ImportError, ValueError or ConnectionError in words.
    """
    name = folder_name(repo)
    if folder.exists():
        return folder
    try:
        from huggingface_hub import HfApi, hf_hub_url
    except ImportError as error:
        raise ImportError(f"downloading needs the package huggingface_hub ({error}): install it with 'pip install "
                          f"huggingface_hub', or copy the files into {folder} by hand") from error
    with _in_words(repo):
        about = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=30)
    files = {each.rfilename: each for each in about.siblings}
    try:
        files = [files[name] for name in wanted(list(files))]
    except ValueError as error:
        raise ValueError(f"{repo} has {error}") from None
    part = folder.with_name(f".{name}")
    part.mkdir(parents=True, exist_ok=True)
    for file, done in _with_progress(files, part, report):
        url = hf_hub_url(repo, file.rfilename, revision=about.sha, endpoint=endpoint)
        _fetch(repo, url, part / file.rfilename, file, done)
    part.rename(folder)
    return folder


def _with_progress(files: list, part: Path, report: Report) -> Iterator[tuple]:
    """(file, its own progress report) of each file, once it is known that there is room for all."""
    total = sum(file.size for file in files)
    missing = total - sum(_size(part / file.rfilename) for file in files)
    if missing > (free := shutil.disk_usage(part).free):
        raise ValueError(f"{missing / 1e9:.1f} GB are to be downloaded but {free / 1e9:.1f} GB are free in {part.parent}: "
                         "make room, or name another place for ppap_guiders in extra_model_paths.yaml")
    before = 0
    for file in files:
        yield file, lambda done, before=before: report(before + done, total)
        before += file.size


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch(repo: str, url: str, path: Path, file, report: Callable[[int], None]) -> None:
    """Piece by piece into a file, from where it ends."""
    size = SMALLEST
    path.touch()
    report(_size(path))
    while (done := _size(path)) < file.size:
        started = time.monotonic()
        with _in_words(repo):
            piece, whole = _get(url, done, min(size, file.size - done))
        with path.open("wb" if whole else "ab") as out:
            out.write(piece)
        report(_size(path))
        size = min(2 * size, LARGEST) if time.monotonic() - started < 1 else max(size // 2, SMALLEST)
    if not _intact(path, file):
        path.unlink()
        raise ValueError(f"{path.name} of {repo} did not arrive as it is on the hub: queue it again")


def _get(url: str, start: int, count: int) -> tuple[bytes, bool]:
    """Bytes of a file from `start` on; or all of it, and True, from a server that knows no ranges."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    headers = build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    response = http_backoff("GET", url, headers=headers, timeout=30, max_retries=2)
    hf_raise_for_status(response)
    return response.content, response.status_code == 200


def _intact(path: Path, file) -> bool:
    """Whether a file is what the hub says it is: by SHA-256 for large ones, by git's own hash for the others."""
    expected = file.lfs.sha256 if file.lfs else file.blob_id
    hashed = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {_size(path)}\0".encode(), usedforsecurity=False)
    with path.open("rb") as read:
        while piece := read.read(2**20):
            hashed.update(piece)
    return hashed.hexdigest() == expected


@contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{repo} is given only to those who accepted its terms: accept them on "
                         f"https://huggingface.co/{repo} and log in with 'hf auth login'") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no network {repo} that you may see: check the name; for a private one log in with "
                         "'hf auth login'") from error
    except Exception as error:  # each version of the client has another HTTP library with errors of its own
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(f"{repo} cannot be downloaded ({said}): check the connection and queue it again, it goes on "
                              "where it stopped") from error
