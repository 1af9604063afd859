"""What single families need so that a tiny config of theirs fits together; see shrink.py."""

from __future__ import annotations

from typing import Any

SHARED_KV = {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "layer_types": [
    "sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]}  # fmt: skip

#: Where the default config has only one of the kinds of layers that the family knows.
BOTH_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}


NO_INPUT_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

#: Model type -> config arguments without which there is not even a default config.
REQUIRED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text"} | NO_INPUT_PER_LAYER},
}


def sections(*mrope: int) -> dict[str, Any]:
    """How many of a head's rotary frequencies turn with time, height and width; half of its rotary dims in all."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(mrope)}}


#: What tells image tokens from others in the families that draw images.
VOCABULARY = {"vocabulary_map": {"<image>": 98, "<s>": 1}}

#: Model type -> config arguments that its sizes need to fit together.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_group": 1,
        "topk_group": 1,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    **dict.fromkeys(("laguna", "mellum", "ministral"), BOTH_WINDOWS),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "smollm3"), BOTH_WINDOWS | {"use_sliding_window": True}),
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 12},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "dots1": BOTH_WINDOWS | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "gemma3n_text": SHARED_KV
    | {"activation_sparsity_pattern": [0.0] * 5, "intermediate_size": 48, "hidden_size_per_layer_input": 8},
    "gemma4_text": SHARED_KV
    | {"hidden_size_per_layer_input": 8, "global_head_dim": 24, "num_global_key_value_heads": 1},
    "gemma4_unified_text": SHARED_KV | {"global_head_dim": 24, "num_global_key_value_heads": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 12},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16), "attention_head_size": 8},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": [
            "linear_attention",
            "linear_attention",
            "hybrid",
            "linear_attention",
            "hybrid",
            "linear_attention",
        ],
    },
    "nemotron_h": {"n_routed_experts": 4, "n_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 200,
        "ple_embed_dim": 16,
        "split_ngram_parts": 1,
    },
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm_ocr_text", "glm4v_text"), sections(1, 1, 2)
    ),
    "qwen2_5_omni_thinker": {"vision_start_token_id": 98},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 98},
    **dict.fromkeys(
        ("paddleocr_vl_text", "cosmos3_edge_text", "qwen3_omni_moe_text"), sections(2, 2, 4) | {"head_dim": 16}
    ),
    "hunyuan_vl_text": sections(2, 2, 2, 2) | {"head_dim": 16},
    "glm4v_moe_text": sections(1, 1, 2) | {"head_dim": 16},
    "ernie4_5_vl_moe_text": sections(1, 1, 2) | {"moe_intermediate_size": [48, 24]},
    **dict.fromkeys(("chameleon", "emu3"), VOCABULARY),
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "qwen2_vl_vision": {"embed_dim": 32},
    "glm5_next_text": {"qk_rope_head_dim": 0, "index_n_heads": 2, "index_head_dim": 16, "n_group": 1, "topk_group": 1},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
        "text_config": {"model_type": "granite4_vision_text"},
        "vision_config": {"hidden_size": 64},  # a head of the projector has 64 dims
    },
    "wavtokenizer_encoder": {"codebook_dim": 32, "codebook_size": 8},
    "apertus1p5": {
        "image_token_id": 60,
        "audio_token_id": 61,
        "image_token_offset": 64,
        "audio_token_offset": 72,
        "vision_config": {"codebook_size": 8},
    },
    "hy_v4_vl_text": sections(2, 1, 1),
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "inkling_vision": {"patch_size": 4, "num_hidden_layers": 6},  # with fewer layers than scales it needs scipy
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 32}},
    "muse_spark": {"audio_config": {"out_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "kosmos_2_text_model": {"embed_dim": 32, "layers": 2},
    "kosmos_2_5_text_model": {"embed_dim": 32, "layers": 2},
    "gemma4_assistant": {"text_config": NO_INPUT_PER_LAYER | {"num_kv_shared_layers": 5}},
    "doge": {"keep_window_size": 32},  # the survey fills 25 slots; test_replica.py, more than it keeps
    "step3p5": {"sliding_window": 12},
}
