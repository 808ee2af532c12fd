"""The command `ppap` as python -m ppap_core."""
from .cli import main

main()
