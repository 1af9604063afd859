"""Benchmarks. README.md lists the commands; the other modules are their parts."""
