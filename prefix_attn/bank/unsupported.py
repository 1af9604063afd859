"""Families that are refused by name, and why, by model type.

Only what a run of the model on one token would not say by itself, or not in words that help.
"""

from __future__ import annotations

from typing import Any

from prefix_attn.errors import UnsupportedModel

_READS_IMAGES = (
    "its encoder reads an image; of encoder-decoder models only some take a prefix whose encoder reads text or sound"
)
_NEEDS_AN_IMAGE = "it does not run without an image; its {0} does: make a bank for model.{0}, and patch that"
_CODEBOOKS = (
    "its tokens are audio codes: a sequence takes a row of input for each codebook, but one of the cache, and all "
    "sequences of a batch share one list of positions, which prefixes of different lengths would part"
)
_DRAFTS = "it drafts for another model, whose keys and values it reads, and keeps none of its own"

#: A prefix has no place in them: there is no bank for such a model.
NO_PLACE = {
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _NEEDS_AN_IMAGE.format("language_model")),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet", "vision-encoder-decoder"), _READS_IMAGES),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFTS),
    **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), _CODEBOOKS),
    "blip": "its text decoder reads an image in every pass",
    "blt": (
        "most of it attends over patches of bytes, cut anew in every pass, and keeps no keys and values of them in a "
        "cache"
    ),
    "cpmant": (
        "it puts a soft prompt of its own in front of every sequence, in the place of a prefix, and leaves it out as "
        "soon as a cache holds anything"
    ),
    "diffusion_gemma": "it fills in a block of tokens at a time, in any order, instead of one after the other",
    "dory": (
        "it runs some layers several times in a pass, each time with keys of their own, which it keeps in layers that "
        "it adds to its cache"
    ),
    "git": "it takes what its cache holds in front of the text for an image, of a fixed number of tokens",
    "idefics": "its layers attend to an image in every pass",
    "kosmos-2": _NEEDS_AN_IMAGE.format("text_model") + " for texts without images",
    "llama4": "it attends in chunks, which do not say which of them a prefix belongs to",
    "minimax": (
        "transformers' cache for it takes the length of padding masks from its first layer, which keeps no keys, and "
        "loses the states of its linear layers when beams change places, so that there is no right result to equal"
    ),
    "pi0": "it writes the movements of a robot, and no text",
    "prophetnet": "behind a cache it takes one token at a time, so that no prompt fits behind a prefix",
    "t5gemma2": "its decoder attends to its own tokens and to the encoder's in one softmax, with one cache for both",
    "udop": "its biases depend on where on a page a token stands, and a prefix stands on none",
    "unlimited_ocr": (
        "its window slides over generated tokens only and hides nothing of the prompt, while the operation's window "
        "slides over a prefix and all tokens"
    ),
    "xlstm": "its layers keep states of their own and no keys and values",
    "xlm": "its padding masks are of the tokens of one pass and know none in a cache, where a prefix would be",
}

#: A bank can be made for them, but `patch` refuses the model.
NOT_PATCHED = {
    "recurrent_gemma": ("the family keeps its recurrent state in the model, so that a pass depends on the one before"),
}


def refuse_without_place(model: Any) -> None:
    """Raise `UnsupportedModel`, with the reason, for a family in which a prefix has no place."""
    reason = NO_PLACE.get(model.config.model_type)
    if reason is not None:
        raise UnsupportedModel(f"{type(model).__name__} ({model.config.model_type}): {reason}")


#: Families that continuous batching, also of the model unpatched, answers otherwise than ``generate``.
NOT_BATCHED = dict.fromkeys(
    ("hrm_text", "kosmos_2_5_text_model"), "transformers' continuous batching gives it other tokens than generate"
)
