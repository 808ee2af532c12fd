"""Fetch one network from the Hugging Face hub: its safetensors and the small files that describe it.

Nothing that can hold code is fetched: no pickles, no Python. huggingface_hub is imported when a download starts.
"""
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

Report = Callable[[int, int], None]
"""(bytes done, bytes in all), after every piece; may raise to stop."""

WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors"  # the files that loaders read; without any, every safetensors file is fetched
DESCRIPTIONS = {
    "config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model"}
PIECE_SIZE = 2**24  # bytes in one request: the most that a stopped download loses


class HubFile(NamedTuple):
    """A file on the hub, with the hash that its content has there."""

    name: str
    size: int
    sha256: str | None   # of large files
    git_hash: str | None  # of all others


def folder_name(repo: str) -> str:
    """owner/name -> owner--name, the folder of a network. ValueError for anything else."""
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo, re.ASCII) or ".." in repo or "--" in repo:
        raise ValueError(f"'{repo}' is not the name of a network on the hub: expected owner/name, such as "
                         "timm/resnet18.a1_in1k; copy it from the head of the network's page")
    return repo.replace("/", "--")


def files_to_fetch(repo: str, names: Iterable[str]) -> list[str]:
    """Names of a repository's files that a loader reads. ValueError without a config.json or without safetensors."""
    names = list(names)
    weights = [name for name in names if re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII)]
    weights = [name for name in weights if re.fullmatch(WEIGHTS, name)] or weights
    if not weights:
        raise ValueError(f"{repo} has no weights in safetensors, only such as can hold code or none at all: expected "
                         "model.safetensors; choose another network, or a copy of this one that has them")
    if "config.json" not in names:
        raise ValueError(f"{repo} has no config.json, which says what network it is: expected one beside the weights; "
                         "choose another network")
    return sorted(DESCRIPTIONS & set(names)) + sorted(weights)


def download(repo: str, folder: Path, report: Report, endpoint: str | None = None) -> Path:
    """Fetch owner/name from the hub into a folder, which appears once it is complete; an existing folder is left alone.

    A stopped download resumes where it stopped. report: see `Report`. endpoint: address of the hub, None for the usual one.
    ImportError without huggingface_hub, ConnectionError when the hub cannot be reached, ValueError for everything else.
    """
    part = folder.with_name(f".{folder_name(repo)}")
    if folder.exists():
        return folder
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise ImportError(f"downloading needs the package huggingface_hub ({error}): install it with 'pip install "
                          f"huggingface_hub', or copy the files into {folder} by hand") from error
    revision, files = _list_files(repo, endpoint)
    part.mkdir(parents=True, exist_ok=True)
    total, done = sum(file.size for file in files), 0
    _require_space(part, total)
    hub = HfFileSystem(endpoint=endpoint, skip_instance_cache=True)
    for file in files:
        with _in_words(repo):
            remote = hub.open(f"{repo}/{file.name}", revision=revision, cache_type="none")
        _fetch_rest(remote, part / file.name, repo, partial(_report_file, report, done, total))
        _require_intact(part / file.name, file, repo)
        done += file.size
    part.rename(folder)
    return folder


def _list_files(repo: str, endpoint: str | None) -> tuple[str | None, list[HubFile]]:
    """Revision of a repository, and its files to fetch."""
    from huggingface_hub import HfApi

    with _in_words(repo):
        info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=30)
    files = {file.rfilename: HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
             for file in info.siblings or ()}
    return info.sha, [files[name] for name in files_to_fetch(repo, files)]


def _require_space(part: Path, total: int) -> None:
    missing, free = total - sum(path.stat().st_size for path in part.iterdir()), shutil.disk_usage(part).free
    if missing > free:
        raise ValueError(f"{missing / 1e9:.1f} GB are to be downloaded but {free / 1e9:.1f} GB are free in {part.parent}: "
                         "make room, or choose a folder on another disk")


def _report_file(report: Report, before: int, total: int, done: int) -> None:
    report(before + done, total)


def _fetch_rest(remote: IO[bytes], path: Path, repo: str, report: Callable[[int], None]) -> None:
    """Append to a file what it lacks of the remote one."""
    with path.open("ab") as out:
        remote.seek(out.tell())
        report(out.tell())
        while piece := _read_piece(remote, repo):
            out.write(piece)
            report(out.tell())


def _read_piece(remote: IO[bytes], repo: str) -> bytes:
    with _in_words(repo):
        return remote.read(PIECE_SIZE)


def _require_intact(path: Path, file: HubFile, repo: str) -> None:
    """Delete a file whose hash is not that on the hub, which no reader by pieces checks, and raise ValueError."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    with path.open("rb") as content:
        intact = sha_fileobj(content).hex() == file.sha256 if file.sha256 else git_hash(content.read()) == file.git_hash
    if not intact:
        path.unlink()
        raise ValueError(f"{path.name} of {repo} did not arrive as it is on the hub: download it again")


@contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """Turn errors of the hub's client into one sentence."""
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
        raise ConnectionError(f"{repo} cannot be downloaded ({said}): check the connection and try again, the download goes "
                              "on where it stopped") from error
