"""Benchmarks that a user can run again on their own machine."""
