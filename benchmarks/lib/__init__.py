"""What the benchmarks share: command lines, loads, meters, ceilings of the hardware, reports."""
