"""Serving: an `Engine` that answers requests of many tasks together. The HTTP server in front of it is in app.py."""

from prefix_attn.serving.engine import Engine, EngineFailed, Piece, Request
from prefix_attn.serving.sampling import Sampling

__all__ = ["Engine", "EngineFailed", "Piece", "Request", "Sampling"]
