"""Decoders of recurrent layers, alone or beside attention: Mamba, Mamba-2, gated delta rules."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from seqpar.hf.converting.attention import AFTER, PRE, block, experts, framed, kind_of, softmax
from seqpar.hf.converting.reading import Reading
from seqpar.hf.converting.rules import Rule
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.delta.gated_deltanet import GatedDeltaNet
from seqpar.layers.parts.experts import Router
from seqpar.layers.parts.norm import RMSNorm
from seqpar.layers.ssm.mamba2 import Mamba2
from seqpar.models.decoder import Decoder


def delta_sizes(read: Reading) -> dict[str, Any]:
    """The arguments of a gated delta rule; raises ``ValueError`` for values that are no multiple of keys."""
    key_dim, value_dim = read("linear_key_head_dim"), read("linear_value_head_dim")
    if value_dim % key_dim:
        raise ValueError(f"{read.config.model_type}: linear_value_head_dim={value_dim} is no multiple of {key_dim}")
    if read.activation() != "silu":
        raise ValueError(
            f"{read.config.model_type}: its recurrent layers are known with silu, not {read('hidden_act')}"
        )
    sizes = {"value_heads": read("linear_num_value_heads"), "key_dim": key_dim, "expand_v": value_dim // key_dim}
    return sizes | {"width": read("linear_conv_kernel_dim")}


def delta(read: Reading, theirs: str, ours: str, more: Mapping[str, Any]) -> GatedDeltaNet:
    """The layer, and the rules of what all spell alike."""
    layer = GatedDeltaNet(read("hidden_size"), read("linear_num_key_heads"), **delta_sizes(read), **more)
    read.same(f"{theirs}.dt_bias", f"{ours}.dt_bias")
    read.same(f"{theirs}.A_log", f"{ours}.log_a")
    read.reshaped(f"{theirs}.conv1d.weight", f"{ours}.conv_weight")
    layer.norm = RMSNorm(layer.sizes.value_dim, read("rms_norm_eps"))
    return layer


def qwen_delta(read: Reading, theirs: str, ours: str) -> GatedDeltaNet:
    """Of Qwen3-Next, whose projections are by key heads, and of Qwen3.5, where they are apart."""
    layer = delta(read, theirs, ours, {})
    read.module(f"{theirs}.norm", f"{ours}.norm")
    read.module(f"{theirs}.out_proj", f"{ours}.out")
    if read.has(f"{theirs}.in_proj_qkv"):
        for their, our in {"qkv": "qkv", "z": "gate", "b": "beta", "a": "decay"}.items():
            read.module(f"{theirs}.in_proj_{their}", f"{ours}.{our}")
        return layer
    keys, share = layer.sizes.keys, layer.sizes.values // layer.sizes.keys
    parts = (*[layer.sizes.key_dim] * 2, *[share * layer.sizes.value_dim] * 2)
    read.rules.append(
        Rule(
            (f"{theirs}.in_proj_qkvz.weight",), (f"{ours}.qkv.weight", f"{ours}.gate.weight"), parts, keys, joins=(3, 1)
        )
    )
    names = (f"{ours}.beta", f"{ours}.decay")
    read.module(f"{theirs}.in_proj_ba", *names, sizes=(share, share), groups=keys)
    return layer


def gated(read: Reading, theirs: str, ours: str, place: int) -> SoftmaxAttention:
    """Attention whose queries come with the gates of their heads."""
    heads, dim = read("num_attention_heads"), read("head_dim")
    read.module(f"{theirs}.q_proj", f"{ours}.q", f"{ours}.gate", sizes=(dim, dim), groups=heads)
    return softmax(read, theirs, ours, place, {"gated": True, "norm": "rms_from_one"}, parts="kv")


def qwen3_next(read: Reading) -> Decoder:
    """Qwen3-Next and Qwen3.5: gated delta rules, gated attention, norms ``1 + w``."""
    blocks, norm = [], {"norm": "rms_from_one"}
    read.know("full_attention_interval", "mlp_only_layers", "decoder_sparse_step", "intermediate_size")
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        mixer: nn.Module
        if kind_of(read, place) == "linear_attention":
            mixer = qwen_delta(read, f"{theirs}.linear_attn", f"{ours}.mixer")
        else:
            mixer = gated(read, f"{theirs}.self_attn", f"{ours}.mixer", place)
        mlp: nn.Module
        if read.has(f"{theirs}.mlp.experts.gate_up_proj"):
            router = Router("softmax_top", read("num_experts_per_tok"), bool(read("norm_topk_prob", True)))
            mlp = experts(read, f"{theirs}.mlp", f"{ours}.mlp", router)
        else:
            mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"))
        blocks.append(block(read, place, mixer, mlp, PRE, norm))
    return framed(read, blocks, norm)


def olmo_hybrid(read: Reading) -> Decoder:
    """Gated delta rules with norms before, and attention with norms after."""
    blocks = []
    for name in ("linear_a_log_min", "linear_a_log_max", "linear_dt_max", "linear_dt_min", "linear_dt_init_floor"):
        read.know(name)  # how it starts
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        recurrent = kind_of(read, place) == "linear_attention"
        mixer: nn.Module
        if recurrent:
            mixer = olmo_delta(read, f"{theirs}.linear_attn", f"{ours}.mixer")
        else:
            mixer = softmax(read, f"{theirs}.self_attn", f"{ours}.mixer", place)
        mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"))
        order = {"order": "pre" if recurrent else "after"}
        blocks.append(block(read, place, mixer, mlp, PRE if recurrent else AFTER, order))
    return framed(read, blocks)


def olmo_delta(read: Reading, theirs: str, ours: str) -> GatedDeltaNet:
    """All projections apart."""
    layer = delta(read, theirs, ours, {"negative_eigenvalues": bool(read("linear_allow_neg_eigval"))})
    layer.norm.eps = 1e-5  # as written there
    for their, our in {"g": "gate", "b": "beta", "a": "decay", "o": "out"}.items():
        read.module(f"{theirs}.{their}_proj", f"{ours}.{our}")
    read.module(f"{theirs}.o_norm", f"{ours}.norm")
    keys = layer.sizes.keys * layer.sizes.key_dim
    sizes = (keys, keys, layer.sizes.channels - 2 * keys)
    read.joined(tuple(f"{theirs}.{part}_proj.weight" for part in "qkv"), f"{ours}.qkv.weight", sizes)
    return layer


def mamba2(read: Reading, theirs: str, ours: str, layer: Mamba2, eps: float) -> Mamba2:
    """The rules of Mamba-2, and what must be as it is in ours."""
    limit = read("time_step_limit")
    if limit is not None and (limit[0] > 0 or limit[1] != float("inf")):
        raise ValueError(f"{read.config.model_type}: time_step_limit={limit} is not known: steps have no limit here")
    for name in ("in_proj.bias", "out_proj.bias"):
        if f"{theirs}.{name}" in read.theirs:
            raise ValueError(f"{read.config.model_type}: {theirs}.{name} is not known: these projections have no bias")
    layer.norm.eps = eps
    sizes = (layer.inner, layer.xbc.out_features, layer.heads)
    read.module(f"{theirs}.in_proj", *(f"{ours}.{part}" for part in ("gate", "xbc", "dt")), sizes=sizes)
    read.reshaped(f"{theirs}.conv1d.weight", f"{ours}.conv_weight")
    for their, our in {"conv1d.bias": "conv_bias", "dt_bias": "dt_bias", "A_log": "log_a", "D": "skip"}.items():
        read.same(f"{theirs}.{their}", f"{ours}.{our}")
    read.module(f"{theirs}.norm", f"{ours}.norm")
    read.module(f"{theirs}.out_proj", f"{ours}.out")
    return layer


def bamba(read: Reading) -> Decoder:
    """Mamba-2 beside attention."""
    blocks = []
    read.know("attn_layer_indices", "mamba_conv_bias", "mamba_proj_bias", "mlp_bias", "z_loss_coefficient")
    norms = {"input_layernorm": "mixer_norm", "pre_ff_layernorm": "mlp_norm"}
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        mixer: nn.Module
        if kind_of(read, place) == "linear_attention":
            sizes = {
                "expand": read("mamba_expand"),
                "head_dim": read("mamba_d_head"),
                "state_dim": read("mamba_d_state"),
            }
            sizes |= {"groups": read("mamba_n_groups"), "width": read("mamba_d_conv")}
            layer = Mamba2(read("hidden_size"), **sizes)
            read.know("mamba_n_heads")
            mixer = mamba2(read, f"{theirs}.mamba", f"{ours}.mixer", layer, read("rms_norm_eps"))
        else:
            mixer = softmax(read, f"{theirs}.self_attn", f"{ours}.mixer", place)
        mlp = read.mlp(f"{theirs}.feed_forward", f"{ours}.mlp", read("intermediate_size"))
        blocks.append(block(read, place, mixer, mlp, norms))
    return framed(read, blocks, norm="model.final_layernorm")
