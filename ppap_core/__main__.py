"""ppap_core.__main__"""
from .cli import main

main()
