"""Fetch one network from the Hugging Face hub, only when asked to: its safetensors and the small files that say what it is.

Nothing that can hold code is fetched: no pickles, no Python.
"""
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Report = Callable[[int, int], None]
"""(bytes done, bytes in all), after every piece; may raise to stop."""

WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors"  # what loaders read; anything in safetensors where there is none of it
BESIDE = {"config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json",
          "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model"}
PIECE = 2**24  # bytes that are asked for at once: what a stopped download loses at most


def folder_name(repo: str) -> str:
    """owner/name -> owner--name, for a folder. ValueError for anything else."""
    if not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", repo, re.ASCII) or ".." in repo or "--" in repo:
        raise ValueError(f"'{repo}' is not the name of a network on the hub: expected owner/name, such as "
                         "timm/resnet18.a1_in1k; copy it from the head of the network's page")
    return repo.replace("/", "--")


def wanted(repo: str, names: list[str]) -> list[str]:
    """Of a repository's files those to fetch. ValueError without a config.json or without safetensors."""
    weights = [name for name in names if re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII)]
    weights = [name for name in weights if re.fullmatch(WEIGHTS, name)] or weights
    if not weights:
        raise ValueError(f"{repo} has no weights in safetensors, only such as can hold code or none at all: expected "
                         "model.safetensors; choose another network, or a copy of this one that has them")
    if "config.json" not in names:
        raise ValueError(f"{repo} has no config.json, which says what network it is: expected one beside the weights; "
                         "choose another network")
    return sorted(BESIDE & set(names)) + sorted(weights)


def download(repo: str, folder: Path, report: Report, endpoint: str | None = None) -> Path:
    """Fetch owner/name from the hub into a folder, which appears when all of it is there. An existing folder is left alone.

    A download that was stopped goes on where it stopped. ImportError, ValueError or ConnectionError in words.
    """
    part = folder.with_name(f".{folder_name(repo)}")
    if folder.exists():
        return folder
    try:
        from huggingface_hub import HfApi, HfFileSystem
    except ImportError as error:
        raise ImportError(f"downloading needs the package huggingface_hub ({error}): install it with 'pip install "
                          f"huggingface_hub', or copy the files into {folder} by hand") from error
    with _in_words(repo):
        about = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=30)
    files = {each.rfilename: each for each in about.siblings}
    files = [files[name] for name in wanted(repo, list(files))]
    part.mkdir(parents=True, exist_ok=True)
    total, before = sum(file.size for file in files), 0
    missing = total - sum(path.stat().st_size for path in part.iterdir())
    if missing > (free := shutil.disk_usage(part).free):
        raise ValueError(f"{missing / 1e9:.1f} GB are to be downloaded but {free / 1e9:.1f} GB are free in {part.parent}: "
                         "make room, or name another place for ppap_guiders in extra_model_paths.yaml")
    hub = HfFileSystem(endpoint=endpoint, skip_instance_cache=True)
    for file in files:
        with _in_words(repo):
            remote = hub.open(f"{repo}/{file.rfilename}", revision=about.sha, cache_type="none")
        path, read = part / file.rfilename, _in_words(repo)(remote.read)
        with path.open("ab") as out:
            remote.seek(out.tell())
            report(before + out.tell(), total)
            while piece := read(PIECE):
                out.write(piece)
                report(before + out.tell(), total)
        if not _intact(path, file):
            path.unlink()
            raise ValueError(f"{path.name} of {repo} did not arrive as it is on the hub: queue it again")
        before += file.size
    part.rename(folder)
    return folder


def _intact(path: Path, file) -> bool:
    """Whether a file is what the hub says it is, which nothing checks that reads by pieces."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    with path.open("rb") as read:
        return sha_fileobj(read).hex() == file.lfs.sha256 if file.lfs else git_hash(read.read()) == file.blob_id


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
