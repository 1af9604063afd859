"""How a request's tokens are chosen, each request in its own way within one batch.

    p = softmax(logits / temperature), cut to the top_k most likely tokens, then to the fewest of probability top_p

Temperature 0 is greedy: the most likely token, the first of equals. One so small that dividing by it could leave the
range of floats is refused: for every request of the batch it would be the end.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from prefix_attn.errors import ShapeError

#: The least temperature that is not 0.
MIN_TEMPERATURE = 0.001

NOT_FINITE = (
    "the model's scores are no finite numbers: too large for its dtype, perhaps by what the prefix holds; load the "
    "model in a wider one"
)

#: Of ``generate``, where a config that samples leaves them open.
AS_GENERATE: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0, which is greedy, or at least 0.001.
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
            (
                "temperature",
                self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < float("inf"),
                f"0 (greedy) or a finite number of at least {MIN_TEMPERATURE}",
            ),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", 0 <= self.top_k < 2**31, "an integer from 0 to 2147483647"),
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

    def arguments(self) -> dict[str, Any]:
        """What `PROCESSORS` take of a request; without those that change nothing for it."""
        if self.temperature == 0:
            return {"greedy": 1}
        given = {"temperature": float(self.temperature), "top_k": self.top_k, "top_p": float(self.top_p)}
        return {name: x for name, x in given.items() if x != PROCESSORS[name].default}


class Processor(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Changes the scores ``[requests, vocabulary]`` of requests by a value that each has for itself.

    transformers has such processors, too; these do nothing in a step in which no request asks for it, where those sort
    the whole vocabulary for every request.
    """

    ignored_kwargs = ()
    name: str
    dtype: torch.dtype
    default: float

    def __init__(self) -> None:
        self.supported_kwargs = {self.name: float if self.dtype.is_floating_point else int}
        self.values: list[float] = []  # of the requests of this step

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(self._bits([self.default]).expand_as(int32_tensor))

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        arguments = [future.state.logit_processor_kwargs for future in requests_with_new_token]
        self.values = [given.get(self.name, self.default) for given in arguments]
        return self._bits(self.values)

    def _bits(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=self.dtype).view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        if all(value == self.default for value in self.values):
            return scores
        return self.process(scores, tensor_arg[: scores.shape[0], None].view(self.dtype))

    @abstractmethod
    def process(self, scores: Tensor, values: Tensor) -> Tensor:
        """The scores of one step; values: ``[requests, 1]``."""


class Temperature(Processor):
    """Divides by it."""

    name, dtype, default = "temperature", torch.float32, 1.0

    def process(self, scores: Tensor, values: Tensor) -> Tensor:
        return scores / values


class TopK(Processor):
    """Leaves the so many most likely tokens, and those that are as likely as the last of them; 0 leaves all."""

    name, dtype, default = "top_k", torch.int32, 0

    def process(self, scores: Tensor, values: Tensor) -> Tensor:
        most = min(int(max(self.values)), scores.shape[1])
        best = scores.topk(most).values  # [requests, most]
        last = best.gather(1, (values - 1).clamp(0, most - 1).long())
        return scores.masked_fill((scores < last) & (values > 0), float("-inf"))


class TopP(Processor):
    """Leaves the fewest of the most likely tokens that have this probability together."""

    name, dtype, default = "top_p", torch.float32, 1.0

    def process(self, scores: Tensor, values: Tensor) -> Tensor:
        ordered, tokens = scores.sort(descending=True)
        probabilities = ordered.softmax(1)
        before = probabilities.cumsum(1) - probabilities  # of the tokens that are more likely
        cut = (before >= values) & (values < 1)
        cut[:, 0] = False
        return scores.masked_fill(torch.zeros_like(cut).scatter_(1, tokens, cut), float("-inf"))


class Greedy(Processor):
    """Leaves the most likely token, the first of equals."""

    name, dtype, default = "greedy", torch.int32, 0

    def process(self, scores: Tensor, values: Tensor) -> Tensor:
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(1, keepdim=True), True)
        return scores.masked_fill((values > 0) & ~best, float("-inf"))


class Finite(Processor):
    """Fails the requests that have no scores to choose by, whose tokens could not be drawn: else all would fail."""

    name, dtype, default = "finite", torch.int32, 0

    def __init__(self, fail: Callable[[str, str], None]) -> None:
        super().__init__()
        self._fail = fail
        self._requests: list[str] = []  # of this step

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        self._requests = [future.state.request_id for future in requests_with_new_token]
        return super().prepare_tensor_args(requests_with_new_token)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        broken = ~scores.amax(1).isfinite()
        rows = broken.nonzero()[:, 0].tolist()
        if not rows:
            return scores
        for row in rows:
            if row < len(self._requests):
                self._fail(self._requests[row], NOT_FINITE)
        return scores.masked_fill(broken[:, None], 0.0)

    def process(self, scores: Tensor, values: Tensor) -> Tensor:
        return scores


#: In their order, by the name of their value.
PROCESSORS: dict[str, type[Processor]] = {kind.name: kind for kind in (Temperature, TopK, TopP, Greedy)}


def install(manager: Any) -> None:
    """Give a manager that has not been started these processors instead of its own."""
    processors = manager.logit_processor
    ours = [Finite(manager.fail_request), *(kind() for kind in PROCESSORS.values())]
    processors.logits_processor = LogitsProcessorList(ours)
    processors.tensors_required = len(ours)
    processors.do_processing = True
    processors._retrieve_processors_kwargs()
