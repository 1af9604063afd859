"""The slow way, for families whose attention cannot be replaced: each row's cache begins with a copy of its prefix.

In the first pass of a sequence the empty cache is filled with every row's prefix, padded on the left to the longest.
The padding is masked, and positions are shifted by the row's own length. (PEFT does this for one task per batch.)
``generate`` must not count the prefix among the tokens it has fed, or it would cut the prompt: outside a pass the cache
says how many tokens the request has, inside it says how many it holds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import CACHE, NAMES, cache_among, cache_name
from prefix_attn.bank.forward import FAILURES, cached_kv, evaluating
from prefix_attn.bank.geometry import DECODER
from prefix_attn.errors import IncompatiblePrefix, PrefixAttnError, ShapeError, UnsupportedModel
from prefix_attn.hf.adapters import RELAYED, pop_task_ids
from prefix_attn.hf.caches import MARK, Mark, check_tasks_of
from prefix_attn.hf.continuous import NoBatches
from prefix_attn.hf.generate import Generate, PrepareInputs, checked_for_batch
from prefix_attn.hf.positions import hook_tables, shifted_positions, tables_of_positions, takes_positions, turn_rows
from prefix_attn.hf.scope import scope
from prefix_attn.hf.sources import fill
from prefix_attn.hf.verify import TOKENS, check_close, of_all_heads, replicated, some_tokens
from prefix_attn.hf.wiring import named_arguments


class ReplicaCache(DynamicCache):  # type: ignore[misc]
    """A cache whose rows begin with a prefix, which only the model itself counts.

    Attributes:
        prefix_mask: int64 ``[batch, longest]``; 1 for a token of the row's prefix, 0 for padding before it.
        inside: whether a pass of the model is under way.
    """

    prefix_mask: Tensor
    inside: bool

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the request; inside a pass, tokens held."""
        held: int = super().get_seq_length(layer_idx)
        return held if self.inside else held - self.prefix_mask.shape[1]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As usual, inside a pass of the patched model; any other pass would take the prefixes for tokens."""
        if not self.inside and self.prefix_mask.shape[1]:
            raise IncompatiblePrefix(
                f"{CACHE}: begins with copies of prefixes, which only the patched model knows to count, called "
                "with the same task_ids; start a new cache"
            )
        keys_and_values: tuple[Tensor, Tensor] = super().update(*args, **kwargs)
        return keys_and_values

    def check_whole(self) -> None:
        """Raise `IncompatiblePrefix` where somebody has removed tokens of the prefixes."""
        if super().get_seq_length() < self.prefix_mask.shape[1]:
            raise IncompatiblePrefix(
                f"{CACHE}: its prefixes, which this family has in its cache, were cropped with its tokens; "
                "start a new cache"
            )

    def reset(self) -> None:
        """Forget tokens and prefixes: an empty plain cache again."""
        super().reset()
        del self.prefix_mask, self.inside
        if hasattr(self, MARK):
            delattr(self, MARK)
        self.__class__ = DynamicCache

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take(torch.arange(len(self.prefix_mask)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def _take(self, rows: Tensor) -> None:
        """Let prefix_mask and the mark be those of the rows that are held now."""
        rows = rows.to(self.prefix_mask.device)
        mark: Mark = getattr(self, MARK)
        assert mark.task_ids is not None, "a cache with prefixes has tasks"
        self.prefix_mask = self.prefix_mask[rows]
        setattr(self, MARK, Mark(mark.bank, mark.task_ids[rows]))


class ReplicaPatch:
    """Everything one patched model got, and what it takes to give it back."""

    def __init__(self, model: Any, bank: PrefixBank, decoder: Any) -> None:
        self.bank = bank
        self.decoder = decoder
        self.hook = ReplicaHook(bank, decoder, cache_name(model))
        self.handles = [
            model.register_forward_pre_hook(self.hook, with_kwargs=True, prepend=True),
            model.register_forward_hook(self.hook.end, always_call=True),
        ]
        self.handles += [
            module.register_forward_pre_hook(_refuse_tasks, with_kwargs=True, prepend=True)
            for module in {model.base_model, decoder} - {model}
        ]
        self.handles += hook_tables(self.hook.tables)
        self.handles += [
            module.register_forward_pre_hook(turn_rows)
            for module in decoder.modules()
            if type(module).__name__ == "RoFormerLayer"
        ]
        model.generate = ReplicaGenerate(model, bank)
        model.prepare_inputs_for_generation = PrepareInputs(model, "")
        model.generate_batch = NoBatches(model)

    def remove(self, model: Any) -> None:
        for handle in self.handles:
            handle.remove()
        del model.generate, model.generate_batch, model.prepare_inputs_for_generation

    def check(self, model: Any) -> None:
        """Raise `UnsupportedModel` unless a padded batch of two texts as prefixes is exact over two passes."""
        _refuse_unmasked_windows(model)
        key_values = cached_kv(model, some_tokens(model, 4))
        bank, self.hook.bank = self.hook.bank, PrefixBank(self.bank.base)
        tasks = ["long", "short", None]
        try:
            self.hook.bank.add("long", of_all_heads(bank, key_values))
            short = [(k[:, :2], v[:, :2]) for k, v in key_values]
            self.hook.bank.add("short", of_all_heads(bank, short))
            with torch.no_grad(), evaluating(model):
                self._compare(model, tasks)
        except PrefixAttnError:
            raise
        except FAILURES as error:
            raise UnsupportedModel(f"it fails with a prefix in its cache ({type(error).__name__}: {error})") from error
        finally:
            self.hook.bank = bank

    def verify(self, model: Any) -> None:
        with torch.no_grad(), evaluating(model):
            for name in self.bank.names:
                self._compare(model, [name])

    def _compare(self, model: Any, tasks: list[str | None]) -> None:
        tokens = some_tokens(model, TOKENS + 1).expand(len(tasks), -1)
        mask = torch.ones_like(tokens)
        for row in range(1, len(tasks)):
            mask[row, :row] = 0
        cache = DynamicCache(config=model.config)
        got = self._two_passes(model, tokens, mask, cache, {"task_ids": tasks})
        for row, task in enumerate(tasks):
            alone = DynamicCache(config=model.config) if task is None else replicated(model, self.hook.bank, task)
            length = alone.get_seq_length()
            row_mask = torch.cat([mask.new_ones(1, length), mask[row : row + 1]], dim=1)
            expected = self._two_passes(model, tokens[:1], row_mask, alone, {})[0]
            try:
                check_close(model, str(task), got[row, row:], expected[row:])
            except UnsupportedModel as error:
                raise UnsupportedModel(
                    "rows with prefixes of different lengths are not exact, because the family counts or masks slots "
                    f"of its cache in a way of its own ({error})"
                ) from error

    def _two_passes(self, model: Any, tokens: Tensor, mask: Tensor, cache: Any, tasks: dict[str, Any]) -> Tensor:
        """Logits ``[rows, len, vocab]`` of all tokens but the last, then of the last."""
        behind = mask.shape[1] - tokens.shape[1]
        logits = []
        for begin, end in ((0, TOKENS), (TOKENS, TOKENS + 1)):
            positions = {}
            if takes_positions(model):
                counted = (mask.cumsum(1) - 1).clamp(min=0)[:, behind:]
                positions["position_ids"] = counted[:, begin:end]
            out = model(
                input_ids=tokens[:, begin:end], attention_mask=mask[:, : behind + end], use_cache=True,
                **{cache_name(model): cache}, **positions, **tasks,
            )  # fmt: skip
            logits.append(out.logits)
        return torch.cat(logits, dim=1)


def _end_pass() -> None:
    """Let the cache of the pass under way know that it is over.

    Called in front of the next pass too: PyTorch calls no hooks where an interrupt ended one.
    """
    under_way = scope()
    under_way.positions = None
    if under_way.replica is not None:
        under_way.replica.inside, under_way.replica = False, None


class ReplicaGenerate(Generate):
    """`Generate` that ends what was interrupted first, for it reads the cache's length."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _end_pass()
        return super().__call__(*args, **kwargs)


class ReplicaHook:
    """Forward pre-hook of the whole model: puts prefixes into its cache, its mask and its positions."""

    def __init__(self, bank: PrefixBank, decoder: Any, cache: str) -> None:
        self.bank = bank
        self.decoder = decoder
        self.cache = cache  # what the model calls it
        self.tables = tables_of_positions(decoder)

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        task_ids = pop_task_ids(kwargs)
        _end_pass()
        given = named_arguments(model, args, kwargs)
        cache = cache_among(given)
        for name in NAMES:
            given.pop(name, None)
        if task_ids is None:
            self.check(cache, None)
            return args, kwargs
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        assert isinstance(inputs, Tensor), "transformers requires input_ids or inputs_embeds"
        ids = checked_for_batch(self.bank, task_ids, inputs.shape[0])
        use_cache = given.get("use_cache")
        without_cache = not (getattr(model.config, "use_cache", True) if use_cache is None else use_cache)
        if cache is None:
            cache = DynamicCache(config=model.config)
        self._begin(cache, ids)
        _refuse_arguments(model, given, without_cache)
        own = given.get("attention_mask")
        if own is None:
            own = torch.ones(inputs.shape[0], cache.get_seq_length() + inputs.shape[1], device=inputs.device)
        elif own.shape[1] < cache.get_seq_length() + inputs.shape[1]:
            raise ShapeError(
                f"attention_mask: expected {cache.get_seq_length() + inputs.shape[1]} columns, one for each token seen "
                f"so far, got {own.shape[1]}"
            )
        positions = shifted_positions(self.bank, ids, inputs, given.get("position_ids"), own, cache, self.decoder)
        if takes_positions(model):
            given["position_ids"] = positions
        elif self.tables:
            scope().positions = positions.expand(inputs.shape[0], -1)
        given["attention_mask"] = mask = torch.cat([cache.prefix_mask.to(own.dtype), own], dim=1)
        _refuse_padding_among_chosen_keys(model, cache.prefix_mask, mask.shape[1])
        cache.inside, scope().replica, scope().without_cache = True, cache, without_cache
        return (), given | {self.cache: cache, "use_cache": True}

    def end(self, model: Any, args: Any, out: Any) -> Any:
        """Forward hook: the pass is over, and its cache counts the request's tokens again."""
        filled = scope().replica is not None
        _end_pass()
        if filled and scope().without_cache and out is not None:
            return type(out)(**{name: x for name, x in out.items() if name != CACHE})
        return None

    def check(self, cache: Any, ids: Tensor | None) -> None:
        """`check_tasks_of`; prefixes left by a pass that failed, or by a crop, count as tokens."""
        if not isinstance(cache, ReplicaCache):
            check_tasks_of(cache, self.bank, ids)
            return
        cache.inside = True
        try:
            check_tasks_of(cache, self.bank, ids)
        finally:
            cache.inside = False

    def _begin(self, cache: Any, ids: Tensor) -> None:
        """Fill an empty cache with the rows' prefixes; check that a filled one has them."""
        if isinstance(cache, ReplicaCache):
            cache.check_whole()
            self.check(cache, ids)
            if len(cache.prefix_mask) != len(ids):
                raise ShapeError(
                    f"task_ids: expected {len(cache.prefix_mask)}, one for each row of {CACHE}, got {len(ids)}"
                )
            return
        if type(cache) is not DynamicCache or cache.get_seq_length():
            raise UnsupportedModel(
                f"{CACHE}: expected an empty DynamicCache, got {type(cache).__name__} of "
                f"{cache.get_seq_length()} tokens; this family's prefixes are copied into a cache that grows"
            )
        lengths = [self.bank.lengths[task] if task >= 0 else 0 for task in ids.tolist()]
        longest = max(lengths)
        nothing = self.bank.geometry.empty()
        prefixes = []
        for task, m in zip(ids.tolist(), lengths, strict=True):
            layers = self.bank.key_values(task) if task >= 0 else nothing
            prefixes.append([
                (self._padded(k, longest - m, device), self._padded(v, longest - m, device))
                for (k, v), device in zip(layers, self.bank.base.devices[DECODER], strict=True)
            ])  # fmt: skip
        fill(cache, prefixes)
        cache.__class__ = ReplicaCache
        setattr(cache, MARK, Mark.of(self.bank, ids))
        cache.inside = False
        slot = torch.arange(longest, device=ids.device)
        cache.prefix_mask = (slot >= longest - torch.tensor(lengths, device=ids.device)[:, None]).long()

    def _padded(self, x: Tensor, padding: int, device: torch.device) -> Tensor:
        zeros = x.new_zeros(x.shape[0], padding, x.shape[2], dtype=self.bank.dtype, device=device)
        return torch.cat([zeros, x.to(zeros)], dim=1)


def _refuse_tasks(body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of the model below its head, where nothing of `ReplicaHook` has been done."""
    if kwargs.get("task_ids", kwargs.get(RELAYED)) is not None:
        raise UnsupportedModel(
            f"task_ids: in families served in the slow way the whole model takes them, not its {type(body).__name__}; "
            "call the model (output_hidden_states=True gives what this would)"
        )


def _refuse_unmasked_windows(model: Any) -> None:
    """Raise `UnsupportedModel` where the cache forgets what is out of a window that the family's masks do not have.

    A text of any length that one would want to run here fits a real window, so this is read off the family's module.
    """
    slides = any(hasattr(layer, "sliding_window") for layer in DynamicCache(config=model.config).layers)
    if slides and not hasattr(sys.modules[type(model).__module__], "create_sliding_window_causal_mask"):
        raise UnsupportedModel(
            "the family's cache forgets what its masks would show, so what a query sees of a prefix would depend on "
            "how the tokens were cut into passes"
        )


def _refuse_padding_among_chosen_keys(model: Any, prefix_mask: Tensor, slots: int) -> None:
    """Doge sees no more than its best ``keep_window_size`` keys, and counts padding among them."""
    kept = getattr(model.config, "keep_window_size", slots)
    if slots > kept and not bool(prefix_mask.all()):
        raise UnsupportedModel(
            f"task_ids: expected prefixes of one length, for rows of more than keep_window_size = {kept} tokens: this "
            "family chooses which of them it sees, and it would choose padding in front of shorter prefixes"
        )


def _refuse_arguments(model: Any, given: dict[str, Any], without_cache: bool) -> None:
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise UnsupportedModel(
            "attention_mask: expected [batch, tokens], to which the prefix is added, got another kind"
        )
    for name in ("encoder_hidden_states", "image_embeds"):
        if given.get(name) is not None:
            raise UnsupportedModel(
                f"{name}: this family is served with the prefix in its cache, where it would be mixed up with the "
                "keys of cross-attention, or taken for tokens behind which there is no image; drop it"
            )
    if model.training and getattr(model, "is_gradient_checkpointing", False):
        raise UnsupportedModel("gradient checkpointing switches the cache off that holds this family's prefixes")
    return_dict = given.get("return_dict")
    if without_cache and not (getattr(model.config, "return_dict", True) if return_dict is None else return_dict):
        raise UnsupportedModel("return_dict=False: expected True with use_cache=False for this family")
