"""PEFT's wrapper around a patched model: LoRA and other adapters of the weights, active together with prefixes.

The wrapper's ``forward`` has an argument ``task_ids`` of its own, which it drops. So a hook in front of it renames the
argument, and the decoder's hook takes it under either name. (The wrapper's ``generate`` passes it on.)
"""

from __future__ import annotations

from typing import Any

from prefix_attn.errors import PrefixAttnError, UnsupportedModel

#: The name under which task ids pass through a wrapper.
RELAYED = "prefix_task_ids"

_ATTRIBUTE = "_prefix_attn_relay"


def is_wrapper(model: Any) -> bool:
    """Whether ``model`` is a PEFT model with a transformers model inside."""
    return hasattr(model, "get_base_model") and hasattr(model, "peft_config")


def attach(wrapper: Any) -> None:
    """Let a PEFT model pass ``task_ids`` on to the patched model inside it; at most once.

    Raises:
        UnsupportedModel: its active adapter is a prompt or a prefix itself, or has tasks of its own.
    """
    _check_adapter(wrapper)
    if not is_attached(wrapper):
        wrapper.__dict__[_ATTRIBUTE] = wrapper.register_forward_pre_hook(_relay, with_kwargs=True)


def is_attached(wrapper: Any) -> bool:
    """Whether `attach` has been called, and not undone."""
    return _ATTRIBUTE in wrapper.__dict__


def detach(wrapper: Any) -> None:
    """Undo `attach`."""
    handle = wrapper.__dict__.pop(_ATTRIBUTE, None)
    if handle is not None:
        handle.remove()


def pop_task_ids(kwargs: dict[str, Any]) -> Any:
    """Take the task ids out of what a stack of layers is called with; None where there are none."""
    refuse_other_names(kwargs)
    relayed = kwargs.pop(RELAYED, None)
    return kwargs.pop("task_ids", relayed)


def refuse_other_names(kwargs: dict[str, Any]) -> None:
    """Raise `PrefixAttnError` for what was meant as ``task_ids``, and would go unread."""
    for name in ("task", "tasks", "task_id"):
        if kwargs.get(name) is not None:
            raise PrefixAttnError(f"{name}: expected task_ids, with one name, id or None for each row")


def _relay(wrapper: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs.get("task_ids") is None:
        return args, kwargs
    _check_adapter(wrapper)
    return args, {name: x for name, x in kwargs.items() if name != "task_ids"} | {RELAYED: kwargs["task_ids"]}


def _check_adapter(wrapper: Any) -> None:
    config = wrapper.active_peft_config
    if config.is_prompt_learning:
        raise UnsupportedModel(
            f"model: expected adapters of weights (LoRA and the like) around the model, got {config.peft_type}; load "
            "it into the bank (bank.load), and patch the model inside (model.get_base_model())"
        )
    if config.peft_type == "POLY":
        raise UnsupportedModel("model: POLY adapters have task_ids of their own, which would be taken for prefixes")
