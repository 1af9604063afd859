"""A model spread over two devices by accelerate, as ``device_map="auto"`` does with one that fits on neither."""

from __future__ import annotations

from typing import Any

from accelerate import dispatch_model


def spread(model: Any, first: str | int, second: str | int) -> Any:
    """The first layer of each stack and all that is in no layer on one device, the other layers on the other."""
    layers = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    places = {name: first if name.endswith(".0") else second for name in layers}
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    places |= {name: first for name in leaves if not any(name.startswith(f"{layer}.") for layer in layers)}
    if "final_logits_bias" in dict(model.named_buffers()):
        places["final_logits_bias"] = first
    return dispatch_model(model, places, main_device=first)
