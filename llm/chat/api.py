"""Models behind the part of OpenAI's HTTP interface that clients use: ``/v1/models``, ``/v1/chat/completions`` and
``/v1/completions``, whole or streamed. What is asked for and can't be done is refused, never ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import Field, ValidationError
from starlette.types import Send

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from llm.chat.conversations import Message, Rejected, listed
from llm.chat.talk import Reply, Speaker

MOST = 512
"""Tokens of an answer, where it is not said."""
IGNORED = (
    "user",
    "metadata",
    "store",
    "stream_options",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
"""Fields that change nothing of an answer."""
PAGES = Path(__file__).with_name("page")
POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'"
"""Rights of the page: it may ask this server, and do nothing else."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Settings(Config):
    """Settings of an answer that a request may give."""

    temperature: float = Field(default=0.7, ge=0, le=100)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def most(self) -> int:
        """Tokens of the answer, at most."""
        return self.max_completion_tokens or self.max_tokens or MOST


class Asked(Settings):
    """A request for an answer of a model."""

    model: str
    seed: int = Field(default=0, ge=0)
    stop: str | tuple[str, ...] | None = None
    stream: bool = False
    n: int = Field(default=1, ge=1, le=1)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that the answer ends before."""
        found = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(one for one in found if one)


class ChatAsked(Asked):
    """A request of ``/v1/chat/completions``."""

    messages: list[Any] = Field(min_length=1)


class TextAsked(Asked):
    """A request of ``/v1/completions``."""

    prompt: str


class Refused(Exception):
    """A request that is answered with an error: its status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Body = TypeVar("Body", bound=Config)


class Events(StreamingResponse):
    """A stream of server-sent events that ends where the client leaves, so that the model is free for the next."""

    def __init__(self, values: Generator[Mapping[str, Any] | str, None, None]) -> None:
        """Send values as JSON, and texts as they are."""
        super().__init__(map(sent, values), media_type="text/event-stream")
        self._values = values

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            self._values.close()  # Starlette leaves it as it is, for the garbage collector


def make_app(
    speakers: Sequence[Speaker], *, key: str | None = None, page: Path = PAGES / "chat.html"
) -> FastAPI:
    """Make the server of some models.

    Args:
        key: that each request must bear; None: nobody else can reach it, so none is needed. Then only requests that
            name this machine are answered, so that no web page that somebody opens can use it.
        page: that stands at ``/``.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    known = {one.name: one for one in speakers}
    app.mount("/page", StaticFiles(directory=PAGES))

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        try:
            require_welcome(request.headers, key)
        except Refused as error:
            return failure(error)
        answered: Response = await call_next(request)
        answered.headers["Cache-Control"] = "no-store"
        return answered

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> Response:
        return failure(error)

    @app.get("/")
    def begin() -> Response:
        return FileResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/v1/models")
    def models() -> Any:
        made = {"object": "model", "created": 0, "owned_by": "llmill"}
        return {"object": "list", "data": [{"id": name, **made} for name in known]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answered(request, ChatAsked)

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        return await answered(request, TextAsked)

    async def answered(request: Request, kind: type[ChatAsked] | type[TextAsked]) -> Response:
        asked = parsed(await request.body(), kind)
        if asked.model not in known:
            raise Refused(404, f"there is no model {asked.model}; there are {', '.join(known)}")
        reply = reply_to(asked, known[asked.model])
        shape = CHAT if isinstance(asked, ChatAsked) else TEXT
        if asked.stream:
            return Events(streamed(reply, asked, shape))
        return JSONResponse(await run_in_threadpool(whole, reply, asked, shape))

    return app


def require_welcome(headers: Mapping[str, str], key: str | None) -> None:
    """See that a request may be answered.

    Raises:
        Refused: it bears another key or none; without one, it came by a name that is not this machine's, or from the
            page of another site.
    """
    if key is not None:
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode(), key.encode()):
            raise Refused(401, "this server wants its key: Authorization: Bearer KEY")
        return
    host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    origin = headers.get("origin")
    if host not in LOOPBACK or (origin is not None and urlsplit(origin).netloc != headers.get("host")):
        raise Refused(403, "this server answers programs on its own machine only")


def parsed(body: bytes, kind: type[Body]) -> Body:
    """Read a request.

    Raises:
        Refused: it is no JSON object, or asks for what can't be done.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is no JSON") from None
    if not isinstance(values, dict):
        raise Refused(400, "the request is no JSON object")
    wanted = {name: value for name, value in values.items() if name not in IGNORED and value is not None}
    try:
        return kind.model_validate(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        raise Refused(400, f"{where}: {'this server can not do that' if unknown else first['msg']}") from None


def reply_to(asked: ChatAsked | TextAsked, speaker: Speaker) -> Reply:
    """Begin an answer.

    Raises:
        Refused: the messages are none, or spell a special token; there is no room for an answer.
    """
    context = speaker.model.config.context
    most = min(asked.most, context - 1)
    try:
        if isinstance(asked, TextAsked):
            messages: list[Message] = [{"role": "user", "content": asked.prompt}]
            prompt, left_out = replace(speaker, chat=None).prompt(messages, context)
        else:
            prompt, left_out = speaker.prompt(listed(asked.messages, "role", "content"), context)
    except (Rejected, UserError) as error:
        raise Refused(400, f"messages: {error}") from None
    if left_out or len(prompt) >= context:
        raise Refused(400, f"the messages have no room in the model's context of {context:,} tokens")
    return Reply(
        speaker=speaker,
        prompt=prompt,
        most=min(most, context - len(prompt)),
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
    )


CHAT, TEXT = "chat.completion", "text_completion"


def whole(reply: Reply, asked: Asked, shape: str) -> dict[str, Any]:
    """Return the answer to a request that is not streamed."""
    with reply.speaker.lock:
        text = "".join(before_stops(reply, asked.stops))
    said = {"message": {"role": "assistant", "content": text}} if shape == CHAT else {"text": text}
    counts = {"prompt_tokens": len(reply.prompt), "completion_tokens": reply.tokens}
    return {
        **named(asked, shape),
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reply.finish}],
        "usage": counts | {"total_tokens": sum(counts.values())},
    }


def streamed(reply: Reply, asked: Asked, shape: str) -> Generator[Mapping[str, Any] | str, None, None]:
    """Yield the answer as the events of a stream."""
    about = named(asked, f"{shape}.chunk" if shape == CHAT else shape)

    def event(said: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        held = {"delta": said} if shape == CHAT else {"text": said.get("content", "")}
        return {**about, "choices": [{"index": 0, **held, "finish_reason": finish}]}

    with reply.speaker.lock:
        if shape == CHAT:
            yield event({"role": "assistant", "content": ""})
        for piece in before_stops(reply, asked.stops):
            yield event({"content": piece})
    yield event({}, reply.finish)
    yield "[DONE]"


def sent(value: Mapping[str, Any] | str) -> str:
    """Return a value, or a text, as a server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    return f"data: {text}\n\n"


def named(asked: Asked, kind: str) -> dict[str, Any]:
    """Return the fields that stand before an answer."""
    return {
        "id": f"llmill-{secrets.token_hex(8)}",
        "object": kind,
        "created": int(time.time()),
        "model": asked.model,
    }


def before_stops(reply: Reply, stops: Sequence[str]) -> Iterator[str]:
    """Yield an answer up to the first of some texts; what may be the beginning of one is held back meanwhile."""
    held, longest = "", max(map(len, stops), default=1)
    for piece in reply:
        held += piece
        if found := [place for stop in stops if (place := held.find(stop)) >= 0]:
            reply.finish = "stop"
            yield held[: min(found)]
            return
        if ready := held[: max(0, len(held) - longest + 1)]:
            yield ready
            held = held[len(ready) :]
    if held:
        yield held


def failure(error: Refused) -> Response:
    """Return an error as OpenAI's clients read it."""
    kind = "authentication_error" if error.status == 401 else "invalid_request_error"
    message = (
        str(error).encode("utf-8", "backslashreplace").decode()
    )  # it may name a field of halves of surrogates
    return JSONResponse({"error": {"message": message, "type": kind, "code": None}}, error.status)
