"""The patch of an encoder-decoder model: prefixes for its encoder, its decoder and its cross-attention.

As in patching.py, each stack gets a hook that takes ``task_ids`` and passes a `PartBatch` down to its layers, which
know their place (part_attention.py). ``generate`` runs the encoder once, before it copies rows for beams.

Positions follow PEFT: a prefix of the decoder stands in front of the decoder's tokens. T5 has no positions but a bias
by distance, which then counts the prefix; the other families look positions up in ``decoder.embed_positions``, which
gets those of every row from the hook. A prefix of the encoder is counted by T5's distances, but moves no learned
positions of the encoder's tokens (arXiv:2101.00190); cross-attention has no positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import cache_among
from prefix_attn.bank.geometry import CROSS, DECODER, ENCODER
from prefix_attn.errors import ShapeError, UnsupportedModel
from prefix_attn.hf.adapters import pop_task_ids
from prefix_attn.hf.attention import KEYWORD
from prefix_attn.hf.caches import check_tasks_of, remember_tasks
from prefix_attn.hf.configs import OwnConfigs, check_config
from prefix_attn.hf.context import check_fits, new_tokens, option
from prefix_attn.hf.continuous import NoBatches
from prefix_attn.hf.encoder_states import StatesHook, check_tasks_of_states, remember_tasks_of_states
from prefix_attn.hf.generate import INPUTS, Generate, PrepareInputs, checked_for_batch
from prefix_attn.hf.masks import check_implementation
from prefix_attn.hf.part_attention import (
    PARTS_IMPLEMENTATION,
    PLACE,
    PartBatch,
    Place,
    part_attention_forward,
    part_mask,
)
from prefix_attn.hf.positions import hook_tables, shifted_positions
from prefix_attn.hf.relative_bias import bias_table, check_buckets
from prefix_attn.hf.scope import scope
from prefix_attn.hf.verify_parts import sound_frames, verify_parts
from prefix_attn.hf.wiring import PROBE, Wired, named_arguments

#: Families whose positions and biases are known, and tested.
FAMILIES = (
    "t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "plbart", "whisper",
)  # fmt: skip

#: What the families call their attention layers, in the encoder and in the decoder.
ATTENTIONS = {
    ENCODER: {"self_attn": ENCODER, "SelfAttention": ENCODER},
    DECODER: {"self_attn": DECODER, "SelfAttention": DECODER, "encoder_attn": CROSS, "EncDecAttention": CROSS},
}


# When this module is imported, so that a patched model which was pickled finds them in another process.
AttentionInterface.register(PARTS_IMPLEMENTATION, part_attention_forward)
AttentionMaskInterface.register(PARTS_IMPLEMENTATION, part_mask)


class Seq2SeqPatch:
    """Everything one patched model got, and what it takes to give it back."""

    def __init__(self, model: Any, bank: PrefixBank) -> None:
        self.bank = bank
        stacks = {ENCODER: model.get_encoder(), DECODER: model.get_decoder()}
        places = _places(stacks, bank)
        implementations = {part: stack.config._attn_implementation for part, stack in stacks.items()}
        self.configs = OwnConfigs(model)
        self.configs.select(model.modules(), PARTS_IMPLEMENTATION)
        for module, place in places.items():
            setattr(module, PLACE, place)
        self.handles = [
            stack.register_forward_pre_hook(
                StackHook(bank, implementations[part], part, _bias_holders(stack)), with_kwargs=True, prepend=True
            )
            for part, stack in stacks.items()
        ]
        self.handles.append(stacks[DECODER].register_forward_hook(remember_tasks, with_kwargs=True))
        self.handles.append(stacks[ENCODER].register_forward_hook(remember_tasks_of_states, with_kwargs=True))
        for module in {model, model.base_model}:
            self.handles.append(module.register_forward_pre_hook(StatesHook(bank), with_kwargs=True))
        if hasattr(stacks[DECODER], "embed_positions"):
            self.handles += hook_tables([stacks[DECODER].embed_positions])
        model.generate = Seq2SeqGenerate(model, bank)
        model.prepare_inputs_for_generation = PrepareInputs(model, self.configs.implementation)
        model.generate_batch = NoBatches(model)

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        del model.generate, model.generate_batch, model.prepare_inputs_for_generation
        for module in model.modules():
            module.__dict__.pop(PLACE, None)
        self.configs.restore(model)

    def verify(self, model: Any) -> None:
        verify_parts(model, self.bank, self.configs)

    def check(self, model: Any) -> None:
        """Make sure that ``task_ids`` given to the model reach both stacks; the hooks stop the passes on arrival."""
        device = model.device
        token = torch.zeros((1, 1), dtype=torch.long, device=device)
        state = torch.zeros((1, 1, model.config.hidden_size), dtype=model.dtype, device=device)
        inputs: dict[str, dict[str, Any]] = {
            ENCODER: {model.main_input_name: token}, DECODER: {"encoder_outputs": (state,)},
        }  # fmt: skip
        for part, given in inputs.items():
            try:
                with torch.no_grad():
                    model(**given, decoder_input_ids=token, task_ids=PROBE)
            except Wired as arrived:
                if arrived.args == (part,):
                    continue
            except TypeError:
                pass
            raise UnsupportedModel(f"{type(model).__name__}: its forward does not pass task_ids on to its {part}")


def _places(stacks: dict[str, Any], bank: PrefixBank) -> dict[Any, Place]:
    """The place of every attention layer.

    Raises:
        UnsupportedModel: their number is not that of the bank's geometry.
    """
    places: dict[Any, Place] = {}
    found = dict.fromkeys(bank.parts, 0)
    biases: dict[str, Any] = {}
    for stack_part, stack in stacks.items():
        for name, module in stack.named_modules():
            part = ATTENTIONS[stack_part].get(name.rpartition(".")[2])
            if part is None:
                continue
            if module in _bias_holders(stack):
                check_buckets(module)
                biases[part] = module  # the layers that follow share it
            places[module] = Place(part, found[part], biases.get(part))
            found[part] += 1
    expected = {part: len(geometry.layers) for part, geometry in bank.base.geometries.items()}
    if found != expected:
        raise UnsupportedModel(f"expected attention layers {expected}, found {found} by their names")
    return places


def _bias_holders(stack: Any) -> list[Any]:
    """The attention layers of a stack that hold a table of relative biases."""
    return [module for module in stack.modules() if getattr(module, "has_relative_attention_bias", False)]


class StackHook:
    """Forward pre-hook of the encoder or the decoder: turns ``task_ids`` into a `PartBatch` for its layers."""

    def __init__(self, bank: PrefixBank, implementation: str, part: str, bias_holders: Sequence[Any]) -> None:
        self.bank = bank
        self.implementation = implementation
        self.part = part
        self.bias_holders = bias_holders

    def __call__(
        self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        task_ids = pop_task_ids(kwargs)
        if task_ids is PROBE:
            raise Wired(self.part)
        if self.part == DECODER:
            scope().positions = None
        if task_ids is None:
            check_tasks_of(cache_among(kwargs), self.bank, None)
            scope().implementation = self.implementation
            return args, kwargs | {KEYWORD: PartBatch(self.implementation)}
        scope().implementation = None
        check_config(stack)
        if args:
            args, kwargs = (), named_arguments(stack, args, kwargs)
        inputs = next(x for name in INPUTS if (x := kwargs.get(name)) is not None)
        ids = checked_for_batch(self.bank, task_ids, inputs.shape[0])
        check_tasks_of(cache_among(kwargs), self.bank, ids)
        if self.part == DECODER and hasattr(stack, "embed_positions"):
            scope().positions = shifted_positions(
                self.bank, ids, inputs, kwargs.get("position_ids"), kwargs.get("attention_mask"),
                cache_among(kwargs), stack,
            )  # fmt: skip
        plans = {part: self.bank.plans(ids, part) for part in set(ATTENTIONS[self.part].values())}
        tables = {holder: bias_table(holder, inputs.device) for holder in self.bias_holders}
        biases = {holder: {there: x.to(there) for there in plans[self.part]} for holder, x in tables.items()}
        return args, kwargs | {KEYWORD: PartBatch(self.implementation, self.bank, ids, plans, biases)}


class Seq2SeqGenerate(Generate):
    """``model.generate`` that takes ``task_ids``: one name, id or None per row of the encoder's input."""

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("encoder_outputs") is not None:  # before its rows are copied for beams
            check_tasks_of_states(self.bank, kwargs["encoder_outputs"], task_ids)
        return super().__call__(*args, task_ids=task_ids, **kwargs)

    def _fit(
        self, ids: Tensor, inputs: Tensor, options: dict[str, Any], configs: Sequence[Any], truncation: bool
    ) -> None:
        """Refuse rows whose decoder has too little room behind its prefix."""
        if truncation:
            raise ShapeError(
                "truncation: expected a decoder-only model; the input of an encoder has no prefix to make room for: "
                "let the tokenizer cut it"
            )
        if option("prefill_chunk_size", options, configs) is not None:
            raise UnsupportedModel(
                "prefill_chunk_size: transformers cuts the mask of the encoder's input to the length of the decoder's "
                "chunk, so that padding is seen or tokens are not; drop it"
            )
        prompt = options.get("decoder_input_ids")
        if prompt is None:
            prompt = ids[:, None]  # stands for the one token that the decoder starts with
        new = new_tokens(prompt, options, configs)
        check_fits(self.bank, ids, prompt, options.get("decoder_attention_mask"), new)
        if self.model.main_input_name == "input_features":
            _refuse_several_passes(self.model, inputs, options, configs)


def _refuse_several_passes(model: Any, sound: Tensor, options: dict[str, Any], configs: Sequence[Any]) -> None:
    """Raise `UnsupportedModel` where Whisper's own ``generate`` would run on some of the rows, or on copies of them.

    It then neither copies nor selects the rows' tasks.
    """
    frames = sound_frames(model)
    if sound.shape[-1] > frames:
        raise UnsupportedModel(
            f"input_features: expected at most {frames} frames with task_ids, got {sound.shape[-1]}; long-form "
            "transcription drops rows on its way: cut the sound into windows"
        )
    if option("return_timestamps", options, configs):
        raise UnsupportedModel("return_timestamps: Whisper then runs again on some of the rows; drop it")
    if isinstance(option("temperature", options, configs), list | tuple):
        raise UnsupportedModel("temperature: Whisper runs again on the rows that need the next one; give one number")
    if (option("num_return_sequences", options, configs) or 1) > 1:
        raise UnsupportedModel("num_return_sequences: Whisper copies the rows, but not their tasks; pass copies")


def refuse_seq2seq(model: Any) -> None:
    """Raise `UnsupportedModel`, naming the family and the reason, for a model the patch cannot be exact for."""
    family = f"{type(model).__name__} ({model.config.model_type})"
    if model.config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{family}: of encoder-decoder models those are supported whose positions are known: {', '.join(FAMILIES)}"
        )
    if not model.can_generate():
        raise UnsupportedModel(f"{family}: expected a model with generate, such as AutoModelForSeq2SeqLM")
    for stack in (model.get_encoder(), model.get_decoder()):
        check_implementation(family, stack, PARTS_IMPLEMENTATION)
