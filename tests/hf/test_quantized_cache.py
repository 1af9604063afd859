"""transformers' quantized caches: a request's own keys are quantized, prefixes are not.

What a batch makes of its keys depends on all its rows. So the oracle is the unpatched model with the same cache and the
same batch, in which every layer attends to a copy of each row's prefix in front of the keys that the cache returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils
from transformers.masking_utils import eager_mask

import prefix_attn as pa
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model

BASE: dict[str, Any] = {
    "max_new_tokens": 8, "do_sample": False, "output_logits": True, "output_scores": True,
    "return_dict_in_generate": True, "cache_implementation": "quantized",
}  # fmt: skip
#: Two tokens fit into the part that is not quantized yet.
BY_GROUP: dict[str, Any] = {"residual_length": 3, "q_group_size": 16}


def missing(package: str) -> bool:
    return find_spec(package.partition(".")[0]) is None or find_spec(package) is None


def backend(name: str, reason: str, absent: bool, **options: Any) -> Any:
    return pytest.param({"backend": name} | options, id=name, marks=pytest.mark.skipif(absent, reason=reason))


BACKENDS = [
    backend("fp8", "this transformers has no fp8 cache", not hasattr(cache_utils, "Fp8QuantizedLayer")),
    backend("quanto", "optimum-quanto is not installed", missing("optimum.quanto"), nbits=4, **BY_GROUP),
    backend("hqq", "hqq is not installed", missing("hqq"), nbits=4, axis_key=1, axis_value=1, **BY_GROUP),
]


@contextmanager
def copies_in_front(model: Any, bank: pa.PrefixBank, tasks: list[str | None]) -> Iterator[None]:
    """An unpatched model in which the rows see the prefixes of ``tasks``, as many rows for each as the batch has."""
    copies = [[] if task is None else bank.key_values(task) for task in tasks]
    lengths = torch.tensor([0 if task is None else bank.prefix_len(task) for task in tasks])

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """softmax(scale * q @ [pk; k]^T + mask) @ [pv; v], row by row."""
        group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
        for row in range(len(q)):
            layers = copies[row * len(copies) // len(q)]
            keys, values = k[row], v[row]
            if layers:
                pk, pv = layers[module.layer_idx]
                keys, values = torch.cat([pk, keys], dim=1), torch.cat([pv, values], dim=1)
            seen = torch.cat([mask.new_zeros(q.shape[2], keys.shape[1] - k.shape[2]), mask[row, 0]], dim=1)
            keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            scale = q.shape[3] ** -0.5 if scaling is None else scaling
            out[row] = (scale * q[row] @ keys.mT + seen).softmax(dim=-1) @ values
        return out.transpose(1, 2), None

    def shift(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        positions = kwargs["position_ids"]
        m = lengths.repeat_interleave(len(positions) // len(tasks))
        return args, kwargs | {"position_ids": positions + m[:, None]}

    AttentionInterface.register("copies_in_front", attend)
    AttentionMaskInterface.register("copies_in_front", eager_mask)
    model.set_attn_implementation("copies_in_front")
    hook = model.get_decoder().register_forward_pre_hook(shift, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cache_config", BACKENDS)
def test_equals_copies_in_front_of_the_same_cache(family: str, cache_config: dict[str, Any]) -> None:
    options = {"hidden_size": 64} if family == "llama" else {"n_embd": 64}
    plain, model = (tiny_model(family, **options) for _ in range(2))
    bank = make_bank(model)
    pa.patch(model, bank)
    inputs = padded_inputs(paddings=(0, 0, 0, 0))  # keys of padding, which mean nothing, would set the common scale too
    for way in ({}, {"num_beams": 2}):
        ours = model.generate(**inputs, **BASE, **way, cache_config=cache_config, task_ids=TASKS)
        assert isinstance(ours.past_key_values, cache_utils.QuantizedCache)
        with copies_in_front(plain, bank, TASKS):
            theirs = plain.generate(**inputs, **BASE, **way, cache_config=cache_config)
        exact = model.generate(**inputs, **(BASE | way | {"cache_implementation": None}), task_ids=TASKS)
        assert torch.equal(ours.sequences, theirs.sequences)
        if way:
            assert (ours.sequences_scores - theirs.sequences_scores).abs().max() < 1e-5
            continue
        errors = [(a - b).abs().max() for a, b in zip(ours.logits, theirs.logits, strict=True)]
        assert max(errors) < 1e-5
        lost = [(a - b).abs().max() for a, b in zip(ours.logits, exact.logits, strict=False)]
        assert max(lost) > 1e-3, "the quantization is real"
