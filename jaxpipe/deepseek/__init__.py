"""DeepSeek-V3's model, once: sizes, attention, layers, embedding and head, and all of them as pipeline stages."""

from jaxpipe.deepseek.config import MODELS, LayerConfig, ModelConfig, model_config
from jaxpipe.deepseek.kernels import causal_attention

__all__ = ["MODELS", "LayerConfig", "ModelConfig", "causal_attention", "model_config"]
