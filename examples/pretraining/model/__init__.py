"""The language model: layers in Flax NNX, and the model as the functions and parameters that a pipeline takes."""

from jaxpipe.deepseek.config import MODELS as MODELS
from jaxpipe.deepseek.config import ModelConfig as ModelConfig
from jaxpipe.deepseek.config import model_config as model_config
from pretraining.model.build import Model as Model
from pretraining.model.build import build_model as build_model
