"""The modes of ``generate``: their options, and what PEFT runs to compare them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import QuantizedLayer

import prefix_attn as pa
from tests.hf.families import tiny_model
from tests.seq2seq import random_parts, tiny_seq2seq

Options = dict[str, Any]


class Mode(NamedTuple):
    """One way to call ``generate``.

    Attributes:
        options: made for one call from the model that runs and its prompts ``[rows, tokens]``.
        peft: options under which PEFT gives the same tokens, where it fails with ``options`` themselves.
        one_row: transformers has it for a single row only.
        families: those transformers has it for; None for all.
    """

    options: Callable[[Any, torch.Tensor], Options]
    peft: Options | None = None
    one_row: bool = False
    families: tuple[str, ...] | None = None


class Nudge(LogitsProcessor):
    """Favours a token that depends on the row's last one."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        favoured = (input_ids[:, -1:] * 5 + 1) % scores.shape[1]
        return scores.scatter_add(1, favoured, scores.new_full(favoured.shape, 2.0))  # type: ignore[return-value]


class AtMultiplesOf5(StoppingCriteria):
    """Stops a row behind a token that is a multiple of 5."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] % 5 == 0


class Lossless(QuantizedLayer):
    """transformers' quantized cache layer with an exact "quantization", so that tokens can be compared."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.double()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.float()


def assistant(model: Any, patched: bool) -> Options:
    """A draft model close to the model; patched, it knows two of its three tasks, by other ids."""
    draft = (tiny_seq2seq if model.config.is_encoder_decoder else tiny_model)(model.config.model_type)
    with torch.no_grad():
        draft.get_input_embeddings().weight.mul_(1.05)
    if patched:
        bank = pa.PrefixBank.for_model(draft)
        for name in ("nine", "five"):
            bank.add(name, random_parts(bank, {"decoder": 6}, seed=5))
        pa.patch(draft, bank)
    return {"assistant_model": draft}


def quantized_cache(model: Any) -> Options:
    """A cache whose own keys are "quantized", in an encoder-decoder model those of the decoder."""
    layers = model.get_decoder().config.get_text_config(decoder=True).num_hidden_layers
    cache = Cache([Lossless(residual_length=3) for _ in range(layers)])
    together = EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache
    return {"past_key_values": together}


def decoder_prompt(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """What the decoder begins with: its first token, and three that depend on the row."""
    start = torch.full_like(prompts[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, (prompts[:, :1] + torch.arange(3)) % 90 + 3], dim=1)


def always(**options: Any) -> Callable[[Any, torch.Tensor], Options]:
    return lambda model, prompts: options


FULL_ATTENTION = ("llama", "qwen3", "gpt2", "opt")
#: What PEFT is asked for where it cannot do the mode: plain greedy decoding, whose tokens must come out.
GREEDY: Options = {}

MODES: dict[str, Mode] = {
    "greedy": Mode(always()),
    "beams": Mode(always(num_beams=3)),
    "constrained beams": Mode(always(num_beams=3, prefix_allowed_tokens_fn=lambda row, ids: [*range(5, 60, 2)])),
    "sequences of beams": Mode(always(num_beams=3, num_return_sequences=2)),
    "logits processor": Mode(lambda model, prompts: {"logits_processor": LogitsProcessorList([Nudge()])}),
    "repetition penalty": Mode(always(repetition_penalty=1.5, no_repeat_ngram_size=2)),
    "guidance": Mode(always(guidance_scale=1.5)),
    "stopping criterion": Mode(lambda model, prompts: {"stopping_criteria": StoppingCriteriaList([AtMultiplesOf5()])}),
    "max time": Mode(always(max_time=600.0)),
    "custom generate": Mode(
        always(custom_generate=lambda model, *args, **options: type(model)._sample(model, *args, **options))
    ),
    "inputs_embeds": Mode(
        lambda model, prompts: {"inputs_embeds": model.get_input_embeddings()(prompts)}, GREEDY
    ),
    "no cache": Mode(always(use_cache=False), GREEDY),
    "static cache": Mode(always(cache_implementation="static"), GREEDY),
    "static cache, beams": Mode(always(cache_implementation="static", num_beams=3), {"num_beams": 3}),
    "quantized cache": Mode(lambda model, prompts: quantized_cache(model), GREEDY, families=FULL_ATTENTION),
    "chunked prefill": Mode(always(prefill_chunk_size=3), GREEDY),
    "chunked prefill, static cache": Mode(always(prefill_chunk_size=3, cache_implementation="static"), GREEDY),
    "prompt lookup": Mode(always(prompt_lookup_num_tokens=3), GREEDY, one_row=True),
    # the other families' own early exit fails in transformers
    "early exit": Mode(always(assistant_early_exit=1), GREEDY, one_row=True, families=("llama",)),
    "plain assistant": Mode(lambda model, prompts: assistant(model, patched=False), GREEDY, one_row=True),
    "patched assistant": Mode(lambda model, prompts: assistant(model, patched=True), GREEDY, one_row=True),
}  # fmt: skip

#: The same of an encoder-decoder model: some modes are its own, and PEFT can do more of them.
SEQ2SEQ_MODES: dict[str, Mode] = {
    **{name: mode for name, mode in MODES.items() if "chunked prefill" not in name},
    # transformers calls T5 without tokens for its decoder
    "guidance": MODES["guidance"]._replace(families=("bart",)),
    "inputs_embeds": Mode(
        lambda model, prompts: {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(prompts)}, GREEDY
    ),
    "quantized cache": MODES["quantized cache"]._replace(families=None),
    "early exit": MODES["early exit"]._replace(peft=None, families=("bart",)),
    **{name: MODES[name]._replace(peft=None) for name in ("prompt lookup", "plain assistant", "patched assistant")},
    "decoder prompt": Mode(lambda model, prompts: {"decoder_input_ids": decoder_prompt(model, prompts)}),
    "decoder prompt, beams": Mode(
        lambda model, prompts: {"decoder_input_ids": decoder_prompt(model, prompts), "num_beams": 3}
    ),
}  # fmt: skip
