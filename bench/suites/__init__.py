"""The pytest-benchmark suites: `make bench`."""
