"""Policies beyond DeepSeek's, one a module, all of the same return type; `eplb_jax` exports them. Internal."""
