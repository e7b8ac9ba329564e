"""Decoders before Llama: GPT-2 and GPT-NeoX, with LayerNorm, biases and a plain feed-forward part."""

from seqpar.hf.converting.reading import Reading
from seqpar.layers.attention.softmax_attention import SoftmaxAttention
from seqpar.layers.parts.block import Block
from seqpar.layers.parts.mlp import MLP
from seqpar.models.decoder import Decoder, Frame


def gpt2(read: Reading) -> Decoder:
    """Learned positions; matrices are written the other way round."""
    dim, heads, eps = read("n_embd"), read("n_head"), read("layer_norm_epsilon")
    if not read("scale_attn_weights") or read("scale_attn_by_inverse_layer_idx") or read("add_cross_attention"):
        raise ValueError("gpt2: attention is known with scale_attn_weights alone, and without cross attention")
    read.know("reorder_and_upcast_attn", "n_inner", "hidden_size", "num_attention_heads")
    read.know("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")  # of another head
    blocks = []
    for place in range(read("n_layer")):
        theirs, ours = f"transformer.h.{place}", f"blocks.{place}"
        qkv = (f"{ours}.mixer.q", f"{ours}.mixer.k", f"{ours}.mixer.v")
        read.module(f"{theirs}.attn.c_attn", *qkv, sizes=(dim, dim, dim), turned=True)
        for their, our in {"attn.c_proj": "mixer.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}.items():
            read.module(f"{theirs}.{their}", f"{ours}.{our}", turned=True)
        read.module(f"{theirs}.ln_1", f"{ours}.mixer_norm")
        read.module(f"{theirs}.ln_2", f"{ours}.mlp_norm")
        hidden = read.theirs[f"{theirs}.mlp.c_fc.weight"].shape[1]
        attention = SoftmaxAttention(dim, heads, rope_base=None, bias=True, out_bias=True)
        mlp = MLP(dim, hidden, activation=read.activation("activation_function"), gated=False, bias=True)
        blocks.append(Block(dim, attention, 1, mlp=mlp, norm="layer", eps=eps))
    read.module("transformer.wte", "embedding")
    read.module("transformer.wpe", "positions")
    read.module("transformer.ln_f", "norm")
    tied = bool(read("tie_word_embeddings"))
    if not tied:
        read.module("lm_head", "head")
    positions = read.theirs["transformer.wpe.weight"].shape[0]
    return Decoder.assembled(
        blocks, Frame(read("vocab_size"), dim, norm="layer", eps=eps, tied=tied, positions=positions)
    )


def gpt_neox(read: Reading) -> Decoder:
    """Parallel or not; rotary positions of some channels; queries, keys and values by heads."""
    dim, heads, eps = read("hidden_size"), read("num_attention_heads"), read("layer_norm_eps")
    order = "parallel" if read("use_parallel_residual") else "pre"
    width, rope, blocks = dim // heads, read.rope(), []
    read.know("attention_bias", "rotary_pct", "rotary_emb_base", "intermediate_size")
    for place in range(read("num_hidden_layers")):
        theirs, ours = f"gpt_neox.layers.{place}", f"blocks.{place}"
        qkv = (f"{ours}.mixer.q", f"{ours}.mixer.k", f"{ours}.mixer.v")
        read.module(f"{theirs}.attention.query_key_value", *qkv, sizes=(width, width, width), groups=heads)
        names = {"attention.dense": "mixer.out", "mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down"}
        names |= {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}
        for their, our in names.items():
            read.module(f"{theirs}.{their}", f"{ours}.{our}")
        bias = f"{theirs}.attention.dense.bias" in read.theirs
        hidden = read.theirs[f"{theirs}.mlp.dense_h_to_4h.weight"].shape[0]
        attention = SoftmaxAttention(dim, heads, rope=rope, bias=bias, out_bias=bias)
        mlp = MLP(dim, hidden, activation=read.activation(), gated=False, bias=True)
        blocks.append(Block(dim, attention, 1, mlp=mlp, norm="layer", eps=eps, order=order))
    read.module("gpt_neox.embed_in", "embedding")
    read.module("gpt_neox.final_layer_norm", "norm")
    tied = bool(read("tie_word_embeddings"))
    if not tied:
        read.module("lm_head" if read.has("lm_head") else "embed_out", "head")
    return Decoder.assembled(blocks, Frame(read("vocab_size"), dim, norm="layer", eps=eps, tied=tied))
