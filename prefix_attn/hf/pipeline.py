"""A text-generation pipeline that takes a task per prompt.

transformers' own hands ``generate``'s keywords unchanged to every batch, so a list with a task for each of many prompts
would not fit. Here the tasks travel with their prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import transformers

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.uses import BANK_LOCK
from prefix_attn.errors import ShapeError, UnsupportedModel


class _Example(NamedTuple):
    prompt: Any
    task: Any  # int32 [1]


class TextGenerationPipeline(transformers.TextGenerationPipeline):  # type: ignore[misc]
    """transformers' text-generation pipeline over a patched model; ``task_ids`` has one name, id or None per prompt.

    ``transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, pipeline_class=...)`` makes one; then
    ``pipe(prompts, task_ids=tasks, batch_size=8)``. All else is as in transformers.
    """

    def get_iterator(self, inputs: Any, *args: Any) -> Any:
        """Pair the prompts, a list, with their tasks; ShapeError where their numbers differ."""
        *rest, forward_params, postprocess_params = args
        tasks = forward_params.get("task_ids")
        if tasks is None:
            return super().get_iterator(inputs, *args)
        if not isinstance(inputs, Sequence):
            raise UnsupportedModel(
                f"text_inputs: with task_ids expected a list of prompts, got {type(inputs).__name__}; call the "
                "pipeline once for each part of a stream"
            )
        forward_params = {name: x for name, x in forward_params.items() if name != "task_ids"}
        bank: PrefixBank = self.model.generate.bank
        with BANK_LOCK:  # else a task might be replaced between the two
            ids = bank.task_ids(tasks).cpu()
            if len(ids) != len(inputs):
                raise ShapeError(f"task_ids: expected one task per prompt, {len(inputs)} in all, got {len(ids)}")
            bank.hold(ids.tolist())
        examples = [_Example(prompt, task[None]) for prompt, task in zip(inputs, ids, strict=True)]
        answers = super().get_iterator
        return _released(bank, ids.tolist(), lambda: answers(examples, *rest, forward_params, postprocess_params))

    def preprocess(self, prompt_text: Any, *args: Any, **params: Any) -> Any:
        """Tokenise one prompt; its task goes into the inputs, where the pipeline's own batching concatenates it."""
        if not isinstance(prompt_text, _Example):
            return super().preprocess(prompt_text, *args, **params)
        inputs = super().preprocess(prompt_text.prompt, *args, **params)
        inputs["task_ids"] = prompt_text.task
        return inputs

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:
        if "task_ids" in model_inputs:
            generate_kwargs["task_ids"] = model_inputs.pop("task_ids")
        return super()._forward(model_inputs, **generate_kwargs)


def _released(bank: PrefixBank, held: list[int], answers: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """All answers, and then the prefixes that they held."""
    try:
        yield from answers()
    finally:
        bank.release(held)
