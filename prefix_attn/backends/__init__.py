"""The ways to compute one call; `prefix_attn.dispatch` chooses among them."""
