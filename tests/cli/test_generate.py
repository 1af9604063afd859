"""``prefix-attn generate`` on the shipped example."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_attn as pa
from prefix_attn.cli import console, generate
from prefix_attn.cli.answer import Answerer
from prefix_attn.cli.example import ANSWERS, INPUT, ShippedExample
from prefix_attn.cli.requests import Line, Row
from tests.cli.conftest import Folder, Run

PROMPT = f"{INPUT}>"


def test_answers_come_in_the_order_of_the_input(folder: Folder, example: ShippedExample) -> None:
    questions = example.questions[:50]
    folder.ask([question._asdict() | {"max_new_tokens": 9 + i % 3} for i, question in enumerate(questions)])
    result = folder.generate("--batch-size", "7", "--verify")
    assert result.exit_code == 0, result.stderr
    answers = folder.answers()
    assert [(a["line"], a["task"], a["prompt"]) for a in answers] == [
        (i, question.task, question.prompt) for i, question in enumerate(questions, start=1)
    ]
    right = sum(answer["text"] == question.answer for answer, question in zip(answers, questions, strict=True))
    assert right >= 47  # the prefixes reach 97 to 100%
    fields = ["line", "task", "prompt", "max_new_tokens", "text", "new_tokens", "made_by"]
    assert all(list(answer) == fields for answer in answers)
    assert "lines answered" in result.stdout
    assert "tokens/s" in result.stdout


def test_every_task_and_none_in_one_batch(folder: Folder, example: ShippedExample) -> None:
    folder.ask([{"task": task, "prompt": PROMPT} for task in (*ANSWERS, None)])
    assert folder.generate().exit_code == 0
    *tasks, none = folder.answers()
    assert {answer["task"]: answer["text"] for answer in tasks} == ANSWERS
    assert [answer["new_tokens"] for answer in tasks] == [len(text) + 1 for text in ANSWERS.values()]
    model, tokenizer = (kind.from_pretrained(example.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    alone = model.generate(**tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False), max_new_tokens=32)
    assert tokenizer.decode(alone[0, len(PROMPT) + 1 :], skip_special_tokens=True) == none["text"]


def test_each_row_gets_as_many_tokens_as_it_asked_for(folder: Folder) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT, "max_new_tokens": n} for n in (12, 3, 1)] + [
        {"task": "upper", "prompt": PROMPT}
    ])  # fmt: skip
    assert folder.generate("--max-new-tokens", "2").exit_code == 0
    assert [(a["text"], a["new_tokens"]) for a in folder.answers()] == [("HOT TEA", 8), ("HOT", 3), ("H", 1), ("HO", 2)]


def test_bad_lines_are_reported_and_lose_no_others(folder: Folder) -> None:
    lines = [
        {"task": "upper", "prompt": PROMPT},
        {"task": "[red]lower", "prompt": PROMPT},
        {"task": "reverse", "prompt": "a" * 60 + ">"},
        {"task": "rot13", "prompt": PROMPT, "max_new_tokens": 44},
        {"task": "rot13", "prompt": PROMPT, "max_new_tokens": 45},
        {"task": "sort", "prompt": PROMPT, "max_new_tokens": 10**30},
        {"task": "sort", "prompt": PROMPT},
    ]
    folder.input.write_bytes(b"\n".join([b"{oops", *(json.dumps(line).encode() for line in lines)]))
    result = folder.generate()
    assert result.exit_code == 1
    answers = {answer["line"]: answer for answer in folder.answers()}
    assert list(answers) == list(range(1, 9))
    assert {n: answer["text"] for n, answer in answers.items() if "text" in answer} == {
        2: "HOT TEA", 5: "ubg grn", 8: "aehott",
    }  # fmt: skip
    errors = {n: answer["error"] for n, answer in answers.items() if "error" in answer}
    assert "expected a JSON object" in errors[1]
    assert errors[3].startswith("task: expected one of ['upper', 'reverse'")
    assert errors[4].endswith("shorten the prompt")
    assert errors[6] == (
        "prompt: 9 tokens, a prefix of 12 and 45 new tokens exceed the model's 64 positions; lower max_new_tokens to 44"
    )
    assert "lower max_new_tokens to 48" in errors[7]
    for number, error in errors.items():
        assert f"line {number}: {error}\n" in result.stderr


def test_a_row_that_fits_alone_is_not_pushed_out_by_its_neighbours(folder: Folder) -> None:
    """The context is 64: a long prompt with a short answer, and a short prompt with a long answer."""
    folder.ask([
        {"task": "reverse", "prompt": "a" * 50 + ">", "max_new_tokens": 4},
        {"task": "reverse", "prompt": PROMPT, "max_new_tokens": 40},
        {"prompt": "a" * 59 + ">", "max_new_tokens": 4},
    ])  # fmt: skip
    result = folder.generate()
    assert result.exit_code == 0, result.stderr
    assert folder.answers()[1]["text"] == ANSWERS["reverse"]


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, calls = Answerer.answer, []

    def interrupted(self: Answerer, rows: Sequence[Row]) -> Any:
        calls.append(rows)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return answer(self, rows)

    monkeypatch.setattr(Answerer, "answer", interrupted)


def test_an_interrupted_run_is_continued(
    folder: Folder, example: ShippedExample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SORTED_BATCHES", 2)
    lines = [question._asdict() for question in example.questions[:20]]
    lines[3]["task"] = "unknown"
    folder.ask(lines)
    assert folder.generate("--batch-size", "3").exit_code == 1
    whole = folder.output.read_bytes()

    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        result = folder.generate("--batch-size", "3", "--overwrite")
    assert result.exit_code == console.INTERRUPTED
    assert "run the same command again to continue" in result.stderr
    begun = folder.output.read_bytes()
    assert whole.startswith(begun)
    assert 12 <= begun.count(b"\n") < 20

    folder.output.write_bytes(begun + whole[len(begun) :][:25])  # as if the power had gone in the middle of a line
    result = folder.generate("--batch-size", "3")
    assert result.exit_code == 1, "the line that failed in the first run still counts"
    assert f"after {begun.count(bytes([10]))} of 20 lines" in result.stderr
    assert folder.output.read_bytes() == whole


def test_a_complete_output_is_left_alone(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT}])
    assert folder.generate().exit_code == 0
    before = folder.output.read_bytes()
    interrupt_after(0, monkeypatch)
    assert folder.generate().exit_code == 0
    assert folder.output.read_bytes() == before


def test_an_output_of_another_prefix_or_model_is_refused_and_kept(
    folder: Folder, example: ShippedExample, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT}, {"prompt": PROMPT}] * 40)
    monkeypatch.setattr(generate, "SORTED_BATCHES", 2)
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert folder.generate("--batch-size", "2").exit_code == console.INTERRUPTED
    begun = folder.output.read_bytes()
    assert 0 < len(begun.splitlines()) < 80
    ours, folder.adapters = folder.adapters, [f"--adapter=upper={example.folder / 'adapters' / 'rot13'}"]
    result = folder.generate()
    assert result.exit_code == 2
    assert "in the existing file task 'upper' was answered by another model, dtype or prefix" in result.stderr
    folder.adapters, base = ours, folder.model
    model, tokenizer = (kind.from_pretrained(base) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.model.embed_tokens.weight.data += 0.1
    folder.model = str(tmp_path / "model")
    for x in (model, tokenizer):
        x.save_pretrained(folder.model)
    result = folder.generate()
    assert result.exit_code == 2
    assert "by another model, dtype or prefix" in result.stderr
    assert folder.output.read_bytes() == begun
    folder.model = base
    assert folder.generate().exit_code == 0
    assert [answer["text"] for answer in folder.answers()[::2]] == ["HOT TEA"] * 40


def test_an_output_of_another_input_is_refused_and_kept(folder: Folder) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT}])
    folder.output.write_text("my notes")
    result = folder.generate()
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --output: line 1 of the existing file does not belong to this input")
    assert folder.output.read_text() == "my notes"
    assert folder.generate("--overwrite").exit_code == 0
    assert folder.answers()[0]["text"] == "HOT TEA"


def test_answers_of_another_length_are_not_mixed_with_these(folder: Folder) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT}] * 2)
    assert folder.generate("--max-new-tokens", "2").exit_code == 0
    begun = folder.output.read_bytes().splitlines(keepends=True)[0]
    folder.output.write_bytes(begun)
    result = folder.generate("--max-new-tokens", "8")
    assert result.exit_code == 2
    assert "line 1 of the existing file does not belong to this input and --max-new-tokens" in result.stderr
    assert folder.output.read_bytes() == begun


def test_one_process_writes_an_output(folder: Folder) -> None:
    fcntl = pytest.importorskip("fcntl", reason="this system has no locks of files")
    folder.ask([{"task": "upper", "prompt": PROMPT}])
    with folder.output.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        result = folder.generate()
    assert result.exit_code == 2
    assert f"another process is writing to {folder.output}" in result.stderr
    assert folder.generate().exit_code == 0


def test_damaged_checkpoints_say_so(folder: Folder, example: ShippedExample, tmp_path: Path) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT}])
    folder.model = str(shutil.copytree(example.model, tmp_path / "damaged"))
    weights = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "mlp" in name)
    save_file({name: x for name, x in tensors.items() if name != lost}, weights, {"format": "pt"})
    result = folder.generate()
    assert result.exit_code == 2
    assert f"lacks 1 weights, {lost} for one" in result.stderr
    weights.write_bytes(weights.read_bytes()[:1000])
    result = folder.generate()
    assert result.exit_code == 2
    assert "--model: cannot load" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_least_length_does_not_count_padding(folder: Folder, example: ShippedExample, tmp_path: Path) -> None:
    model, tokenizer = (kind.from_pretrained(example.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.generation_config.min_length = 12
    folder.model = str(tmp_path / "model")
    for x in (model, tokenizer):
        x.save_pretrained(folder.model)
    folder.ask([{"task": "upper", "prompt": "at>"}, {"task": "upper", "prompt": "a long prompt>"}])
    assert folder.generate().exit_code == 0
    assert folder.answers()[0]["text"] == "AT"


def test_a_failed_start_keeps_the_old_output(folder: Folder) -> None:
    folder.ask([{"task": "upper", "prompt": PROMPT}])
    folder.output.write_text("old")
    assert folder.generate("--overwrite", "--adapter", "x=/nowhere").exit_code == 2
    assert folder.output.read_text() == "old"


def test_an_input_without_requests_gives_an_empty_output(folder: Folder) -> None:
    folder.input.write_text("\n\n")
    assert folder.generate().exit_code == 0
    assert folder.output.read_bytes() == b""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--adapter", "nonsense"], "expected NAME=DIR"),
        (["--adapter", "x=/nowhere"], "'/nowhere' does not exist"),
        (["--adapter", "upper=/nowhere"], "'upper' is already in the bank"),
        (["--bank", "/nowhere"], "/nowhere: expected a folder with a bank"),
        (["--model", "./nowhere"], "--model: no such folder: ./nowhere"),
        (["--device", "abacus"], "--device: cannot use 'abacus'"),
        (["--batch-size", "0"], "batch-size"),
        (["--dtype", "int4"], "int4"),
        (["--output", "/nowhere/out.jsonl"], "/nowhere/out.jsonl: No such file or directory"),
        (["--input", "/nowhere.jsonl"], "does not exist"),
    ],
)
def test_what_cannot_run_says_why_without_a_traceback(folder: Folder, options: list[str], says: str) -> None:
    folder.ask([{"prompt": PROMPT}])
    result = folder.generate(*options)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_the_input_is_not_overwritten(folder: Folder) -> None:
    folder.ask([{"prompt": PROMPT}])
    before = folder.input.read_bytes()
    assert folder.generate("--output", folder.input, "--overwrite").exit_code == 2
    assert folder.input.read_bytes() == before


def test_some_task_must_be_given(folder: Folder) -> None:
    folder.ask([{"prompt": PROMPT}])
    folder.adapters = []
    assert folder.generate().exit_code == 2


def test_too_little_memory_is_told_as_a_batch_size(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("prefix_attn.hf.generate.Generate.__call__", no_room)
    folder.ask([{"prompt": PROMPT}])
    result = folder.generate()
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: --batch-size: 1 rows of 9 tokens exceed the memory of cpu")


def test_half_precision(folder: Folder) -> None:
    folder.ask([{"task": task, "prompt": PROMPT} for task in ANSWERS])
    assert folder.generate("--dtype", "bfloat16").exit_code == 0
    right = [answer["text"] == ANSWERS[answer["task"]] for answer in folder.answers()]
    assert sum(right) >= 5


def test_a_checkpoint_with_settings_of_its_own_is_run_greedily_and_without_a_pad_token(
    folder: Folder, example: ShippedExample, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = (kind.from_pretrained(example.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9, pad_token_id=None, num_beams=3)
    model.generation_config.update(forced_eos_token_id=2, prompt_lookup_num_tokens=3, max_time=0.001)
    tokenizer.pad_token = None
    folder.model = str(tmp_path / "model")
    model.save_pretrained(folder.model)
    tokenizer.save_pretrained(folder.model)
    folder.ask([{"task": task, "prompt": PROMPT} for task in ANSWERS])
    assert folder.generate().exit_code == 0
    assert {answer["task"]: answer["text"] for answer in folder.answers()} == ANSWERS
    assert "not valid" not in capfd.readouterr().err


def test_a_bos_that_a_chat_template_wrote_is_not_doubled(example: ShippedExample) -> None:
    model, tokenizer = (kind.from_pretrained(example.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    answerer = Answerer(model, tokenizer, pa.PrefixBank.for_model(model))
    plain, templated = (answerer.row(0, Line(1, None, x, 5)).tokens for x in (PROMPT, f"<bos>{PROMPT}"))
    assert plain == templated


def test_a_prompt_after_a_text_prefix_gets_no_second_bos(
    folder: Folder, example: ShippedExample, tmp_path: Path, run: Run
) -> None:
    """Prefix and prompt together are the instruction as the base model knows it: ``<bos>reverse|hot tea>``."""
    model, tokenizer = (kind.from_pretrained(example.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    bank = pa.PrefixBank.for_model(model)
    bank.add_text("instructed", tokenizer, "reverse|", model)
    bank.save_pretrained(tmp_path / "bank")
    folder.adapters = ["--bank", str(tmp_path / "bank")]
    folder.ask([{"task": "instructed", "prompt": prompt} for prompt in (PROMPT, f"<bos>{PROMPT}")])
    assert folder.generate().exit_code == 0
    assert [answer["text"] for answer in folder.answers()] == [ANSWERS["reverse"]] * 2
    folder.adapters = ["--adapter", f"instructed={tmp_path / 'bank' / 'instructed.safetensors'}"]
    assert folder.generate("--overwrite").exit_code == 0
    assert folder.answers()[0]["text"] == ANSWERS["reverse"]
