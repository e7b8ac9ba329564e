"""Any config of transformers, shrunk to a few layers of every kind that it has, with windows that are active."""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig

from bench.models.hf.special import SPECIAL

HEADS, DIM, VOCABULARY, WINDOW = 4, 32, 64, 7
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"], DIM),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"], 40),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "swa_num_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim", "swa_head_dim"], 8),
    **dict.fromkeys(["kv_channels", "swa_v_head_dim", "global_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["vocab_size", "text_vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"], 96),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "local_attention", "window_size"], WINDOW),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["shared_intermediate_size", "moe_shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state", "conv_L_cache"], 4),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"], 8),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads"], 4),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    "attention_chunk_size": 6,
    "qk_rope_head_dim": 8,
    "rotary_dim": 4,
    "index_topk": 4,
    "index_n_heads": 2,
    "zero_expert_num": 2,
    "mamba_n_heads": 8,
    "n_mamba_heads": 2,
    "first_k_dense_replace": 1,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "time_step_rank": 4,
    "mamba_dt_rank": 4,
    "hidden_size_per_layer_input": 8,
    "type_vocab_size": 1,
}
_NAMES_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")


def shrunk(model_type: str, layers: int = 4) -> PreTrainedConfig:
    """A small config of ``model_type``, or ``ValueError`` or whatever transformers says of it."""
    config_type = CONFIG_MAPPING[model_type]
    return config_type(**_changes(config_type(), layers), **_fixed(model_type))


def _fixed(model_type: str) -> dict[str, Any]:
    return dict(SPECIAL.get(model_type, {}))


def _changes(config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """Arguments for the type of ``config`` that give a small one."""
    kinds = kinds_of(config)
    count = max(2, min(layers, len(kinds))) if kinds else 2
    found: dict[str, Any] = {}
    names = set(config.attribute_map) | set(vars(config)) | set(config.attribute_map.values())
    special = SPECIAL.get(config.model_type, {})
    for name in sorted(names - set(special)):
        value = _value(config, name)
        if isinstance(value, PreTrainedConfig):
            found[name] = {
                **_changes(value, layers),
                **SPECIAL.get(value.model_type, {}),
                "model_type": value.model_type,
            }
        elif name in SIZES and value is not None and name not in config.attribute_map:
            found[name] = SIZES[name]
        elif name == "sliding_window":
            found[name] = WINDOW  # where it is off at first, too
        elif name == "num_hidden_layers" and name not in config.attribute_map:
            found[name] = count
        elif name in _NAMES_OF_LAYERS and value and name not in config.attribute_map:
            found[name] = _chosen(list(value), count)
        elif name == "rope_parameters" and value:
            found[name] = _short(value)
        elif "drop" in name and isinstance(value, float):
            found[name] = 0.0
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            found[name] = 1
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = HEADS
    return found


def _short(rope: dict[str, Any]) -> dict[str, Any]:
    """The same, whose longest document at the start was a short one."""
    least = {"original_max_position_embeddings": 16}
    return {name: _short(value) if isinstance(value, dict) else least.get(name, value) for name, value in rope.items()}


def _value(config: PreTrainedConfig, name: str) -> Any:
    """None where it is not to be set: it follows from others, or differs by layer."""
    own = getattr(type(config), name, None)
    if isinstance(own, property) and own.fset is None:
        return None
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def kinds_of(config: PreTrainedConfig) -> list[str]:
    """The kinds of layers that a config has, in order of appearance."""
    return list(dict.fromkeys(next((v for n in _NAMES_OF_LAYERS if (v := _value(config, n))), [])))


def _chosen(kinds: list[str], count: int) -> list[str]:
    """``count`` layers with every kind among them."""
    unique = list(dict.fromkeys(kinds))
    return [unique[min(i, len(unique) - 1)] for i in range(count)]


def built(config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A model in fp64 with every number of it drawn, so that nothing is hidden behind zeros and ones."""
    torch.manual_seed(seed)
    kind, config._experts_implementation = type(config), "eager"
    model = AutoModelForCausalLM.from_config(config) if kind in MODEL_FOR_CAUSAL_LM_MAPPING else None
    if model is None:
        raise ValueError(f"no model for causal LM takes a {kind.__name__}")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * (0.3 if parameter.dim() > 1 else 0.2)
            parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0).clamp(-2, 2) * 0.5 + noise.to(parameter.dtype))
    model = model.double().eval()
    for part in model.modules():  # decays of MiniMax are kept in fp32, in four tables that then do not fit each other
        if hasattr(part, "decay_factors"):
            part.query_decay, part.key_decay, part.diagonal_decay = part.decay_factors(part.slope_rate)
    return model
