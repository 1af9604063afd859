"""Own files: round trips, and everything that is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefix_attn import IncompatiblePrefix, __version__
from prefix_attn.bank import PrefixBank
from prefix_attn.bank import format as files
from prefix_attn.bank.format import checksum, file_names, portable_name, read_safetensors
from prefix_attn.bank.names import SUFFIX
from tests.bank.models import random_kv, read, same_bits, state, tiny

MODEL = tiny()


@pytest.fixture
def bank() -> PrefixBank:
    bank = PrefixBank.for_model(MODEL)
    bank.add("zebra", random_kv(bank.geometry, 5, seed=1))
    bank.add("gone", random_kv(bank.geometry, 40, seed=2))
    bank.add("ant eater é", random_kv(bank.geometry, 17, seed=3))
    bank.add("empty", random_kv(bank.geometry, 0))
    bank.remove("gone")
    return bank


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, **changes: str | None) -> None:
    """Save the file again with other metadata; None drops a key."""
    metadata = {**metadata_of(path), **changes}
    save_file(load_file(path), path, {key: value for key, value in metadata.items() if value is not None})


def test_round_trip(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path / "new" / "folder")
    again = PrefixBank.from_pretrained(str(tmp_path / "new" / "folder"), MODEL)
    assert again.names == bank.names == ["zebra", "ant eater é", "empty"]
    assert again.lengths == [5, 17, 0]  # ids count anew
    assert all(same_bits(read(again, name), read(bank, name)) for name in bank.names)
    assert again.memory_usage.tasks == bank.memory_usage.tasks
    padded = 16 + 32
    assert again.memory_usage.allocated == padded * bank.geometry.token_bytes(bank.dtype) + 2 * 3 * 4
    again.save_pretrained(tmp_path / "twice")
    assert state(PrefixBank.from_pretrained(tmp_path / "twice", MODEL)) == state(again)
    assert not list(tmp_path.rglob("*.partial"))


def test_layers_of_different_shapes(tmp_path: Path) -> None:
    model = tiny("gemma4_text")
    bank = PrefixBank.for_model(model)
    assert [layer[:2] for layer in bank.geometry.layers] == [(2, 8), (2, 16)]
    bank.add("a", random_kv(bank.geometry, 9))
    bank.save_pretrained(tmp_path)
    assert state(PrefixBank.from_pretrained(tmp_path, model)) == state(bank)
    with pytest.raises(IncompatiblePrefix, match="2 kv heads of 8 or 2 kv heads of 16"):
        PrefixBank.for_model(MODEL).load("a", tmp_path / "a.safetensors")


def test_empty_bank(tmp_path: Path) -> None:
    PrefixBank.for_model(MODEL).save_pretrained(tmp_path)
    assert PrefixBank.from_pretrained(tmp_path, MODEL).names == []


def test_saving_again_replaces(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    bank.remove("zebra")
    bank.add("zebra", random_kv(bank.geometry, 6, seed=9))
    bank.save_pretrained(tmp_path)
    assert PrefixBank.from_pretrained(tmp_path, MODEL).names == ["ant eater é", "empty", "zebra"]


def test_who_saves_at_the_same_time_loses_no_task(
    bank: PrefixBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both would read the index before either has written it."""
    pytest.importorskip("fcntl", reason="this system has no locks of files")
    bank.save_pretrained(tmp_path)
    others = [PrefixBank.for_model(MODEL) for _ in range(4)]
    write = files.write_index

    def slowly(*arguments: Any) -> None:
        time.sleep(0.1)
        write(*arguments)

    monkeypatch.setattr(files, "write_index", slowly)
    for i, other in enumerate(others):
        other.add(f"more {i}", random_kv(bank.geometry, 3))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda other: other.save_into(tmp_path), others))
    assert {*files.read_index(tmp_path)} == {*bank.names, *(f"more {i}" for i in range(4))}


def test_one_file_into_another_bank(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    other = PrefixBank.for_model(MODEL)
    assert other.load("renamed", tmp_path / "zebra.safetensors") == 0
    assert same_bits(read(other, "renamed"), read(bank, "zebra"))


def test_metadata(bank: PrefixBank, tmp_path: Path) -> None:
    MODEL.config._name_or_path = str(tmp_path / "models" / "tiny-llama")
    try:
        named = PrefixBank.for_model(MODEL)
    finally:
        MODEL.config._name_or_path = ""
    named.add("a", random_kv(bank.geometry, 5))
    named.save_pretrained(tmp_path / "bank")
    fingerprint = bank.base.fingerprint
    assert metadata_of(tmp_path / "bank" / "a.safetensors") == {
        "format": "prefix_attn.prefix",
        "format_version": "1",
        "geometry": "[[2, 8], [2, 8]]",
        "dtype": "float32",
        "position_mode": "offset",
        "base_config": fingerprint.config,
        "base_weights": fingerprint.weights,
        "base_model": "tiny-llama",
        "source": "tensors",
        "created_by": f"prefix_attn {__version__}",
        "tensors_sha256": checksum(read_safetensors(tmp_path / "bank" / "a.safetensors")[0]),
    }
    for file in (tmp_path / "bank").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_portable_name() -> None:
    for name in ("", "gpt2", "meta-llama/Llama-3.2-1B"):
        assert portable_name(name) == name
    for name in ("/data/models/x", "~/x", "./x", "../x", "a/b/x", "C:\\models\\x", "/data/x/"):
        assert portable_name(name) == "x"


def test_files_differ_where_case_is_ignored() -> None:
    files = file_names(["a", "A", "a~2", "b"], {})
    assert list(files) == ["a", "A", "a~2", "b"]
    assert len({file.casefold() for file in files.values()}) == 4
    assert files["a"] == "a.safetensors"


@pytest.mark.parametrize("name", ["v1.", "a b", "~", "n" * 200, "\u00e4" * 100])
def test_every_legal_name_survives(tmp_path: Path, name: str) -> None:
    bank = PrefixBank.for_model(MODEL)
    bank.add(name, random_kv(bank.geometry, 5, seed=1))
    bank.save_pretrained(tmp_path)
    assert state(PrefixBank.from_pretrained(tmp_path, MODEL)) == state(bank)


def test_case_pairs_survive(tmp_path: Path) -> None:
    bank = PrefixBank.for_model(MODEL)
    bank.add("a", random_kv(bank.geometry, 5, seed=1))
    bank.add("A", random_kv(bank.geometry, 5, seed=2))
    bank.save_pretrained(tmp_path)
    assert state(PrefixBank.from_pretrained(tmp_path, MODEL)) == state(bank)


def test_other_dtype_of_the_same_weights(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    half = PrefixBank.from_pretrained(tmp_path, tiny().to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(read(half, "zebra")[0][0], read(bank, "zebra")[0][0].to(torch.bfloat16))


def test_other_weights_are_refused(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    other = tiny(seed=1)
    with pytest.raises(IncompatiblePrefix, match=r"zebra.safetensors: expected the fingerprint .* weights"):
        PrefixBank.from_pretrained(tmp_path, other)
    assert PrefixBank.from_pretrained(tmp_path, other, check_base=False).names == bank.names
    theirs = PrefixBank.for_model(other)
    with pytest.raises(IncompatiblePrefix, match="check_base=False"):
        theirs.load("zebra", tmp_path / "zebra.safetensors")
    assert len(theirs) == 0
    theirs.load("zebra", tmp_path / "zebra.safetensors", check_base=False)
    with pytest.raises(IncompatiblePrefix, match="2 layers of 2 kv heads of 8; it was made for another model"):
        PrefixBank.from_pretrained(tmp_path, tiny(num_hidden_layers=3), check_base=False)
    rotary = tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(IncompatiblePrefix, match=r"bank's base model's config"):
        PrefixBank.from_pretrained(tmp_path, rotary)


def _damage(path: Path, case: str) -> None:
    tensors, metadata = load_file(path), metadata_of(path)
    content = bytearray(path.read_bytes())
    if case == "truncated":
        path.write_bytes(content[:-100])
    elif case == "header cut":
        path.write_bytes(content[:40])
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "noise":
        path.write_bytes(bytes(range(256)))
    elif case == "pickle":
        path.write_bytes(pickle.dumps({"k.0": 1}))
    elif case == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data.pkl", b"")
    elif case == "no metadata":
        save_file(tensors, path)
    elif case == "missing layer":
        del tensors["v.1"]
        save_file(tensors, path, metadata)
    elif case == "extra tensor":
        save_file({**tensors, "w": torch.zeros(1)}, path, metadata)
    elif case == "shape":
        save_file({**tensors, "v.1": tensors["v.1"][:, :-1].contiguous()}, path, metadata)
    elif case == "nan":
        tensors["k.1"][0, 0, 0] = torch.nan
        save_file(tensors, path, metadata | {"tensors_sha256": checksum(tensors)})
    elif case == "one bit":
        content[-5] ^= 4
        path.write_bytes(content)
    else:
        key, value = case.split("=", 1)
        rewrite(path, **{key: None if value == "None" else value})


DAMAGES = {
    "truncated": "expected a whole safetensors file",
    "header cut": "expected a whole safetensors file",
    "empty": "expected a whole safetensors file",
    "noise": "expected a whole safetensors file",
    "pickle": "refusing to read what is a pickle.*safe_serialization=True",
    "zip": "refusing to read what is a pickle or a zip",
    "no metadata": "without its metadata",
    "missing layer": "for 2 layers, got 3 tensors",
    "extra tensor": "got 5 tensors",
    "shape": r"layer 1 takes v .*got \[2, 4, 8\]",
    "nan": r"\[1\]: expected finite values",
    "one bit": "its values are not those that were saved",
    "tensors_sha256=0": "its values are not those that were saved",
    "format=other": "without its metadata",
    "format_version=2": "expected format_version '1', got '2'; it was written by prefix_attn",
    "position_mode=absolute": "expected position_mode 'offset', got 'absolute'",
    "position_mode=None": "expected position_mode 'offset', got None",
    "geometry=[[4, 4], [4, 4]]": "2 layers of 4 kv heads of 4",
    "geometry=None": "geometry is unreadable",
    "geometry={": "geometry is unreadable",
    "geometry=7": "geometry is unreadable",
    "base_weights=None": "weights, got none",
    "base_config=0123": "config, got 0123",
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused(bank: PrefixBank, tmp_path: Path, case: str) -> None:
    bank.save_pretrained(tmp_path)
    path = tmp_path / "zebra.safetensors"
    _damage(path, case)
    words = "zebra.safetensors.*" + DAMAGES[case]
    before = state(bank)
    with pytest.raises(IncompatiblePrefix, match=words):
        bank.load("new", path)
    assert state(bank) == before
    with pytest.raises(IncompatiblePrefix, match=words):
        PrefixBank.from_pretrained(tmp_path, MODEL)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".BIN"])
def test_pickles_are_refused_by_name(bank: PrefixBank, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"adapter_model{suffix}"
    torch.save({"prompt_embeddings": torch.zeros(1)}, path)
    with pytest.raises(IncompatiblePrefix, match=f"adapter_model{suffix}: refusing to read a pickle"):
        bank.load("new", path)


def test_a_header_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    """A safetensors file may start with 0x80, the first byte of a pickle: its header's length."""
    for padding in range(1, 400):
        path = tmp_path / "x.safetensors"
        save_file({"x": torch.zeros(1)}, path, {"padding": "p" * padding})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert read_safetensors(path)[0].keys() == {"x"}


def test_paths_that_are_no_prefix(bank: PrefixBank, tmp_path: Path) -> None:
    before = state(bank)
    with pytest.raises(IncompatiblePrefix, match=r"OWNER/NAME on the Hub, but 'nowhere' does not exist"):
        bank.load("new", "nowhere")
    with pytest.raises(IncompatiblePrefix, match=r"expected a folder with adapter_config.json"):
        bank.load("new", tmp_path)
    bank.save_pretrained(tmp_path)
    with pytest.raises(IncompatiblePrefix, match=r"PrefixBank.from_pretrained"):
        bank.load("new", tmp_path)
    with pytest.raises(IncompatiblePrefix, match="remove it first"):
        bank.load("zebra", tmp_path / "zebra.safetensors")
    assert state(bank) == before


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "bank.json: expected a JSON file"),
        ("{", "bank.json: expected a JSON file"),
        ("[]", "bank.json: expected a JSON object"),
        ("{}", "expected format 'prefix_attn.bank'"),
        ({"format_version": "2"}, "got 'prefix_attn.bank' version '2'"),
        ({"tasks": None}, "expected tasks with name and file"),
        ({"tasks": [{"name": "zebra"}]}, "expected tasks with name and file"),
        ({"tasks": ["zebra"]}, "expected tasks with name and file"),
        ({"tasks": [{"name": "zebra", "file": "../zebra.safetensors"}]}, "file: expected the name of a file in"),
        ({"tasks": [{"name": "zebra", "file": ".."}]}, "file: expected the name of a file in"),
        ({"tasks": [{"name": "zebra", "file": "bank.json"}]}, r"file: expected a prefix file, \*.safetensors, got"),
        ({"tasks": [{"name": x, "file": "zebra.safetensors"} for x in "ab"]}, "or its file twice"),
        ({"tasks": [{"name": "../x", "file": "zebra.safetensors"}]}, "name: expected no '/'"),
        ({"tasks": [{"name": "zebra", "file": "zebra.safetensors"}] * 2}, "twice"),
        ({"tasks": [{"name": "zebra", "file": "missing.safetensors"}]}, "missing.safetensors: expected a whole"),
    ],
)
def test_bad_index(bank: PrefixBank, tmp_path: Path, index: object, words: str) -> None:
    bank.save_pretrained(tmp_path)
    path = tmp_path / "bank.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if isinstance(index, dict) and index:
        path.write_text(json.dumps({**good, **index}), encoding="utf-8")
    elif index is not None:
        path.write_text(str(index), encoding="utf-8")
    with pytest.raises(IncompatiblePrefix, match=words):
        PrefixBank.from_pretrained(tmp_path, MODEL)


def test_a_loaded_bank_does_not_need_its_files(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path / "bank")
    again = PrefixBank.from_pretrained(tmp_path / "bank", MODEL)
    before = state(again)
    shutil.rmtree(tmp_path / "bank")
    assert state(again) == before


def test_saving_into_a_bank_touches_no_other_task(tmp_path: Path) -> None:
    model = tiny()
    first, second = PrefixBank.for_model(model), PrefixBank.for_model(model)
    first.add("a", random_kv(first.geometry, 3, seed=0))
    first.add("b", random_kv(first.geometry, 4, seed=1))
    first.save_into(tmp_path)
    before = (tmp_path / "a.safetensors").read_bytes()
    second.add("A", random_kv(first.geometry, 5, seed=2))
    second.add("b", random_kv(first.geometry, 6, seed=3), source="again")
    second.save_into(tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    bank = PrefixBank.from_pretrained(tmp_path, model)
    assert {name: bank.prefix_len(name) for name in bank.names} == {"a": 3, "b": 6, "A": 5}
    assert bank.source("b") == "again"
    assert same_bits(bank.key_values("A"), second.key_values("A"))


def test_files_are_as_readable_as_others_here(bank: PrefixBank, tmp_path: Path) -> None:
    bank.save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_a_full_disk(bank: PrefixBank, tmp_path: Path) -> None:
    """Simulated by a limit on the size of files, in a process of its own."""
    pytest.importorskip("resource", reason="this system has no limits of processes")
    bank.save_pretrained(tmp_path)
    names = bank.names
    bank.add("more", random_kv(bank.geometry, 60))
    pid = os.fork()
    if pid == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            bank.save_into(tmp_path)
        except OSError as error:
            os._exit(42 if "cannot be written" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert {*tmp_path.iterdir()} == {
        tmp_path / name for name in (".lock", "bank.json", *(f"{x}{SUFFIX}" for x in names))
    }
    again = PrefixBank.from_pretrained(tmp_path, MODEL)
    assert again.names == names
    assert all(same_bits(read(again, name), read(bank, name)) for name in names)
