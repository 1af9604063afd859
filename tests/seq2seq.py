"""Tiny random encoder-decoder models, and random prefixes for every part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank import PrefixBank

T5_LIKE = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
#: Three layers in the encoder, two in the decoder.
BART_LIKE = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "forced_eos_token_id": None, "forced_bos_token_id": None,
}  # fmt: skip
#: model_type -> config arguments
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": T5_LIKE,
    "mt5": T5_LIKE | {"num_decoder_layers": 2},
    "umt5": T5_LIKE | {"num_decoder_layers": 2},
    "bart": BART_LIKE,
    "mbart": BART_LIKE | {"scale_embedding": True},
    "pegasus": BART_LIKE,
    "marian": BART_LIKE,
    "blenderbot": BART_LIKE,
    "blenderbot-small": BART_LIKE,
    "plbart": BART_LIKE,
    "whisper": BART_LIKE | {
        "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}  # fmt: skip


#: One of each kind.
SOME = ("t5", "bart", "pegasus", "whisper")


def tiny_seq2seq(family: str, **overrides: Any) -> Any:
    """A random model in float32, ready for inference; the same for the same arguments."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SEQ2SEQ[family] | overrides))
    auto = transformers.AutoModelForSpeechSeq2Seq if family == "whisper" else transformers.AutoModelForSeq2SeqLM
    # in transformers 5.17 umt5's sdpa forgets in prefill that the decoder is causal
    attention = {"attn_implementation": "eager"} if family == "umt5" else {}
    model = auto.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_positions" not in name:
                parameter.normal_(std=0.15)  # the default of 0.02 makes attention, and so every prefix, invisible
            if name.endswith("relative_attention_bias.weight"):
                parameter.normal_()
    return model


def random_parts(bank: PrefixBank, lengths: Mapping[str, int], seed: int = 0) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Random keys and values of ``lengths[part]`` tokens for each part named."""
    rng = torch.Generator().manual_seed(seed)
    return {
        part: [
            (torch.randn(layer.kv_heads, m, layer.head_dim, generator=rng),
             torch.randn(layer.kv_heads, m, layer.head_dim, generator=rng))
            for layer in bank.base.geometries[part].layers
        ]
        for part, m in lengths.items()
    }  # fmt: skip
