"""A real server with two small models, in a thread of the tests' process."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from conftest import prose, tiny_config, tiny_model

from tinygpt.model.gpt import GPT
from tinygpt.options import Limits
from tinygpt.serve.request import Served
from tinygpt.serve.server import Server, listen
from tinygpt.serve.service import Service
from tinygpt.serve.template import PLAIN, Template
from tinygpt.tokenizer import Tokenizer

FIRST = tiny_model(block_size=32)
SECOND = tiny_model(seed=5, position="learned", norm="layernorm", mlp="gelu", n_head=2)
MODELS = {"first": FIRST, "second": SECOND}


def trained(tokenizer: Tokenizer, n_step: int, **changes: Any) -> GPT:
    """A model that has seen some prose."""
    model = GPT(tiny_config(**changes), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(tokenizer.encode(prose(2000)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(n_step):
        at = torch.randint(len(ids) - 33, (16,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([ids[i : i + 33] for i in at])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@contextmanager
def running(
    tokenizer: Tokenizer, models: Mapping[str, GPT] = MODELS, template: Template = PLAIN, **limits: int
) -> Iterator[tuple[str, Service]]:
    """Run a server; yields its address and its service."""
    served = [Served(name, model, tokenizer, model.n_params(), template) for name, model in models.items()]
    service = Service(served, Limits(**limits))
    listener = listen("127.0.0.1", 0)
    server = Server(service, ["known.example"])
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        service.worker.stop()
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
