"""Continuous batching with a task per request: transformers' engine, told whose tokens are whose.

transformers packs the tokens of all requests of a step into one row; nothing its attention receives says which request
they come from. The manager knows: it hands the model the task of each request in the order of the batch, and the
attention layers take the row apart again (packed.py).

Full blocks of the paged cache are shared between requests with equal tokens. Under different tasks equal tokens have
different keys, so sharing is switched off. So are graphs, compilation and asynchronous batches, which would replay the
tasks of an earlier step.

The bank may change while the engine runs: a request holds its prefix from the moment it is added until it is over.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState, RequestStatus

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.geometry import DECODER
from prefix_attn.bank.unsupported import NOT_BATCHED
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.context import room_for_new
from prefix_attn.errors import PrefixAttnError, ShapeError, UnsupportedModel
from prefix_attn.hf.adapters import refuse_other_names
from prefix_attn.hf.attention import KEYWORD, Batch
from prefix_attn.hf.generate import Method, refuse_tasks_in
from prefix_attn.hf.packed import PackedRequest, PackedRows
from prefix_attn.hf.positions import overflow, prefix_lengths
from prefix_attn.hf.wiring import PATCHED, bank_of

#: The transformers whose engine this was written for; in older ones it works otherwise.
SINCE = (5, 23)

Task = str | int | None


class Prompt(list[int]):
    """The tokens of a request that know its task: the engine hands prompts on as they are."""

    def __init__(self, tokens: Sequence[int], task: Task) -> None:
        super().__init__(tokens)
        self.task = task


def prompts_of(inputs: Sequence[Sequence[int]], task_ids: Any) -> list[Prompt]:
    """Each prompt with its task; no task for any without ``task_ids``."""
    tasks = (
        [None] * len(inputs) if task_ids is None else task_ids.tolist() if isinstance(task_ids, Tensor) else task_ids
    )
    if len(tasks) != len(inputs):
        raise ShapeError(f"task_ids: expected one task per prompt, {len(inputs)} in all, got {len(tasks)}")
    return [Prompt(tokens, task) for tokens, task in zip(inputs, tasks, strict=True)]


class GenerateBatch(Method):
    """``model.generate_batch`` that takes ``task_ids``: one name, id or None per prompt.

    A request of an unknown task, or too long for its prefix, fails alone: its output has ``error`` set.
    """

    name = "generate_batch"

    def __call__(self, inputs: Sequence[Sequence[int]], *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        refuse_other_names(kwargs)
        return self.original(prompts_of(inputs, task_ids), *args, **kwargs)


class InitContinuousBatching(Method):
    """``model.init_continuous_batching``, behind all entries to continuous batching, that makes a `Manager`."""

    name = "init_continuous_batching"

    def __init__(self, model: Any, bank: PrefixBank) -> None:
        super().__init__(model)
        self.bank = bank

    def __call__(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        if len(set(self.bank.base.devices[DECODER])) > 1:
            raise UnsupportedModel(
                f"continuous batching: expected the model on one device, got {self.bank.base.placement}; call generate"
            )
        refuse_old_engines()
        refuse_tasks_in([generation_config, self.model.generation_config])
        sources = getattr(self.model, PATCHED).hook.sources
        if sources is not None and sources.derives:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: continuous batching does not reach the keys that this family makes of "
                "what the bank holds; call generate"
            )
        if getattr(self.model, PATCHED).hook.by_scope:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: its layers do not get the keywords of a call, by which they know whose "
                "tokens are whose in continuous batching; call generate"
            )
        model_type = self.bank.base.model_type
        if model_type in NOT_BATCHED:
            raise UnsupportedModel(f"{type(self.model).__name__}: {NOT_BATCHED[model_type]}; call generate")
        if getattr(self.model, PATCHED).counts_positions:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: continuous batching packs all tokens into one row, and this family "
                "counts positions along rows by itself; call generate"
            )
        kept = getattr(self.model, "_cached_continuous_batching_manager", None)
        if kept is None:
            config = _checked_config(continuous_batching_config or ContinuousBatchingConfig())
            return Manager(
                self.bank, self.model, generation_config or self.model.generation_config, config, workload_hints
            )
        if getattr(kept, "bank", None) is not self.bank:
            raise UnsupportedModel(
                "persistent_manager: the one kept was made before the model was patched with this bank; call "
                "model.destroy_cached_continuous_batching_manager() first"
            )
        return kept


class NoBatches(Method):
    """``model.generate_batch`` of a model for which there is none with tasks; without them it is as it was."""

    name = "generate_batch"

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        if task_ids is not None:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: continuous batching with tasks is for decoder-only models, and not for "
                "those served in the slow way, with copies of the prefixes in their caches; call generate"
            )
        return self.original(*args, **kwargs)


def refuse_old_engines() -> None:
    """Raise `UnsupportedModel` where transformers is older than the engine that this was written for."""
    if tuple(int(x) for x in transformers.__version__.split(".")[:2]) < SINCE:
        raise UnsupportedModel(
            f"continuous batching: expected transformers {SINCE[0]}.{SINCE[1]} or newer, got "
            f"{transformers.__version__}, whose engine works otherwise; call generate"
        )


def _checked_config(config: Any) -> Any:
    """A copy of the engine's config without block sharing and graphs; UnsupportedModel where they were asked for."""
    _refuse_what_would_replay(config)
    config = copy.deepcopy(config)
    config.allow_block_sharing = config.use_cuda_graph = config.use_async_batching = False
    return config


def _refuse_what_would_replay(config: Any) -> None:
    graphs = config.use_cuda_graph if isinstance(config.use_cuda_graph, tuple) else (config.use_cuda_graph,)
    for name, asked in {
        "use_cuda_graph": any(graphs),
        "use_async_batching": config.use_async_batching,
        "default_compile_level": config.default_compile_level,
        "varlen_compile_config": config.varlen_compile_config,
        "decode_compile_config": config.decode_compile_config,
    }.items():
        if asked:
            raise UnsupportedModel(
                f"continuous_batching_config: {name} would replay the tasks of an earlier step; leave it unset (in the "
                "model's config too)"
            )


class Manager(ContinuousBatchingManager):  # type: ignore[misc]
    """transformers' manager; ``add_request`` takes a ``task``, ``add_requests`` takes ``task_ids``."""

    def __init__(self, bank: PrefixBank, *args: Any) -> None:
        self.bank = bank
        self._task_of: dict[str, int] = {}  # of the requests that are not over, by their id; children included
        self._cancelled: set[str] = set()  # of them, those that nobody waits for
        self._failed: dict[str, str] = {}  # of them, those whose next output shall be this error
        self._request_counter: int
        super().__init__(*args)
        _refuse_what_would_replay(self.continuous_batching_config)  # as the engine has completed it
        self.output_router = _Outputs(self)

    def switch_to_cb_friendly_attn(self, *_: Any, **__: Any) -> None:
        """Nothing to switch: the patched model's attention reads the paged cache itself."""

    def add_requests(self, inputs: Sequence[Sequence[int]], *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        """As in transformers, with a name, id or None per prompt; a request that cannot be served fails alone."""
        known = task_ids is None and all(isinstance(tokens, Prompt) for tokens in inputs)
        return super().add_requests(inputs if known else prompts_of(inputs, task_ids), *args, **kwargs)

    def add_request(
        self, input_ids: Sequence[int], request_id: str | None = None, max_new_tokens: int | None = None,
        *args: Any, task: Task = None, **kwargs: Any,
    ) -> str | None:  # fmt: skip
        """As in transformers, with a task.

        Raises:
            PrefixAttnError: UnknownTask or ContextOverflow, or a ``request_id`` that runs already. (For a request of
                `add_requests` the output says so.)
        """
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        new = self.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        family = [request_id, *self._children(request_id)]
        if any(name in self._task_of for name in family):
            raise PrefixAttnError(f"request_id: expected one that no running request has, got {request_id!r}")
        try:
            with BANK_LOCK:  # a name that is replaced between the two would be an error
                task_id = int(self.bank.task_ids([getattr(input_ids, "task", task)]))
                new = self._room(task_id, len(input_ids), new)
                for name in family:
                    self.bank.hold([task_id])
                    self._task_of[name] = task_id
        except PrefixAttnError as error:
            if not isinstance(input_ids, Prompt):
                raise
            for name in family:  # none of them was begun
                self.output_router.fail_and_deliver(RequestState(name, list(input_ids)), error)
            return request_id
        added: str | None = None
        try:
            added = super().add_request(input_ids, request_id, new, *args, **kwargs)
        finally:
            if added is None:
                self._over(request_id)
        return added

    def _room(self, task_id: int, tokens: int, new: int | None) -> int | None:
        """New tokens a request may have; ContextOverflow where the prefix leaves too little room."""
        m, limit = self.bank.lengths[task_id] if task_id >= 0 else 0, self.bank.context_limit
        if not m or limit is None:
            return new
        room = room_for_new(limit, m, tokens)
        if room < (new or 1):
            raise overflow(0, m, tokens + (new or 1) - 1, limit)
        return room if new is None else new

    def _over(self, request_id: str, complete: bool = False) -> None:
        """Release the prefix of a request; if it is not complete, also of children that it will not have."""
        children = [] if complete else [name for name in self._children(request_id) if not self._runs(name)]
        for name in (request_id, *children):
            self._cancelled.discard(name)
            self._failed.pop(name, None)
            task_id = self._task_of.pop(name, None)
            if task_id is not None:
                self.bank.release([task_id])

    def _children(self, request_id: str) -> list[str]:
        return [f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1)]

    def _runs(self, request_id: str) -> bool:
        scheduler = getattr(self.batch_processor, "scheduler", None)
        if scheduler is None:
            return False
        return request_id in scheduler.active_requests or request_id in scheduler.waiting_requests

    def cancel_request(self, request_id: str) -> None:
        """As in transformers; what the engine still makes for it is dropped, and its handler forgotten."""
        if request_id in self._task_of:
            self._cancelled.add(request_id)  # first: an output without a handler is then known to be nobody's
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)
        super().cancel_request(request_id)

    def fail_request(self, request_id: str, reason: str) -> None:
        """End a request with an error in the place of what the step under way makes for it."""
        if request_id in self._task_of:
            self._failed[request_id] = reason

    def _clear_cancelled(self, scheduler: Any) -> list[RequestState]:
        """The scheduler's ``clear_cancelled_requests``, after which the prefixes are released.

        Requests and cancellations travel in two queues: a request that its cancellation overtakes is cancelled when it
        arrives.
        """
        for name in list(self._cancelled):
            if name in self._task_of:
                scheduler.set_request_cancellation(name)
            else:  # over before it was cancelled
                self._cancelled.discard(name)
        states: list[RequestState] = type(scheduler).clear_cancelled_requests(scheduler)
        for state in states:
            self._over(state.request_id)
        if states or not scheduler.active_requests:
            # When the cache is short the engine takes in nobody until somebody is finished, cancelled or not.
            scheduler.block_new_requests = False
        return states

    def start(self) -> None:
        """As in transformers, but for requests that were left over when the thread stopped."""
        if not self.is_running():
            for state in _drained(self.input_queue):
                if state.request_id in self._task_of:
                    self.input_queue.put(state)
        super().start()

    def _run_generation_loop(self, **mode: bool) -> None:
        try:
            super()._run_generation_loop(**mode)
        finally:
            # Some may be between the queue and the batch, or come to the queue when nobody reads it any more.
            reason = self.background_thread_status.fatal_error or "the engine was stopped"
            for name in list(self._task_of):
                self.output_router.fail_and_deliver(RequestState(name, []), PrefixAttnError(str(reason)))

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        processor.scheduler.clear_cancelled_requests = partial(self._clear_cancelled, processor.scheduler)
        return processor

    def _generation_step(self) -> None:
        processor = self.batch_processor
        self._check_patch()
        futures = processor.inputs_and_outputs.requests_in_batch
        requests = [
            PackedRequest(
                self._task_of[future.state.request_id],
                future.state.position_offset - future.query_length,
                future.query_length,
            )
            for future in futures
        ]
        if not all(request.q_len for request in requests):
            # transformers counts them among the rows of logits, but leaves there what an earlier step had.
            processor.inputs_and_outputs.logits_indices[sum(future.has_new_token for future in futures) :].zero_()
        if any(request.q_len for request in requests):  # else prompts of one token, kept for their several sequences
            processor._generation_step(_WithTasks(self.model, self.bank, requests))
        self._check_patch()  # before anybody gets the step's tokens

    def _check_patch(self) -> None:
        if bank_of(self.model) is not self.bank:
            raise UnsupportedModel(
                "continuous batching: the model was unpatched, or patched with another bank, meanwhile"
            )


class _Outputs(OutputRouter):  # type: ignore[misc]
    """Where the engine puts outputs: to the event loop that waits for each, or into the queue.

    transformers' own sends all outputs of a step to one of the loops, and fails where that is closed.
    """

    def __init__(self, manager: Manager) -> None:
        super().__init__()
        self._manager = manager

    def deliver(self, output: GenerationOutput) -> None:
        self.deliver_batch([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        calls: dict[Any, list[Callable[[], None]]] = defaultdict(list)
        for output in outputs:
            # In this order: `Manager.cancel_request` says that a request is cancelled before it takes the handler.
            with self._lock:
                callback, loop = self.result_handlers.get(output.request_id, (None, None))
            dropped = output.request_id in self._manager._cancelled
            over, reason = output.is_finished(), self._manager._failed.get(output.request_id)
            if reason is not None:
                output.error, output.status = reason, RequestStatus.FAILED
            if over:
                self._manager._over(output.request_id, output.error is None)
            elif reason is not None:
                self._manager.cancel_request(output.request_id)
            if callback is not None:
                calls[loop].append(partial(callback, output))
            elif not dropped:
                self.output_queue.put(output)
        for loop, of_loop in calls.items():
            try:
                loop.call_soon_threadsafe(_call_all, of_loop)
            except RuntimeError:  # the loop is closed: nobody waits any more
                for call in of_loop:
                    self._manager.cancel_request(call.args[0].request_id)  # type: ignore[attr-defined]


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _drained(queue: Any) -> list[Any]:
    """All that a queue holds."""
    items = []
    with suppress(Empty):
        while True:
            items.append(queue.get_nowait())
    return items


class _WithTasks:
    """The model as the engine calls it, for one step's requests."""

    def __init__(self, model: Any, bank: PrefixBank, requests: list[PackedRequest]) -> None:
        self._model = model
        self._bank = bank
        self._requests = requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        device, bank = inputs["position_ids"].device, self._bank
        ids = torch.tensor([r.task for r in self._requests], dtype=torch.int32, device=device)
        q_lens = torch.tensor([r.q_len for r in self._requests], device=device)
        positions = inputs["position_ids"] + prefix_lengths(bank.lens, ids).repeat_interleave(q_lens)
        batch = Batch("", bank, ids, layer=bank.layer, packed=PackedRows(self._requests, bank.lens, inputs["cache"]))
        no_mask = torch.empty((1, 1, 1, 1), device=device)  # four axes: transformers hands it on, and nobody reads it
        return self._model(**inputs | {"position_ids": positions, "attention_mask": no_mask, KEYWORD: batch})
