"""Remakes the figures of the documentation: ``python -m benchmarks --help``. README.md lists the commands."""
