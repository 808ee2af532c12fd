"""Build the archive that the registry would publish: the files that git tracks, less those that .comfyignore names."""
import subprocess
import sys
import zipfile
from pathlib import Path

from pathspec import GitIgnoreSpec

ROOT = Path(__file__).parents[1]
LARGEST = 45_000_000  # bytes, packed and unpacked


def published_files(root: Path = ROOT) -> list[str]:
    """Names of the files in the archive, relative to the root of the repository."""
    tracked = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True, check=True).stdout
    ignored = GitIgnoreSpec.from_lines((root / ".comfyignore").read_text().splitlines())
    return sorted(name for name in tracked.split("\0") if name and not ignored.match_file(name))


def build(archive: Path, root: Path = ROOT) -> tuple[int, int]:
    """Write the archive; its size in bytes, unpacked and packed."""
    names = published_files(root)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in names:
            file.write(root / name, name)
    return sum((root / name).stat().st_size for name in names), archive.stat().st_size


def main() -> None:
    archive = ROOT / "runs" / "archive.zip"
    unpacked, packed = build(archive)
    print(f"{archive.relative_to(ROOT)}: {packed / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked")
    if max(unpacked, packed) > LARGEST:
        sys.exit(f"The archive is too large: expected at most {LARGEST / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
