"""The patch for Hugging Face models; `patch.py` tells how it works."""

from prefix_attn.hf.patch import patch, unpatch

__all__ = ["patch", "unpatch"]
