"""``prefix-attn bank``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_attn.bank.format import read_index, write_index
from prefix_attn.bank.lock import only_writer
from prefix_attn.cli.example import ShippedExample
from tests.bank.hub import MAIN, serving
from tests.cli.conftest import Folder, Run


@pytest.fixture
def bank(tmp_path: Path, example: ShippedExample, run: Run) -> Path:
    """A bank of two tasks, made by the command."""
    for name, task in (("up", "upper"), ("back", "reverse")):
        adapter = f"{name}={example.folder / 'adapters' / task}"
        result = run("bank", "add", tmp_path / "bank", adapter, "--model", example.model)
        assert result.exit_code == 0, result.stderr
        assert result.stderr == ""
    return tmp_path / "bank"


def test_list_says_tokens_bytes_and_source(bank: Path, run: Run, example: ShippedExample) -> None:
    for command in (("list", bank), ("check", bank, "--model", example.model)):
        result = run("bank", *command)
        assert result.exit_code == 0
        rows = [line.replace("│", " ").split() for line in result.stdout.splitlines()]
        assert ["up", "6", "12,288", "peft:upper", "model"] in rows
        assert ["back", "8", "16,384", "peft:reverse", "model"] in rows
        assert ["total", "14", "28,672"] in rows


def test_a_name_that_the_terminal_cannot_show(bank: Path) -> None:
    files = read_index(bank)
    write_index(bank, {"größer": files["up"]})
    command = [sys.executable, "-m", "prefix_attn", "bank", "list", str(bank)]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "gr\\xf6\\xdfer" in shown.stdout


def test_check(bank: Path, run: Run, example: ShippedExample, tmp_path: Path) -> None:
    result = run("bank", "check", bank, "--model", example.model)
    assert result.exit_code == 0
    assert "2 prefixes fit" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(example.model)
    model.model.embed_tokens.weight.data += 0.1
    model.save_pretrained(tmp_path / "other")
    result = run("bank", "check", bank, "--model", tmp_path / "other")
    assert result.exit_code == 2
    assert "expected the fingerprint" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_remove_takes_the_file_too(bank: Path, run: Run, example: ShippedExample) -> None:
    result = run("bank", "remove", bank, "up")
    assert result.exit_code == 0
    assert sorted(file.name for file in bank.iterdir()) == [".lock", "back.safetensors", "bank.json"]
    result = run("bank", "remove", bank, "up")
    assert result.exit_code == 2
    assert result.stderr == "error: name: expected one of ['back'], got 'up'\n"


def test_removing_waits_for_who_writes(bank: Path, run: Run) -> None:
    pytest.importorskip("fcntl", reason="this system has no locks of files")
    with ThreadPoolExecutor() as pool:
        with only_writer(bank):
            removing = pool.submit(run, "bank", "remove", bank, "up")
            with pytest.raises(TimeoutError):
                removing.result(timeout=0.5)
            assert list(read_index(bank)) == ["up", "back"]
        assert removing.result().exit_code == 0
    assert list(read_index(bank)) == ["back"]


def test_a_bank_serves_generate(bank: Path, folder: Folder) -> None:
    folder.adapters = ["--bank", str(bank)]
    folder.ask([{"task": "back", "prompt": "hot tea>"}, {"task": "up", "prompt": "hot tea>"}])
    assert folder.generate().exit_code == 0
    assert [answer["text"] for answer in folder.answers()] == ["aet toh", "HOT TEA"]


def test_from_the_hub(run: Run, example: ShippedExample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repositories = {"me/upper": {MAIN: example.folder / "adapters" / "upper"}, "me/bank": {MAIN: tmp_path / "bank"}}
    (tmp_path / "in.jsonl").write_text('{"task": "up", "prompt": "hot tea>"}\n', encoding="utf-8")
    with serving(repositories, tmp_path / "cache", monkeypatch):
        added = run("bank", "add", tmp_path / "bank", "up=me/upper", "--model", example.model)
        assert added.exit_code == 0, added.stderr
        assert f"peft:me/upper@{MAIN[:12]}" in added.stdout
        files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
        assert run("generate", "--model", example.model, "--bank", "me/bank", *files).exit_code == 0
        missing = run("bank", "add", tmp_path / "bank", "x=me/nobody", "--model", example.model)
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["text"] == "HOT TEA"
    assert missing.exit_code == 2
    assert "'me/nobody' does not exist on this machine" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


def test_a_name_is_given_once(bank: Path, run: Run, example: ShippedExample) -> None:
    result = run("bank", "add", bank, f"up={example.folder / 'adapters' / 'sort'}", "--model", example.model)
    assert result.exit_code == 2
    assert "'up' is already in the bank" in result.stderr


def test_an_adapter_of_another_model_is_warned_of_in_one_line(
    run: Run, example: ShippedExample, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    source = example.folder / "adapters" / "upper"
    (adapter / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    config = json.loads((source / "adapter_config.json").read_text()) | {"base_model_name_or_path": "someone/other"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = run("bank", "add", tmp_path / "bank", f"up={adapter}", "--model", example.model)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {adapter}: this adapter was trained on 'someone/other'")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"not a prefix"])
def test_a_damaged_file_is_shown_and_stops_no_other(
    bank: Path, run: Run, example: ShippedExample, content: bytes | None
) -> None:
    if content is None:
        (bank / "up.safetensors").unlink()
    else:
        (bank / "up.safetensors").write_bytes(content)
    result = run("bank", "list", bank)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 5]
    assert ["back", "8", "16,384", "peft:reverse", "model"] in rows
    assert ["total", "8", "16,384", "", ""] in rows
    start = next(i for i, row in enumerate(rows) if row[0] == "up")
    problem = "".join(row[3] for row in rows[start:]).replace(" ", "")
    assert "up.safetensors:expectedaprefixfileofthispackage" in problem
    assert run("bank", "check", bank, "--model", example.model).exit_code == 2
    assert run("bank", "remove", bank, "back").exit_code == 0
    assert list(read_index(bank)) == ["up"]
    assert run("bank", "remove", bank, "up").exit_code == 0
    assert list(read_index(bank)) == []


def test_a_text_becomes_a_task(bank: Path, run: Run, example: ShippedExample, folder: Folder, tmp_path: Path) -> None:
    """The instruction that the base model was trained with, as a prefix."""
    text = tmp_path / "text"
    text.write_text("reverse|", encoding="utf-8")
    result = run("bank", "add-text", bank, "told", text, "--model", example.model)
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "told" in line).replace("│", " ").split()
    assert row == ["told", "9", "18,432", "text", "model"], "its characters and the token that opens a sequence"
    folder.adapters = ["--bank", str(bank)]
    folder.ask([{"task": "told", "prompt": "hot tea>"}, {"task": "up", "prompt": "hot tea>"}])
    assert folder.generate().exit_code == 0
    assert [answer["text"] for answer in folder.answers()] == ["aet toh", "HOT TEA"]


def test_adding_rewrites_no_other_task(bank: Path, run: Run, example: ShippedExample, tmp_path: Path) -> None:
    """Also where the checkpoint has another dtype than the bank."""
    model = AutoModelForCausalLM.from_pretrained(example.model).bfloat16()
    for x in (model, AutoTokenizer.from_pretrained(example.model)):
        x.save_pretrained(tmp_path / "half")
    text, before = tmp_path / "text", (bank / "up.safetensors").read_bytes()
    text.write_text("reverse|", encoding="utf-8")
    added = run("bank", "add", bank, f"more={example.folder / 'adapters' / 'rot13'}", "--model", tmp_path / "half")
    assert added.exit_code == 0, added.stderr
    assert "its values were rounded from float32 to bfloat16; --dtype float32 keeps them as they are\n" in added.stderr
    assert run("bank", "add-text", bank, "told", text, "--model", tmp_path / "half").exit_code == 0
    assert (bank / "up.safetensors").read_bytes() == before
    assert run("bank", "check", bank, "--model", example.model).exit_code == 0
    again = run("bank", "add", bank, f"more={example.folder / 'adapters' / 'rot13'}", "--model", example.model)
    assert again.exit_code == 2
    assert "'more' is already in the bank" in again.stderr


def test_a_bank_in_another_dtype_than_its_checkpoint(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(example.model).bfloat16()
    for x in (model, AutoTokenizer.from_pretrained(example.model)):
        x.save_pretrained(tmp_path / "model")
    text, bank = tmp_path / "text", tmp_path / "bank"
    text.write_text("reverse|", encoding="utf-8")
    common = ("--model", tmp_path / "model", "--dtype", "float32")
    for command in (("add", bank, f"up={example.folder / 'adapters' / 'upper'}"), ("add-text", bank, "told", text)):
        result = run("bank", *command, *common)
        assert (result.exit_code, result.stderr) == (0, "")
    for name in ("up", "told"):
        assert load_file(bank / f"{name}.safetensors")["k.0"].dtype == torch.float32


def test_a_text_that_is_none(run: Run, example: ShippedExample, tmp_path: Path) -> None:
    text = tmp_path / "text"
    for content, reason in ((b"", "expected a non-empty string"), (b"\xff", "expected a text in UTF-8")):
        text.write_bytes(content)
        result = run("bank", "add-text", tmp_path / "bank", "told", text, "--model", example.model)
        assert result.exit_code == 2
        assert reason in result.stderr
        assert not (tmp_path / "bank").exists()
