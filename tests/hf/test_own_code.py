"""Models with code of their own (``trust_remote_code``), which call a cache past_key_values in every transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

import prefix_attn as pa
from prefix_attn.bank.cache_argument import CACHE, OLD
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import LLAMA_LIKE, tiny_model


class Body(LlamaModel):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
                past_key_values: Any = None, inputs_embeds: Any = None, use_cache: Any = None,
                **kwargs: Any) -> Any:  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        if position_ids is None:
            position_ids = (torch.arange(x.shape[1]) + cache.get_seq_length())[None]
        named = {CACHE: cache}
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids, **named
        )
        rotary = self.rotary_emb(x, position_ids=position_ids)
        kwargs.pop(CACHE, None)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary, **named, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), **named)


class OwnCode(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.post_init()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None,
                past_key_values: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:  # fmt: skip
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), **{CACHE: getattr(out, CACHE)})


@pytest.fixture
def model() -> Iterator[Any]:
    made = OwnCode(LlamaConfig(**LLAMA_LIKE)).eval()
    made.load_state_dict(tiny_model("llama").state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", pa.SlowModel)
        yield pa.patch(made, make_bank(made))


def test_generates_what_transformers_own_model_does(model: Any) -> None:
    plain = tiny_model("llama")
    pa.patch(plain, make_bank(plain))
    for options in ({}, {"num_beams": 2}, {"prefill_chunk_size": 3}):
        tokens = [
            x.generate(**padded_inputs(), task_ids=TASKS, max_new_tokens=6, do_sample=False, eos_token_id=-1, **options)
            for x in (model, plain)
        ]
        assert tokens[0].tolist() == tokens[1].tolist()


@pytest.mark.skipif(CACHE == OLD, reason="a cache has one name before transformers 5.24")
def test_a_name_that_its_code_ignores_is_refused(model: Any) -> None:
    with pytest.raises(pa.UnsupportedModel, match=OLD):
        model(**padded_inputs(), task_ids=TASKS, cache=DynamicCache())
