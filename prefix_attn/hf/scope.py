"""What the forward pass under way in a thread needs to know, where keywords do not reach; its first hook sets it."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor


class _Scope(threading.local):
    implementation: str | None = None  # the model's own, for a pass without tasks; None: a `RequestMask`
    batch: Any = None  # the `Batch` of a model that does not pass keywords on to its layers
    positions: Tensor | None = None  # the decoder's ``[batch, q_len]``, for a table that looks them up; None: its own
    recorded: Any = None  # where to note the attention calls of a pass without tasks, if anywhere


scope = _Scope()
