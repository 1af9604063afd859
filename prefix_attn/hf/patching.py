"""`patch` and `unpatch`: a transformers model that takes ``task_ids``.

The request's KV cache stays a plain transformers cache of the request's own tokens. The model gets

1. an attention function and a mask function under our name in transformers' registries (attention.py, masks.py), and
   its own copies of its config objects that select them: models that share a config are not touched;
2. hooks that take ``task_ids``, pass a `Batch` down to the attention layers, and add each row's prefix length to the
   positions (decoder.py), and on each attention layer a note of which prefix it reads (sources.py);
3. ``generate`` and ``prepare_inputs_for_generation`` that accept ``task_ids`` (generate.py), and ``generate_batch``,
   continuous batching with a task per request (continuous.py);
4. a mark on each cache of whose prefixes its tokens were computed with (caches.py).

Encoder-decoder models get the same for both their stacks, but for continuous batching (seq2seq.py). A family whose
attention cannot be replaced gets copies of the prefixes in its cache instead (replica.py). Called without ``task_ids``,
the hooks leave masks and attention to the implementation the model had before.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.forward import unwrap
from prefix_attn.bank.unsupported import NOT_PATCHED
from prefix_attn.errors import IncompatiblePrefix, PrefixAttnError, SlowModel, UnsupportedModel
from prefix_attn.hf.adapters import attach, detach, is_attached, is_wrapper
from prefix_attn.hf.attention import IMPLEMENTATION, Ambiguous
from prefix_attn.hf.configs import OURS
from prefix_attn.hf.decoder import DecoderPatch, decoder_of
from prefix_attn.hf.masks import check_implementation
from prefix_attn.hf.part_attention import PLACE
from prefix_attn.hf.replica import ReplicaPatch
from prefix_attn.hf.seq2seq import Seq2SeqPatch, refuse_seq2seq
from prefix_attn.hf.sources import SOURCES
from prefix_attn.hf.wiring import PATCHED

Model = TypeVar("Model")


def patch(model: Model, bank: PrefixBank, verify: bool = False) -> Model:
    """Let ``model(...)`` and ``model.generate(...)`` take ``task_ids``; reversible by `unpatch`, idempotent.

    Args:
        model: a transformers model that uses the attention interface; changed in place. Or a PEFT model around one,
            with LoRA or other adapters of its weights: give it, not the model inside, if you call it.
        bank: prefixes made for this model; a model already patched gets this bank instead.
        verify: before returning, compare each task's logits for a few tokens with those of the family's eager
            attention over a copy of the prefix. (A decoder-only model is always compared with a short text as prefix.)

    Returns:
        The same model. ``task_ids`` is one name, id or None per row, or an integer tensor ``[batch]`` (-1: no prefix).

    Raises:
        UnsupportedModel: the result would not be exact for this family, or verification found a difference.
        IncompatiblePrefix: the bank was made for another model.
    """
    if is_wrapper(model):
        already = is_attached(model)
        attach(model)
        try:
            patch(unwrap(model), bank, verify)
        except BaseException:
            if not already:
                detach(model)
            raise
        return model
    _refuse(model)
    if not isinstance(bank, PrefixBank):
        raise IncompatiblePrefix(f"bank: expected a PrefixBank (PrefixBank.for_model), got {type(bank).__name__}")
    bank.check_model(model)
    before = getattr(model, PATCHED, None)
    unpatch(model)
    try:
        _refuse_shared_layers(model)
        with _uncompiled(model):
            state = _apply(model, bank)
            if verify:
                if not len(bank):
                    raise PrefixAttnError("verify: expected a bank with at least one task; add one, or leave it out")
                state.verify(model)
    except BaseException:
        unpatch(model)
        if before is not None:
            _apply(model, before.bank)
        raise
    return model


def _uncompiled(model: Any) -> AbstractContextManager[Any]:
    """A model that is compiled as if it were not: the patch looks into its passes."""
    compiled = any(
        module._compiled_call_impl is not None
        or hasattr(module, "_orig_mod")
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


_State = DecoderPatch | ReplicaPatch | Seq2SeqPatch


def _apply(model: Any, bank: PrefixBank) -> _State:
    """Patch in the fast way; where that is refused, in the slow one."""
    if model.config.is_encoder_decoder:
        return _checked(model, Seq2SeqPatch(model, bank))
    try:
        return _checked(model, DecoderPatch(model, bank))
    except Ambiguous:
        raise
    except UnsupportedModel as refusal:
        unpatch(model)
        try:
            state = _checked(model, ReplicaPatch(model, bank, decoder_of(model)))
        except UnsupportedModel as slow:
            raise UnsupportedModel(f"{refusal}; and with a copy of the prefix in its cache: {slow}") from refusal
        warnings.warn(
            f"served in the slow way, with a copy of the prefix in every row's cache: {refusal}",
            SlowModel,
            stacklevel=3,
        )
        return state


def _checked(model: Any, state: _State) -> _State:
    setattr(model, PATCHED, state)
    state.check(model)
    return state


def unpatch(model: Model) -> Model:
    """Undo `patch`; a model that is not patched is left as it is. Returns the model."""
    if is_wrapper(model):
        detach(model)
        unpatch(unwrap(model))
        return model
    state = vars(model).pop(PATCHED, None)
    if state is not None:
        state.remove(model)
    return model


def layers_read_the_bank(model: Any) -> bool:
    """Whether every attention layer of a patched decoder-only model reads the bank's own tensors, as gradients must.

    Not so where a prefix is copied into a cache, or where layers make their keys of what the bank holds.
    """
    state: _State = model.__dict__[PATCHED]
    if not isinstance(state, DecoderPatch):
        return False
    assert state.hook.sources is not None, "the patch has been checked"
    return not state.hook.sources.derives


def _refuse_shared_layers(model: Any) -> None:
    """Raise `UnsupportedModel` for a model, not patched itself, with layers of one that is."""
    for name, module in model.named_modules():
        if PLACE in module.__dict__ or SOURCES in module.__dict__:
            raise UnsupportedModel(
                f"{type(model).__name__}: shares {name} with another patched model, whose prefixes its layers would "
                "read; unpatch that one, or patch a copy (copy.deepcopy)"
            )


def _refuse(model: Any) -> None:
    """Raise `UnsupportedModel`, naming the family and the reason, for a model the patch cannot be exact for."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    config: Any = model.config.get_text_config()
    family = f"{type(model).__name__} ({config.model_type})"
    if PATCHED not in vars(model) and (model.config._attn_implementation or "").startswith(OURS):
        raise UnsupportedModel(
            f"{family}: was made from a patched model's config; call set_attn_implementation('sdpa') on it first"
        )
    if model.config.is_encoder_decoder:
        refuse_seq2seq(model)
        return
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModel(
            f"{family}: the family uses chunked attention, whose chunks do not say which of them a prefix belongs to"
        )
    if config.model_type in NOT_PATCHED:
        raise UnsupportedModel(f"{family}: {NOT_PATCHED[config.model_type]}")
    if not model.can_generate():
        raise UnsupportedModel(
            f"{family}: expected a causal language model with generate, such as AutoModelForCausalLM"
        )
    check_implementation(family, decoder_of(model), IMPLEMENTATION)
