"""An encoder's output remembers whose prefixes it was computed with, as caches do (caches.py).

It may be made once and given to several calls (``encoder_outputs``). Made with other prefixes of the encoder than the
call's tasks have, or with none, it would answer for other tasks than those named. Copies and slices of it do not
remember, and are taken as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import cache_among
from prefix_attn.bank.geometry import ENCODER
from prefix_attn.errors import IncompatiblePrefix
from prefix_attn.hf.adapters import RELAYED
from prefix_attn.hf.attention import KEYWORD
from prefix_attn.hf.caches import MARK, Mark, has_tokens
from prefix_attn.hf.generate import checked_for_batch
from prefix_attn.hf.positions import prefix_lengths
from prefix_attn.hf.wiring import PROBE, named_arguments


def remember_tasks_of_states(encoder: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the encoder: mark its last states with the tasks of the call, None without."""
    if not torch.compiler.is_compiling():
        setattr(output[0], MARK, Mark.of(kwargs[KEYWORD].bank, kwargs[KEYWORD].task_ids))


class StatesHook:
    """Forward pre-hook of the model: compares a call's tasks with those of the encoder's output it is given."""

    def __init__(self, bank: PrefixBank) -> None:
        self.bank = bank

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = named_arguments(model, args, kwargs)
        states, cache = kwargs.get("encoder_outputs"), cache_among(kwargs)
        tasks = kwargs.get("task_ids", kwargs.get(RELAYED))
        if states is not None and tasks is not PROBE and not (cache is not None and has_tokens(cache)):
            check_tasks_of_states(self.bank, states, tasks)


def check_tasks_of_states(bank: PrefixBank, encoder_outputs: Any, task_ids: Any) -> None:
    """Raise `IncompatiblePrefix` where the encoder ran with another prefix than the row's task has, or with none."""
    states = encoder_outputs[0]
    if torch.compiler.is_compiling() or not hasattr(states, MARK):
        return
    mark: Mark = getattr(states, MARK)
    if mark.is_of(None if task_ids is None else bank, task_ids):
        return  # every step of generate: known without reading the device
    none = torch.full((len(states),), -1, dtype=torch.int32, device=bank.device)
    seen = none if mark.task_ids is None else mark.task_ids
    given = none if task_ids is None else checked_for_batch(bank, task_ids, len(states))
    lens = bank.layer(0, ENCODER).lens.to(bank.device)
    prefixed = (prefix_lengths(lens, seen) > 0) | (prefix_lengths(lens, given) > 0)
    other_bank = mark.bank not in (None, bank)
    if bool((((seen != given) | other_bank) & prefixed).any()):
        raise IncompatiblePrefix(
            f"encoder_outputs: the encoder ran with tasks {seen.tolist()} (by id; -1 is none), got {given.tolist()}, "
            "some with prefixes in the encoder; run it with the same task_ids: model.get_encoder()(..., task_ids=...)"
        )
