"""Workflows that tell one story each, on the bundled models, as functions of the page that they fill."""
