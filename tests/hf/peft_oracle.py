"""PEFT's own prefix tuning, one task at a time: what the patched model must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model

import prefix_attn as pa
from tests.hf.families import geometry, random_prefix, tiny_model


def prefix_tuned(model: Any, m: int, seed: int) -> Any:
    """PEFT's model around ``model``, with a random prefix of m tokens to be trained."""
    layers, kv_heads, head_dim = geometry(model)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=m, num_layers=layers, token_dim=kv_heads * head_dim,
        num_attention_heads=kv_heads, num_transformer_submodules=1,
    )  # fmt: skip
    peft_model = get_peft_model(model, config)
    prefix = torch.stack([torch.stack(kv) for kv in random_prefix(model, m, seed)])  # [layers, 2, heads, m, D]
    with torch.no_grad():
        peft_model.prompt_encoder["default"].embedding.weight.copy_(prefix.permute(3, 0, 1, 2, 4).reshape(m, -1))
    return peft_model


def save_adapter(model: Any, path: Path, m: int, seed: int) -> None:
    """Write a PEFT prefix-tuning adapter of m tokens for ``model`` as PEFT itself saves it."""
    prefix_tuned(model, m, seed).save_pretrained(path)


class PeftOracle:
    """Adapters of several tasks on disk, and PEFT's generate for any one of them."""

    def __init__(self, family: str, folder: Path, lengths: dict[str, int]) -> None:
        self.family = family
        self.paths = {name: folder / name for name in lengths}
        for seed, (name, m) in enumerate(lengths.items()):
            save_adapter(tiny_model(family), self.paths[name], m, seed)
        self.models = {name: PeftModel.from_pretrained(tiny_model(family), path).eval()
                       for name, path in self.paths.items()}  # fmt: skip
        self.bare = tiny_model(family)

    def bank(self, model: Any) -> pa.PrefixBank:
        """A bank of all the tasks, loaded from what PEFT saved."""
        bank = pa.PrefixBank.for_model(model)
        for name, path in self.paths.items():
            bank.load(name, path)
        return bank

    def model(self, task: str | None) -> Any:
        """PEFT's model with the task's adapter; the bare model for None."""
        return self.bare if task is None else self.models[task]

    def base(self, task: str | None) -> Any:
        """The transformers model inside."""
        return self.bare if task is None else self.models[task].get_base_model()

    def generate(self, task: str | None, **kwargs: Any) -> Any:
        """Generate with the task's adapter alone."""
        return self.model(task).generate(**({"output_logits": True} | kwargs), return_dict_in_generate=True)

    def logits(self, task: str | None, **kwargs: Any) -> torch.Tensor:
        """Logits of one forward pass."""
        with torch.no_grad():
            return self.model(task)(**kwargs).logits
