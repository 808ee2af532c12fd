"""Fetch one network from the Hugging Face hub: its safetensors and the small files that describe it.

Nothing that can hold code is fetched: no pickles, no Python. huggingface_hub is imported when a download starts.
"""
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ...io.packages import importing
from ...io.values import shown
from . import require_loadable
from .contents import HEAD, INDEX, WHOLE, require_config, weight_names

Report = Callable[[int, int], None]
"""(bytes done, bytes in all), after every piece; may raise to stop."""

DECIDING = {"config.json", "preprocessor_config.json", "processor_config.json", INDEX}
"""Small files that say whether a loader can load the network: fetched first."""
DESCRIPTIONS = DECIDING | {
    HEAD, "selected_tags.csv", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.model",
    "sentencepiece.bpe.model"}
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
        raise ValueError(f"{shown(repo)} is not the name of a network on the hub: expected owner/name, such as "
                         "timm/resnet18.a1_in1k; copy it from the head of the network's page")
    return repo.replace("/", "--")


def files_to_fetch(repo: str, names: Iterable[str]) -> list[str]:
    """Names of a repository's files that a loader reads. ValueError without a config.json or without safetensors."""
    names = set(names)
    with _as_value_error():
        weights = weight_names(repo, names)
    require_config(repo, names)
    described = DESCRIPTIONS & names - ({INDEX} if weights == [WHOLE] else set())
    return sorted(described) + weights


def download(repo: str, folder: Path, report: Report, endpoint: str | None = None) -> Path:
    """Fetch owner/name from the hub into a folder, which appears once it is complete; an existing folder is left alone.

    A stopped download resumes where it stopped. What no loader could load is refused before its weights are fetched.
    report: see `Report`. endpoint: address of the hub, None for the usual one. ImportError without huggingface_hub or the
    network's own library, ConnectionError when the hub cannot be reached, ValueError for everything else.
    """
    if folder.exists():
        return folder
    with importing("huggingface_hub", "downloading needs", "huggingface_hub", "transformers",
                   f"or copy the files into {folder} by hand"):
        from huggingface_hub import HfFileSystem
    part = folder.with_name(f".{folder_name(repo)}")
    listing = _list_files(repo, endpoint)
    part.mkdir(parents=True, exist_ok=True)
    _drop_others(part, {file.name for file in listing.files})
    _require_space(part, listing.total)
    fetch = _Fetch(HfFileSystem(endpoint=endpoint, skip_instance_cache=True), repo, listing, part, report)
    fetch.all(file for file in listing.files if file.name in DECIDING)
    _require_loadable(part, repo, listing)
    fetch.all(file for file in listing.files if file.name not in DECIDING)
    part.rename(folder)
    return folder


def _drop_others(part: Path, names: Collection[str]) -> None:
    """Delete what an earlier start fetched and this one would not, such as a second copy of the weights."""
    for file in part.iterdir():
        if file.name not in names:
            file.unlink()


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Say of a page of the hub as ValueError what a loader says of files that are not there."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error


def _require_loadable(part: Path, repo: str, listing: "Listing") -> None:
    """Ask the loaders, and leave none of the small files behind if they refuse."""
    try:
        with _as_value_error():
            require_loadable(part, {file.name for file in listing.files}, repo)
    except (ValueError, ImportError):
        for name in DECIDING:
            (part / name).unlink(missing_ok=True)
        if not any(part.iterdir()):
            part.rmdir()
        raise


class Listing(NamedTuple):
    """Files of a repository to fetch, at one revision."""

    revision: str | None
    files: list[HubFile]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)


class _Fetch:
    """Fetches files of one repository, and reports what is done of all of them."""

    def __init__(self, hub: Any, repo: str, listing: Listing, part: Path, report: Report):
        self.hub, self.repo, self.listing, self.part, self.report, self.done = hub, repo, listing, part, report, 0

    def all(self, files: Iterable[HubFile]) -> None:
        for file in files:
            with _in_words(self.repo):
                remote = self.hub.open(f"{self.repo}/{file.name}", revision=self.listing.revision, cache_type="none")
            _fetch_rest(remote, self.part / file.name, self.repo, self._report_file)
            _require_intact(self.part / file.name, file, self.repo)
            self.done += file.size

    def _report_file(self, done: int) -> None:
        self.report(self.done + done, self.listing.total)


def _list_files(repo: str, endpoint: str | None) -> Listing:
    from huggingface_hub import HfApi

    with _in_words(repo):
        info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=30)
    files = {file.rfilename: HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
             for file in info.siblings or ()}
    return Listing(info.sha, [files[name] for name in files_to_fetch(repo, files)])


def _require_space(part: Path, total: int) -> None:
    missing, free = total - sum(path.stat().st_size for path in part.iterdir()), shutil.disk_usage(part).free
    if missing > free:
        raise ValueError(f"{missing / 1e9:.1f} GB are to be downloaded but {free / 1e9:.1f} GB are free in {part.parent}: "
                         "make room, or choose a folder on another disk")


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
