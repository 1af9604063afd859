"""The patch for Hugging Face models; `patching.py` tells how it works."""

from prefix_attn.hf.patching import patch, unpatch

__all__ = ["patch", "unpatch"]
