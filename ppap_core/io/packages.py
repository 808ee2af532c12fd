"""Packages that only some features need: what is said where one is missing, or does not go with another."""
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version


@contextmanager
def importing(package: str, purpose: str, requirement: str, beside: str = "torch", without: str = "") -> Iterator[None]:
    """Context manager for the import of a package: whatever that raises becomes an ImportError in words.

    A package that is not there is told from one that is, and that raises here, which installing it would not mend.

    purpose: what needs it, with its verb. requirement: what to install, such as "peft>=0.18".
    beside: a package that it is built on, and whose release may not go with it.
    without: what else can be done, as the end of the sentence; "": nothing.
    """
    try:
        yield
    except Exception as error:  # a package that does not fit raises whatever its first line raises
        words = f"{purpose} the package {package}{_failure(package, requirement, beside, error)}"
        raise ImportError(f"{words}; {without}" if without else words) from error


def _failure(package: str, requirement: str, beside: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f" ({said}): install it with 'pip install {requirement}'"
    update = package if beside == "torch" else f"{package} {beside}"  # ComfyUI's torch is made for the graphics card
    return (f", and {release(package)} is installed but cannot be imported with {release(beside)} ({said}): expected "
            f"releases that go together, such as those of 'pip install -U {update}'")


def release(package: str) -> str:
    """A package with its release, such as "timm 1.0.31"."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} of an unknown release"
