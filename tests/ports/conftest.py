"""The stand-in that verl loads has no doctests, and verl may be absent."""

collect_ignore = ["verl_cpu.py"]
