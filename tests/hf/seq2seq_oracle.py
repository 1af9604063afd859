"""What a patched encoder-decoder model must equal: PEFT's own prefix tuning, or a replicated prefix.

PEFT gives the decoder's self-attention a prefix and nothing else. So one of the tasks has prefixes in all three parts,
and is compared with their copies in front of every layer's keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import prefix_attn as pa
from tests.bank.models import quiet_peft
from tests.bank.test_seq2seq import peft_prefix
from tests.hf.seq2seq_replica import replicated
from tests.seq2seq import random_parts, tiny_seq2seq

#: Tokens of the task with prefixes in every part.
IN_ALL_PARTS = {"decoder": 12, "encoder": 3, "cross": 9}


class Seq2SeqOracle:
    """Adapters of several tasks on disk, and generate for any one of them.

    Args:
        lengths: prefix tokens by task.
        replicated_task: which of them has prefixes in all parts instead.
    """

    def __init__(self, family: str, folder: Path, lengths: Mapping[str, int], replicated_task: str) -> None:
        self.family = family
        self.replicated_task = replicated_task
        self.bare = tiny_seq2seq(family)
        self.parts = random_parts(pa.PrefixBank.for_model(self.bare), IN_ALL_PARTS)
        self.paths = {name: folder / name for name in lengths if name != replicated_task}
        with warnings.catch_warnings():
            quiet_peft()
            self.models = {name: peft_prefix(tiny_seq2seq(family), lengths[name]).eval() for name in self.paths}
            for name, path in self.paths.items():
                self.models[name].save_pretrained(path)

    def bank(self, model: Any) -> pa.PrefixBank:
        """A bank of all the tasks."""
        bank = pa.PrefixBank.for_model(model)
        for name, path in self.paths.items():
            bank.load(name, path)
        bank.add(self.replicated_task, self.parts)
        return bank

    def base(self, task: str | None) -> Any:
        """The transformers model that runs for a task."""
        return self.models[task].get_base_model() if task in self.models else self.bare

    def generate(self, task: str | None, **kwargs: Any) -> Any:
        """Generate with the task's prefix alone."""
        with warnings.catch_warnings(), self._with_prefix(task) as model:
            quiet_peft()
            return model.generate(**kwargs, return_dict_in_generate=True)

    def _with_prefix(self, task: str | None) -> AbstractContextManager[Any]:
        if task == self.replicated_task:
            return replicated(self.bare, self.parts)
        return nullcontext(self.models.get(task, self.bare))
