"""Prefixes from the Hub, and to it: which files are fetched, and what is said where there are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from prefix_attn import IncompatiblePrefix, PrefixBank
from prefix_attn.bank.hub import is_repository
from tests.bank.hub import MAIN, OLD, serving
from tests.bank.models import random_kv, read, same_bits, tiny

MODEL = tiny()
GEOMETRY = PrefixBank.for_model(MODEL).geometry


@pytest.fixture
def bank() -> PrefixBank:
    bank = PrefixBank.for_model(MODEL)
    bank.add("ant eater é", random_kv(GEOMETRY, 5, seed=1), source="ants|eaters")
    bank.add("zebra", random_kv(GEOMETRY, 17, seed=2))
    return bank


def adapter(folder: Path, tokens: int) -> Path:
    """What PEFT saves."""
    first = GEOMETRY.layers[0]
    sizes = {"num_layers": len(GEOMETRY.layers), "num_attention_heads": first.kv_heads,
             "token_dim": first.kv_heads * first.head_dim, "num_virtual_tokens": tokens}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PREFIX_TUNING", **sizes}), encoding="utf-8")
    width = sizes["num_layers"] * 2 * sizes["token_dim"]
    save_file({"prompt_embeddings": torch.randn(tokens, width)}, folder / "adapter_model.safetensors")
    (folder / "training.bin").write_bytes(b"not wanted")
    return folder


@pytest.fixture
def fetched(bank: PrefixBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub with an adapter in two commits, one that is a pickle, and a bank."""
    monkeypatch.chdir(tmp_path)
    bank.save_pretrained(tmp_path / "saved")
    save_file({"x": torch.zeros(1)}, tmp_path / "saved" / "model.safetensors")
    pickled = adapter(tmp_path / "pickled", 3)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    repositories = {
        "me/adapter": {MAIN: adapter(tmp_path / "new", 4), OLD: adapter(tmp_path / "old", 7)},
        "me/pickled": {MAIN: pickled},
        "me/bank.v1": {MAIN: tmp_path / "saved"},
    }
    with serving(repositories, tmp_path / "cache", monkeypatch) as files:
        yield files


@pytest.mark.usefixtures("fetched")
def test_an_adapter_in_two_revisions(bank: PrefixBank, fetched: list[str], tmp_path: Path) -> None:
    bank.load("new", "me/adapter")
    bank.load("old", "me/adapter", revision="v1")
    assert (bank.prefix_len("new"), bank.prefix_len("old")) == (4, 7)
    assert (bank.source("new"), bank.source("old")) == (f"peft:me/adapter@{'a' * 12}", f"peft:me/adapter@{'b' * 12}")
    assert fetched == ["adapter_config.json", "adapter_model.safetensors"] * 2
    same = PrefixBank.for_model(MODEL)
    same.load("new", tmp_path / "new")
    assert same_bits(read(bank, "new"), read(same, "new"))


def test_a_bank_is_fetched_file_by_file(bank: PrefixBank, fetched: list[str]) -> None:
    again = PrefixBank.from_pretrained("me/bank.v1", MODEL)
    assert fetched == ["bank.json", "ant eater é.safetensors", "zebra.safetensors"]
    assert again.names == bank.names
    assert all(same_bits(read(again, name), read(bank, name)) for name in bank.names)


def test_offline_the_cache_is_enough(bank: PrefixBank, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bank.load("new", "me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    bank.load("again", "me/adapter")
    assert len(fetched) == 2
    assert same_bits(read(bank, "new"), read(bank, "again"))
    with pytest.raises(IncompatiblePrefix, match=r"'me/other' does not exist on this machine, .* not in the cache"):
        bank.load("other", "me/other")


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("me/nobody", None, "'me/nobody' does not exist on this machine, and cannot be had from the Hub: .*404"),
        ("me/adapter", "v2", "cannot be had from the Hub: .*404"),
        ("me/bank.v1", None, "'me/bank.v1' on the Hub has no adapter_config.json"),
        ("me/pickled", None, "'me/pickled' on the Hub has no adapter_model.safetensors"),
        ("saved/zebra", None, "expected a file, a folder, or OWNER/NAME on the Hub, but 'saved/zebra' does not exist"),
        ("a/b/c", None, "'a/b/c' does not exist"),
        ("me/x.safetensors", None, "'me/x.safetensors' does not exist"),
        ("new", "main", "revision: expected None for a path on this machine"),
    ],
)
def test_what_is_not_there(bank: PrefixBank, path: str, revision: str | None, message: str) -> None:
    names = bank.names
    with pytest.raises(IncompatiblePrefix, match=message):
        bank.load("other", path, revision=revision)
    assert bank.names == names


def test_what_is_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repository("me/adapter")
    assert is_repository(Path("me") / "adapter")
    assert not any(map(is_repository, ("adapter", "./adapter", "/me/adapter", "~/adapter", "me/", "me\\x", "..//x")))
    (tmp_path / "me").mkdir()
    assert not is_repository("me/adapter")


class Hub:
    """What `push_to_hub` does of huggingface_hub's."""

    def __init__(self, folder: Path, has_page: bool) -> None:
        self.folder, self.has_page, self.made = folder, has_page, dict[str, Any]()

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.made = {"repo_id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, file: str) -> bool:
        assert file == "README.md"
        return self.has_page

    def upload_folder(
        self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]
    ) -> SimpleNamespace:
        shutil.copytree(folder_path, self.folder, ignore=shutil.ignore_patterns(*ignore_patterns))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/{commit_message}")


@pytest.mark.parametrize("has_page", [False, True])
def test_push(bank: PrefixBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_page: bool) -> None:
    hub = Hub(tmp_path / "there", has_page)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: hub)
    assert bank.push_to_hub("me/bank", private=True, commit_message="first") == "https://hub/me/bank/first"
    assert hub.made == {"repo_id": "me/bank", "private": True, "exist_ok": True}
    again = PrefixBank.from_pretrained(hub.folder, MODEL)
    assert again.names == bank.names
    page = hub.folder / "README.md"
    assert page.is_file() is not has_page
    if not has_page:
        text = page.read_text(encoding="utf-8")
        assert huggingface_hub.ModelCard(text).data.library_name == "prefix_attn"
        assert "| ant eater é | 5 | ants\\|eaters |\n| zebra | 17 | tensors |" in text
        assert 'from_pretrained("me/bank", model)' in text
