"""The mixture-of-experts layer: router, dispatch, permutation, exchange, experts, combine. Internal."""
