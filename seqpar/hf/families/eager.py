"""Softmax attention of models that do not ask transformers' registry, and write it out instead."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seqpar.crossing.here import Here
from seqpar.hf.attend import attend
from seqpar.hf.families.family import Family, Function
from seqpar.hf.sight import Sight


def softmax(here: Here, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
    """``[b, h, t, dim]`` in, ``[b, t, h dim]`` out."""
    out, _ = attend(here.layer, query, key, value, mask, scaling=scale, seqpar_cut=here.cut)
    return out.flatten(2)


def heads(x: Tensor, dim: int) -> Tensor:
    """``[b, t, h dim]`` as ``[b, h, t, dim]``."""
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def alone(here: Here, *others: Any) -> None:
    """Raise ``ValueError`` for tokens of an encoder or of a cache."""
    if any(other is not None for other in others):
        raise ValueError(f"{type(here.layer).__name__} attends to tokens of an encoder or a cache: that is not cut")


def gpt_neo(
    here: Here, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> tuple[Tensor, None]:
    """Not scaled; ``"local"`` layers see a window."""
    window = module.config.window_size if module.attention_type == "local" else None
    seen = Sight(window=window) if isinstance(attention_mask, Sight) and attention_mask == Sight() else attention_mask
    out, _ = attend(module, query, key, value, seen, scaling=1.0, seqpar_cut=here.cut)
    return out.transpose(1, 2), None


def gpt_neox_japanese(
    here: Here, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
) -> tuple[Tensor, None]:
    """As GPT-NeoX."""
    scale = float(1.0 / module.norm_factor)
    out, _ = attend(module, query, key, value, attention_mask, scaling=scale, seqpar_cut=here.cut)
    return out.transpose(1, 2), None


def gpt(
    here: Here,
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any = None,
    output_attentions: bool = False,
) -> list[Tensor]:
    """The first GPT: ``k [b, h, dim, t]``, and no mask but its own."""
    alone(here, attention_mask)
    scale = v.shape[-1] ** -0.5 if module.scale else 1.0
    out, _ = attend(module, q, k.transpose(-1, -2), v, Sight(), scaling=scale, seqpar_cut=here.cut)
    return [out.transpose(1, 2)]


def bert(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    cache: Any = None,
) -> tuple[Tensor, None]:
    """Megatron-BERT and RemBERT."""
    alone(here, encoder_hidden_states, cache)
    dim = module.attention_head_size
    query, key, value = (heads(linear(hidden_states), dim) for linear in (module.query, module.key, module.value))
    return softmax(here, query, key, value, attention_mask, dim**-0.5), None


def roformer(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    sinusoidal_pos: Tensor | None = None,
    encoder_hidden_states: Any = None,
    cache: Any = None,
) -> tuple[Tensor, None]:
    """Rotary BERT; values may be turned, too."""
    alone(here, encoder_hidden_states, cache)
    dim = module.attention_head_size
    turned = [heads(linear(hidden_states), dim) for linear in (module.query, module.key, module.value)]
    count = 3 if module.rotary_value else 2
    if sinusoidal_pos is not None:
        turned[:count] = module.apply_rotary_position_embeddings(sinusoidal_pos, *turned[:count])
    query, key, value = turned
    return softmax(here, query, key, value, attention_mask, dim**-0.5), None


def bart(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    key_value_states: Any = None,
    cache: Any = None,
    attention_mask: Any = None,
    attn_prompt: Any = None,
) -> tuple[Tensor, None, None] | tuple[Tensor, None]:
    """Attention as in BART, with scaled queries: XGLM, TrOCR and MVP."""
    alone(here, key_value_states, cache, attn_prompt)
    query = heads(module.q_proj(hidden_states) * module.scaling, module.head_dim)
    key, value = (heads(linear(hidden_states), module.head_dim) for linear in (module.k_proj, module.v_proj))
    return module.out_proj(softmax(here, query, key, value, attention_mask, 1.0)), None


def falcon(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Any,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, None]:
    """Fused queries, keys and values; rotary."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    alone(here, layer_past)
    if alibi is not None or position_embeddings is None:
        raise ValueError("FalconAttention with alibi=True rounds its biases to bf16, which is not cut")
    query, key, value = (each.transpose(1, 2) for each in module._split_heads(module.query_key_value(hidden_states)))
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    return module.dense(softmax(here, query, key, value, attention_mask, module.head_dim**-0.5)), None


def biased(here: Here, query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, slopes: Tensor) -> Tensor:
    """ALiBi (arXiv 2108.12409) as one more channel: of queries the slope, of keys the position in the document."""
    positions = here.positions.to(query.device, query.dtype)[None, None, :, None].expand(*key.shape[:3], 1)
    slope = (slopes.to(query) / scale)[None, :, None, None].expand(*query.shape[:3], 1)
    return softmax(here, torch.cat([query, slope], -1), torch.cat([key, positions], -1), value, mask, scale)


def bloom(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Any,
    layer_past: Any = None,
) -> tuple[Tensor, None]:
    """BLOOM; the residual is added here."""
    from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

    alone(here, layer_past)
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    slopes = _get_alibi_slopes(module.num_heads, hidden_states.device)
    out = biased(here, query, key, value, attention_mask, module.inv_norm_factor, slopes)
    return module.dense(out) + residual, None


def mpt(
    here: Here,
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    cache: Any = None,
    attention_mask: Any = None,
) -> tuple[Tensor, None]:
    """MPT; neighbours in ``position_bias [h, 1, tokens]`` differ by the slope."""
    alone(here, cache)
    mixed = module.Wqkv(hidden_states)
    clip = module.clip_qkv
    mixed = mixed.clamp(-clip, clip) if clip else mixed
    query, key, value = (heads(each, module.head_dim) for each in mixed.chunk(3, dim=2))
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    return module.out_proj(biased(here, query, key, value, attention_mask, module.softmax_scale, slopes)), None


METHODS: Mapping[str, Function] = MappingProxyType(
    {
        "GPTNeoSelfAttention._attn": gpt_neo,
        "GPTNeoXJapaneseAttention._attn": gpt_neox_japanese,
        "Attention._attn": gpt,
        "MegatronBertSelfAttention.forward": bert,
        "RemBertSelfAttention.forward": bert,
        "RoFormerSelfAttention.forward": roformer,
        "XGLMAttention.forward": bart,
        "TrOCRAttention.forward": bart,
        "MvpAttention.forward": bart,
        "FalconAttention.forward": falcon,
        "BloomAttention.forward": bloom,
        "MptAttention.forward": mpt,
    }
)
FAMILY = Family(methods=METHODS)
