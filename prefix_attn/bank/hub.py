"""Prefixes on the Hugging Face Hub: what is not on this machine and reads OWNER/NAME is a repository there.

Only files that are named are fetched, into the Hub's own cache, which alone is asked where HF_HUB_OFFLINE is set.
Private repositories take the token of ``hf auth login`` or HF_TOKEN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from prefix_attn.bank.names import SUFFIX
from prefix_attn.errors import IncompatiblePrefix

#: What a repository shows its visitors.
CARD = "README.md"

REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether a path is to be looked for on the Hub; not where OWNER is a folder here, and NAME a mistake."""
    text = _name(path)
    return bool(REPOSITORY.fullmatch(text)) and not text.endswith(SUFFIX) and not os.path.exists(text.split("/")[0])


def local_folder(
    path: str | os.PathLike[str],
    first: str,
    others: Callable[[Path], Iterable[str]],
    revision: str | None = None,
) -> Path:
    """A folder on this machine as it is, a repository's files as a folder of the Hub's cache.

    Args:
        path: a folder, or OWNER/NAME.
        first: the file that is fetched first; where it is decides the commit that the others are taken from.
        others: the names of the others, from the folder of the first.
        revision: a branch, a tag or a commit; the repository's main branch by default.

    Raises:
        IncompatiblePrefix: nothing is there, a file is missing, or a revision of what is on this machine.
    """
    if not is_repository(path):
        if revision is not None:
            raise IncompatiblePrefix(
                f"revision: expected None for a path on this machine ({os.fspath(path)!r}), got {revision!r}"
            )
        return Path(path)
    folder = _fetch(_name(path), first, revision).parent
    for file in others(folder):
        _fetch(_name(path), file, folder.name)
    return folder


def _name(path: str | os.PathLike[str]) -> str:
    """With slashes, whatever a path has on this system."""
    return path.as_posix() if isinstance(path, Path) else os.fspath(path)


def _fetch(repository: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, revision=revision, library_name="prefix_attn"))
    except LocalEntryNotFoundError as error:
        raise IncompatiblePrefix(f"{_nowhere(repository)}, of which {file} is not in the cache either") from error
    except EntryNotFoundError as error:
        raise IncompatiblePrefix(f"path: the repository {repository!r} on the Hub has no {file}") from error
    except (OSError, ValueError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise IncompatiblePrefix(f"{_nowhere(repository)}: {reason}") from error


def _nowhere(repository: str) -> str:
    return f"path: {repository!r} does not exist on this machine, and cannot be had from the Hub"


def name_of(folder: Path) -> str:
    """A folder's name; ``OWNER/NAME@COMMIT`` for one in the Hub's cache."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return f"{repository.removeprefix('models--').replace('--', '/')}@{folder.name[:12]}"
    return folder.name


def upload(folder: Path, repo_id: str, private: bool | None, commit_message: str) -> str:
    """Put the files of a folder into a repository, made if there is none; a README.md that is there stays.

    Returns the address of the commit. Raises what huggingface_hub does.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="prefix_attn")
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    kept = [CARD] if api.file_exists(repository, CARD) else []
    commit = api.upload_folder(
        repo_id=repository, folder_path=folder, commit_message=commit_message, ignore_patterns=kept
    )
    return commit.commit_url
