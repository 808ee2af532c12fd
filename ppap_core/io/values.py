"""Values of JSON files that come from strangers: what they are, and how they stand in a sentence."""
from reprlib import Repr
from typing import TypeGuard

MAX_NAME = 500   # characters
MAX_SHOWN = 400  # characters of a value in a sentence

_short = Repr()
_short.maxstring = _short.maxother = 200
_short.maxdict = _short.maxlist = 30
_short.maxlong = 30


def shown(value: object) -> str:
    """A value as Python writes it, but short and one line, whatever it is."""
    text = _short.repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN // 2]} ... {text[-MAX_SHOWN // 4:]}"


def bare(text: str) -> str:
    """A text from a file for a sentence: short, one line, without quotation marks."""
    return shown(text)[1:-1]


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300


def is_name(value: object) -> TypeGuard[str]:
    """Whether a value is a text that is not too long for a name."""
    return isinstance(value, str) and len(value) <= MAX_NAME


def is_whole(value: object, low: int, high: float) -> TypeGuard[int]:
    """Whether a value is a whole number in a range, ends included."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
