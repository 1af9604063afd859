"""What sliding-window layers hide of a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefix_attn.bank.config import setting


@dataclass(frozen=True)
class SlidingWindow:
    """Layers that see the last ``tokens`` tokens, the query's own included.

    Behind a prefix of m tokens, own token i (from 0) of a row sees slot j while ``m + i - j < tokens``: all of the
    prefix up to i = tokens - m - 1, nothing of it from i = tokens - 1 on.
    """

    tokens: int
    layers: tuple[int, ...]

    @classmethod
    def of(cls, config: Any) -> SlidingWindow | None:
        """That of a (text) config; None where every layer sees everything."""
        tokens, kinds, sliding = setting(config, "sliding_window"), setting(config, "layer_types"), "sliding"
        if setting(config, "attention_layers"):  # GPT-Neo's words for the same
            tokens, kinds, sliding = config.window_size, config.attention_layers, "local"
        if not isinstance(tokens, int):
            return None
        kinds = kinds or [sliding] * config.num_hidden_layers
        layers = tuple(i for i, kind in enumerate(kinds) if sliding in kind)
        return cls(tokens, layers) if layers else None

    def describe(self, layers: int) -> str:
        """One line for a model of ``layers`` layers."""
        return (
            f"sliding window: {len(self.layers)} of {layers} layers see {self.tokens} tokens; there a row sees all of "
            f"its m prefix tokens up to its token {self.tokens} - m, and none after its token {self.tokens - 1}"
        )
