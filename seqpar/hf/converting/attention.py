"""Decoders of softmax attention: the families around Llama, with their norms, windows, biases and experts."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from seqpar.hf.converting.reading import Reading
from seqpar.layers.attention.latent_attention import LatentAttention
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.parts.block import Block
from seqpar.layers.parts.experts import Experts, Router
from seqpar.models.decoder import Decoder, Frame

NOTHING: Mapping[str, Any] = MappingProxyType({})
PRE = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
AFTER = {"post_attention_layernorm": "mixer_norm", "post_feedforward_layernorm": "mlp_norm"}
SANDWICH = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "mixer_out_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_out_norm",
}


def kind_of(read: Reading, place: int) -> str:
    """What the config says of a layer, or nothing."""
    kinds = read("layer_types")
    return kinds[place] if kinds else ""


def window_of(read: Reading, place: int) -> int | None:
    """How far a layer sees; None: to the start."""
    kind, window = kind_of(read, place), read("sliding_window")
    if kind not in ("", "full_attention", "sliding_attention"):
        raise ValueError(f"{read.config.model_type}: layer {place} is of a kind that is not known: {kind!r}")
    read.know("use_sliding_window", "max_window_layers")  # layer_types says what they come to
    return None if kind == "full_attention" else window


def softmax(
    read: Reading, theirs: str, ours: str, place: int, more: Mapping[str, Any] = NOTHING, parts: str = "qkv"
) -> SoftmaxAttention:
    """Attention by the usual names. ``more``: options beside those that weights and config tell; ``parts``: whose
    projections are written by these names."""
    heads, dim = read("num_attention_heads"), read("hidden_size")
    kv_heads, key_dim = read("num_key_value_heads") or heads, read("head_dim") or dim // heads
    if read.has(f"{theirs}.qkv_proj"):
        sizes = (heads * key_dim, kv_heads * key_dim, kv_heads * key_dim)
        read.module(f"{theirs}.qkv_proj", *(f"{ours}.{part}" for part in "qkv"), sizes=sizes)
    for part in parts:
        read.module(f"{theirs}.{part}_proj", f"{ours}.{part}")
    read.module(f"{theirs}.o_proj", f"{ours}.out")
    options: dict[str, Any] = {"kv_heads": kv_heads, "key_dim": key_dim, "value_dim": key_dim}
    options["bias"] = f"{theirs}.q_proj.bias" in read.theirs
    options["out_bias"] = f"{theirs}.o_proj.bias" in read.theirs
    read("attention_bias")
    if read.has(f"{theirs}.q_norm"):
        read.module(f"{theirs}.q_norm", f"{ours}.q_norm")
        read.module(f"{theirs}.k_norm", f"{ours}.k_norm")
        whole = read.theirs[f"{theirs}.q_norm.weight"].numel() != key_dim
        options |= {"qk_norm": "all" if whole else "head", "eps": read("rms_norm_eps")}
    options["window"] = window_of(read, place)
    if "rope" not in more and "rope_base" not in more:
        options["rope"] = read.rope(kind_of(read, place))
    return SoftmaxAttention(dim, heads, **options, **more)


def experts(read: Reading, theirs: str, ours: str, router: Router, *, gate: str = "gate") -> Experts:
    """A mixture of experts whose weights are stacked; a shared one where there is one."""
    count, hidden = read.theirs[f"{theirs}.experts.gate_up_proj"].shape[:2]
    sizes = (hidden // 2, hidden // 2)
    read.module(f"{theirs}.{gate}", f"{ours}.router")
    names = (f"{ours}.gate", f"{ours}.up")
    read.stacked(f"{theirs}.experts.gate_up_proj", names, sizes)
    read.same(f"{theirs}.experts.down_proj", f"{ours}.down")
    read.know("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "intermediate_size")
    shared = 0
    for name in ("shared_expert", "shared_experts"):
        if read.has(f"{theirs}.{name}.up_proj"):
            shared = read.theirs[f"{theirs}.{name}.up_proj.weight"].shape[0]
            read.mlp(f"{theirs}.{name}", f"{ours}.shared", shared)
            read.know("shared_expert_intermediate_size", "n_shared_experts")
    gated = read.has(f"{theirs}.shared_expert_gate")
    read.module(f"{theirs}.shared_expert_gate", f"{ours}.shared_gate")
    if f"{theirs}.{gate}.e_score_correction_bias" in read.theirs:
        read.same(f"{theirs}.{gate}.e_score_correction_bias", f"{ours}.correction")
    how = {"activation": read.activation(), "shared": shared, "shared_gated": gated}
    return Experts(read("hidden_size"), hidden // 2, count, router, **how)  # type: ignore[arg-type]


def framed(read: Reading, blocks: list[Block], more: Mapping[str, Any] = NOTHING, norm: str = "model.norm") -> Decoder:
    """The decoder of these blocks, with embedding, last norm and head by the usual names."""
    tied = bool(read("tie_word_embeddings"))
    read.module("model.embed_tokens", "embedding")
    read.module(norm, "norm")
    if not tied:
        read.module("lm_head", "head")
    options: dict[str, Any] = {"tied": tied, "eps": read("rms_norm_eps"), "head_bias": "lm_head.bias" in read.theirs}
    return Decoder.assembled(blocks, Frame(read("vocab_size"), read("hidden_size"), **options, **more))


def block(
    read: Reading,
    place: int,
    mixer: nn.Module,
    mlp: nn.Module,
    norms: Mapping[str, str],
    more: Mapping[str, Any] = NOTHING,
) -> Block:
    """One block, its norms by ``norms``: of their names ours."""
    for theirs, ours in norms.items():
        read.module(f"model.layers.{place}.{theirs}", f"blocks.{place}.{ours}")
    return Block(read("hidden_size"), mixer, 1, mlp=mlp, **{"eps": read("rms_norm_eps"), **more})


Options = Callable[[Reading, int], Mapping[str, Any]]


def _plain(read: Reading, place: int) -> Mapping[str, Any]:
    return NOTHING


def llama(
    read: Reading, *, mixer: Options = _plain, norms: Mapping[str, str] = PRE, around: Options = _plain
) -> Decoder:
    """Attention and a gated feed-forward part, as Llama: Mistral, Qwen2, Qwen3, Phi-3 differ by what weights tell."""
    read("mlp_bias")
    blocks = []
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        attention = softmax(read, f"{theirs}.self_attn", f"{ours}.mixer", place, mixer(read, place))
        mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"))
        blocks.append(block(read, place, attention, mlp, norms, around(read, place)))
    return framed(read, blocks)


def olmo2(read: Reading) -> Decoder:
    """Norms after, and of queries and keys over all heads."""
    return llama(read, norms=AFTER, around=lambda read, place: {"order": "after"})


def smollm3(read: Reading) -> Decoder:
    """Some layers have no positions."""

    def positions(read: Reading, place: int) -> Mapping[str, Any]:
        read("no_rope_layer_interval")
        return NOTHING if read("no_rope_layers")[place] else {"rope_base": None}

    return llama(read, mixer=positions)


def granite(read: Reading) -> Decoder:
    """Four multipliers."""
    read("mlp_bias")
    blocks = []
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        scale = {"scale": read("attention_multiplier")}
        attention = softmax(read, f"{theirs}.self_attn", f"{ours}.mixer", place, scale)
        mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"))
        blocks.append(block(read, place, attention, mlp, PRE, {"residual": read("residual_multiplier")}))
    more = {"embedding_scale": read("embedding_multiplier"), "logit_scale": 1 / read("logits_scaling")}
    return framed(read, blocks, more)


def gemma(read: Reading) -> Decoder:
    """Gemma 2 and 3: norms before and after, ``1 + w``, and caps."""
    if read("use_bidirectional_attention"):
        raise ValueError(f"{read.config.model_type}: use_bidirectional_attention lets tokens see later ones")
    blocks = []
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        scale = read("query_pre_attn_scalar") ** -0.5
        more = {"scale": scale, "softcap": read("attn_logit_softcapping"), "norm": "rms_from_one"}
        attention = softmax(read, f"{theirs}.self_attn", f"{ours}.mixer", place, more)
        activation = read.activation("hidden_activation")
        mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"), activation=activation)
        around = {"order": "sandwich", "norm": "rms_from_one"}
        blocks.append(block(read, place, attention, mlp, SANDWICH, around))
    embedding: Any = read.model.get_submodule("model.embed_tokens")
    scale, cap = float(embedding.embed_scale), read("final_logit_softcapping")
    return framed(read, blocks, {"embedding_scale": scale, "logit_cap": cap, "norm": "rms_from_one"})


def mixture(read: Reading) -> Decoder:
    """Mixtral and Qwen's: softmax, then the largest; some layers may have one feed-forward part."""
    blocks = []
    normed = read.config.model_type == "mixtral" or bool(read("norm_topk_prob"))
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        attention = softmax(read, f"{theirs}.self_attn", f"{ours}.mixer", place)
        read.know("mlp_only_layers", "decoder_sparse_step", "qkv_bias")  # weights say what they come to
        mlp: nn.Module
        if read.has(f"{theirs}.mlp.experts.gate_up_proj"):
            router = Router("softmax_top", read("num_experts_per_tok"), normed)
            mlp = experts(read, f"{theirs}.mlp", f"{ours}.mlp", router)
        else:
            mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"))
        blocks.append(block(read, place, attention, mlp, PRE))
    return framed(read, blocks)


def deepseek_v3(read: Reading) -> Decoder:
    """Latent attention, and experts chosen in groups by sigmoids with a correction."""
    blocks = []
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"model.layers.{place}", f"blocks.{place}"
        attention = latent(read, f"{theirs}.self_attn", f"{ours}.mixer")
        mlp: nn.Module
        read.know("first_k_dense_replace", "mlp_layer_types", "layer_types")
        if read.has(f"{theirs}.mlp.experts.gate_up_proj"):
            groups = read("n_group"), read("topk_group")
            how = (read("num_experts_per_tok"), bool(read("norm_topk_prob")), *groups, read("routed_scaling_factor"))
            mlp = experts(read, f"{theirs}.mlp", f"{ours}.mlp", Router("sigmoid_groups", *how))
        else:
            mlp = read.mlp(f"{theirs}.mlp", f"{ours}.mlp", read("intermediate_size"))
        blocks.append(block(read, place, attention, mlp, PRE))
    return framed(read, blocks)


def latent(read: Reading, theirs: str, ours: str, *, rotated: bool = True) -> LatentAttention:
    """Multi-head latent attention by DeepSeek's names."""
    for name, our in {
        "q_proj": "q", "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q", "o_proj": "out",
        "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv",
    }.items():  # fmt: skip
        read.module(f"{theirs}.{name}", f"{ours}.{our}")
    read.know("attention_bias", "head_dim", "qk_head_dim", "num_key_value_heads", "rope_interleave")
    module: Any = read.model.get_submodule(theirs)
    rope = read.rope(interleaved=bool(read("rope_interleave", True))) if rotated else None
    return LatentAttention(
        read("hidden_size"),
        read("num_attention_heads"),
        latent_dim=read("kv_lora_rank"),
        key_dim=read("qk_nope_head_dim"),
        rope_dim=read("qk_rope_head_dim"),
        value_dim=read("v_head_dim"),
        query_rank=read("q_lora_rank"),
        rope=rope,
        scale=module.scaling,
        eps=1e-6,
    )
