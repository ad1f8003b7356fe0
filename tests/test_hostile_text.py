"""Text of people is printed as it is, by every command: brackets are no markup, escape sequences no commands."""

from __future__ import annotations

import ast
import io
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import Llmill
from markdown_it import MarkdownIt
from rich.table import Table as Grid
from rich.text import Text
from typer.main import get_command

from flows.cli.main import main, make_app
from flows.compare.cells import Section
from flows.compare.page import table
from flows.compare.svg import Line, plot
from flows.headline import describe
from flows.listeners.markdown import code, link, plain
from flows.listeners.terminal import Screen, Terminal, visible

HOSTILE = (
    "a[/b]",
    "[bold red]",
    "[/INST] [INST]",
    "[link=x]y",
    "\x1b[31mred\x1b]0;title\x07",
    ":smile: :warning:",
    "two\nlines",
    "日本語 ภาษาไทย العربية हिन्दी 🙂",
    "w" * 3000,
    "back\\slash \\[b]",
    "\udcff no UTF-8",
)
LINE = "[/INST]a[/b] [bold red]:smile:\x1b[31m\x9b日本語ภาษาไทยहिन्दी العربية🙂" + "w" * 300
SEEN = LINE.replace("\x1b", "␛").replace("\x9b", "\ufffd")
HOME = "a[/b] [red] :smile: $x 'q' #1 %20 q?m=1 \x1b[31m 日本語"

CALLS: dict[str, list[list[str]]] = {
    "run": [[LINE], ["{recipe}", "--set", f"clean.{LINE}=1"], ["{recipe}", "--set", f"pretrain.lr={LINE}"],
            ["{recipe}", "--only", LINE], ["{recipe}", "--from", LINE], ["{recipe}", "--force", LINE],
            ["{recipe}", "--to", LINE]],
    "plan": [[LINE], ["{recipe}", "--set", f"name={LINE}"], ["{recipe}", "--set", LINE]],
    "ladder": [[LINE, "--flops", "1e9,2e9,3e9"], ["{recipe}", "--flops", LINE]],
    "forecast": [[LINE], ["{recipe}", "--ladder", LINE]],
    "forecasts": [],
    "sweep": [[LINE], ["{recipe}", "--grid", LINE], ["{recipe}", "--grid", f"pretrain.lr={LINE},2"]],
    "join": [[LINE]],
    "deploy": [[LINE], ["{recipe}", "--set", LINE], ["{recipe}", "--cron", LINE], ["{recipe}", "--every", LINE],
               ["{recipe}", "--rrule", LINE], ["{recipe}", "--every", "1h", "--timezone", LINE]],
    "runs": [[LINE]],
    "status": [],
    "verify": [[LINE]],
    "trace": [[LINE]],
    "find": [["--file", LINE]],
    "gc": [["--artifact", LINE]],
    "compare": [[LINE, "latest"]],
    "score": [["latest", "--sets", LINE], ["latest", "--tasks", LINE]],
    "votes": [["--out", f"/dev/null/{LINE}"]],
    "generate": [["--prompt", "x", "--model", LINE]],
    "chat": [[LINE]],
    "classify": [["x", "--model", LINE]],
    "adopt": [[LINE, "x"], ["model", LINE]],
    "promote": [[LINE]],
    "up": [],
    "down": [],
    "worker": [],
    "ui": [],
    "sync": [],
    "settings": [[LINE]],
    "init": [["x", "--from", LINE]],
}  # fmt: skip
"""Command -> arguments with a text that its answer names; a dot in it would end a setting's name."""

AT_HOME: dict[str, list[list[str]]] = {
    "run": [["{recipe}"]],
    "plan": [["{recipe}"]],
    "sweep": [],
    "ladder": [],
    "forecast": [["{recipe}"]],
    "forecasts": [[], ["--json"]],
    "join": [],
    "deploy": [],
    "runs": [[], ["{recipe}"], ["--json"]],
    "status": [[]],
    "verify": [[]],
    "trace": [["{export}"]],
    "find": [["no words of that home"]],
    "gc": [[]],
    "compare": [["latest", "latest"]],
    "score": [["latest", "--sets", "{recipe}"]],
    "votes": [[], ["--json"]],
    "generate": [["--prompt", "[/INST] :smile: \x1b[31m [bold]"]],
    "chat": [],
    "classify": [],
    "adopt": [["tokenizer", "{tokenizer}", "--origin", LINE]],
    "promote": [["--dry-run"]],
    "up": [["--mlflow-port", "{port}"]],
    "down": [[]],
    "worker": [],
    "ui": [["--port", "{port}"]],
    "sync": [[]],
    "settings": [],
    "init": [],
}
"""The same for what works on a home, which here has a name of that kind."""


def printed(*objects: object) -> str:
    screen = Screen()
    screen.file = out = io.StringIO()
    screen.print(*objects)
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_the_printer_shows_text_as_it_is(text):
    grid = Grid(box=None)
    grid.add_column(text.replace("\n", " ")[:60])
    grid.add_row(text.replace("\n", " ")[:60])
    short = visible(text.replace("\n", " ")[:60])
    for found in (printed(text), printed(Text(text)), printed(Text.assemble(("x", "bold"), text))):
        assert visible(text).replace("␇", "") in found.replace("␇", "")  # rich drops the bell from its Text
        assert "\x1b" not in found
    assert printed(grid).count(short) == 2


def test_a_terminal_shows_names_of_stages_and_figures_as_they_are():
    terminal = Terminal(Screen())
    terminal.console.file = out = io.StringIO()
    terminal.title(LINE)
    terminal.note(LINE)
    terminal.step_started(LINE, LINE)
    terminal.step_ended("✗", LINE, LINE)
    assert out.getvalue().count(SEEN) == 4
    assert "[red]" in describe({"dropped/[red]": 1.0}, ["dropped/[red]"])


def test_nobody_makes_a_printer_of_another_kind():
    """Each would have to escape for itself, and one day one would forget."""
    made = []
    for path in (
        *Path("flows").rglob("*.py"),
        *Path("llm").rglob("*.py"),
        *Path("data_pipeline").rglob("*.py"),
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Console"
            ):
                made.append(path.as_posix())
            if isinstance(node, ast.keyword) and node.arg == "markup":
                made.append(path.as_posix())
    assert set(made) == {"flows/listeners/terminal.py"}


def test_all_commands_are_tried():
    assert CALLS.keys() == AT_HOME.keys() == get_command(make_app()).commands.keys()


@pytest.fixture(scope="module")
def taken_port() -> Iterator[str]:
    """One that nothing can be started on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield str(listener.getsockname()[1])


def filled(arguments: list[str], **values: str) -> list[str]:
    return [values.get(one.strip("{}"), one) if one.startswith("{") else one for one in arguments]


@pytest.fixture
def signals_kept() -> Iterator[None]:
    """What signals mean to pytest, after a command that said otherwise."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize("command", CALLS)
def test_what_people_type_is_shown_as_they_typed_it(finished: Llmill, command: str, monkeypatch, capsys):
    """Each call fails early, so it may do so in this process."""
    monkeypatch.setenv("LLMILL_HOME", str(finished.home))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("flows.cli.main.heed_signals", lambda: None)  # they are pytest's here
    for arguments in CALLS[command]:
        monkeypatch.setattr("sys.argv", ["llmill", command, *filled(arguments, recipe=str(finished.recipe))])
        before = dict(os.environ)
        with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
            main()
        os.environ.clear()
        os.environ.update(before)
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert SEEN in said


@pytest.fixture(scope="module")
def named(copy_finished, tmp_path_factory) -> Llmill:
    """A home that people name so, and that was moved there."""
    return copy_finished(tmp_path_factory.mktemp("named") / HOME)


@pytest.mark.parametrize("command", AT_HOME)
def test_a_home_may_be_called_anything(named: Llmill, command: str, taken_port: str):
    export = named.made("export").name
    tokenizer = str(named.made("train_tokenizer").absolute())
    for arguments in AT_HOME[command]:
        words = filled(
            arguments, recipe=str(named.recipe), export=export, tokenizer=tokenizer, port=taken_port
        )
        process = named.start(command, *words, "--home", str(named.home))
        out, err = process.communicate(timeout=900)
        said = out + err
        assert process.returncode == (2 if taken_port in words else process.returncode), said
        assert process.returncode in (0, 1, 2), said
        assert "Traceback" not in said
        assert "MarkupError" not in said
        if command in ("status", "run") and "--json" not in words:
            assert visible(HOME) in said
        if command == "generate":
            assert process.returncode == 0, said
            assert "[/INST] :smile:" in out


def test_nothing_is_written_outside_a_home(named: Llmill):
    beside = named.home.parents[HOME.count("/")]
    assert [path.name for path in beside.iterdir()] == [HOME.partition("/")[0]]
    assert [path.name for path in named.home.parent.iterdir()] == [named.home.name]
    assert not list(Path().glob("file:*"))


MARKED = (*HOSTILE, "**b** _i_ `c` ``d` [a](javascript:x) ![i](u) # h", "<img src=x onerror=alert(1)> &amp; &lt;",
          "a|b~~c~~", "x\n\n# heading\n- item", "$x$ 1. a")  # fmt: skip


def text_of(html: str) -> tuple[str, set[str]]:
    """What a browser shows of a page, and its elements."""
    reader, shown, tags = HTMLParser(), [], set()
    reader.handle_data = shown.append  # type: ignore[method-assign]
    reader.handle_starttag = lambda tag, _: tags.add(tag)  # type: ignore[method-assign,misc]
    reader.feed(html)
    reader.close()
    return "".join(shown), tags


@pytest.mark.parametrize("text", MARKED)
def test_text_within_markdown_is_shown_as_it_is(text):
    text, flat = text.replace("\udcff", ""), " ".join(text.replace("\udcff", "").split())
    shown, tags = text_of(
        MarkdownIt().enable(["table", "strikethrough"]).render(f"**Failed**: {plain(text)}")
    )
    assert (shown.strip(), tags) == (f"Failed: {flat}", {"p", "strong"})
    shown, tags = text_of(MarkdownIt().render(f"at {code(text)}."))
    assert (shown.strip(), tags) == (f"at {text.replace(chr(10), ' ')}.", {"p", "code"})
    shown, tags = text_of(MarkdownIt().render(f"- A: {link(text, 'http://h/x?a=(1)')}"))
    assert shown.split() == f"A: {flat}".split()
    assert tags == {"ul", "li", "a"}


@pytest.mark.parametrize("text", MARKED)
def test_text_within_a_page_of_compare_is_shown_as_it_is(text):
    section = Section(heading=text, header=["", text], rows=[[text, text]], empty=text, fixed=1)
    shown, tags = text_of(table(section, [f'http://h/"onclick="{text}']))
    assert shown.count(text) == 4
    assert tags == {"h2", "div", "table", "tr", "th", "td", "a"}
    shown, tags = text_of(plot([Line(text, [0.0, 1.0], [0.0, 1.0])], "tokens", text))
    assert text in shown
    assert tags == {"svg", "line", "text", "polyline", "title"}
