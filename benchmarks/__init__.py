"""Measurements against PyTorch, and compilation for TPUs: `python -m benchmarks NAME --help`."""
