"""`patch` and `unpatch`: a transformers model that takes ``task_ids``.

The request's KV cache stays a plain transformers cache of the request's own tokens. The model gets

1. an attention function and a mask function under our name in transformers' registries (attention.py, masks.py), and
   its own copies of its config objects that select them: models that share a config are not touched;
2. a hook in front of its decoder that takes ``task_ids``, adds each row's prefix length to the positions, and passes
   a `Batch` down to the attention layers;
3. ``generate`` and ``prepare_inputs_for_generation`` that accept ``task_ids`` (generate.py).

Encoder-decoder models get the same for both their stacks (seq2seq.py). Called without ``task_ids``, the hooks leave
masks and attention to the implementation the model had before.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from prefix_attn.bank import PrefixBank
from prefix_attn.errors import UnsupportedModel
from prefix_attn.hf.adapters import attach, detach, is_wrapper, pop_task_ids
from prefix_attn.hf.attention import KEYWORD, NAME, Batch, prefix_attention_forward
from prefix_attn.hf.caches import check_tasks_of, remember_tasks
from prefix_attn.hf.configs import OwnConfigs
from prefix_attn.hf.continuous import GenerateBatch, InitContinuousBatching
from prefix_attn.hf.generate import Generate, PrepareInputs, checked_for_batch
from prefix_attn.hf.masks import request_mask, scope
from prefix_attn.hf.positions import shifted_positions
from prefix_attn.hf.seq2seq import Seq2SeqPatch, refuse_seq2seq
from prefix_attn.hf.verify import verify_against_replica
from prefix_attn.hf.verify_parts import verify_parts
from prefix_attn.hf.wiring import PROBE, Wired
from prefix_attn.plan import BatchPlan

_ATTRIBUTE = "_prefix_attn"


def patch(model: PreTrainedModel, bank: PrefixBank, verify: bool = False) -> PreTrainedModel:
    """Let ``model(...)`` and ``model.generate(...)`` take ``task_ids``; reversible by `unpatch`, idempotent.

    Args:
        model: a transformers model that uses the attention interface; changed in place. Or a PEFT model around one,
            with LoRA or other adapters of its weights: give it, not the model inside, if you call it.
        bank: prefixes made for this model; a model already patched gets this bank instead.
        verify: before returning, compare each task's logits for a few tokens with those of the family's eager
            attention over a copy of the prefix.

    Returns:
        The same model. ``task_ids`` is one name, id or None per row, or an integer tensor ``[batch]`` (-1: no prefix).

    Raises:
        UnsupportedModel: the result would not be exact for this family, or verification found a difference.
        IncompatiblePrefix: the bank was made for another model.
    """
    if is_wrapper(model):
        attach(model)
        try:
            patch(model.get_base_model(), bank, verify)
        except BaseException:
            detach(model)
            raise
        return model
    _refuse(model)
    bank.check_model(model)
    before = getattr(model, _ATTRIBUTE, None)
    unpatch(model)
    try:
        state = _apply(model, bank)
        if verify:
            if isinstance(state, Seq2SeqPatch):
                verify_parts(model, bank, state.configs)
            else:
                verify_against_replica(model, bank, state.hook)
    except BaseException:
        unpatch(model)
        if before is not None:
            _apply(model, before.bank)
        raise
    return model


def _apply(model: Any, bank: PrefixBank) -> _Patch | Seq2SeqPatch:
    state = Seq2SeqPatch(model, bank) if model.config.is_encoder_decoder else _Patch(model, bank)
    setattr(model, _ATTRIBUTE, state)
    state.check_wiring(model)
    return state


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `patch`; a model that is not patched is left as it is. Returns the model."""
    if is_wrapper(model):
        detach(model)
        unpatch(model.get_base_model())
        return model
    state = model.__dict__.pop(_ATTRIBUTE, None)
    if state is not None:
        state.remove(model)
    return model


class _Patch:
    """Everything one patched model got, and what it takes to give it back."""

    def __init__(self, model: Any, bank: PrefixBank) -> None:
        AttentionInterface.register(NAME, prefix_attention_forward)
        AttentionMaskInterface.register(NAME, request_mask)
        self.bank = bank
        implementation = model.get_decoder().config._attn_implementation
        self.configs = OwnConfigs(model)
        self.configs.select(model.get_decoder().modules(), NAME)
        self.hook = DecoderHook(bank, implementation)
        decoder = model.get_decoder()
        self.handles = [
            decoder.register_forward_pre_hook(self.hook, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(remember_tasks, with_kwargs=True),
        ]
        model.generate = Generate(model, bank)
        model.prepare_inputs_for_generation = PrepareInputs(model, implementation)
        model.generate_batch = GenerateBatch(model)
        model.init_continuous_batching = InitContinuousBatching(model, bank)

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        del model.generate, model.prepare_inputs_for_generation
        del model.generate_batch, model.init_continuous_batching
        self.configs.restore(model)

    def check_wiring(self, model: Any) -> None:
        """Make sure ``task_ids`` given to the model reach its decoder; the hook stops the pass on arrival."""
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), task_ids=PROBE)
        except Wired:
            return
        except TypeError:
            pass
        raise UnsupportedModel(f"{type(model).__name__}: its forward does not pass task_ids on to its decoder")


class DecoderHook:
    """Forward pre-hook of the decoder: turns ``task_ids`` into positions and a `Batch` for the layers below."""

    def __init__(self, bank: PrefixBank, implementation: str) -> None:
        self.bank = bank
        self.implementation = implementation

    def __call__(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if KEYWORD in kwargs:
            return args, kwargs  # continuous batching has prepared everything
        task_ids = pop_task_ids(kwargs)
        if task_ids is PROBE:
            raise Wired
        if task_ids is None:
            scope.implementation = self.implementation
            check_tasks_of(kwargs.get("past_key_values"), None)
            return args, kwargs | {KEYWORD: Batch(self.implementation)}
        scope.implementation = None
        if len(args) > 1:
            bound = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
            args, kwargs = (), bound | bound.pop("kwargs", {})
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        assert isinstance(inputs, Tensor), "transformers requires input_ids or inputs_embeds"
        ids = checked_for_batch(self.bank, task_ids, inputs.shape[0])
        check_tasks_of(kwargs.get("past_key_values"), ids)
        positions = shifted_positions(
            self.bank, ids, inputs, kwargs.get("position_ids"), kwargs.get("attention_mask"),
            kwargs.get("past_key_values"), decoder.config.model_type,
        )  # fmt: skip
        batch = Batch(self.implementation, self.bank, ids, BatchPlan(ids, self.bank.lens))
        return args, kwargs | {"position_ids": positions, KEYWORD: batch}


def _refuse(model: Any) -> None:
    """Raise `UnsupportedModel`, naming the family and the reason, for a model the patch cannot be exact for."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    config: Any = model.config.get_text_config()
    family = f"{type(model).__name__} ({config.model_type})"
    if model.config.is_encoder_decoder:
        refuse_seq2seq(model)
        return
    if not model._supports_attention_backend:
        raise UnsupportedModel(
            f"{family}: the family does not use transformers' attention interface, so its attention "
            "cannot be replaced; use PEFT's own inference"
        )
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise UnsupportedModel(
            f"{family}: the family uses chunked attention, whose chunks do not say which of them a prefix belongs to"
        )
    if not model.can_generate():
        raise UnsupportedModel(
            f"{family}: expected a causal language model with generate, such as AutoModelForCausalLM"
        )
    implementation = model.get_decoder().config._attn_implementation
    if implementation != NAME and implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModel(
            f"{family}: attn_implementation={implementation!r} has no mask function; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
