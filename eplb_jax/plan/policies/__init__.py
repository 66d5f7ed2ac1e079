"""Policies beyond DeepSeek's, one a module, all of the same return type; internal, `eplb_jax` exports them."""
