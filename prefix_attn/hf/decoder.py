"""The patch of a decoder-only model: its hooks, and what it takes to give everything back."""

from __future__ import annotations

from inspect import Parameter
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import CACHE, OLD, cache_among, cache_name
from prefix_attn.bank.forward import FAILURES, device_of_inputs, evaluating
from prefix_attn.errors import UnsupportedModel
from prefix_attn.hf.adapters import pop_task_ids
from prefix_attn.hf.attention import (
    IMPLEMENTATION,
    KEYWORD,
    Ambiguous,
    Batch,
    KeywordsLost,
    prefix_attention_forward,
)
from prefix_attn.hf.caches import check_tasks_of, remember_tasks
from prefix_attn.hf.configs import OwnConfigs, check_config
from prefix_attn.hf.continuous import GenerateBatch, InitContinuousBatching
from prefix_attn.hf.generate import Generate, PrepareInputs, checked_for_batch
from prefix_attn.hf.masks import request_mask
from prefix_attn.hf.positions import hook_tables, shifted_positions, tables_of_positions, takes_positions
from prefix_attn.hf.scope import scope
from prefix_attn.hf.sources import NO_INTERFACE, Call, Sources
from prefix_attn.hf.verify import verify_a_text, verify_against_replica
from prefix_attn.hf.wiring import PROBE, Wired, named_arguments, parameters_of

# When this module is imported, so that a patched model which was pickled finds them in another process.
AttentionInterface.register(IMPLEMENTATION, prefix_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, request_mask)


class DecoderPatch:
    """Everything one patched model got, and what it takes to give it back."""

    def __init__(self, model: Any, bank: PrefixBank) -> None:
        self.bank = bank
        decoder = decoder_of(model)
        tables = tables_of_positions(decoder)
        self.counts_positions = not takes_positions(decoder)
        implementation = decoder.config._attn_implementation
        self.configs = OwnConfigs(model)
        self.configs.select(decoder.modules(), IMPLEMENTATION)
        self.hook = ModelHook(model, bank, implementation)
        body = model.base_model
        outermost = [body] if body is decoder else [body, decoder]  # some heads call the decoder inside the body
        self.handles = [
            module.register_forward_pre_hook(self.hook, with_kwargs=True, prepend=True) for module in outermost
        ]
        self.handles += [module.register_forward_hook(remember_tasks, with_kwargs=True) for module in outermost]
        self.handles.append(decoder.register_forward_pre_hook(PositionsHook(self.hook), with_kwargs=True))
        self.handles += hook_tables(tables)
        if self.hook.by_scope:
            self.leave_in_scope(model)
        model.generate = Generate(model, bank)
        model.prepare_inputs_for_generation = PrepareInputs(model, implementation)
        model.generate_batch = GenerateBatch(model)
        model.init_continuous_batching = InitContinuousBatching(model, bank)

    def leave_in_scope(self, model: Any) -> None:
        """For a model that loses keywords: the batch waits in the thread's scope until the pass ends."""
        self.hook.by_scope = True
        for module in {model.base_model, decoder_of(model)}:
            self.handles.append(module.register_forward_hook(_end_of_pass, always_call=True))

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        if self.hook.sources is not None:
            self.hook.sources.detach()
            self.hook.sources = None  # which holds the hook: the model goes with its last user, not with a collection
        del model.generate, model.prepare_inputs_for_generation
        del model.generate_batch, model.init_continuous_batching
        self.configs.restore(model)

    def check(self, model: Any) -> None:
        """Find out what each attention layer reads, and make sure that a text as a prefix is exact."""
        self._check_wiring(model)
        try:
            verify_a_text(model, self.hook)
        except KeywordsLost:
            self.leave_in_scope(model)
            verify_a_text(model, self.hook)
        assert self.hook.sources is not None
        self.configs.leave_others(model, [decoder_of(model), *self.hook.sources.sources])
        self._check_causal()

    def _check_causal(self) -> None:
        """Raise `Ambiguous` for layers that are causal by a mask alone, where there may be none."""
        assert self.hook.sources is not None
        modules = self.hook.sources.sources
        layers = {type(module).__name__ for module in modules if not getattr(module, "is_causal", True)}
        if layers and self.hook.implementation != "eager":
            raise Ambiguous(
                f"{', '.join(layers)}: looks at later tokens too where no mask keeps it from that, and only causal "
                "self-attention takes a prefix; with attn_implementation='eager' there is always a mask"
            )

    def verify(self, model: Any) -> None:
        verify_against_replica(model, self.bank, self.hook)

    def _check_wiring(self, model: Any) -> None:
        """Make sure ``task_ids`` given to the model reach its decoder; the hook stops the pass on arrival."""
        try:
            with torch.no_grad(), evaluating(model):
                model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device_of_inputs(model)), task_ids=PROBE)
        except Wired:
            return
        except KeywordsLost:
            pass  # the pass went on without tasks
        except FAILURES as error:
            raise UnsupportedModel(f"{type(model).__name__}: does not run on tokens alone ({error})") from error
        if not decoder_of(model)._can_set_attn_implementation():
            raise UnsupportedModel(f"{type(model).__name__}: {NO_INTERFACE}")
        raise UnsupportedModel(f"{type(model).__name__}: its forward does not pass task_ids on to its decoder")


def decoder_of(model: Any) -> Any:
    """The module with the layers of text: what has a language-model head beside it, or another sense."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


class ModelHook:
    """Forward pre-hook of the model below its head, and of its decoder: makes a `Batch` of ``task_ids`` for the layers.

    Attributes:
        strict: refuse unknown keywords of attention calls; while patching.
        by_scope: the model does not pass keywords on to its layers, so that the batch is left where they look for it.
    """

    def __init__(self, model: Any, bank: PrefixBank, implementation: str) -> None:
        self.model = model
        self.bank = bank
        self.implementation = implementation
        self.by_scope = not (_takes_keywords(model.base_model) and _takes_keywords(decoder_of(model)))
        self.cache = cache_name(model.base_model)
        self.sources: Sources | None = None
        self.strict = False

    def __call__(
        self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if KEYWORD in kwargs or (scope().batch is not None and body is not self.model.base_model):
            return args, kwargs  # prepared: by continuous batching, or by this hook further out
        scope().batch = None  # that of a pass which was interrupted may still be there
        task_ids = pop_task_ids(kwargs)
        if task_ids is PROBE:
            raise Wired
        if task_ids is None:
            scope().implementation, scope().positions = self.implementation, None
            if len(args) > 1:
                args, kwargs, _ = _by_name(body, args, kwargs)
            check_tasks_of(cache_among(kwargs), self.bank, None)
            return args, kwargs | self._passed_down(Batch(self.implementation, recorded=scope().recorded))
        args, kwargs, inputs = _by_name(body, args, kwargs)
        if self.cache != CACHE and kwargs.get(CACHE) is not None:
            raise UnsupportedModel(f"{CACHE}: {type(body).__name__} calls it {OLD}, and would ignore it; call it so")
        ids = checked_for_batch(self.bank, task_ids, inputs.shape[0])
        check_tasks_of(cache_among(kwargs), self.bank, ids)
        derived = self.sources.derived_from(self.bank) if self.sources is not None else []
        scope().implementation, scope().positions = None, None
        batch = Batch(
            self.implementation, self.bank, ids, self.bank.plans(ids), self.bank.layers_of_pass(ids),
            derived=tuple(derived), strict=self.strict,
        )  # fmt: skip
        return args, kwargs | self._passed_down(batch)

    def _passed_down(self, batch: Batch) -> dict[str, Batch]:
        scope().batch = batch if self.by_scope else None
        return {} if self.by_scope else {KEYWORD: batch}

    def record(self, cache: Any) -> list[Call]:
        """The attention calls of one token without tasks, behind a cache; see `Sources`."""
        tokens = torch.ones((1, 1), dtype=torch.long, device=device_of_inputs(self.model))
        mask = tokens.new_ones((1, cache.get_seq_length() + 1))
        positions = {}
        if takes_positions(self.model):
            # some families count by what they keep of the last sequence, when none are given
            positions["position_ids"] = torch.full_like(tokens, cache.get_seq_length())
        calls: list[Call] = []
        scope().recorded = calls
        try:
            named = {cache_name(self.model): cache}
            self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **named, **positions)
            return calls
        finally:
            scope().recorded = None


class PositionsHook:
    """Forward pre-hook of the decoder: adds each row's prefix length to its positions."""

    def __init__(self, hook: ModelHook) -> None:
        self.hook = hook

    def __call__(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        batch: Batch | None = kwargs.get(KEYWORD) or scope().batch
        if batch is None or batch.task_ids is None or batch.packed is not None:
            return None
        check_config(decoder)
        args, kwargs, inputs = _by_name(decoder, args, kwargs)
        positions = shifted_positions(
            self.hook.bank, batch.task_ids, inputs, kwargs.get("position_ids"), kwargs.get("attention_mask"),
            cache_among(kwargs), decoder,
        )  # fmt: skip
        if takes_positions(decoder):
            if torch.compiler.is_compiling() and kwargs.get("attention_mask") is None and cache_among(kwargs) is None:
                # Without a mask transformers looks for packed rows, and a compiler does not see that there are none.
                kwargs = kwargs | {"attention_mask": inputs.new_ones(inputs.shape[:2], dtype=torch.long)}
            return args, kwargs | {"position_ids": positions}
        scope().positions = positions.expand(inputs.shape[0], -1)
        return None


def _by_name(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """A call with at most one argument by position, and its input: tokens, or their embeddings."""
    if len(args) > 1:
        args, kwargs = (), named_arguments(module, args, kwargs)
    inputs = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if not isinstance(inputs, Tensor):
        raise UnsupportedModel(
            f"{type(module).__name__}: expected input_ids or inputs_embeds with task_ids, got neither"
        )
    return args, kwargs, inputs


def _takes_keywords(module: Any) -> bool:
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters_of(module).values())


def _end_of_pass(*_: Any) -> None:
    scope().batch = None
