"""The patch for Hugging Face models; `patching.py` tells how it works."""

from prefix_attn.hf.patching import patch, unpatch
from prefix_attn.hf.pipeline import TextGenerationPipeline

__all__ = ["TextGenerationPipeline", "patch", "unpatch"]
