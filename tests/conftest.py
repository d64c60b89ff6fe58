"""One thread: the tests' tensors are tiny, and sums are then the same on every machine's cores."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("project", derandomize=True, deadline=None)
settings.load_profile("project")
