"""Tiny random models, random prefixes, and everything a bank shows, as values to compare."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank import Geometry, PrefixBank

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GQA = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "mistral": {**GQA, "sliding_window": 8},
    "gpt2": {},
    "gemma3_text": {**GQA, "head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {
        **GQA, "head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "sliding_window": 8,
    },
}  # fmt: skip


def tiny(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of two layers, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES.get(family, {}), **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def random_kv(geometry: Geometry, tokens: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(heads, tokens, dim, generator=rng), torch.randn(heads, tokens, dim, generator=rng))
        for heads, dim, _ in geometry.layers
    ]


def read(bank: PrefixBank, name: str) -> list[tuple[Tensor, Tensor]]:
    """A task's keys and values, as a model would find them."""
    (task,) = bank.task_ids([name]).tolist()
    result = []
    for i in range(bank.num_layers):
        prefix = bank.layer(i)
        start, length = prefix.spans[task]
        result.append((prefix.k[:, start : start + length], prefix.v[:, start : start + length]))
    return result


def bits(key_values: list[tuple[Tensor, Tensor]]) -> list[bytes]:
    return [x.detach().contiguous().view(torch.uint8).numpy().tobytes() for pair in key_values for x in pair]


def same_bits(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return bits(a) == bits(b)


def state(bank: PrefixBank) -> tuple[Any, ...]:
    """All that can be seen of a bank."""
    return (
        bank.names,
        bank.lengths,
        bank.lens.tolist(),
        {name: bank.task_ids([name]).item() for name in bank.names},
        {name: bits(read(bank, name)) for name in bank.names},
        bank.memory_usage,
        repr(bank),
    )


def quiet_peft() -> None:
    """Let through what PEFT and transformers warn about each other; tests otherwise turn warnings into errors."""
    # PEFT 0.21 still asks models for `is_gradient_checkpointing`, which transformers 5.23 renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def prefix_tuned(model: Any, tokens: int = 5, projection: bool = False) -> Any:
    """The model with a random PEFT prefix."""
    import peft

    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=tokens, prefix_projection=projection, encoder_hidden_size=12
    )
    torch.manual_seed(tokens)
    return peft.get_peft_model(model, config)
