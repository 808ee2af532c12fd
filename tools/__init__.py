"""Commands of a contributor, run by `make`; not in what is published."""
