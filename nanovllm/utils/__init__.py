"""Devices, checkpoints, driver calls."""
