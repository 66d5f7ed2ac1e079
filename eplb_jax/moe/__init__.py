"""The mixture-of-experts layer: router, dispatch, exchange, experts, combine; internal."""
