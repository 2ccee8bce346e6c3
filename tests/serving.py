"""A real server in a thread of the tests' process, with two small models."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conftest import tiny_model

from tinygpt.serve.limits import Limits
from tinygpt.serve.request import Served
from tinygpt.serve.server import Server, listen
from tinygpt.serve.service import Service
from tinygpt.tokenizer import Tokenizer

FIRST = tiny_model(block_size=32)
SECOND = tiny_model(seed=5, position="learned", norm="layernorm", mlp="gelu", n_head=2)


@contextmanager
def running(tokenizer: Tokenizer, **limits: int) -> Iterator[tuple[str, Service]]:
    """The address of a server of `first` and `second`, and its service."""
    models = [Served("first", FIRST, tokenizer), Served("second", SECOND, tokenizer)]
    service = Service(models, Limits(**limits))
    listener = listen("127.0.0.1", 0)
    server = Server(service, ["known.example"])
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        service.worker.stop()
        server.should_exit = True
        thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
