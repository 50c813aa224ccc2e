"""Decisions: plain Python that returns small dataclasses. Imports no torch."""
