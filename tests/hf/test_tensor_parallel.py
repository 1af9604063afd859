"""A model split over two processes: each holds its heads of the bank, and the tokens are those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
import transformers

import prefix_attn as pa
from tests.hf.conftest import TASKS, make_bank, padded_inputs
from tests.hf.families import tiny_model

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def one_process(folder: Path) -> None:
    """What each process runs: load its shards of the model and of the bank, verify, generate, compare."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", dtype=torch.float32)
    bank = pa.PrefixBank.from_pretrained(folder / "bank", model)
    rank = torch.distributed.get_rank()
    whole = torch.load(folder / "k.pt")
    assert torch.equal(bank.layer(0).k, whole[rank : rank + 1]), "one of the two heads"
    pa.patch(model, bank, verify=True)
    tokens = model.generate(**padded_inputs(), **GREEDY, task_ids=TASKS)
    assert torch.equal(tokens, torch.load(folder / "tokens.pt"))
    with pytest.raises(pa.UnsupportedModel, match=f"rank {rank} of 2"):
        bank.save_pretrained(folder / "again")
    torch.distributed.barrier()  # the other's threads would miss one that ends first
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=100)  # transformers 5.17 wants it to be even
    model.save_pretrained(tmp_path / "model")
    bank = make_bank(model)
    bank.save_pretrained(tmp_path / "bank")
    torch.save(bank.layer(0).k, tmp_path / "k.pt")
    pa.patch(model, bank)
    torch.save(model.generate(**padded_inputs(), **GREEDY, task_ids=TASKS), tmp_path / "tokens.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.hf.test_tensor_parallel", str(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_a_model_that_fsdp_has_sharded_is_refused() -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model = tiny_model("llama")
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(pa.UnsupportedModel, match="before fully_shard"):
            pa.PrefixBank.for_model(model)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_process(Path(sys.argv[1]))
