"""Talk with a model, in the terminal or on a page."""

from __future__ import annotations

import json
import readline  # noqa: F401 (lines can be edited, and earlier ones called back)
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.core.errors import UserError
from flows.cli.models import finite, write_pieces
from flows.cli.options import HOME, Home, announce, at_home, writable
from flows.engine.process import quiet_libraries
from flows.engine.store import Store

HELP = (
    "/reset forgets what was said · /system TEXT · /temperature NUMBER · /save FILE · /help · /quit (or Ctrl-D); "
    "Ctrl-C stops an answer"
)


def chat(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="A folder, a fingerprint, a run's name, latest or models:/NAME@ALIAS; else the newest model. With "
            "--web, several: two are compared blind.",
            metavar="[MODEL ...]",
        ),
    ] = None,
    web: Annotated[
        bool,
        typer.Option("--web", help="Serve a page, and OpenAI's HTTP interface, in place of the terminal."),
    ] = False,
    blind: Annotated[
        bool | None,
        typer.Option(
            "--blind/--open",
            help="With --web and two models: hide which is which until one votes, or show it and keep no votes.",
            show_default="blind, of two models",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="With --web: another address needs --key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --web; 0: any free one.")] = 8765,
    key: Annotated[
        str | None,
        typer.Option(envvar="LLMILL_CHAT_KEY", help="With --web: that each request must bear."),
    ] = None,
    system: Annotated[str, typer.Option(help="Said to the model before all else.")] = "",
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="0 takes the likeliest token.")
    ] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, callback=finite)] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    home: Home = HOME,
) -> None:
    """Talk with a model; one that was trained on no conversations goes on with the text."""
    quiet_libraries()
    if len(models or ()) > 1 and not web:
        raise UserError("one model is talked to in the terminal: name one, or add --web")
    if blind and (not web or len(models or ()) != 2):
        raise UserError("--blind compares two models on a page: name two, with --web")
    hidden = web and len(models or ()) == 2 and blind is not False
    speakers = load(models or [None], home, known=hidden)
    if web:
        return serve(speakers, host=host, port=port, key=key, blind=Store(home) if hidden else None)
    from llm.chat.talk import Talk

    [speaker] = speakers
    room = max(1, speaker.model.config.context // 2)
    talk = Talk(
        speaker, temperature=temperature, top_p=top_p, most=min(max_tokens, room), seed=seed, system=system
    )
    how = "" if speaker.chat else "; it was trained on no conversations, and goes on with the text"
    note(f"{speaker.name}{how}\n{HELP}")
    with interruptible():
        talk_on(talk)


def load(models: Sequence[str | None], home: Path, *, known: bool) -> list[Any]:
    """Load models; ``known`` has them with their fingerprints, for votes on them in a home that can be written to."""
    if known:
        writable(home)
    announce(f"loading {', '.join(one or 'the newest model' for one in models)}")
    from flows.compare.talkers import find_known, find_speaker

    return [
        find_known(one, Store(home)) if known and one else find_speaker(one, Store(home)) for one in models
    ]


def serve(speakers: Any, *, host: str, port: int, key: str | None, blind: Store | None) -> None:
    """Serve the page and the interface until Ctrl-C.

    Args:
        blind: keeps the votes on the two models; None: they are not compared blind.

    Raises:
        UserError: others could reach it without a key, the port is taken, or the models are the same.
    """
    import uvicorn

    from llm.chat.api import LOOPBACK

    if host not in LOOPBACK and not key:
        raise UserError(f"--host {host} lets others in: give a key with --key, or LLMILL_CHAT_KEY")
    if len({one.name for one in speakers}) < len(speakers):
        raise UserError("two of the models are the same: name another")
    app = app_of(speakers, key, blind)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()  # who reads the line below is let in from then on
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}") from None
        where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        note(
            f"{', '.join(one.name for one in speakers)} at {where} (OpenAI's interface at {where}/v1); Ctrl-C ends"
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        with interruptible(), suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


def app_of(speakers: Any, key: str | None, store: Store | None) -> Any:
    """Make the server of some models, which compares two of them blind where there is a store for votes.

    Raises:
        UserError: the two are the same, or earlier votes can't be read.
    """
    from llm.chat.api import PAGES, make_app
    from llm.chat.blind import Blind, add_routes
    from llm.chat.votes import votes_file

    if store is None:
        return make_app(speakers, key=key)
    first, second = speakers
    if first.fingerprint == second.fingerprint:
        raise UserError(f"both are model {first.fingerprint}: name another, or compare them with --open")
    blind = Blind(first, second, file=votes_file(store.home), report=note)
    note(f"blind: {blind.tally().summary} (which leads: llmill votes{at_home(store.home)})")
    app = make_app(speakers, key=key, page=PAGES / "blind.html")
    add_routes(app, blind)
    return app


@contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C raise `KeyboardInterrupt` inside, and not end the program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def note(text: str) -> None:
    """Print a line that is no answer, beside the answers on standard output."""
    from flows.listeners.terminal import Screen

    Screen(stderr=True).print(text)


def talk_on(talk: Any) -> None:
    """Read lines and answer each, until there are no more."""
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "")
            if line.strip() == "/quit":
                return
            command(talk, line) if line.startswith("/") else answer(talk, line)
        except KeyboardInterrupt:  # at the prompt, or when an answer had just ended
            note("\n(/quit or Ctrl-D ends)")
        except EOFError:
            return
        except UnicodeDecodeError:
            note("error: that was not UTF-8")
        except UserError as error:
            note(f"error: {error}")


def answer(talk: Any, line: str) -> None:
    """Answer a line, until the answer ends or is stopped."""
    if not line.strip():
        return
    try:
        write_pieces(talk.answer(line))
        how = ""
    except KeyboardInterrupt:
        print()
        how = "stopped · "
    if talk.left_out:
        note(f"(the oldest {talk.left_out} messages no longer fit the context)")
    reply = talk.reply
    if reply is None:  # stopped before it began
        return
    later = max(reply.seconds - reply.first_seconds, 1e-9)
    rate = f" · {(reply.tokens - 1) / later:.1f} tokens/s" if reply.tokens > 1 else ""
    note(f"({how}{reply.tokens} tokens · first after {reply.first_seconds:.2f} s{rate})")


def command(talk: Any, line: str) -> None:
    """Carry out a line that begins with a slash.

    Raises:
        UserError: there is no such command, or it needs another value.
    """
    name, _, value = line[1:].partition(" ")
    found = COMMANDS.get(name.strip())
    if found is None:
        raise UserError(f"there is no command /{name}; {HELP}")
    note(f"({found(talk, value.strip())})")


def reset(talk: Any, _: str) -> str:
    talk.reset()
    return "forgotten"


def set_system(talk: Any, text: str) -> str:
    if talk.speaker.chat is None:
        raise UserError("this model was trained on no conversations, so nothing is said to it beforehand")
    talk.system = text
    talk.reset()
    return (
        "said before all else from now on; what was said is forgotten"
        if text
        else "nothing is said beforehand"
    )


def set_temperature(talk: Any, text: str) -> str:
    try:
        talk.temperature = finite(float(text))
    except (ValueError, typer.BadParameter):
        raise UserError(f"/temperature takes a number from 0 on, not {text!r}") from None
    if talk.temperature < 0:
        talk.temperature = 0.0
    return f"temperature {talk.temperature:g}"


def save(talk: Any, text: str) -> str:
    """Append what was said to a file, as a row that `finetune` reads."""
    names = shlex.split(text)
    if len(names) != 1:
        raise UserError("/save takes the name of a file")
    if not talk.said:
        raise UserError("nothing was said yet")
    path = Path(names[0]).expanduser()
    try:
        with path.open("a", encoding="utf-8") as file:
            row = {"messages": [dict(one) for one in talk.messages()], "model": talk.speaker.name}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return f"a row in {path}, as finetune reads it"


def show_help(talk: Any, _: str) -> str:
    return HELP


COMMANDS: dict[str, Callable[[Any, str], str]] = {
    "reset": reset,
    "system": set_system,
    "temperature": set_temperature,
    "save": save,
    "help": show_help,
}
