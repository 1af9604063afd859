"""Who is timed beside our kernels, one file each; see interface.py for what a peer must offer."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from .flash_attn import FlashAttnKvcache, FlashAttnVarlen, TorchVarlen
from .flashinfer import FlashInferCascade, FlashInferPlain
from .flex_attention import FlexAttention
from .gathered import Gathered
from .hugging_face import HuggingFace
from .interface import OwnKernel, Peer
from .ours import OneRegime, Ours, OursInPlace, OwnKeysOnly
from .peft import Peft
from .problem import Point, Problem
from .sdpa import SdpaReplica
from .sdpa_concatenated import SdpaConcatenated
from .sdpa_in_place import SdpaInPlace
from .shared_pages import SharedPages

__all__ = [
    "Gathered", "HuggingFace", "OneRegime", "Ours", "OursInPlace", "OwnKernel", "OwnKeysOnly", "Peer", "Peft", "Point",
    "Problem", "SdpaConcatenated", "SdpaInPlace", "SdpaReplica", "SharedPages", "all_peers", "cpu_peers",
]  # fmt: skip

#: Names that the summary looks for. Ours is timed twice: the difference is the noise of the run.
OURS, AGAIN, NO_PREFIX = "prefix_attn", "prefix_attn, again", "prefix_attn without prefix"
INVARIANT = "prefix_attn, batch_invariant"


def all_peers() -> list[Peer]:
    """Every provider on a GPU, ours first."""
    return [
        Ours(OURS, "triton"),
        Ours(AGAIN, "triton"),
        OwnKeysOnly(NO_PREFIX, "triton"),
        Ours(INVARIANT, "triton", batch_invariant=True),
        OneRegime("inline"),
        OneRegime("grouped"),
        Gathered(),
        SharedPages(),
        FlashInferPlain(),
        FlashInferCascade("fa2"),
        FlashInferCascade("auto"),
        TorchVarlen(),
        FlashAttnVarlen("flash_attn"),
        FlashAttnVarlen("flash_attn_interface"),
        FlashAttnKvcache("flash_attn"),
        FlashAttnKvcache("flash_attn_interface"),
        FlexAttention(),
        SdpaReplica(SDPBackend.FLASH_ATTENTION),
        SdpaReplica(SDPBackend.CUDNN_ATTENTION),
        SdpaReplica(SDPBackend.EFFICIENT_ATTENTION),
        SdpaConcatenated(),
        HuggingFace(),
        HuggingFace("eager"),
        Peft(),
    ]


def cpu_peers() -> list[Peer]:
    """Every provider on a CPU, ours first. There a step is timed: the newest keys are put into a cache, then read."""
    return [
        OursInPlace(OURS, "auto"),
        OursInPlace(AGAIN, "auto"),
        OwnKeysOnly(NO_PREFIX, "auto"),
        OursInPlace(INVARIANT, "auto", batch_invariant=True),
        SdpaInPlace(),
        SdpaConcatenated(),
        HuggingFace(),
        HuggingFace("eager"),
        Peft(),
    ]
