"""Serving: an `Engine` that answers requests of many tasks together, and an HTTP server in front of it."""

from prefix_attn.serving.app import create_app
from prefix_attn.serving.engine import Engine, EngineFailed, Piece, Request
from prefix_attn.serving.sampling import Sampling

__all__ = ["Engine", "EngineFailed", "Piece", "Request", "Sampling", "create_app"]
