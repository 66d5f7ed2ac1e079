"""A decoder-only language model pretrained through a pipeline: model, data and trainer."""
