"""Where tests run: on the GPU if there is one, else kernels run in Triton's interpreter on the CPU."""

import os

import torch

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

for size in ("COLUMNS", "LINES"):  # pytest-xdist sets them, and a console would keep to them
    os.environ.pop(size, None)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
