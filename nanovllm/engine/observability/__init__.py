"""Metrics, the trace, and statistics of the decode pipeline."""
