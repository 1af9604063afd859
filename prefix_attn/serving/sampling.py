"""How a request's tokens are chosen, each request in its own way within one batch.

    p = softmax(logits / temperature), cut to the top_k most likely tokens, then to the fewest of probability top_p

Temperature 0 is greedy: the most likely token, the first of equals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from prefix_attn.errors import ShapeError

#: Of ``generate``, where a config that samples leaves them open.
AS_GENERATE: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class Sampling:
    """Attributes:
    temperature: at least 0, which is greedy.
    top_p: more than 0, at most 1, which keeps all tokens.
    top_k: at least 0, which keeps all tokens.

    Raises:
        ShapeError: one is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "a finite number, at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", self.top_k >= 0, "an integer, at least 0"),
        ):
            if not valid:
                raise ShapeError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampling:
        """As ``generate`` does with a model's own config: greedy unless it samples."""
        if not config.do_sample:
            return cls()
        given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return cls(**AS_GENERATE | {name: x for name, x in given.items() if x is not None})

    def but(self, **asked: Any) -> Sampling:
        """With these instead, but for those that are None."""
        return replace(self, **{name: x for name, x in asked.items() if x is not None})

    def arguments(self, vocabulary: int) -> dict[str, Any]:
        """What the engine's processors take of a request, for logits of so many tokens."""
        if self.temperature == 0:
            return {"greedy": True, "temperature": 1.0, "top_k": vocabulary, "top_p": 1.0}
        top_k = min(self.top_k or vocabulary, vocabulary)
        return {"greedy": False, "temperature": float(self.temperature), "top_k": top_k, "top_p": float(self.top_p)}


#: Makes transformers build the processors that take a request's own values in the place of these.
EACH_ITS_OWN = {"do_sample": True, "temperature": 0.5, "top_k": 2, "top_p": 0.5}


class Greedy(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Leaves the most likely token of a request that is greedy, the first of equals."""

    supported_kwargs = {"greedy": bool}  # noqa: RUF012, as transformers declares it
    ignored_kwargs = ()

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(0)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        greedy = [future.state.logit_processor_kwargs.get("greedy", False) for future in requests_with_new_token]
        return torch.tensor(greedy, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        greedy = tensor_arg[: scores.shape[0]].bool()  # [requests]
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(1, keepdim=True), True)
        return scores.masked_fill(greedy[:, None] & ~best, float("-inf"))


def add_greedy(processors: Any) -> None:
    """Put `Greedy` behind the processors of an engine that has not been started."""
    processors.logits_processor.append(Greedy())
    processors.tensors_required += 1
    processors._retrieve_processors_kwargs()
