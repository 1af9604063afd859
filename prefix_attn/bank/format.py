"""The package's own file of one prefix, and the index of a saved bank.

``<task>.safetensors`` holds ``k.<layer>`` and ``v.<layer>``, each ``[kv_heads, m, head_dim]``, and in its metadata
(strings): format, format_version, geometry (JSON, ``[[kv_heads, head_dim], ...]``), dtype, position_mode, base_config
and base_weights (fingerprint), base_model, source, peft_version (for prefixes made by PEFT), created_by, and
tensors_sha256, which tells values that were damaged. For the other parts of an encoder-decoder model the same stands
behind the part's name: ``encoder.k.0``, ``cross.geometry``.
``bank.json`` lists names and files in the order of the tasks. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from prefix_attn.bank.base import Base
from prefix_attn.bank.fingerprint import Fingerprint
from prefix_attn.bank.geometry import CROSS, DECODER, ENCODER, Geometry, LayerKV
from prefix_attn.bank.names import SUFFIX, check_file, check_name
from prefix_attn.errors import IncompatiblePrefix

FORMAT = "prefix_attn.prefix"
BANK_FORMAT = "prefix_attn.bank"
VERSION = "1"
INDEX = "bank.json"
CHECKSUM = "tensors_sha256"
#: A request's token i sits at position m + i (PEFT's rule). A file made for another rule would be silently wrong.
POSITION_MODE = "offset"

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE_MAGIC = (b"\x80", b"PK\x03\x04")
CONVERT = "convert it with PEFT's save_pretrained(..., safe_serialization=True)"


@dataclass(frozen=True)
class Provenance:
    """Where a prefix came from, and the version of PEFT that wrote it.

    source: "tensors", "trained", "text", "peft:<folder>", or what the caller of `PrefixBank.add` said.
    """

    source: str
    peft_version: str = ""


def write_prefix(path: Path, key_values: Mapping[str, Sequence[LayerKV]], base: Base, provenance: Provenance) -> None:
    """Write one prefix, every part of it; the file appears whole or not at all. OSError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from prefix_attn import __version__

    tensors = {
        f"{prefixed(part)}{name}.{i}": x.clone(memory_format=torch.contiguous_format)
        for part, layers in key_values.items()
        for i, pair in enumerate(layers)
        for name, x in zip("kv", pair, strict=True)
    }
    metadata = {
        "format": FORMAT,
        "format_version": VERSION,
        **{f"{prefixed(part)}geometry": geometry.to_json() for part, geometry in base.geometries.items()},
        "dtype": str(base.dtype).removeprefix("torch."),
        "position_mode": POSITION_MODE,
        "base_config": base.fingerprint.config,
        "base_weights": base.fingerprint.weights,
        "base_model": portable_name(base.name),
        "source": provenance.source,
        "created_by": f"prefix_attn {__version__}",
        CHECKSUM: checksum(tensors),
    }
    if provenance.peft_version:
        metadata["peft_version"] = provenance.peft_version
    with _partial(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # of a new file here; safetensors lets no other user read what it writes
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        partial.chmod(mode)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the tensors in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prefixed(part: str) -> str:
    """What stands in front of a part's names in a file."""
    return "" if part == DECODER else f"{part}."


def read_prefix(path: Path, base: Base, check_base: bool) -> tuple[dict[str, list[LayerKV]], Provenance]:
    """Read a file of `write_prefix`: every part of a prefix.

    Raises:
        IncompatiblePrefix: the file is missing, damaged or not ours, or was made for another geometry, position mode
            or (with ``check_base``) other weights.
    """
    tensors, metadata = read_safetensors(path)
    _check_metadata(str(path), metadata, base, check_base)
    layers = {part: len(geometry.layers) for part, geometry in base.geometries.items()}
    expected = {f"{prefixed(part)}{name}.{i}" for part, n in layers.items() for i in range(n) for name in "kv"}
    if tensors.keys() != expected:
        raise IncompatiblePrefix(
            f"{path}: expected tensors k.<layer> and v.<layer> for {sum(layers.values())} layers, got "
            f"{len(tensors)} tensors: {sorted(tensors)[:4]} ..."
        )
    key_values = {
        part: [(tensors[f"{prefixed(part)}k.{i}"], tensors[f"{prefixed(part)}v.{i}"]) for i in range(n)]
        for part, n in layers.items()
    }
    for part, geometry in base.geometries.items():
        geometry.checked(key_values[part], str(path))
    if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors):
        raise IncompatiblePrefix(f"{path}: its values are not those that were saved; fetch or save it again")
    return key_values, Provenance(metadata.get("source", ""), metadata.get("peft_version", ""))


@dataclass(frozen=True)
class Header:
    """What the head of a prefix file says.

    Attributes:
        tokens: of the prefix in each part of the model ("decoder"; with an encoder also "encoder" and "cross").
        bytes: of its keys and values, as stored.
        source: as in `Provenance`.
        base: name of the model it was made for.
    """

    tokens: dict[str, int]
    bytes: int
    source: str
    base: str


def read_header(path: Path) -> Header:
    """The head of a file of `write_prefix`, its tensors unread; `IncompatiblePrefix` where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        item = getattr(torch, metadata["dtype"]).itemsize
        size = item * sum(prod(shape) for shape in shapes.values())
        first = {part: shapes.get(f"{prefixed(part)}k.0") for part in (DECODER, ENCODER, CROSS)}
        tokens = {part: shape[1] for part, shape in first.items() if shape is not None}
        return Header(tokens, size, metadata["source"], metadata["base_model"])
    except (OSError, SafetensorError, LookupError, AttributeError) as error:
        raise IncompatiblePrefix(
            f"{path}: expected a prefix file of this package, but its header cannot be read ({_reason(error)})"
        ) from error


def tokens_of(path: Path) -> dict[str, int]:
    """Those of `read_header`; none of a file with a bad head, of which `read_prefix` says what is wrong."""
    try:
        return read_header(path).tokens
    except IncompatiblePrefix:
        return {}


def _check_metadata(file: str, metadata: Mapping[str, str], base: Base, check_base: bool) -> None:
    if metadata.get("format") != FORMAT:
        raise IncompatiblePrefix(
            f"{file}: expected a prefix file of this package, got a safetensors file without its "
            "metadata; for a PEFT adapter give the folder with adapter_config.json"
        )
    for key, mine in (("format_version", VERSION), ("position_mode", POSITION_MODE)):
        if metadata.get(key) != mine:
            raise IncompatiblePrefix(
                f"{file}: expected {key} {mine!r}, got {metadata.get(key)!r}; it was written by "
                f"{metadata.get('created_by', 'an unknown version')}"
            )
    for part, ours in base.geometries.items():
        try:
            geometry = Geometry.from_json(metadata.get(f"{prefixed(part)}geometry", ""))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise IncompatiblePrefix(f"{file}: its geometry is unreadable ({error}); the file is damaged") from error
        if geometry != ours:
            raise IncompatiblePrefix(
                f"{file}: expected a prefix for {ours}, got one for {geometry}; "
                "it was made for " + (repr(metadata["base_model"]) if metadata.get("base_model") else "another model")
            )
    if check_base:
        fingerprint = Fingerprint(metadata.get("base_config", ""), metadata.get("base_weights", ""))
        base.check_fingerprint(fingerprint, file, "load the model that it was made for, or make it anew (in "
                               "Python, pass check_base=False if you know that the weights are the same)")  # fmt: skip


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and metadata; refuses pickles unread, and damaged files with `IncompatiblePrefix`."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise IncompatiblePrefix(f"{path}: refusing to read a pickle, which can run code; {CONVERT}")
    try:
        with path.open("rb") as file:
            head = file.read(9)
        # The header's length comes first and may look like a pickle's magic; the header itself opens with a brace.
        if head.startswith(PICKLE_MAGIC) and head[8:] != b"{":
            raise IncompatiblePrefix(f"{path}: refusing to read what is a pickle or a zip file; {CONVERT}")
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise IncompatiblePrefix(
            f"{path}: expected a whole safetensors file, but it cannot be read ({_reason(error)}); fetch or save it "
            "again"
        ) from error


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    """Write ``bank.json``: task names and their files, in order."""
    tasks = [{"name": name, "file": file} for name, file in files.items()]
    text = json.dumps({"format": BANK_FORMAT, "format_version": VERSION, "tasks": tasks}, indent=2, ensure_ascii=False)
    with _partial(folder / INDEX) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A file of this process alone, which takes the place of ``path`` once it is whole, and is gone if it never is."""
    partial = path.with_name(f".{uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_index(folder: Path) -> dict[str, str]:
    """Inverse of `write_index`; names and files are checked, so that none points out of the folder."""
    index = read_json(folder / INDEX)
    if index.get("format") != BANK_FORMAT or index.get("format_version") != VERSION:
        raise IncompatiblePrefix(
            f"{folder / INDEX}: expected format {BANK_FORMAT!r} version {VERSION!r}, got "
            f"{index.get('format')!r} version {index.get('format_version')!r}"
        )
    files, seen = dict[str, str](), set[str]()
    try:
        for task in index["tasks"]:
            name, file = check_name(task["name"]), check_file(task["file"])
            if name in files or file in seen:
                raise IncompatiblePrefix(
                    f"{folder / INDEX}: lists the task {name!r} or its file twice; the index is damaged"
                )
            files[name] = file
            seen.add(file)
    except (KeyError, TypeError) as error:
        raise IncompatiblePrefix(
            f"{folder / INDEX}: expected tasks with name and file ({error!r}); it is damaged"
        ) from error
    return files


def file_names(names: Sequence[str], others: Mapping[str, str]) -> dict[str, str]:
    """The files of others, and one for each task, ``<name>.safetensors``; distinct also where systems ignore case."""
    all_files = dict(others)
    used = {file.casefold() for file in others.values()}
    for name in names:
        file, n = f"{name}{SUFFIX}", 1
        while file.casefold() in used:
            n += 1
            file = f"{name}~{n}{SUFFIX}"
        if all_files.setdefault(name, file) == file:
            used.add(file.casefold())
    return all_files


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or `IncompatiblePrefix` naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IncompatiblePrefix(f"{path}: expected a JSON file, but it cannot be read ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise IncompatiblePrefix(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _reason(error: Exception) -> object:
    """Why a file cannot be read; its name is said elsewhere."""
    return error.strerror if isinstance(error, OSError) and error.strerror else error


def portable_name(name: str) -> str:
    """A hub id as it is; of a path only the last part, so that no file says where it was made."""
    is_hub_id = name.count("/") <= 1 and "\\" not in name and not name.startswith((".", "~", "/"))
    return name if is_hub_id else Path(name.replace("\\", "/")).name
