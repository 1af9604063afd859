"""Answer requests with a patched model: check and tokenise a line, then run batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.format import checksum
from prefix_attn.bank.seq2seq import encoder_positions
from prefix_attn.bank.tokens import tokenised
from prefix_attn.cli.requests import ANEW, Line, Row, cut
from prefix_attn.context import room_for_new
from prefix_attn.errors import ContextOverflow, PrefixAttnError, UnknownTask

#: Settings of sampling and beams that a checkpoint may bring along; transformers warns of them where they mean nothing.
NOT_GREEDY = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "early_stopping",
    "length_penalty",
)  # fmt: skip


#: Settings by which an answer would depend on its batch or be no plain text, or that ask for what is not there.
NOT_PLAIN = (
    "forced_eos_token_id", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states", "stop_strings", "prompt_lookup_num_tokens", "is_assistant", "assistant_early_exit",
    "prefill_chunk_size", "max_time", "num_return_sequences",
)  # fmt: skip


class Answerer:
    """Greedy answers of a patched model, of a prompt for its decoder or, where it has one, for its encoder.

    Args:
        model: patched with ``bank``; its generation settings are made greedy.
        tokenizer: the model's; without a padding token, its end token pads.
        bank: as given to the patch.
    """

    def __init__(self, model: Any, tokenizer: Any, bank: PrefixBank) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.bank = bank
        # Those whose prefix opens the sequence itself, so that prompts get no BOS.
        self.made_from_text = {*bank.named("text").values()}
        self._made_by: dict[str | None, str] = {}
        self.encodes: bool = model.config.is_encoder_decoder
        settings = model.generation_config
        end = tokenizer.eos_token_id if settings.eos_token_id is None else settings.eos_token_id
        self.ends: list[int] = [] if end is None else [end] if isinstance(end, int) else list(end)
        pads = [token for token in (tokenizer.pad_token_id, *self.ends) if token is not None]
        self.pad: int = pads[0] if pads else 0
        if not self.encodes:
            settings.min_length = None  # counts the prompt, and what pads it
        settings.update(do_sample=False, num_beams=1, **dict.fromkeys((*NOT_GREEDY, *NOT_PLAIN)))

    def made_by(self, task: str | None) -> str:
        """What tells whether an answer came from this model in its dtype, and this prefix: 12 digits of a digest."""
        if task not in self._made_by:
            digest = hashlib.sha256(f"{self.bank.base.fingerprint} {self.bank.dtype}".encode())
            for layers in [] if task is None else [self.bank.key_values(task, part) for part in self.bank.parts]:
                tensors = {f"{name}.{i}": x for i, kv in enumerate(layers) for name, x in zip("kv", kv, strict=True)}
                digest.update(checksum(tensors).encode())
            self._made_by[task] = digest.hexdigest()[:12]
        return self._made_by[task]

    def check_made(self, earlier: Iterable[tuple[str | None, str]]) -> None:
        """Raise `PrefixAttnError` if answers of an earlier run, (task, made_by), came from elsewhere."""
        for task, digest in earlier:
            known = task is None or task in self.bank
            if known and digest != self.made_by(task):
                whose = "rows without a task" if task is None else f"task {task!r}"
                raise PrefixAttnError(f"--output: in the existing file {whose} was answered by another model, dtype or "
                                      f"prefix; {ANEW}")  # fmt: skip

    def row(self, index: int, line: Line) -> Row:
        """Make a line ready to run.

        Args:
            index: of the line among the input's.

        Raises:
            PrefixAttnError: the line is bad, its task is unknown, or it does not fit the model's context.
        """
        if line.error is not None:
            raise PrefixAttnError(line.error)
        if line.task is not None and line.task not in self.bank:
            raise UnknownTask(f"task: expected one of {self.bank.names}, or null for no prefix, got {line.task!r}")
        assert line.prompt is not None, "a line without an error has a prompt"
        tokens = tokenised(self.tokenizer, line.prompt, opens=line.task not in self.made_from_text, verbose=False)
        if not tokens:
            raise PrefixAttnError("prompt: expected at least one token, got none")
        assert line.new_tokens is not None, "a line without an error says how many"
        prefix = 0 if line.task is None else self.bank.prefix_len(line.task)
        row = Row(index, line.task, tokens, prefix, line.new_tokens, self.encodes)
        self._check_context(row)
        return row

    def _check_context(self, row: Row) -> None:
        if self.encodes:
            most = encoder_positions(self.model)
            if most is not None and len(row.tokens) > most:
                raise ContextOverflow(
                    f"prompt: {len(row.tokens)} tokens exceed the encoder's {most} positions; shorten the prompt"
                )
        limit = self.bank.context_limit
        if limit is not None and row.new_tokens > (room := room_for_new(limit, row.prefix, row.start)):
            advice = f"lower max_new_tokens to {room}" if room > 0 else "shorten the prompt"
            start = "a start token" if self.encodes else f"{len(row.tokens)} tokens"
            raise ContextOverflow(f"prompt: {start}, a prefix of {row.prefix} and {row.new_tokens} new tokens exceed "
                                  f"the {'decoder' if self.encodes else 'model'}'s {limit} positions; "
                                  f"{advice}")  # fmt: skip

    def answer(self, rows: Sequence[Row]) -> list[tuple[str, int]]:
        """Text and number of new tokens (its end included) of each row of one batch.

        Raises:
            PrefixAttnError: the device has too little memory for so many rows.
        """
        width = max(len(row.tokens) for row in rows)
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            start = 0 if self.encodes else width - len(row.tokens)  # an encoder may count positions from the left
            tokens = slice(start, start + len(row.tokens))
            ids[i, tokens] = torch.tensor(row.tokens)
            mask[i, tokens] = 1
        device = self.model.device
        try:
            sequences = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                task_ids=[row.task for row in rows],
                max_new_tokens=max(row.new_tokens for row in rows),
                pad_token_id=self.pad,
                eos_token_id=self.ends or None,
            )
        except torch.OutOfMemoryError as error:
            raise PrefixAttnError(f"--batch-size: {len(rows)} rows of {width} tokens exceed the memory of {device}; "
                                  "run again with a smaller one, which continues the output") from error  # fmt: skip
        generated = sequences[:, 1 if self.encodes else width :].tolist()
        kept = [cut(tokens, row.new_tokens, self.ends) for tokens, row in zip(generated, rows, strict=True)]
        return [(self.tokenizer.decode(tokens, skip_special_tokens=True), len(tokens)) for tokens in kept]
