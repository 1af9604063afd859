"""``prefix-attn serve``: an HTTP server for all tasks of a model."""

from __future__ import annotations

import asyncio
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.markup import escape

from prefix_attn.cli import console
from prefix_attn.cli.options import (
    AdapterOption,
    BankOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelOption,
    named_path,
)
from prefix_attn.errors import PrefixAttnError

#: Seconds for which the server, told to end, waits for clients while no request runs.
PATIENCE = 5.0


def serve(
    model: ModelOption,
    adapter: AdapterOption = None,
    bank: BankOption = None,
    prefixes: Annotated[
        Path | None,
        typer.Option(
            help="Let clients add, replace and remove tasks, from adapters and prefix files in this folder.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model without a prefix; by default the name of its folder."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all networks.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    cache_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the cache that running requests share; by default what memory allows."),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            help="Leave out what the model's generation config asks for and the server cannot do, such as a repetition "
            "penalty; otherwise such a model is refused.",
        ),
    ] = False,
    dtype: DtypeOption = Dtype.AUTO,
    device: DeviceOption = "auto",
) -> None:
    """Serve all tasks over HTTP, in OpenAI's API; the name of a task is the name of a model.

    Requests of all tasks run together in one batch (continuous batching). What a request does not say about sampling is
    as in the model's generation config: greedy, unless that samples.

        prefix-attn serve --model MODEL --adapter sum=adapters/sum --adapter cls=adapters/cls

        curl localhost:8000/v1/completions -H 'content-type: application/json' \\
            -d '{"model": "sum", "prompt": "Summarise: ...", "max_tokens": 64}'

    `/v1/chat/completions` needs a tokenizer with a chat template. `/metrics` is for Prometheus, `/docs` shows every
    route. There are no passwords and no encryption: for other machines, put a proxy in front.

    With `--prefixes adapters`, tasks change while the server runs; requests that have begun keep the prefix they had:

        curl -X PUT localhost:8000/v1/prefixes/sum -H 'content-type: application/json' -d '{"path": "sum-v2"}'
        curl -X DELETE localhost:8000/v1/prefixes/cls

    Ctrl-C or SIGTERM waits for requests that run; a second one breaks them off. Exit code: 0, or 2 if the command could
    not run.
    """
    adapters = [named_path(text) for text in adapter or []]
    if not adapters and bank is None and prefixes is None:
        raise typer.BadParameter("give at least one --adapter NAME=DIR, a --bank, or a folder of --prefixes")
    try:
        import uvicorn

        from prefix_attn.serving import Engine
        from prefix_attn.serving.app import create_app
    except ModuleNotFoundError as error:
        raise PrefixAttnError(
            f"serve: needs transformers 5.23 or newer and the extra [serve] ({error}); pip install 'prefix-attn[serve]'"
        ) from error
    from prefix_attn.cli.models import load_bank, load_model, load_tokenizer
    from prefix_attn.hf import patch

    base = name or (Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2])
    with listen(host, port) as listening:  # before loading, so that a taken port is known
        tokenizer, loaded = load_tokenizer(model), load_model(model, dtype, device)
        if loaded.generation_config.eos_token_id is None:
            loaded.generation_config.eos_token_id = tokenizer.eos_token_id  # as `generate` and `train` do
        tasks = load_bank(loaded, adapters, bank)
        engine = Engine(patch(loaded, tasks), cache_tokens, plain)

        class Server(uvicorn.Server):
            """At a second signal the running requests fail, and so end; at a third Ctrl-C uvicorn waits for nothing."""

            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if self.should_exit and engine.failure is None:
                    asyncio.get_running_loop().call_soon_threadsafe(engine.stop)  # not within what is interrupted
                else:
                    super().handle_exit(sig, frame)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                leaving = asyncio.create_task(self.leave_the_stuck())
                await super().shutdown(sockets)
                leaving.cancel()

            async def leave_the_stuck(self) -> None:
                """Clients that are waited for in vain: they do not end their request, or do not read the answer."""
                idle_since = time.monotonic()
                while time.monotonic() < idle_since + PATIENCE:
                    await asyncio.sleep(0.1)
                    if engine.running or engine.waiting:
                        idle_since = time.monotonic()
                self.force_exit = True

        server = Server(uvicorn.Config(create_app(engine, tokenizer, base, prefixes), lifespan="off"))
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        with engine, console.warnings_as_lines(), suppress(KeyboardInterrupt):  # which uvicorn raises when it has ended
            warnings.filterwarnings("always", category=UserWarning, module=r"prefix_attn\.")
            console.out.print(welcome(engine, base, where), soft_wrap=True)
            server.run([listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send what is written at once, and do not wait for word of what was sent before."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sets it for its own sockets only
    return listening


def welcome(engine: Any, base: str, where: str) -> str:
    """What is served, and where."""
    from prefix_attn.bank.memory import readable

    count, names = len(engine.bank), ", ".join(engine.bank.names) or "none yet"
    size = readable(engine.bank.memory_usage.total)
    return escape(
        f"{base}, and {count} task{'' if count == 1 else 's'}: {names}\n"
        f"Prefixes take {size}; running requests may hold {engine.cache_tokens:,} tokens.\n"
        f"{where}/v1"
    )
