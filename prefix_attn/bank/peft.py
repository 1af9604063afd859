"""Prefix tuning and cartridges of PEFT: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT stores one tensor ``prompt_embeddings [m, layers * 2 * kv_heads * head_dim]`` (also with ``prefix_projection``: its
MLP is run at save time) and reads it as ``view(m, layers, 2, kv_heads, head_dim)``. A cartridge is stored and read in
the same way; which of its tokens were frozen matters to training only. PEFT itself is not needed here.

In an encoder-decoder model only the decoder's self-attention gets a prefix, and layer i reads slot ``2 i mod layers``:
get_prompt repeats the slots, ``cat([p, p])``, and hands every layer four tensors, of which the cache keeps two.

Source: get_prompt in peft/peft_model.py; prefix tuning, arXiv:2101.00190; cartridges, arXiv:2506.06266.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank.base import Base
from prefix_attn.bank.format import CONVERT, PICKLE_SUFFIXES, Provenance, portable_name, read_json, read_safetensors
from prefix_attn.bank.geometry import LayerKV
from prefix_attn.bank.hub import local_folder, name_of
from prefix_attn.errors import IncompatiblePrefix

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
KEY = "prompt_embeddings"
#: The kinds of adapters that are keys and values for every layer.
KINDS = ("PREFIX_TUNING", "CARTRIDGE")
#: Models whose layers differ in shape; PEFT makes the widest and cuts it down to each layer for these only.
SLICED = "gemma4"


def local_adapter(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of an adapter, or what else is at a path on this machine; see `hub.local_folder`."""
    return local_folder(path, CONFIG, lambda folder: [WEIGHTS], revision)


def read_adapter(folder: Path, base: Base) -> tuple[list[LayerKV], Provenance]:
    """Read a prefix-tuning adapter.

    Returns:
        Per layer of the decoder k and v, each ``[kv_heads, m, head_dim]`` (on the CPU), and the source.

    Raises:
        IncompatiblePrefix: another kind of adapter, one of a decoder-only model for an encoder-decoder one or the other
            way round, one that also changes weights, a pickle, or sizes that disagree with the model.

    Warns:
        UserWarning: the adapter names another base model (PEFT records no fingerprint, so this is all that is known).
    """
    config = read_json(folder / CONFIG)
    sizes = _check_config(config, base, folder / CONFIG)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
        found = f"only the pickle {pickles[0]}, which can run code; {CONVERT}" if pickles else "no such file"
        raise IncompatiblePrefix(f"{folder}: expected {WEIGHTS}, got {found}")
    tensors, _ = read_safetensors(weights)
    if tensors.keys() != {KEY}:
        raise IncompatiblePrefix(
            f"{weights}: expected the tensor {KEY} alone, got {sorted(tensors)[:4]}; a bank "
            "cannot keep weights that an adapter changes besides its prefix (modules_to_save)"
        )
    key_values = _split(tensors[KEY], sizes, base, folder)
    if doubt := other_base(folder, base):
        warnings.warn(doubt, stacklevel=3)
    return key_values, Provenance(f"peft:{name_of(folder)}", str(config.get("peft_version") or ""))


def _check_config(config: dict[str, Any], base: Base, path: Path) -> tuple[int, int, int, int]:
    """m, layers, kv_heads, head_dim of the adapter."""
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise IncompatiblePrefix(
            f"{path}: expected peft_type {' or '.join(KINDS)}, got {kind}; they alone are keys and values of all layers"
        )
    submodules = config.get("num_transformer_submodules") or (2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1)
    expected = len(base.geometries) > 1
    if (submodules == 2) != expected:
        kinds = ("a decoder-only", "an encoder-decoder")
        raise IncompatiblePrefix(
            f"{path}: expected an adapter of {kinds[expected]} model, got one of {kinds[not expected]} model "
            f"(num_transformer_submodules {submodules})"
        )
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    sizes = [config.get(name) for name in names]
    for name, size in zip(names, sizes, strict=True):
        if type(size) is not int or size < 1:
            raise IncompatiblePrefix(f"{path}: expected {name} to be a positive integer, got {size!r}")
    tokens, layers, heads, width = (int(size) for size in sizes if size is not None)
    ours = len(base.geometry.layers)  # PEFT counts the encoder's layers; a shorter decoder leaves the last ones unused
    if width % heads or not (ours <= layers if expected else ours == layers):
        raise IncompatiblePrefix(
            f"{path}: expected an adapter for {base.geometry}, got {layers} layers of {heads} "
            f"heads of {width / heads:g}; it was trained on another model"
        )
    return tokens, layers, heads, width // heads


def _split(prompt: Tensor, sizes: tuple[int, int, int, int], base: Base, folder: Path) -> list[LayerKV]:
    """``[m, layers * 2 * heads * head_dim]`` to per-layer k and v as PEFT's get_prompt does."""
    tokens, layers, heads, head_dim = sizes
    expected = [tokens, layers * 2 * heads * head_dim]
    if list(prompt.shape) != expected:
        raise IncompatiblePrefix(
            f"{folder / WEIGHTS}: expected {KEY} of shape [m, layers * 2 * heads * head_dim] = {expected} "
            f"as {CONFIG} says, got {list(prompt.shape)}; the files do not belong together"
        )
    split = prompt.view(tokens, layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)  # [layers, 2, heads, m, head_dim]
    if len(base.geometries) > 1:
        split = split[torch.arange(layers) * 2 % layers]
    key_values = []
    for i, layer in enumerate(base.geometry.layers):
        fits = layer == (heads, head_dim, head_dim)
        sliceable = SLICED in base.model_type and layer.kv_heads <= heads and layer.width <= head_dim
        if layer.kv_heads and not fits and not sliceable:
            raise IncompatiblePrefix(
                f"{folder / CONFIG}: expected {layer} in layer {i} "
                f"(the model has {base.geometry}), got {heads} heads of {head_dim}"
            )
        k, v = split[i, :, : layer.kv_heads, :, : layer.head_dim]
        key_values.append((k, v))
    return key_values


def other_base(path: Path, base: Base) -> str | None:
    """What is to be said of an adapter that names another base model; None for others, and for what is no adapter."""
    recorded = read_json(path / CONFIG).get("base_model_name_or_path") if (path / CONFIG).is_file() else None
    if not isinstance(recorded, str) or not recorded or not base.name:
        return None
    theirs, ours = (portable_name(name) for name in (recorded, base.name))
    if theirs.rstrip("/").rpartition("/")[2] == ours.rstrip("/").rpartition("/")[2]:
        return None
    return (
        f"{path}: this adapter was trained on {theirs!r}, the bank's base model is {ours!r}; with other weights its "
        "results will be poor"
    )
