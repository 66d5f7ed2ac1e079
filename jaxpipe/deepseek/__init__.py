"""DeepSeek-V3's model, once: sizes, attention, layers, embedding and head, and all of them as pipeline stages.

What `__all__` names is public; all modules below are internal and may change without notice.

`build_model` gives what `jaxpipe.value_and_grad` takes; `attend`, `attend_cached` and `apply_block` are the layer as
functions of arrays, for those who put it together otherwise.
"""

from jaxpipe.deepseek.arrange import Arrangement
from jaxpipe.deepseek.block import DenseBlock, MoEBlock, apply_block
from jaxpipe.deepseek.config import MODELS, LayerConfig, ModelConfig, model_config
from jaxpipe.deepseek.head import EmbeddingAndHead
from jaxpipe.deepseek.hf_load import load
from jaxpipe.deepseek.hf_save import save
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import RMSNorm, SwiGLU, feed_forward, rms_norm
from jaxpipe.deepseek.mla import MLA, Latents, MLAParams, attend, attend_cached, init_mla, keep_mla
from jaxpipe.deepseek.model import DeepSeekModel, build_model
from jaxpipe.deepseek.mtp import MTPLayer
from jaxpipe.deepseek.rope import Rope, Yarn, rotate

__all__ = [
    "MLA",
    "MODELS",
    "Arrangement",
    "DeepSeekModel",
    "DenseBlock",
    "EmbeddingAndHead",
    "Latents",
    "LayerConfig",
    "MLAParams",
    "MTPLayer",
    "MoEBlock",
    "ModelConfig",
    "RMSNorm",
    "Rope",
    "SwiGLU",
    "Yarn",
    "apply_block",
    "attend",
    "attend_cached",
    "build_model",
    "causal_attention",
    "feed_forward",
    "init_mla",
    "keep_mla",
    "load",
    "model_config",
    "rms_norm",
    "rotate",
    "save",
]
