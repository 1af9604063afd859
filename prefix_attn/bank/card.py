"""The page of a bank on the Hugging Face Hub: its tasks, and how to use them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefix_attn.bank.format import portable_name
from prefix_attn.bank.hub import is_repository

if TYPE_CHECKING:
    from prefix_attn.bank.bank import PrefixBank

_PAGE = """\
{head}

# Prefixes of {count} for {base}

| task | tokens | made from |
|---|--:|---|
{tasks}

```python
import prefix_attn as pa

bank = pa.PrefixBank.from_pretrained("{repo_id}", model)  # the base model, from transformers
pa.patch(model, bank)
model.generate(**inputs, task_ids=[{first!r}, None])  # a task, or none, for each row
```
"""


def card(bank: PrefixBank, repo_id: str) -> str:
    """In Markdown, behind the metadata that the Hub reads; of a base model that is no repository only the name."""
    from huggingface_hub import ModelCardData

    base = portable_name(bank.base.name)
    data = ModelCardData(
        library_name="prefix_attn",
        base_model=base if is_repository(bank.base.name) else None,
        tags=["prefix-tuning"],
    )
    names = bank.names
    rows = [f"| {_cell(name)} | {bank.prefix_len(name)} | {_cell(bank.source(name))} |" for name in names]
    return _PAGE.format(
        head=f"---\n{data.to_yaml()}\n---", count="one task" if len(names) == 1 else f"{len(names)} tasks",
        base=base or "a language model", tasks="\n".join(rows), repo_id=repo_id, first=next(iter(names), None),
    )  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
