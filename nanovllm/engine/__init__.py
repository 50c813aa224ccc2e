"""Requests, scheduling, KV bookkeeping and the loop."""
