"""Where tests run: on the GPU if there is one, else kernels run in Triton's interpreter on the CPU."""

import os

import torch

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
