"""Train the prefixes of many tasks at once: their examples are mixed in every batch of one frozen model.

    loss = sum over the tasks of a batch of the mean over the task's rows of the mean over a row's answer of -log p

A row reads its own task's prefix alone, so each task learns as if it were trained by itself with the rows it has in a
batch: its gradient is clipped by itself, and a batch without its rows does not move it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from prefix_attn.bank import Base, PrefixBank
from prefix_attn.bank.forward import cached_kv, evaluating, positions_of_generate, unwrap
from prefix_attn.bank.geometry import LayerKV
from prefix_attn.errors import IncompatiblePrefix, PrefixAttnError, ShapeError, UnknownTask, UnsupportedModel
from prefix_attn.hf.wiring import bank_of
from prefix_attn.training.examples import (
    NOT_SCORED,
    Example,
    TokenisedExample,
    by_task,
    checked_examples,
    rows_of,
    split,
)
from prefix_attn.training.prefixes import PROJECTION, TrainablePrefixes

#: Learning rates of an MLP that makes keys and values, and of these themselves.
PROJECTED_LEARNING_RATE, LEARNING_RATE = 1e-3, 1e-2

#: Each task's gradient is clipped to this norm.
LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood of a task's answers, in nats a token, after an epoch (0: before the first)."""

    epoch: int
    task: str
    training: float | None  # over the epoch, while the prefix was changing; None before the first
    held_out: float | None  # None for a task of which nothing is held out


@dataclass
class Trained:
    """The best prefix of each task, and the losses of the whole run.

    Attributes:
        key_values: by task, for `PrefixBank.add`: after the epoch with the lowest loss on held-out examples, or after
            the last epoch for a task that has none.
        best: by task, the losses after that epoch.
        losses: those of every task and epoch.
    """

    key_values: dict[str, list[LayerKV]] = field(default_factory=dict)
    best: dict[str, Loss] = field(default_factory=dict)
    losses: list[Loss] = field(default_factory=list)

    def add_to(self, bank: PrefixBank) -> None:
        """Add every task to a bank of the same model, in which there is none of them yet; all, or none."""
        if taken := [name for name in self.key_values if name in bank]:
            raise IncompatiblePrefix(f"bank: expected none of {taken} in it; remove them first")
        added: list[str] = []
        try:
            for name, key_values in self.key_values.items():
                bank.add(name, key_values, source="trained")
                added.append(name)
        except BaseException:
            for name in added:
                bank.remove(name)
            raise

    def note(
        self, epoch: int, prefixes: TrainablePrefixes, training: Mapping[str, float], held_out: Mapping[str, float]
    ) -> None:
        """Write down the losses after an epoch, and keep the prefixes that are the best so far."""
        for name in prefixes.names:
            loss, best = Loss(epoch, name, training.get(name), held_out.get(name)), self.best.get(name)
            self.losses.append(loss)
            if loss.held_out is None or best is None or best.held_out is None or loss.held_out < best.held_out:
                self.best[name], self.key_values[name] = loss, prefixes.key_values(name)


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example | Mapping[str, str]],
    *,
    tokens: int = 16,
    projection: int | None = PROJECTION,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    start: Mapping[str, Sequence[LayerKV]] | None = None,
    progress: bool = True,
    after_epoch: Callable[[Trained], None] | None = None,
) -> Trained:
    """Train a prefix for every task of ``examples`` on one frozen model, by AdamW with a one-cycle learning rate.

    A prefix starts as the model's own keys and values of some of the task's training examples.

    Args:
        model: a decoder-only transformers model, plain, patched or PEFT-wrapped; run without dropout, and not changed.
        tokenizer: the model's. A row is the prompt, as the tokenizer opens a sequence, the answer and the end token.
        examples: `Example`, or mappings with its fields, in any order; those of all tasks are shuffled together.
        tokens: of each prefix.
        projection: hidden width of an MLP that makes the prefix; None trains keys and values themselves, which takes
            more epochs.
        epochs: passes over the examples.
        batch_size: rows, of all tasks together.
        learning_rate: the highest of the cycle; by default `PROJECTED_LEARNING_RATE`, without a projection
            `LEARNING_RATE`.
        held_out: share of each task's examples that choose the best epoch, and train nothing.
        seed: of the order of examples, and of the MLPs.
        start: other starts, by task, as in `TrainablePrefixes` and of any length: a prefix to be trained further, say.
        progress: show a bar on stderr.
        after_epoch: called after each epoch with the result so far, for instance to save it.

    Returns:
        Key values for a bank: ``train(...).add_to(bank)``.

    Raises:
        UnsupportedModel, IncompatiblePrefix: as in `TrainablePrefixes`; or an example is none, or its tokens are not
            the model's.
        ShapeError: a number is out of range.
        UnknownTask: a start of a task without examples.
        ContextOverflow: an example and its prefix are longer than the model's context.
        PrefixAttnError: a loss is no finite number.
    """
    check_numbers(tokens, epochs, batch_size, held_out, learning_rate)
    given, start = checked_examples(examples), dict(start or {})
    _check_start(start, {example.task for example in given})
    rng, inner, base = random.Random(seed), unwrap(model), Base.of(model)
    device = inner.get_input_embeddings().weight.device
    lengths = {example.task: tokens for example in given} | {name: kv[0][0].shape[1] for name, kv in start.items()}
    rows = rows_of(given, inner, tokenizer, base.context_limit, lengths)
    training, scored = split(rows, held_out, rng)
    if learning_rate is None:
        learning_rate = LEARNING_RATE if projection is None else PROJECTED_LEARNING_RATE
    with torch.inference_mode(False), torch.enable_grad(), _frozen(inner), evaluating(inner):
        for task, of_task in by_task(training).items():
            if task not in start:
                start[task] = _text_start(model, of_task, tokens)
        prefixes = TrainablePrefixes(model, start, projection, seed)
        prefixes.lazy = True
        optimizer = torch.optim.AdamW(prefixes.parameters(), lr=learning_rate, weight_decay=0.0)
        # In float16 the gradients of long answers would vanish: the loss is scaled up, and they are scaled down.
        scaler = torch.amp.GradScaler(base.device.type, init_scale=2.0**12, enabled=base.dtype == torch.float16)
        steps = epochs * -(-len(training) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=max(steps, 2))
        result = Trained()
        bar = tqdm(total=steps, desc="training", unit="batch", mininterval=0.5, disable=not progress)
        with prefixes.attached(model), bar:
            result.note(0, prefixes, {}, _evaluate(inner, scored, batch_size, device))
            for epoch in range(1, epochs + 1):
                rng.shuffle(training)
                sums = _Means()
                for step, batch in enumerate(_batches(training, batch_size)):
                    of_tasks = _losses(inner, batch, device)
                    total = torch.stack(list(of_tasks.values())).sum()
                    _check_finite(total.item(), f"the loss in epoch {epoch}")
                    optimizer.zero_grad()
                    torch.autograd.backward(scaler.scale(total))
                    scaler.unscale_(optimizer)
                    norm = _keep_apart(prefixes, of_tasks).item()
                    if norm == 0 and epoch == 1 and step == 0:
                        raise UnsupportedModel(
                            f"{type(inner).__name__}: no gradient reaches the prefixes; some quantised layers pass "
                            "none on: load the model in another precision"
                        )
                    if scaler.get_scale() <= 1:
                        _check_finite(norm, f"a gradient in epoch {epoch}")
                    scaler.step(optimizer)  # not where the gradient is infinite: then the scale is halved
                    scaler.update()
                    if math.isfinite(norm):
                        schedule.step()
                    sums.add(batch, of_tasks)
                    bar.update()
                    bar.set_postfix(epoch=epoch, loss=f"{total.item() / len(of_tasks):.3f}", refresh=False)
                result.note(epoch, prefixes, sums.means(), _evaluate(inner, scored, batch_size, device))
                if after_epoch is not None:
                    after_epoch(result)
                    _check_untouched(inner, prefixes)
    return result


def check_numbers(tokens: int, epochs: int, batch_size: int, held_out: float, learning_rate: float | None) -> None:
    """Raise `ShapeError` for arguments of `train` that are out of range."""
    for name, count in (("tokens", tokens), ("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(count, int) or count < 1:
            raise ShapeError(f"{name}: expected an integer of at least 1, got {count!r}")
    if not 0 <= held_out < 1:
        raise ShapeError(f"held_out: expected a share from 0 to below 1, got {held_out}")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ShapeError(f"learning_rate: expected None or a positive finite number, got {learning_rate}")


def _check_start(start: Mapping[str, Sequence[LayerKV]], tasks: Collection[str]) -> None:
    if unknown := [name for name in start if name not in tasks]:
        raise UnknownTask(f"start: expected tasks that have examples ({sorted(tasks)}), got {unknown}")
    if empty := [name for name, key_values in start.items() if not key_values]:
        raise IncompatiblePrefix(f"start: expected (k, v) for each layer, got none for {empty}")


def _check_untouched(model: Any, prefixes: TrainablePrefixes) -> None:
    if bank_of(model) is not prefixes.bank or model.training:
        raise PrefixAttnError(
            "after_epoch: expected to find the model as it was, but it is patched with another bank, or none, or in "
            "training mode; undo that before returning"
        )


def _check_finite(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise PrefixAttnError(f"{what} is {loss}; lower the learning rate, or load the model in a wider dtype")


def _text_start(model: Any, rows: Sequence[TokenisedExample], tokens: int) -> list[LayerKV]:
    """The model's keys and values of the first ``tokens`` tokens of the (shuffled) rows, repeated if they are fewer."""
    text = torch.cat([row.ids for row in rows[:tokens]])
    return cached_kv(unwrap(model), text.repeat(-(-tokens // len(text)))[None, :tokens])


def _batches(rows: Sequence[TokenisedExample], size: int) -> Iterator[Sequence[TokenisedExample]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def row_losses(model: Any, rows: Sequence[TokenisedExample], device: torch.device, **options: Any) -> Tensor:
    """Mean negative log-likelihood of each row's answer, ``[rows]``, of a model that is called with ``options``.

    Rows are padded on the right, where a causal model does not look.
    """
    ids = pad_sequence([row.ids for row in rows], batch_first=True).to(device)
    labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=NOT_SCORED).to(device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=device)
    mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    positions = positions_of_generate(unwrap(model), ids)
    logits = model(input_ids=ids, attention_mask=mask, **positions, **options).logits[:, :-1].float()
    labels = labels[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=NOT_SCORED)
    return losses.sum(1) / (labels != NOT_SCORED).sum(1)


def _losses(model: Any, rows: Sequence[TokenisedExample], device: torch.device) -> dict[str, Tensor]:
    """The mean over each task's rows."""
    tasks = [row.task for row in rows]
    of_rows = row_losses(model, rows, device, task_ids=tasks, use_cache=False)
    places = {task: [i for i, other in enumerate(tasks) if other == task] for task in dict.fromkeys(tasks)}
    return {task: of_rows[i].mean() for task, i in places.items()}


@torch.no_grad()
def _evaluate(model: Any, rows: Sequence[TokenisedExample], batch_size: int, device: torch.device) -> dict[str, float]:
    """Loss of every task that has held-out rows."""
    sums = _Means()
    for batch in _batches(rows, batch_size):
        sums.add(batch, _losses(model, batch, device))
    means = sums.means()
    for task, loss in means.items():
        _check_finite(loss, f"the held-out loss of task {task!r}")
    return means


class _Means:
    """Means over the rows of many batches, by task."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, rows: Sequence[TokenisedExample], means: Mapping[str, Tensor]) -> None:
        """One batch: its rows, and the mean of each task among them."""
        counts = {task: len(of_task) for task, of_task in by_task(rows).items()}
        # One wait for the device, however many tasks there are.
        for task, mean in zip(means, torch.stack(list(means.values())).tolist(), strict=True):
            total, seen = self._sums.get(task, (0.0, 0))
            self._sums[task] = total + mean * counts[task], seen + counts[task]

    def means(self) -> dict[str, float]:
        return {task: total / seen for task, (total, seen) in self._sums.items()}


def _keep_apart(prefixes: TrainablePrefixes, present: Mapping[str, Tensor]) -> Tensor:
    """Clip each task's gradient by itself, and return the largest norm; a task without rows in the batch has none."""
    norms = []
    for name in prefixes.names:
        parameters = prefixes.parameters_of(name)
        if name in present:
            norms.append(nn.utils.clip_grad_norm_(parameters, LARGEST_NORM))
        else:
            for parameter in parameters:
                parameter.grad = None
    return torch.stack(norms).amax()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model requires a gradient for a while."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad = True
