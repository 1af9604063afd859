"""What ``model.generate`` needs: task ids as a tensor (so that beams and return sequences copy them), checked up front.

A `Method` stands in front of a bound method, as an attribute of the model instance. It is a plain object, not a
closure, so that a patched model can be copied and pickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import CACHE, cache_among, cache_name
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.errors import PrefixAttnError, ShapeError, UnsupportedModel
from prefix_attn.hf.assistant import Assistant
from prefix_attn.hf.caches import check_tasks_of
from prefix_attn.hf.context import check_fits, new_tokens, option, truncated, warn_of_padding, warn_of_second_bos
from prefix_attn.hf.scope import scope


class Method:
    """A method of the model's class, called on the instance it was attached to, with more keywords in its signature."""

    name: str
    keywords: Mapping[str, Any] = {"task_ids": None}

    def __init__(self, model: Any) -> None:
        self.model = model
        self.__doc__ = f"{type(self).__doc__}\n\n{self.original_function.__doc__}"

    @property
    def original_function(self) -> Callable[..., Any]:
        """The method as the model's class defines it."""
        function: Callable[..., Any] = getattr(type(self.model), self.name)
        return function

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.original_function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", *self.keywords)]
        ours = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=x) for name, x in self.keywords.items()]
        last = parameters[-1:] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        return signature.replace(parameters=[*parameters[: len(parameters) - len(last)], *ours, *last])

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return self.original_function(self.model, *args, **kwargs)


class Generate(Method):
    """``model.generate`` that takes ``task_ids``: one name, id or None per row.

    With ``truncation=True`` a row that is too long for its prefix loses its oldest tokens instead of being refused. The
    bank may change meanwhile: the rows keep the prefixes they began with.
    """

    name = "generate"
    keywords = {"task_ids": None, "truncation": False}  # noqa: RUF012

    def __init__(self, model: Any, bank: PrefixBank) -> None:
        super().__init__(model)
        self.bank = bank

    def __call__(self, *args: Any, task_ids: Any = None, truncation: bool = False, **kwargs: Any) -> Any:
        options = inspect.signature(self.original_function).bind_partial(self.model, *args).arguments | kwargs
        options.pop("self", None)
        configs = self._configs(options)
        refuse_tasks_in(configs)
        _refuse_mtp(options, configs)
        if task_ids is None:
            if truncation:
                raise ShapeError("truncation: expected task_ids with it (None for a row without prefix), got none")
            check_tasks_of(cache_among(options), self.bank, None)
            return self.original(*args, **kwargs)
        if not isinstance(vars(self.model).get(PrepareInputs.name), PrepareInputs):
            raise UnsupportedModel(
                "task_ids: the model's prepare_inputs_for_generation was replaced after it was patched, as PEFT's "
                "prefix and prompt tuning do, which would generate with their own prefix. Call generate on the model "
                "inside, and prefix_attn.patch(model, bank) again if it says so too"
            )
        # A name must not be replaced between the two. Outside the inference mode the bank can tell when ids are
        # written, and keeps their plan for the steps.
        with BANK_LOCK, torch.inference_mode(False):
            ids = self.bank.plan(task_ids).task_ids
            held = ids.tolist()
            self.bank.hold(held)
        try:
            _refuse_options(options, configs)
            # Where the model is compiled, its passes do not compare tasks.
            check_tasks_of(cache_among(options), self.bank, ids)
            inputs = next((x for name in INPUTS if (x := options.get(name)) is not None), None)
            if inputs is not None:
                if len(ids) != len(inputs):
                    raise wrong_count(len(ids), len(inputs))
                self._fit(ids, inputs, options, configs, truncation)
            if options.get("assistant_model") is not None:
                options["assistant_model"] = Assistant(options["assistant_model"], self._names(ids))
            return self.original(task_ids=ids, **options)
        finally:
            self.bank.release(held)

    def _configs(self, options: dict[str, Any]) -> list[Any]:
        return [options.get("generation_config"), self.model.generation_config]

    def _fit(
        self, ids: Tensor, inputs: Tensor, options: dict[str, Any], configs: Sequence[Any], truncation: bool
    ) -> None:
        """Refuse rows that are too long for their prefix, or mask their oldest tokens in ``options``."""
        new = new_tokens(inputs, options, configs)
        if truncation:
            _refuse_media(options)
            options["attention_mask"] = truncated(self.bank, ids, options, new)
        check_fits(self.bank, ids, inputs, options.get("attention_mask"), new)
        warn_of_padding(self.bank, ids, inputs, options.get("attention_mask"), new)
        bos = option("bos_token_id", options, configs)
        warn_of_second_bos(self.bank, ids, inputs, options.get("attention_mask"), bos)

    def _names(self, ids: Tensor) -> list[str | None]:
        names = self.bank.named()
        return [names.get(task) for task in ids.tolist()]


#: The arguments that hold the prompt (of an encoder: also sound), in the order in which ``generate`` looks for it.
INPUTS = ("inputs", "inputs_embeds", "input_ids", "input_features")


#: How the arguments begin that hold what a prompt shows, or plays.
MEDIA = ("pixel_values", "image", "video", "audio", "input_features", "input_values", "speech", "second_per_grid")


def refuse_tasks_in(configs: Sequence[Any]) -> None:
    """A config keeps whatever it is given, and nobody would look for tasks there."""
    if any(getattr(config, "task_ids", None) is not None for config in configs):
        raise PrefixAttnError("generation_config: expected task_ids beside it, got them in it; pass task_ids=...")


def _refuse_media(options: dict[str, Any]) -> None:
    """A prompt that loses the tokens of an image keeps its pixels, which then are those of the next."""
    media = sorted(name for name, x in options.items() if x is not None and name.startswith(MEDIA))
    if media:
        raise UnsupportedModel(
            f"truncation: expected a prompt of text alone, got {', '.join(media)}; shorten the prompt"
        )


def _refuse_mtp(options: dict[str, Any], configs: Sequence[Any]) -> None:
    """With or without tasks."""
    if option("use_mtp", options, configs):
        raise UnsupportedModel(
            "use_mtp: its drafting layers are made from the config of the patched model, whose attention they cannot "
            "use; drop it, or unpatch the model"
        )


def _refuse_options(options: dict[str, Any], configs: Sequence[Any]) -> None:
    if option("output_attentions", options, configs):
        raise UnsupportedModel("output_attentions: attention weights are never built; drop it, or unpatch the model")
    if option("token_healing", options, configs):
        raise UnsupportedModel(
            "token_healing: transformers heals the prompts in calls of their own, without their tasks; heal them first "
            "(model.heal_tokens), or do without"
        )
    if option("cache_implementation", options, configs) == "paged":
        raise UnsupportedModel(
            "cache_implementation: transformers drops padding masks with 'paged'; call "
            "model.generate_batch(prompts, task_ids=...) with a list of tokens per prompt"
        )


class PrepareInputs(Method):
    """``prepare_inputs_for_generation`` with ``task_ids``: transformers reads its signature to accept the name."""

    name = "prepare_inputs_for_generation"

    def __init__(self, model: Any, implementation: str) -> None:
        super().__init__(model)
        self.implementation = implementation
        self.cache = cache_name(model)

    def __call__(self, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        scope().implementation = self.implementation if task_ids is None else None  # static caches build masks here
        inputs: dict[str, Any] = self.original(*args, **kwargs)
        if task_ids is None:
            return inputs
        if CACHE in inputs:
            inputs[self.cache] = inputs.pop(CACHE)
        return inputs | {"task_ids": task_ids}


def wrong_count(got: int, rows: int) -> ShapeError:
    """The error for a list of tasks that does not match the batch."""
    return ShapeError(
        f"task_ids: expected one task per row, {rows} in all (None for a row without prefix), got {got}; in a "
        "transformers pipeline, make it with pipeline_class=prefix_attn.TextGenerationPipeline"
    )


def checked_for_batch(bank: PrefixBank, task_ids: Any, rows: int) -> Tensor:
    """Task ids of a forward call as an int32 tensor ``[rows]``."""
    ids = bank.task_ids(task_ids)
    if ids.shape != torch.Size([rows]):
        raise wrong_count(len(ids), rows)
    return ids
