"""Load what a command names: a model with its tokenizer, and prefixes into a bank."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.format import INDEX, Header, read_header, read_index, read_safetensors
from prefix_attn.bank.hub import is_repository
from prefix_attn.bank.peft import WEIGHTS
from prefix_attn.cli import console
from prefix_attn.cli.options import Dtype
from prefix_attn.errors import IncompatiblePrefix, PrefixAttnError

#: What transformers raises for files that are damaged, or do not belong together.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError)


def load_model(name: str, dtype: Dtype = Dtype.AUTO, device: str = "auto") -> Any:
    """A language model, causal or with an encoder as its config says, in evaluation mode.

    Raises:
        PrefixAttnError: there is no such model or device; says which.
    """
    place = device_of(device)
    if not console.err.is_terminal:
        logging.disable_progress_bar()
    kind = "auto" if dtype is Dtype.AUTO else getattr(torch, dtype)
    try:
        seq2seq = AutoConfig.from_pretrained(checked_name(name)).is_encoder_decoder
        auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        model, found = auto.from_pretrained(name, dtype=kind, output_loading_info=True)
    except UNREADABLE as error:
        raise _unloadable(name, error) from error
    if missing := sorted(found["missing_keys"]):
        raise PrefixAttnError(f"--model: {name!r} lacks {len(missing)} weights, {missing[0]} for one; fetch it again")
    try:
        return model.to(place).eval()
    except torch.OutOfMemoryError as error:
        raise PrefixAttnError(f"--device: {device!r} has no room for {name} ({console.error_line(error)})") from error


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(checked_name(name))
    except UNREADABLE as error:
        raise _unloadable(name, error) from error


def checked_name(name: str) -> str:
    """A name on the Hub has at most one slash; whatever else is not a folder is a mistake, not worth a download."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise PrefixAttnError(f"--model: no such folder: {name}")
    return name


def _unloadable(name: str, error: Exception) -> PrefixAttnError:
    return PrefixAttnError(f"--model: cannot load {name!r}: {console.error_line(error)}")


def device_of(name: str) -> torch.device:
    """The device of ``--device``; "auto" is a GPU if there is one.

    Raises:
        PrefixAttnError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise PrefixAttnError(f"--device: cannot use {name!r} ({console.error_line(error)}); see `prefix-attn "
                              "doctor`") from error  # fmt: skip


def load_bank(model: Any, adapters: Iterable[tuple[str, Path]], folder: Path | None = None) -> PrefixBank:
    """A bank with the prefixes of a saved bank, if one is given, and of adapters; warnings become lines on stderr."""
    if folder is not None and not is_repository(folder):
        check_bank(folder)
    with console.warnings_as_lines():
        warnings.simplefilter("always", UserWarning)
        bank = PrefixBank.for_model(model) if folder is None else PrefixBank.from_pretrained(folder, model)
        for name, path in adapters:
            bank.load(name, path)
    return bank


def warn_if_rounded(path: Path, dtype: torch.dtype) -> None:
    """Say so if a bank of a dtype cannot hold the values of an adapter or a prefix file as they are."""
    tensors, _ = read_safetensors(path / WEIGHTS if path.is_dir() else path)
    rounded = [x.dtype for x in tensors.values() if not torch.equal(x.to(dtype).to(x.dtype), x)]
    if rounded:
        theirs, ours = (str(kind).removeprefix("torch.") for kind in (rounded[0], dtype))
        advice = f"; --dtype {theirs} keeps them as they are" if theirs in [*Dtype] else ""
        console.warn(f"{path}: its values were rounded from {theirs} to {ours}{advice}")


def tasks_of(folder: Path) -> set[str]:
    """The tasks of a saved bank; none of a folder that is empty, or not there.

    Raises:
        PrefixAttnError: the folder holds something else, whose files a bank's could replace.
    """
    if (folder / INDEX).is_file():
        return set(read_index(folder))
    if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise PrefixAttnError(f"{folder}: expected a bank ({INDEX}), or a new or empty folder to make one in")
    return set()


def check_bank(folder: Path) -> None:
    """Raise `PrefixAttnError` if a folder holds no bank."""
    if not (folder / INDEX).is_file():
        raise PrefixAttnError(
            f"{folder}: expected a folder with a bank ({INDEX}); make one with `prefix-attn bank add`"
        )


def read_headers(folder: Path) -> dict[str, Header | IncompatiblePrefix]:
    """Header of each prefix of a saved bank, or what is wrong with its file, by task, in the order of the tasks."""
    check_bank(folder)
    headers: dict[str, Header | IncompatiblePrefix] = {}
    for name, file in read_index(folder).items():
        try:
            headers[name] = read_header(folder / file)
        except IncompatiblePrefix as error:
            headers[name] = error
    return headers
