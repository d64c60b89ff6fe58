"""The ports to libraries have no doctests, and their libraries may be absent."""

collect_ignore_glob = ["*_port.py", "verl_score.py"]
