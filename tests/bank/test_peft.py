"""Adapters written by the real PEFT give the keys and values that PEFT itself would use."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefix_attn import ContextOverflow, IncompatiblePrefix
from prefix_attn.bank import PrefixBank
from tests.bank.models import FAMILIES, prefix_tuned, quiet_peft, random_kv, read, same_bits, state, tiny


@pytest.fixture(autouse=True)
def _quiet() -> None:
    quiet_peft()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings():
        quiet_peft()
        folder = tmp_path_factory.mktemp("adapters") / "reverse"
        prefix_tuned(tiny()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter to damage."""
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_get_prompt(family: str, projection: bool, tmp_path: Path) -> None:
    model = tiny(family)
    bank = PrefixBank.for_model(model)
    tuned = prefix_tuned(model, tokens=5, projection=projection)
    tuned.save_pretrained(tmp_path / "task")
    bank.load("task", tmp_path / "task")
    cache = tuned.get_prompt(batch_size=1)
    assert bank.lengths == [5]
    assert len(cache.layers) == bank.num_layers
    for (k, v), layer in zip(read(bank, "task"), cache.layers, strict=True):
        assert torch.equal(k, layer.keys[0])
        assert torch.equal(v, layer.values[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cartridge_is_read_as_peft_does(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "CartridgeConfig"):
        pytest.skip("this PEFT has no cartridges")
    torch.manual_seed(0)
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2)
    model = tiny(family)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(family), tmp_path)
    bank = PrefixBank.for_model(again)
    bank.load("task", tmp_path)
    assert bank.lengths == [5]
    for (k, v), layer in zip(read(bank, "task"), again.get_prompt(batch_size=1).layers, strict=True):
        assert torch.equal(k, layer.keys[0])
        assert torch.equal(v, layer.values[0])


def test_half_precision_model(tmp_path: Path) -> None:
    model = tiny().to(torch.bfloat16)
    tuned = prefix_tuned(model)
    tuned.save_pretrained(tmp_path)
    bank = PrefixBank.for_model(tuned)  # the base inside the wrapper
    bank.load("task", tmp_path)
    assert bank.dtype == torch.bfloat16
    assert torch.equal(read(bank, "task")[1][0], tuned.get_prompt(batch_size=1).layers[1].keys[0])


def test_longer_than_the_window(tmp_path: Path) -> None:
    """PEFT crops a sliding layer's prefix to the window, where the mask would hide the rest; the bank keeps all."""
    model = tiny("gemma3_text")
    tuned = prefix_tuned(model, tokens=20)
    tuned.save_pretrained(tmp_path)
    bank = PrefixBank.for_model(model)
    bank.load("task", tmp_path)
    layers = tuned.get_prompt(batch_size=1).layers
    assert [layer.keys.shape[2] for layer in layers] == [7, 20]
    assert bank.lengths == [20]
    for (k, _), layer in zip(read(bank, "task"), layers, strict=True):
        assert torch.equal(k[:, -layer.keys.shape[2] :], layer.keys[0])


def test_peft_is_not_needed(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = PrefixBank.for_model(tiny())
    monkeypatch.setitem(sys.modules, "peft", None)
    bank.load("task", adapter)
    assert bank.lengths == [5]


def test_saved_again_in_our_format(adapter: Path, tmp_path: Path) -> None:
    bank = PrefixBank.for_model(tiny())
    bank.load("task", adapter)
    bank.save_pretrained(tmp_path)
    with safe_open(tmp_path / "task.safetensors", "pt") as file:
        metadata = file.metadata()
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert metadata["source"] == "peft:reverse"
    assert metadata["peft_version"] == config["peft_version"]
    again = PrefixBank.from_pretrained(tmp_path, tiny())
    assert same_bits(read(again, "task"), read(bank, "task"))
    again.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "task.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_a_reloaded_adapter(tmp_path: Path) -> None:
    """PEFT then reads the stored tensor itself, without the MLP that made it."""
    import peft

    tuned = prefix_tuned(tiny(), projection=True)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path)
    bank = PrefixBank.for_model(again)
    bank.load("task", tmp_path)
    for (k, v), layer in zip(read(bank, "task"), again.get_prompt(batch_size=1).layers, strict=True):
        assert torch.equal(k, layer.keys[0])
        assert torch.equal(v, layer.values[0])


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return apply


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return write


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "lora": (_config(peft_type="LORA"), "expected peft_type PREFIX_TUNING or CARTRIDGE, got LORA"),
    "prompt tuning": (_config(peft_type="PROMPT_TUNING"), "got PROMPT_TUNING"),
    "no type": (_config(peft_type=None), "got None"),
    "two submodules": (_config(num_transformer_submodules=2), "encoder-decoder"),
    "seq2seq": (_config(task_type="SEQ_2_SEQ_LM", num_transformer_submodules=None), "encoder-decoder"),
    "layers": (_config(num_layers=3), "2 layers of 2 kv heads of 8, got 3 layers of 2 heads of 8"),
    "heads": (_config(num_attention_heads=4), r"2 kv heads of 8 in layer 0.*got 4 heads of 4"),
    "head_dim": (_config(token_dim=32), r"shape .* = \[5, 128\].*got \[5, 64\]"),
    "ragged heads": (_config(num_attention_heads=3), "3 heads of 5.33333"),
    "tokens": (_config(num_virtual_tokens=6), r"= \[6, 64\] as adapter_config.json says, got \[5, 64\]"),
    "no tokens": (_config(num_virtual_tokens=None), "num_virtual_tokens to be a positive integer, got None"),
    "float": (_config(token_dim=16.0), "token_dim to be a positive integer, got 16.0"),
    "classifier": (_tensors(lambda t: {**t, "score.weight": torch.zeros(2)}), "modules_to_save"),
    "other key": (_tensors(lambda t: {"prompt": t["prompt_embeddings"]}), "the tensor prompt_embeddings alone"),
    "nan": (_tensors(lambda t: {"prompt_embeddings": t["prompt_embeddings"] * torch.nan}), "expected finite values"),
    "pickle": (_pickle_only, "adapter_model.bin, which can run code; .*safe_serialization=True"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "got no such file"),
    "truncated": (_truncate, "adapter_model.safetensors: expected a whole safetensors file"),
    "bad json": (_write("adapter_config.json", b"{"), "expected a JSON file"),
    "binary json": (_write("adapter_config.json", b"\xff"), "a JSON file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_changed(folder: Path, case: str) -> None:
    damage, words = REFUSED[case]
    damage(folder)
    bank = PrefixBank.for_model(tiny())
    bank.add("other", random_kv(bank.geometry, 9))
    before = state(bank)
    with pytest.raises(IncompatiblePrefix, match=words):
        bank.load("task", folder)
    assert state(bank) == before


def test_a_file_inside_the_folder_is_not_the_adapter(folder: Path) -> None:
    with pytest.raises(IncompatiblePrefix, match=r"give the folder with adapter_config.json"):
        PrefixBank.for_model(tiny()).load("task", folder / "adapter_model.safetensors")


def test_other_models_are_refused(folder: Path) -> None:
    with pytest.raises(IncompatiblePrefix, match="expected 4 kv heads of 8 in layer 0"):
        PrefixBank.for_model(tiny("gpt2")).load("task", folder)
    with pytest.raises(ContextOverflow, match="at most 4 prefix tokens, got 5"):
        PrefixBank.for_model(tiny(max_position_embeddings=5)).load("task", folder)


def test_a_layer_that_peft_would_skip_is_refused(tmp_path: Path) -> None:
    """Gemma 4 with fewer heads in its wide layers: PEFT leaves the narrow layers without prefix."""
    model = tiny("gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1)
    bank = PrefixBank.for_model(model)
    assert [layer[:2] for layer in bank.geometry.layers] == [(2, 8), (1, 16)]
    prefix_tuned(model).save_pretrained(tmp_path)
    with pytest.raises(IncompatiblePrefix, match="expected 2 kv heads of 8 in layer 0"):
        bank.load("task", tmp_path)


@pytest.mark.parametrize(
    ("recorded", "model", "warns"),
    [
        ("org/tiny-llama", "org/tiny-llama", False),
        ("org/tiny-llama", "/models/tiny-llama", False),
        ("/somewhere/else/tiny-llama/", "org/tiny-llama", False),
        ("", "org/tiny-llama", False),
        (None, "org/tiny-llama", False),
        ("org/tiny-llama", "", False),
        ("org/tiny-llama", "org/tiny-qwen", True),
        ("/home/someone/other", "org/tiny-qwen", True),
    ],
)
def test_name_of_the_base_model(folder: Path, recorded: str | None, model: str, warns: bool) -> None:
    _config(base_model_name_or_path=recorded)(folder)
    base = tiny()
    base.config._name_or_path = model
    bank = PrefixBank.for_model(base)
    if warns:
        with pytest.warns(UserWarning, match="the bank's base model is 'org/tiny-qwen'") as seen:
            bank.load("task", folder)
        assert not any("/home" in str(warning.message) for warning in seen)
        assert seen[0].filename == __file__
    else:
        bank.load("task", folder)  # a warning would be an error here
    assert bank.names == ["task"]
