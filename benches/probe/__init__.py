"""The parts of ../gpu_probe.py."""
