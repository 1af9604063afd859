"""Models that the engine does not take: by what their configs ask for, by their families, or as they are patched."""

from __future__ import annotations

import warnings

import pytest
from transformers import GenerationConfig

import prefix_attn as pa
from prefix_attn.serving import Engine, Request
from prefix_attn.serving.engine import UNSUPPORTED_SETTINGS
from tests.hf.families import tiny_model
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.seq2seq import tiny_seq2seq
from tests.serving.conftest import Served
from tests.serving.engines import OLD, answers, needs_engine


@needs_engine
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.1), ("no_repeat_ngram_size", 2), ("bad_words_ids", [[5]]), ("suppress_tokens", [5]),
        ("begin_suppress_tokens", [5]), ("sequence_bias", [[[5], 1.0]]), ("min_length", 3), ("min_new_tokens", 3),
        ("forced_bos_token_id", 5), ("forced_eos_token_id", 2), ("min_p", 0.1), ("typical_p", 0.9), ("top_h", 0.2),
        ("epsilon_cutoff", 0.1), ("eta_cutoff", 0.1), ("guidance_scale", 2.0), ("num_beams", 2), ("max_time", 1.0),
        ("stop_strings", ["x"]), ("token_healing", True), ("exponential_decay_length_penalty", (3, 1.1)),
    ],
)  # fmt: skip
def test_settings_that_the_engine_has_no_part_for(served: Served, name: str, value: object) -> None:
    setattr(served.model.generation_config, name, value)
    with pytest.raises(pa.UnsupportedModel, match=rf"\{{'{name}': .*--plain"):
        Engine(served.model, cache_tokens=256)


@needs_engine
def test_a_plain_engine_does_without(served: Served) -> None:
    served.model.generation_config.repetition_penalty = 1.1
    with Engine(served.model, cache_tokens=256, plain=True) as engine:
        assert answers(engine, Request([5], None, 2))


#: Settings that the engine itself reads, or that change no token of a greedy or sampled answer of one row.
ELSEWHERE = {
    "do_sample", "temperature", "top_p", "top_k", "eos_token_id", "bos_token_id", "pad_token_id", "max_length",
    "max_new_tokens", "use_cache", "cache_implementation", "cache_config", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size", "low_memory", "early_stopping", "length_penalty",
    "num_return_sequences", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids",
    "renormalize_logits", "remove_invalid_values",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "decoder_start_token_id", "encoder_no_repeat_ngram_size", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "speculation_type", "use_mtp", "assistant_ensemble_weight", "max_cache_len", "transformers_version",
}  # fmt: skip


@needs_engine
def test_every_setting_of_transformers_is_known() -> None:
    """A new one must be looked at before it is passed over."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - ELSEWHERE - set(UNSUPPORTED_SETTINGS) == set()


@needs_engine
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("deepseek_v3", "keys that this family makes"),
        ("gpt_neox_japanese", "slow way"),
        ("stablelm", "do not get the keywords of a call"),
        ("hrm_text", "other tokens than generate"),
        ("mimo_v2_flash", "does not run with this model"),
        ("gemma4_text", "does not run with this model"),
        ("lfm2", "does not run with this model"),
    ],
)
def test_families_that_cannot_be_batched(family: str, words: str) -> None:
    """Some are known, some fail as the cache is made, and some with the first answer: never with a user's request."""
    model = tiny_random_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pa.SlowModel)
        pa.patch(model, random_bank(model))
    with pytest.raises(pa.UnsupportedModel, match=words), Engine(model, cache_tokens=256):
        pass


@needs_engine
def test_a_manager_that_was_kept(served: Served) -> None:
    served.model.generate_batch([[5]], task_ids=["upper"], persistent_manager=True, max_new_tokens=2)
    with pytest.raises(pa.UnsupportedModel, match="destroy_cached"):
        Engine(served.model)
    served.model.destroy_cached_continuous_batching_manager()
    assert Engine(served.model, cache_tokens=256).cache_tokens == 256


@needs_engine
def test_a_prefix_of_peft_in_front_of_the_model(served: Served) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(pa.UnsupportedModel, match="load that into the bank"):
        Engine(peft.get_peft_model(served.model, config))


@needs_engine
def test_encoder_decoders_are_refused() -> None:
    model = tiny_seq2seq("t5")
    with pytest.raises(pa.UnsupportedModel, match="decoder-only"):
        Engine(pa.patch(model, pa.PrefixBank.for_model(model)))


@pytest.mark.skipif(not OLD, reason="this transformers has the engine")
def test_older_transformers_are_refused(served: Served) -> None:
    with pytest.raises(pa.UnsupportedModel, match=r"5\.23"):
        Engine(served.model)


@needs_engine
def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(pa.UnsupportedModel, match="expected a patched model"):
        Engine(tiny_model("llama"))
