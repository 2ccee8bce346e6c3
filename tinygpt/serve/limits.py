"""What the server takes on, and what it answers where that is passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from tinygpt.options import type_rules
from tinygpt.params import Count, Within, require

PIECE = 2**16  # most bytes of an answer that wait to be sent


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Beyond them a request is refused, which bounds the memory that clients can take.

    Those with a help text are flags.
    """

    max_tokens: Annotated[Count, "tokens of an answer, at most"] = 4096
    max_rows: Annotated[int, Within("[1, 1024]"), "answers written at a time"] = 32  # each has a KV cache
    max_waiting: Annotated[Count, "requests that may wait; one more is refused with status 429"] = 128
    max_body: Annotated[Count, "bytes of a request"] = 2**18  # a larger one has status 413
    max_prompt: Count = 2**14  # UTF-8 bytes, or ids, of one prompt
    max_prompts: Count = 2**15  # the same of all prompts of a request, each as often as it has answers
    client_seconds: Count = 30  # for a client to send a head, then a body, and to read each PIECE of an answer

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        require(*type_rules(self))

    @property
    def max_requests(self) -> int:
        """Requests of all kinds at a time; one more has status 503.  As many as can run or wait have room for others
        next to them, which are refused at once or read a page.
        """
        return 2 * (self.max_rows + self.max_waiting)


class Refusal(Exception):
    """A request that is not done, with the HTTP status and the error object of OpenAI's API."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message[:1000], param, code
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = (
            "invalid_request_error"
            if self.status < 429
            else "rate_limit_error"
            if self.status == 429
            else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
