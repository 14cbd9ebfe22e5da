"""Benchmarks: pytest-benchmark suites and the results that were measured with them."""
