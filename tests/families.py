"""Tiny Hugging Face configs of every family, with every option that changes the mathematics switched on in some case."""

from __future__ import annotations

from typing import Any

VOCAB = 96
_BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_NEOX = {k: v for k, v in _BASE.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
_GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_PERIOD = ["linear_attention", "linear_attention", "full_attention"]
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-3,  # an output of nearly nothing, normed, is rounding made large
}  # fmt: skip

# case -> config.json; the family is its `model_type`
CASES: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama", "head_dim": 8, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    "mistral": {**_BASE, "model_type": "mistral", "head_dim": 16, "sliding_window": 7},
    "mixtral": {**_BASE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "qwen2": {
        **_BASE, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {**_BASE, "model_type": "qwen3", "head_dim": 16, "attention_bias": True, "rope_parameters": _YARN},
    "qwen3_5_text": {
        **_BASE, **_DELTA, "model_type": "qwen3_5_text", "num_hidden_layers": 6, "head_dim": 16, "layer_types": _PERIOD * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.25},
    },
    "qwen3_5_text_tied": {  # no pattern that repeats
        **_BASE, **_DELTA, "model_type": "qwen3_5_text", "num_hidden_layers": 5, "head_dim": 8, "layer_types": _PERIOD + _PERIOD[1:],
        "attention_bias": True, "tie_word_embeddings": True, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 3,
    },
    "qwen3_moe": {
        **_BASE, "model_type": "qwen3_moe", "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "norm_topk_prob": True, "mlp_only_layers": [1],
    },
    "qwen3_moe_raw": {
        **_BASE, "model_type": "qwen3_moe", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "norm_topk_prob": False, "decoder_sparse_step": 1,
    },
    "gemma": {**_BASE, "model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {
        **_BASE, "model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 6, "layer_types": _TYPES,
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_BASE, "model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 6, "layer_types": _TYPES,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
        },
    },
    "gemma4_text": {  # E2B: inputs to each layer, shared keys and values under wider MLPs
        **_BASE, "model_type": "gemma4_text", "num_hidden_layers": 5, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
        "layer_types": ["sliding_attention", *_TYPES[:2], *_TYPES[:2]], "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 3.0,
    },
    "gemma4_text_experts": {  # 26B-A4B: experts beside the MLP, values from the keys
        **_BASE, "model_type": "gemma4_text", "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "moe_intermediate_size": 16,
        "attention_bias": True, "use_bidirectional_attention": "vision",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5, "factor": 2.0},
        },
    },
    "gemma4_text_all": {  # every option at once, shared layers in a pattern
        **_BASE, "model_type": "gemma4_text", "num_hidden_layers": 8, "head_dim": 8, "global_head_dim": 12, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 4, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB, "enable_moe_block": True,
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
    },
    "phi3": {**_BASE, "model_type": "phi3", "sliding_window": 9, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}},
    "olmo2": {**_BASE, "model_type": "olmo2", "attention_bias": True},
    "olmo3": {
        **_BASE, "model_type": "olmo3", "sliding_window": 6, "layer_types": _TYPES,
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e3}, "full_attention": _YARN},
    },
    "smollm3": {**_BASE, "model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True, "mlp_bias": True},
    "gpt_oss": {
        **_BASE, "model_type": "gpt_oss", "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6,
        "layer_types": _TYPES, "rope_parameters": {**_YARN, "truncate": False}, "swiglu_limit": 0.5,
    },
    "deepseek_v3": {
        **_BASE, "model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 2, "routed_scaling_factor": 1.7,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    },
    "deepseek_v3_plain": {
        **_BASE, "model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1, "norm_topk_prob": False,
        "rope_interleave": False, "attention_bias": True,
    },
    "ernie4_5": {**_BASE, "model_type": "ernie4_5", "head_dim": 8, "use_bias": True},
    "ernie4_5_moe": {
        **_BASE, "model_type": "ernie4_5_moe", "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1, "tie_word_embeddings": False,
    },
    "gpt2": {**_GPT, "model_type": "gpt2", "n_inner": 48},
    "gptj": {**_GPT, "model_type": "gptj", "rotary_dim": 4},
    "gpt_neox": {**_NEOX, "model_type": "gpt_neox", "use_parallel_residual": True},
    "gpt_neox_sequential": {
        **_NEOX, "model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5},
    },
    "opt": {
        "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    "opt_350m": {
        "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "pad_token_id": 0, "eos_token_id": 2,
    },
    "galactica": {
        "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "activation_function": "gelu", "enable_bias": False,
        "pad_token_id": 0, "eos_token_id": 2,
    },
    "bloom": {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 48, "n_layer": 3, "n_head": 6, "pad_token_id": 0},
    "mpt": {
        "model_type": "mpt", "vocab_size": VOCAB, "d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": 64,
        "attn_config": {"softmax_scale": 0.3},
    },
    "falcon": {  # 40B: grouped, two norms
        "model_type": "falcon", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_kv_heads": 2, "new_decoder_architecture": True, "max_position_embeddings": 64, "ffn_hidden_size": 48,
    },
    "falcon_7b": {
        "model_type": "falcon", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "max_position_embeddings": 64,
    },
    "falcon_rw": {
        "model_type": "falcon", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True,
        "multi_query": False, "parallel_attn": False, "alibi": True, "new_decoder_architecture": False, "max_position_embeddings": 64,
    },
    "falcon_one_norm": {
        "model_type": "falcon", "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True,
        "num_kv_heads": 4, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "max_position_embeddings": 64,
    },
}  # fmt: skip

_LABELS = {"id2label": {i: f"label {i}" for i in range(3)}, "label2id": {f"label {i}": i for i in range(3)}}
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {**_BERT, "model_type": "bert", "layer_norm_eps": 1e-6},
    "Roberta": {**_BERT, "model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1},
    "Ernie": {**_BERT, "model_type": "ernie", "use_task_id": True, "hidden_act": "relu"},
    "DistilBert": {
        "model_type": "distilbert", "vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4,
        "max_position_embeddings": 64, "pad_token_id": 0,
    },
    "ModernBert": {
        **_BERT, "model_type": "modernbert", "local_attention": 8, "cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 3,
        "eos_token_id": 4, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
}  # fmt: skip
_TASKS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")
_DECODERS_WITH_LABELS = {
    "LlamaForSequenceClassification": "llama", "LlamaForTokenClassification": "llama", "GPT2ForSequenceClassification": "gpt2",
    "FalconForTokenClassification": "falcon", "Gemma2ForSequenceClassification": "gemma2", "LlamaModel": "llama", "GPT2Model": "gpt2",
    "OPTModel": "opt_350m",
}  # fmt: skip
_REWARD = {"id2label": {0: "reward"}, "label2id": {"reward": 0}}

# transformers' class (and what is special) -> config.json of a model for a task other than causal language modelling
TASKS: dict[str, dict[str, Any]] = (
    {
        f"{name}{task}": {**settings, **_LABELS, "architectures": [f"{name}{task}"]}
        for name, settings in _ENCODERS.items()
        for task in _TASKS
    }
    | {
        name: {**CASES[case], **_LABELS, "pad_token_id": 0, "architectures": [name]}
        for name, case in _DECODERS_WITH_LABELS.items()
    }
    | {  # one score: a reward for a text, a value for every token
        f"{name} of one label": {**CASES["qwen3"], **_REWARD, "pad_token_id": 0, "architectures": [name]}
        for name in ("Qwen3ForSequenceClassification", "Qwen3ForTokenClassification")
    }
)
