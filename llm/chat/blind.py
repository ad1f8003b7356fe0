"""Two models that answer the same prompt side by side, and a person who votes without knowing which is which.

Which model is left is drawn anew for each prompt, and stays here until the vote. Both answers come in step, piece by
piece, so that the faster model is not known by its speed.
"""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from pydantic import Field

from data_pipeline.core.config import Config
from data_pipeline.core.errors import UserError
from llm.chat.api import ChatAsked, Events, Refused, Settings, parsed, reply_to
from llm.chat.conversations import listed
from llm.chat.talk import Reply, Speaker
from llm.chat.votes import Answer, Choice, Model, Tally, Vote, append_vote, read_votes, tally

MOST_ROUNDS = 100
"""Pairs of answers that are kept for a vote, the newest."""
SEEDS = 2**53
"""Seeds that any reader of JSON reads exactly."""


class BlindAsked(Settings):
    """A request for two answers."""

    messages: list[Any] = Field(min_length=1)


class Given(Config):
    """A request that votes."""

    id: str
    vote: Choice


def model_of(speaker: Speaker) -> Model:
    """Return a model as votes name it."""
    return Model(name=speaker.name, fingerprint=speaker.fingerprint)


@dataclass
class Side:
    """An answer as it is drawn."""

    reply: Reply
    text: str = ""

    def pieces(self) -> Iterator[str]:
        """Yield the answer, and keep it."""
        for piece in self.reply:
            self.text += piece
            yield piece

    @property
    def answer(self) -> Answer:
        """The answer as a vote has it."""
        model = model_of(self.reply.speaker)
        return Answer(**model.model_dump(), text=self.text, finish=self.reply.finish)


@dataclass
class Round:
    """A prompt and its two answers."""

    asked: ChatAsked
    left: Side
    right: Side
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    finished: bool = False
    voted: bool = False

    def vote(self, choice: Choice) -> Vote:
        """Return the record of a vote that is given now."""
        return Vote(
            id=self.id,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            vote=choice,
            messages=tuple(dict(one) for one in listed(self.asked.messages, "role", "content")),
            left=self.left.answer,
            right=self.right.answer,
            seed=self.asked.seed,
            temperature=self.asked.temperature,
            top_p=self.asked.top_p,
            max_tokens=self.left.reply.most,
        )


class Blind:
    """The comparison of two models: what was asked, and the votes."""

    def __init__(self, first: Speaker, second: Speaker, *, file: Path, report: Callable[[str], None]) -> None:
        """Keep votes in ``file``; ``report`` is given a line for each."""
        self.first, self.second, self.file, self.report = first, second, file, report
        self.rounds: dict[str, Round] = {}
        self._lock = threading.Lock()

    def tally(self) -> Tally:
        """Count the votes between the two, earlier ones too.

        Raises:
            UserError: they can't be read.
        """
        return tally(read_votes(self.file).votes, model_of(self.first), model_of(self.second))

    def begin(self, asked: BlindAsked) -> Round:
        """Draw which model is left, and begin both answers with the same settings.

        Raises:
            Refused: one of the models can't answer.
        """
        seed = secrets.randbelow(SEEDS)
        both = [self.first, self.second]
        random.Random(seed).shuffle(both)
        wanted = ChatAsked(model="either", seed=seed, **asked.model_dump())
        left, right = (Side(reply_to(wanted, one)) for one in both)
        left.reply.most = right.reply.most = min(left.reply.most, right.reply.most)
        begun = Round(wanted, left, right)
        with self._lock:
            self.rounds[begun.id] = begun
            for old in list(self.rounds)[:-MOST_ROUNDS]:
                del self.rounds[old]
        return begun

    def answers(self, begun: Round) -> Generator[dict[str, Any], None, None]:
        """Yield what the page is sent: an id, pieces of both answers, and how they ended."""
        yield {"id": begun.id}
        with self.first.lock, self.second.lock:
            for left, right in zip_longest(begun.left.pieces(), begun.right.pieces(), fillvalue=""):
                yield {"left": left, "right": right}
        begun.finished = True
        yield {"left": "", "right": "", "finished": [begun.left.reply.finish, begun.right.reply.finish]}

    def vote(self, given: Given) -> dict[str, Any]:
        """Keep a vote; return which model was which.

        Raises:
            Refused: there is nothing to vote on, or it can't be kept.
        """
        with self._lock:
            begun = self.rounds.get(given.id)
            if begun is None:
                raise Refused(404, "there are no answers of this id, or they are too old: ask anew")
            if not begun.finished:
                raise Refused(409, "both answers must have ended before a vote")
            if begun.voted:
                raise Refused(409, "these answers were voted on already")
            try:
                append_vote(self.file, begun.vote(given.vote))
            except OSError as error:
                raise Refused(500, f"the vote can't be kept in {self.file}: {error.strerror}") from None
            begun.voted = True
        summary = self.summary()
        self.report(summary)
        left, right = begun.left.reply.speaker, begun.right.reply.speaker
        return {"left": left.name, "right": right.name, "summary": summary}

    def summary(self) -> str:
        """Report whether a preference is shown, and not which.

        Raises:
            Refused: the votes can't be read.
        """
        try:
            return self.tally().summary
        except UserError as error:
            raise Refused(500, str(error)) from None


def add_routes(app: FastAPI, blind: Blind) -> None:
    """Have a server answer the page that votes."""

    @app.post("/blind/answers")
    async def answers(request: Request) -> Response:
        begun = await run_in_threadpool(blind.begin, parsed(await request.body(), BlindAsked))
        return Events(blind.answers(begun))

    @app.post("/blind/votes")
    async def vote(request: Request) -> Any:
        return await run_in_threadpool(blind.vote, parsed(await request.body(), Given))

    @app.get("/blind/summary")
    def summary() -> Any:
        return {"summary": blind.summary()}

    @app.get("/blind/tally")
    def words() -> Any:
        """Return what the page shows on asking only: who knows which model leads votes otherwise."""
        return {"words": blind.tally().in_words()}
