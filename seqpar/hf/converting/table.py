"""Which families are converted, by ``model_type``."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from seqpar.hf.converting import attention, gpt, recurrent
from seqpar.hf.converting.reading import Reading
from seqpar.models.decoder import Decoder

FAMILIES: Mapping[str, Callable[[Reading], Decoder]] = MappingProxyType(
    {
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), attention.llama),
        **dict.fromkeys(("gemma2", "gemma3_text"), attention.gemma),
        **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), attention.mixture),
        "olmo2": attention.olmo2,
        "smollm3": attention.smollm3,
        "granite": attention.granite,
        "deepseek_v3": attention.deepseek_v3,
        **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), recurrent.qwen3_next),
        "gpt2": gpt.gpt2,
        "gpt_neox": gpt.gpt_neox,
        "olmo_hybrid": recurrent.olmo_hybrid,
        "bamba": recurrent.bamba,
    }
)
