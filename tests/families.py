"""Tiny configurations of decoder families: what `AutoConfig.for_model(kind, **settings)` takes."""

from __future__ import annotations

from typing import Any

# Most families use Llama's names. Where the heads' width can be set, queries are wider than the hidden state.
_IDS = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {**_IDS, "hidden_size": 32, "num_hidden_layers": 3, "initializer_range": 0.2}
_PLAIN = {
    **_BASE, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
_S = {**_PLAIN, "num_key_value_heads": 2}
_H = {**_S, "num_attention_heads": 8, "head_dim": 8}
_TIED = {"tie_word_embeddings": True}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
_BYTES = {  # one of the four stacks of blt
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
# Blocks of several kinds
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_FOUR = {
    "num_hidden_layers": 4, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
_STATE = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_DELTA = {
    **_STATE, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}  # fmt: skip
_KDA = {**_STATE, "linear_num_heads": 4, "linear_head_dim": 8}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
_CONV = {"layer_types": ["conv", "full_attention", "conv"]}
_HYBRID = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "num_key_value_heads": 4, "mamba_d_state": 4,
}  # fmt: skip
_DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
# Four experts, of which a token takes two; in some families `intermediate_size` is their width.
_TWO = {"num_experts_per_tok": 2}
_LOCAL = {**_TWO, "num_local_experts": 4, "intermediate_size": 16}
_NARROW = {**_TWO, "num_experts": 4, "intermediate_size": 16}
_EXPERTS = {**_TWO, "num_experts": 4, "moe_intermediate_size": 16}
_SHARED = {"shared_expert_intermediate_size": 24}
_ROUTED = {**_TWO, "n_routed_experts": 4, "moe_intermediate_size": 16}
_GROUPED = {**_ROUTED, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
# Keys and values through a narrow latent; an index that picks the keys
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
_MLA = {**_LATENT, "q_lora_rank": 24}
_INDEX = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 8}

# transformers keeps the lists it is given and may change them: pass a deep copy.
FAMILIES: dict[str, dict[str, Any]] = {
    # Attention, then an MLP
    "llama": _H,
    "mistral": {**_H, "sliding_window": 8},
    "ministral": {**_H, **_SLIDING},
    "ministral3": _H,
    "qwen2": _S,
    "qwen3": _H,
    "phi": _S,
    "phi3": _S,
    "olmo": _S,
    "olmo2": _S,
    "olmo3": {**_S, **_SLIDING},
    "granite": _S,
    "granite_swa": {**_S, **_SLIDING},
    "cohere": {**_S, **_TIED},
    "cohere2": {**_H, **_TIED, **_SLIDING},
    "starcoder2": _S,
    "glm": _H,
    "glm4": _H,
    "stablelm": _S,
    "gemma": {**_H, **_TIED},
    "gemma2": {**_H, **_TIED, **_SLIDING},
    "gemma3_text": {**_H, **_TIED, **_SLIDING},
    "gemma3n_text": {
        **_H, **_TIED, **_FOUR, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        **_H, **_TIED, **_FOUR, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "global_head_dim": 12,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "enable_moe_block": True,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
    "gemma4_unified_text": {**_H, **_TIED, **_FOUR, "global_head_dim": 12, "attention_k_eq_v": True},
    "vaultgemma": {**_H, **_TIED, **_SLIDING},
    "ernie4_5": _H,
    "exaone4": {**_S, **_SLIDING},
    "smollm3": {**_S, "no_rope_layers": [1, 0, 1]},
    "seed_oss": _H,
    "arcee": _H,
    "apertus": _S,
    "nemotron": _H,
    "nanochat": _S,
    "helium": {**_H, "num_attention_heads": 4},
    "hunyuan_v1_dense": _H,
    "hyperclovax": _H,
    "internlm3": _H,
    "iquestcoder": _H,
    "jais2": _H,
    "cwm": {**_H, **_SLIDING},
    "bitnet": _S,
    "diffllama": _H,
    "doge": _S,
    "persimmon": _PLAIN,
    "minicpm3": {**_S, **_MLA, "dim_model_base": 32},
    "youtu": {**_S, **_MLA},
    "hrm_text": {**_PLAIN, "head_dim": 8, "num_layers_per_stack": 1, "H_cycles": 1, "L_cycles": 1},
    "modernbert-decoder": {**_PLAIN, **_SLIDING, "cls_token_id": 1, "sep_token_id": 2},
    "cohere_compass_text": {
        **_S, **_TIED, **_SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "blt": {
        **_IDS, "initializer_range": 0.2, "cross_attn_k": 2, "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 64, "patcher_config": _BYTES, "global_config": {**_BYTES, "hidden_size": 64},
        "encoder_config": {**_BYTES, "hidden_size_global": 64, "cross_attn_k": 2},
        "decoder_config": {**_BYTES, "hidden_size_global": 64, "cross_attn_k": 2},
    },
    # The older ones, with names of their own
    "gpt2": _GPT,
    "openai-gpt": _GPT,
    "ctrl": {**_GPT, "dff": 48},
    "codegen": {**_GPT, "rotary_dim": 4},
    "gptj": {**_GPT, "rotary_dim": 4},
    "gpt_bigcode": {**_GPT, "n_inner": 48},
    "gpt_neo": {
        **_IDS, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48, "window_size": 8,
        "max_position_embeddings": 64, "initializer_range": 0.2,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
    },
    "gpt_neox": _PLAIN,
    "gpt_neox_japanese": {**_BASE, "num_attention_heads": 4, "max_position_embeddings": 64},
    "opt": {
        **_IDS, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "init_std": 0.2,
        "max_position_embeddings": 64, "word_embed_proj_dim": 16,
    },
    "biogpt": _PLAIN,
    "xglm": {
        **_IDS, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "init_std": 0.2,
        "max_position_embeddings": 64,
    },
    "bloom": {**_IDS, "hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2},
    "falcon": {**_BASE, "num_attention_heads": 4, "ffn_hidden_size": 48, "max_position_embeddings": 64},
    "mpt": {
        **_IDS, "d_model": 32, "n_layers": 3, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64,
        "initializer_range": 0.2,
    },
    # Mixtures of experts
    "mixtral": {**_S, **_LOCAL},
    "qwen2_moe": {**_S, **_EXPERTS, **_SHARED, "mlp_only_layers": [0]},
    "qwen3_moe": {**_H, **_EXPERTS, "mlp_only_layers": [0]},
    "gpt_oss": {**_H, **_LOCAL, **_SLIDING, "intermediate_size": 24},
    "phimoe": {**_S, **_LOCAL},
    "olmoe": {**_S, **_NARROW},
    "flex_olmo": {**_S, **_NARROW},
    "granitemoe": {**_S, **_LOCAL},
    "granitemoeshared": {**_S, **_LOCAL, "shared_intermediate_size": 24},
    "granitemoe_swa": {**_S, **_LOCAL, **_SLIDING, "shared_intermediate_size": 24},
    "deepseek_v2": {**_S, **_GROUPED, **_MLA, "first_k_dense_replace": 1},
    "deepseek_v3": {**_S, **_GROUPED, **_MLA, "first_k_dense_replace": 1},
    "deepseek_v32": {**_S, **_GROUPED, **_MLA, **_INDEX, **_DENSE_FIRST},
    "deepseek_v4": {
        **_S, **_ROUTED, **_INDEX, "n_shared_experts": 1, "num_hidden_layers": 4, "num_key_value_heads": 1,
        "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 24, "o_groups": 2, "o_lora_rank": 12,
        "hc_mult": 2, "hc_sinkhorn_iters": 4, "num_nextn_predict_layers": 0, "sliding_window": 8,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "layer_types": [
            "heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    },
    "axk1": {**_S, **_GROUPED, **_MLA, **_DENSE_FIRST},
    "axk2": {**_S, **_GROUPED, **_MLA, **_INDEX, **_DENSE_FIRST, "gated_norm_rank": 8},
    "glm4_moe": {**_H, **_GROUPED, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**_S, **_GROUPED, **_MLA, **_DENSE_FIRST},
    "glm_moe_dsa": {**_S, **_GROUPED, **_MLA, **_INDEX, **_DENSE_FIRST, "indexer_types": ["full", "shared", "full"]},
    "hy_v3": {**_H, **_EXPERTS, **_DENSE_FIRST},
    "hy_v4": {
        **_S, **_GROUPED, **_MLA, **_INDEX, **_DENSE_FIRST, "hc_mult": 2, "indexer_types": ["full", "shared", "full"],
    },
    "solar_open": {**_H, **_GROUPED},
    "dots1": {**_S, **_GROUPED, **_SLIDING, "first_k_dense_replace": 1},
    "dots3_note_text": {
        **_S, **_GROUPED, **_MLA, **_INDEX, **_DENSE_FIRST, "shared_experts_intermediate_size": 16,
        "sliding_window": 8, "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"],
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12,
    },
    "ernie4_5_moe": {
        **_S, "moe_intermediate_size": 16, "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 2,
    },
    "hunyuan_v1_moe": {**_H, "num_experts": 4, "moe_topk": 2, "intermediate_size": 16},
    "exaone_moe": {**_S, **_EXPERTS, **_SLIDING, **_DENSE_FIRST},
    "cohere2_moe": {
        **_H, **_TIED, **_NARROW, **_SLIDING, **_DENSE_FIRST, "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 48,
    },
    "aria_text": {**_S, "intermediate_size": 16, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "afmoe": {**_H, **_EXPERTS, **_SLIDING, "num_dense_layers": 1, "num_shared_experts": 1},
    "flint": {**_H, **_EXPERTS, **_SHARED, **_SLIDING, "mlp_only_layers": [0]},
    "kolibri1": {**_H, **_EXPERTS, **_SHARED, **_SLIDING},
    "laguna": {**_H, **_EXPERTS, **_SHARED, **_SLIDING, **_DENSE_FIRST, "num_attention_heads_per_layer": [4, 8, 4]},
    "mellum": {**_H, **_EXPERTS, **_SLIDING, **_DENSE_FIRST},
    "mimo_v2_flash": {**_H, **_GROUPED, **_SLIDING, **_DENSE_FIRST, "v_head_dim": 12},
    "minimax_m2": {**_H, **_LOCAL},
    "minimax_m3_vl_text": {
        **_H, **_LOCAL, **_DENSE_FIRST, "dense_intermediate_size": 48, "shared_intermediate_size": 24, "rotary_dim": 4,
        "index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
    },
    "llama4_text": {
        **_H, **_LOCAL, "intermediate_size_mlp": 48, "moe_layers": [1, 2], "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 8, "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
    },
    "jetmoe": {**_S, **_LOCAL, "kv_channels": 8},
    "dbrx": {
        **_IDS, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "initializer_range": 0.2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "longcat_flash": {
        **_S, **_MLA, "num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4,
        "zero_expert_num": 2, "moe_topk": 2, "head_dim": 8,
    },
    "zaya": {  # one expert per token is all it knows
        **_H, **_TIED, "num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 16, "sliding_window": 8,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
    },
    "inkling_text": {
        **_H, **_ROUTED, **_DENSE_FIRST, "n_shared_experts": 1, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 32,
        "logits_mup_width_multiplier": 1.0, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    "inkling2_text": {
        **_H, **_ROUTED, "unpadded_vocab_size": 128, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
        "swa_head_dim": 8, "sliding_window_size": 8, "d_rel": 4, "rel_extent": 32, "n_layers_per_attn_res_block": 1,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    },
    # Blocks with a state, alone or beside attention
    "mamba": {**_BASE, "state_size": 4},
    "falcon_mamba": {**_BASE, "state_size": 4},
    "mamba2": {**_BASE, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {
        "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32, "num_hidden_layers": 3,
        "intermediate_size": 48, "attention_hidden_size": 48, "context_length": 64,
    },
    "xlstm": {
        **_IDS, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2, "chunk_size": 8,
        "ffn_round_up_to_multiple_of": 8,
    },
    "jamba": {
        **_S, **_TWO, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "bamba": {**_S, **_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_S, **_MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {**_S, **_LOCAL, **_MAMBA2, **_STATE, "shared_intermediate_size": 24},
    "nemotron_h": {
        **_H, **_GROUPED, "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "moe_shared_expert_intermediate_size": 24, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 4,
        "n_groups": 1, "chunk_size": 8,
    },
    # tied embeddings are what makes the two hybrid blocks of Zamba share one transformer
    "zamba": {**_S, **_TIED, **_HYBRID, "mamba_dt_rank": 4},
    "zamba2": {**_S, **_TIED, **_HYBRID, "chunk_size": 8},
    "recurrent_gemma": {**_H, **_TIED, "lru_width": 48, "attention_window_size": 8},
    "lfm2": {**_S, **_CONV, "block_multiple_of": 8},
    "lfm2_moe": {**_S, **_EXPERTS, **_CONV, "num_dense_layers": 1},
    "lfm3": {**_H, "sliding_window": 8, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "qwen3_next": {**_H, **_EXPERTS, **_SHARED, **_DELTA},
    "qwen3_5_text": {**_H, **_DELTA},
    "qwen3_5_moe_text": {**_H, **_EXPERTS, **_SHARED, **_DELTA},
    "qwen4_exp_text": {
        **_H, **_EXPERTS, **_SHARED, **_DELTA, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 4,
        "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4,
        "ple_layer_ids": [1], "ple_embed_dim": 16, "ngram_vocab_size_base": 100, "heads_per_ngram": 2,
        "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    },
    "olmo_hybrid": {**_S, **_DELTA},
    "minimax": {**_H, **_LOCAL, **_STATE, "block_size": 8},
    "kimi_linear": {**_S, **_EXPERTS, **_LATENT, **_DENSE_FIRST, **_KDA},
    "bailing_hybrid": {
        **_S, **_EXPERTS, **_LATENT, **_DENSE_FIRST, **_KDA, "num_expert_group": 1, "topk_group": 1,
    },
}  # fmt: skip
