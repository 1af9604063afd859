"""Banks of encoder-decoder models: three parts, one set of tasks; and PEFT's adapters, layer quirk included."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import ContextOverflow, IncompatiblePrefix, UnsupportedModel
from prefix_attn.bank import PrefixBank
from tests.bank.models import quiet_peft, same_bits, tiny
from tests.bank.test_text import Letters
from tests.seq2seq import SEQ2SEQ, random_parts, tiny_seq2seq

LENGTHS = {"decoder": 5, "encoder": 3, "cross": 17}


def read_part(bank: PrefixBank, name: str, part: str) -> list[tuple[Tensor, Tensor]]:
    (task,) = bank.task_ids([name]).tolist()
    pairs = []
    for i in range(len(bank.base.geometries[part].layers)):
        prefix = bank.layer(i, part)
        start, m = prefix.spans[task]
        pairs.append((prefix.k[:, start : start + m], prefix.v[:, start : start + m]))
    return pairs


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_parts_of_a_model(family: str) -> None:
    bank = PrefixBank.for_model(tiny_seq2seq(family))
    assert bank.parts == ["decoder", "encoder", "cross"]
    decoder_layers = 3 if family == "t5" else 2
    assert bank.num_layers == decoder_layers
    layers = {part: [layer[:2] for layer in geometry.layers] for part, geometry in bank.base.geometries.items()}
    assert layers == {
        "decoder": [(4, 8)] * decoder_layers, "encoder": [(4, 8)] * 3, "cross": [(4, 8)] * decoder_layers,
    }  # fmt: skip
    assert bank.context_limit == (None if "t5" in family else 64)
    bank.check_model(tiny_seq2seq(family))


@pytest.fixture
def bank() -> PrefixBank:
    return PrefixBank.for_model(tiny_seq2seq("bart"))


def test_each_part_is_kept_as_given(bank: PrefixBank) -> None:
    whole, decoder, encoder = (random_parts(bank, lengths, seed=seed) for seed, lengths in enumerate(
        (LENGTHS, {"decoder": 7}, {"encoder": 20})
    ))  # fmt: skip
    bank.add("whole", whole)
    bank.add("decoder alone", decoder["decoder"])
    bank.add("encoder alone", encoder)
    for part in bank.parts:
        assert same_bits(read_part(bank, "whole", part), whole[part])
    assert same_bits(read_part(bank, "decoder alone", "decoder"), decoder["decoder"])
    assert same_bits(read_part(bank, "encoder alone", "encoder"), encoder["encoder"])
    lengths = {part: [bank.prefix_len(name, part) for name in bank.names] for part in bank.parts}
    assert lengths == {"decoder": [5, 7, 0], "encoder": [3, 0, 20], "cross": [17, 0, 0]}
    assert bank.lengths == lengths["decoder"]
    assert bank.layer(2, "encoder").lens.tolist() == lengths["encoder"]
    token = 2 * 4 * 8 * 4  # k and v, heads, head_dim, bytes
    assert bank.memory_usage.tasks["whole"] == token * (2 * 5 + 3 * 3 + 2 * 17)
    assert "whole             5 decoder +    3 encoder +   17 cross tokens" in repr(bank)
    bank.remove("whole")
    assert [bank.layer(0, part).lens.tolist() for part in bank.parts] == [[-1, 7, 0], [-1, 0, 20], [-1, 0, 0]]
    assert same_bits(read_part(bank, "encoder alone", "encoder"), encoder["encoder"])


def test_saved_and_loaded(bank: PrefixBank, tmp_path: Path) -> None:
    bank.add("whole", random_parts(bank, LENGTHS))
    bank.add("cross alone", random_parts(bank, {"cross": 4}))
    bank.save_pretrained(tmp_path)
    again = PrefixBank.from_pretrained(tmp_path, tiny_seq2seq("bart"))
    for name in bank.names:
        for part in bank.parts:
            assert same_bits(read_part(again, name, part), read_part(bank, name, part))
    one = PrefixBank.for_model(tiny_seq2seq("bart"))
    one.load("whole", tmp_path / "whole.safetensors")
    assert same_bits(read_part(one, "whole", "encoder"), read_part(bank, "whole", "encoder"))
    with pytest.raises(IncompatiblePrefix, match="expected a prefix for 3 layers of 4 kv heads of 8, got one for 2"):
        PrefixBank.for_model(tiny_seq2seq("bart", decoder_layers=3)).load("whole", tmp_path / "whole.safetensors")


def test_a_part_that_does_not_fit_leaves_the_bank_as_it_was(bank: PrefixBank, monkeypatch: pytest.MonkeyPatch) -> None:
    bank.add("first", random_parts(bank, LENGTHS))
    before = bank.names, bank.memory_usage.tasks, [bank.layer(0, part).lens.tolist() for part in bank.parts]
    good = random_parts(bank, LENGTHS)
    broken = dict(good, encoder=[*good["encoder"][:2], (good["encoder"][2][0] * torch.nan, good["encoder"][2][1])])
    refused: list[tuple[Any, str]] = [
        (dict(good, middle=[]), r"parts among \['decoder', 'encoder', 'cross'\], got \['middle'\]"),
        (dict(good, encoder=good["cross"]), r"key_values\['encoder'\]: .* each of the model's 3 layers, got 2"),
        (broken, r"key_values\['encoder'\]\[2\]: expected finite values"),
    ]
    for key_values, words in refused:
        with pytest.raises(IncompatiblePrefix, match=words):
            bank.add("second", key_values)
    with pytest.raises(ContextOverflow, match="at most 63 prefix tokens, got 64"):
        bank.add("second", random_parts(bank, {"decoder": 64}))
    with monkeypatch.context() as patched:
        patched.setattr(bank._parts["cross"], "append", lambda _: 1 / 0)  # as if memory had run out
        with pytest.raises(ZeroDivisionError):
            bank.add("second", good)
    assert before == (bank.names, bank.memory_usage.tasks, [bank.layer(0, part).lens.tolist() for part in bank.parts])
    bank.add("second", random_parts(bank, {"decoder": 63, "encoder": 100, "cross": 100}))


def test_a_text_is_no_prefix_of_a_decoder_with_an_encoder(bank: PrefixBank) -> None:
    with pytest.raises(UnsupportedModel, match="depend on the encoder's input"):
        bank.add_text("text", Letters(), "some words", tiny_seq2seq("bart"))


def peft_prefix(model: Any, tokens: int = 5) -> Any:
    """The model with a random PEFT prefix."""
    import peft

    task = "SEQ_2_SEQ_LM"
    torch.manual_seed(tokens)
    return peft.get_peft_model(model, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens))


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_same_as_get_prompt(family: str, tmp_path: Path) -> None:
    """The decoder's self-attention reads slots 0, 2, 1 of three; in a decoder of two layers 0 and 2."""
    with warnings.catch_warnings():
        quiet_peft()
        tuned = peft_prefix(tiny_seq2seq(family))
        tuned.save_pretrained(tmp_path)
        cache = tuned.get_prompt(batch_size=1)
    bank = PrefixBank.for_model(tiny_seq2seq(family))
    bank.load("task", tmp_path)
    assert [bank.prefix_len("task", part) for part in bank.parts] == [5, 0, 0]
    theirs = [(layer.keys[0], layer.values[0]) for layer in cache.self_attention_cache.layers[: bank.num_layers]]
    assert same_bits(read_part(bank, "task", "decoder"), theirs)


def test_adapters_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        quiet_peft()
        peft_prefix(tiny_seq2seq("bart")).save_pretrained(tmp_path)
        peft_prefix(tiny_seq2seq("bart", encoder_layers=2, decoder_layers=2)).save_pretrained(tmp_path / "two")
    with pytest.raises(IncompatiblePrefix, match="a decoder-only model, got one of an encoder-decoder"):
        PrefixBank.for_model(tiny()).load("task", tmp_path)
    with pytest.raises(IncompatiblePrefix, match="got 2 layers of 4 heads of 8"):
        PrefixBank.for_model(tiny_seq2seq("t5")).load("task", tmp_path / "two")
