"""DeepSeek-V3's model, once: sizes, attention, layers, embedding and head, and all of them as pipeline stages.

What `__all__` names is public; all modules below are internal and may change without notice.

`build_model` gives what `jaxpipe.value_and_grad` takes; `attend`, `attend_cached` and `apply_block` are the layer as
functions of arrays, for those who put it together otherwise. `serve` and `Server` run it without a pipeline.
"""

from jaxpipe.deepseek.arrange import Arrangement
from jaxpipe.deepseek.block import DenseBlock, MoEBlock, apply_block
from jaxpipe.deepseek.config import MODELS, LayerConfig, ModelConfig, model_config
from jaxpipe.deepseek.costs import LayerCosts
from jaxpipe.deepseek.generate import Generated, Sampling, Scores, Server
from jaxpipe.deepseek.head import EmbeddingAndHead
from jaxpipe.deepseek.hf_config import from_hf_config, to_hf_config
from jaxpipe.deepseek.hf_load import load
from jaxpipe.deepseek.hf_save import save
from jaxpipe.deepseek.kernels import causal_attention
from jaxpipe.deepseek.layers import RMSNorm, SwiGLU, feed_forward, rms_norm
from jaxpipe.deepseek.lora import LoRA, merge
from jaxpipe.deepseek.mla import MLA, Latents, MLAParams, attend, attend_cached, init_mla, keep_mla
from jaxpipe.deepseek.model import DeepSeekModel, build_model, sharing_pays
from jaxpipe.deepseek.mtp import MTPLayer
from jaxpipe.deepseek.rope import Rope, Yarn, rotate
from jaxpipe.deepseek.serving import ServedModel, serve, serving_mesh

__all__ = [
    "MLA",
    "MODELS",
    "Arrangement",
    "DeepSeekModel",
    "DenseBlock",
    "EmbeddingAndHead",
    "Generated",
    "Latents",
    "LayerConfig",
    "LayerCosts",
    "LoRA",
    "MLAParams",
    "MTPLayer",
    "MoEBlock",
    "ModelConfig",
    "RMSNorm",
    "Rope",
    "Sampling",
    "Scores",
    "ServedModel",
    "Server",
    "SwiGLU",
    "Yarn",
    "apply_block",
    "attend",
    "attend_cached",
    "build_model",
    "causal_attention",
    "feed_forward",
    "from_hf_config",
    "init_mla",
    "keep_mla",
    "load",
    "merge",
    "model_config",
    "rms_norm",
    "rotate",
    "save",
    "serve",
    "serving_mesh",
    "sharing_pays",
    "to_hf_config",
]
