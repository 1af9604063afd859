"""Which of its own keys a row may see, in three numbers instead of a matrix.

transformers builds its masks once per forward pass through AttentionMaskInterface and hands the result to every layer.
Ours is an int32 tensor ``[batch, 1, 1, 2 or 3]`` holding ``(kv_start, kv_len[, window])`` per row: four axes, because
transformers passes a mask with four axes through untouched (static caches build it before the forward pass); the third
number is there only for sliding-window layers, so that its presence can be seen without reading the device.

With ``q_offset`` and ``kv_offset`` the positions of the first query and the first cached key, the alignment of
`prefix_attention` is ``kv_len = q_offset + q_len - kv_offset``: this covers dynamic, static and sliding caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from prefix_attn.errors import ShapeError, UnsupportedModel
from prefix_attn.hf.scope import scope


@dataclass(frozen=True)
class RequestMask:
    """The unpacked mask of one layer: int32 views ``[batch]``, and the window in tokens."""

    kv_start: Tensor
    kv_len: Tensor
    window: int | None

    @classmethod
    def unpack(cls, mask: Tensor | None, module: nn.Module, window_of_layer: int | None) -> RequestMask:
        """Read a layer's mask; the window must be the one the layer itself names, where it names one."""
        if mask is None or mask.dtype != torch.int32 or mask.ndim != 4 or mask.shape[-1] not in (2, 3):
            got = "None" if mask is None else f"{mask.dtype} {list(mask.shape)}"
            raise UnsupportedModel(
                f"attention_mask: expected a causal or a causal sliding-window mask, got {got}. Pass a 2D padding "
                "mask (1 = token, 0 = padding); packed sequences, bidirectional, chunked and custom 4D masks "
                "do not say what becomes of the prefix"
            )
        config: Any = module.config
        window = config.sliding_window if mask.shape[-1] == 3 else None
        if window_of_layer is not None and window_of_layer != window:
            raise UnsupportedModel(
                f"{type(module).__name__}: the layer slides over {window_of_layer} tokens, but its mask over {window}"
            )
        start, end, *_ = mask.flatten(1).unbind(1)  # half the time of two indexings, at every layer
        return cls(start, end, window)


def request_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Build the mask for AttentionMaskInterface; without tasks, build what the unpatched model would."""

    def theirs(implementation: str) -> Tensor | None:
        mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, config=config,
            device=device, **kwargs,
        )  # fmt: skip
        return mask

    if (implementation := scope().implementation) is not None:
        return theirs(implementation)
    try:
        window = _window(mask_function)
    except _Unknown:  # attention refuses it, if it is used at all
        return theirs("eager")
    if window is not None and window != getattr(config, "sliding_window", None):
        raise UnsupportedModel(
            f"sliding window: the mask slides over {window} tokens, the config says "
            f"{getattr(config, 'sliding_window', None)}"
        )
    end = q_offset + q_length - kv_offset
    ends = (
        end.to(device).expand(batch_size) if isinstance(end, Tensor) else torch.full((batch_size,), end, device=device)
    )
    if attention_mask is None:
        starts = torch.zeros_like(ends)
    else:
        starts = _first_key(attention_mask, kv_offset, end, ends, q_length)
    numbers = [starts, ends] if window is None else [starts, ends, torch.full_like(ends, window)]
    return torch.stack(numbers, dim=1).int()[:, None, None]


def check_implementation(family: str, stack: Any, ours: str) -> None:
    """Raise `UnsupportedModel` for layers whose attention implementation has no mask function; ``ours`` has one."""
    implementation = stack.config._attn_implementation
    if implementation != ours and implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModel(
            f"{family}: attn_implementation={implementation!r} has no mask function; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )


class _Unknown(Exception):
    """A mask function whose meaning for prefix tokens is not known."""


def _window(mask_function: Callable[..., Any]) -> int | None:
    """The sliding window of a mask function, None for a plain causal one; raises `_Unknown` for any other.

    Functions are recognised by what they are made of. Blocks of tokens that see each other (images) may be joined to
    the causal mask, as long as there is none in this pass.
    """
    if mask_function is causal_mask_function:
        return None
    joined = _closure(mask_function, "or_masks").get("mask_functions", ())
    if len(joined) == 2 and _no_blocks(joined[1]):
        return _window(joined[0])
    parts = _closure(mask_function, "and_masks").get("mask_functions", ())
    windows = [_closure(part, "sliding_window_overlay").get("sliding_window") for part in parts]
    if len(parts) == 2 and sum(isinstance(window, int) for window in windows) == 1:
        other = parts[0] if windows[0] is None else parts[1]
        if _window(other) is None:
            return next(window for window in windows if isinstance(window, int))
    raise _Unknown


def _no_blocks(function: Callable[..., Any]) -> bool:
    blocks = _closure(function, "blockwise_overlay").get("block_sequence_ids")
    return isinstance(blocks, Tensor) and bool((blocks == -1).all())


def _closure(function: Callable[..., Any], factory: str) -> dict[str, Any]:
    """The variables a function made by transformers' ``factory`` closed over; empty for any other function."""
    code = getattr(function, "__code__", None)
    if code is None or not function.__qualname__.startswith(f"{factory}.<locals>."):
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


def _first_key(padding: Tensor, kv_offset: int, end: int | Tensor, ends: Tensor, q_length: int) -> Tensor:
    """First valid key of each row, ``[batch]``, from a 2D mask over all tokens; rows must be ``0*1*0*``.

    Zeros behind the ones belong to queries that are padding themselves, whose outputs mean nothing.
    """
    if isinstance(end, int) and padding.shape[1] < kv_offset + end:
        raise ShapeError(
            f"attention_mask: expected at least {kv_offset + end} columns, one for each token seen so far, "
            f"got {padding.shape[1]}"
        )
    valid = padding[:, kv_offset:].to(device=ends.device, dtype=torch.int32)
    valid = valid * (torch.arange(valid.shape[1], device=ends.device) < ends[:, None])
    start, last = row_spans(valid, may_wait=q_length > 1)
    return torch.where(last > 0, start, ends)


def row_spans(padding: Tensor, may_wait: bool) -> tuple[Tensor, Tensor]:
    """The first token of each row and one past its last, ``[batch]`` each; 0 and 0 for a row without any.

    Args:
        padding: ``[batch, tokens]``, 1 = token, 0 = padding; rows must be ``0*1*0*``.
        may_wait: whether a GPU may be waited for, to raise an error that says what is wrong.
    """
    valid = padding.to(torch.int32)
    slot = torch.arange(valid.shape[1], device=valid.device)
    start = valid.argmax(dim=1)
    end = (valid * (slot + 1)).amax(dim=1)
    whole = ((end - start == valid.sum(dim=1)) | (end == 0)).all()
    message = (
        "attention_mask: expected each row's tokens side by side (zeros before or after them), got zeros between "
        "tokens; pad all turns of a conversation on the left"
    )
    if torch.compiler.is_compiling() or (valid.is_cuda and not may_wait):
        torch._assert_async(whole, message)
    elif not whole:
        raise UnsupportedModel(message)
    return start, end
