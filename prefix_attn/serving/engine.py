"""Requests of many tasks, answered together: continuous batching of a patched model, for asyncio.

The engine's thread runs the model; `Engine.answer` may be called from any event loop. What would stop the thread for
everybody (a token that the model does not have, a request that the cache cannot hold) is refused before it gets there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.forward import FAILURES
from prefix_attn.context import room_for_new
from prefix_attn.errors import ContextOverflow, PrefixAttnError, ShapeError, UnsupportedModel
from prefix_attn.hf.continuous import refuse_old_engines
from prefix_attn.hf.wiring import bank_of
from prefix_attn.serving.sampling import Sampling, install

#: Tokens of a page of the cache.
PAGE = 64

#: Settings of a generation config that change tokens, that the engine has no part for, and their values that do not.
UNSUPPORTED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []),
    "sequence_bias": (None,), "min_length": (None, 0), "min_new_tokens": (None, 0), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "exponential_decay_length_penalty": (None,), "min_p": (None, 0.0),
    "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "guidance_scale": (None, 1.0),
    "watermarking_config": (None,), "num_beams": (None, 1), "stop_strings": (None, []), "top_h": (None,),
    "penalty_alpha": (None, 0.0), "dola_layers": (None,), "max_time": (None,), "token_healing": (None, False),
}  # fmt: skip


class EngineFailed(PrefixAttnError):
    """The engine does not run (any more), or could not answer; the message says why."""


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        tokens: of the prompt, at least one.
        task: a name in the bank, or an id of it; None for no prefix.
        new_tokens: the most to answer with; None for what the model's generation config says (``max_new_tokens``), or
            else for as many as the model's context holds.
        sampling: how they are chosen.
    """

    tokens: Sequence[int]
    task: str | int | None = None
    new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)


class Piece(NamedTuple):
    """The next tokens of an answer; ``finish`` with the last: "stop" by the model's end token, "length" otherwise."""

    tokens: list[int]
    finish: Literal["stop", "length"] | None


class Engine:
    """Answers requests with a patched model.

    Args:
        model: patched (`prefix_attn.patch`), decoder-only. Its bank may change while the engine runs; a request ends
            with the prefix it began with.
        cache_tokens: tokens of the cache that all running requests share, rounded up to pages; by default what memory
            allows. (Layers that slide have pages of their own, so that the cache may hold more.)
        plain: do without what the model's generation config asks for and the engine cannot do, such as a penalty of
            repetitions; where there is such a thing, False refuses the model.

    Raises:
        UnsupportedModel: the model is not patched, has an encoder, or is one for which continuous batching is refused;
            or see ``plain``.
        ShapeError: a cache of ``cache_tokens`` does not fit into memory, or holds nothing.
    """

    def __init__(self, model: Any, cache_tokens: int | None = None, plain: bool = False) -> None:
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(f"{type(model).__name__}: expected a decoder-only model; transformers has no "
                                   "continuous batching for encoder-decoders, call generate")  # fmt: skip
        refuse_old_engines()
        bank = _bank_of(model)
        settings = {name: getattr(model.generation_config, name, None) for name in UNSUPPORTED_SETTINGS}
        asked = {name: x for name, x in settings.items() if x not in UNSUPPORTED_SETTINGS[name]}
        if asked and not plain:
            raise UnsupportedModel(f"{type(model).__name__}: its generation config asks for {asked}, which continuous "
                                   "batching does not do; pass plain=True (--plain) to answer without")  # fmt: skip
        self.bank: PrefixBank = bank
        self.defaults = Sampling.of(model.generation_config)
        self._default_new_tokens: int | None = model.generation_config.max_new_tokens
        ends = model.generation_config.eos_token_id
        self.ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._inputs: int = model.get_input_embeddings().weight.shape[0]
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=None if cache_tokens is None else max(-(-cache_tokens // PAGE), 1),
        )
        wanted = GenerationConfig(eos_token_id=self.ends or -1, pad_token_id=0, do_sample=True)
        self._family = type(model).__name__
        try:
            self._manager = model.init_continuous_batching(wanted, config)
            install(self._manager)
            self._manager.warmup()  # makes the cache, so that too little memory is known here
        except PrefixAttnError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ShapeError(f"cache_tokens: too little memory for {cache_tokens or 'the cache'}: {error}") from error
        except FAILURES as error:
            raise self._refusal(error) from error
        # not in older versions, where there is no manager either
        from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

        self.cache_tokens: int = infer_max_single_request_tokens(self._manager.batch_processor.cache)

    def start(self) -> None:
        """Start the thread that answers, and wait for its first answer, of two tokens.

        Raises:
            UnsupportedModel: it fails: transformers' engine does not run with this family.
        """
        self._manager.start()
        name, first = uuid.uuid4().hex, None
        self._manager.add_request([0, 0], name, 2, eos_token_id=-1, **Sampling().arguments())
        while first is None and self.failure is None:
            first = self._manager.get_result(name, timeout=0.1)
        if first is None or first.error is not None:
            reason = self.failure if first is None else first.error
            self.stop()
            raise self._refusal(reason)

    def _refusal(self, reason: object) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._family}: transformers' continuous batching does not run with this model ({reason}); call generate"
        )

    def stop(self) -> None:
        """Stop it, if it was started; requests that run fail."""
        if self._manager._generation_thread is not None:
            self._manager.stop(hard_stop=True)

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def failure(self) -> str | None:
        """Why the engine answers nothing; None while it does."""
        fatal = self._manager.background_thread_status.fatal_error
        if fatal is not None:
            return f"the engine stopped: {fatal}"
        return None if self._manager.is_running() else "the engine was not started, or was stopped"

    @property
    def running(self) -> int:
        """Requests that are in the batch."""
        return 0 if self._scheduler is None else len(self._scheduler.active_requests)

    @property
    def waiting(self) -> int:
        """Requests that wait for room in the batch."""
        queued = int(self._manager.input_queue.qsize())
        return queued if self._scheduler is None else len(self._scheduler.waiting_requests) + queued

    @property
    def _scheduler(self) -> Any:
        """None while the engine does not run."""
        return getattr(self._manager.batch_processor, "scheduler", None)

    def new_tokens(self, request: Request) -> int:
        """How many tokens the answer may have.

        Raises:
            UnknownTask: the task is not in the bank.
            ShapeError: no token, or one that the model does not have, or no new tokens.
            ContextOverflow: prompt, prefix and new tokens exceed the model's positions, or the cache.
        """
        tokens, new = len(request.tokens), request.new_tokens
        if not tokens:
            raise ShapeError("prompt: expected at least one token, got none")
        if new is not None and not (isinstance(new, int) and new >= 1):
            raise ShapeError(f"new_tokens: expected an integer of at least 1, got {new!r}")
        task_id = int(self.bank.task_ids([request.task]))
        prefix = self.bank.lengths[task_id] if task_id >= 0 else 0
        limit = self.bank.context_limit
        room = room_for_new(self.cache_tokens, 0, tokens)
        if limit is not None:
            room = min(room, room_for_new(limit, prefix, tokens))
        if room < (new or 1):
            positions = "" if limit is None else f"the model's {limit} positions, or "
            raise ContextOverflow(
                f"prompt: {tokens} tokens, a prefix of {prefix} and {new or 1} new tokens exceed {positions}the "
                f"{self.cache_tokens} tokens of the engine's cache; "
                + (f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt")
            )
        # Last, since a prompt that is too long may be very long.
        unknown = [token for token in request.tokens if not (isinstance(token, int) and 0 <= token < self._inputs)]
        if unknown:
            raise ShapeError(f"prompt: expected tokens of 0 to {self._inputs - 1}, got {unknown[0]!r}")
        return min(room, self._default_new_tokens or room) if new is None else new

    async def answer(self, request: Request) -> AsyncIterator[Piece]:
        """The answer, piece by piece as it is made. Closing the iterator early cancels the request.

        Raises:
            PrefixAttnError: those of `new_tokens`; EngineFailed.
        """
        new = self.new_tokens(request)
        if self.failure is not None:
            raise EngineFailed(self.failure)
        name = uuid.uuid4().hex
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        self._manager.register_result_handler(name, outputs.put_nowait)
        finished = False
        try:
            added = self._manager.add_request(
                request.tokens, name, new, streaming=True, task=request.task, eos_token_id=self.ends or -1,
                **request.sampling.arguments(),
            )  # fmt: skip
            if added is None:
                raise EngineFailed(self.failure or "the engine is stopping")
            seen = 0
            while not finished:
                output = await outputs.get()
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineFailed(output.error)
                made = output.generated_tokens
                ended = bool(made) and made[-1] in self.ends
                yield Piece(made[seen:], ("stop" if ended else "length") if finished else None)
                seen = len(made)
        finally:
            if not finished:
                self._manager.cancel_request(name)


def _bank_of(model: Any) -> PrefixBank:
    """The bank that a model is patched with.

    Raises:
        UnsupportedModel: it is not patched, or cannot be batched, or its batches are somebody else's.
    """
    name = type(model).__name__
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise UnsupportedModel(
            f"{name}: its active PEFT adapter is a prompt or a prefix itself; load that into the bank instead"
        )
    if bank_of(model) is None:
        raise UnsupportedModel(f"{name}: expected a patched model; call prefix_attn.patch(model, bank) first")
    bank: PrefixBank | None = getattr(model.init_continuous_batching, "bank", None)
    if bank is None:
        raise UnsupportedModel(
            f"{name}: this family is served in the slow way, with copies of the prefixes in its cache; continuous "
            "batching has no such caches, call generate"
        )
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise UnsupportedModel(
            f"{name}: a persistent manager of generate_batch was kept; call "
            "model.destroy_cached_continuous_batching_manager() first"
        )
    return bank
