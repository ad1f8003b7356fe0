"""Two models compared blind on the page of ``llmill chat --web``: who is left is not known before the vote, each vote
is kept once whatever is killed, and `llmill votes` reports and writes what people prefer."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from browser import open_browser
from chat_server import ChatServer, start_chat
from command_line import Llmill
from safetensors.torch import load_file, save_file

from flows.compare.talkers import find_known
from flows.engine.store import Store
from llm.align.pairs import pair_of
from llm.chat.api import Refused
from llm.chat.blind import MOST_ROUNDS, Blind, BlindAsked, Given
from llm.chat.votes import Answer, Choice, Model, Vote, append_vote, read_votes, tallies, tally, votes_file

PROMPTS = ("import os", "日本語", "ภาษาไทย", "العربية", "हिन्दी", "🦊\u200d🔥", "</script><b>", "a\u2028b\0c")
HOSTILE = ("".join(PROMPTS), '"}\n{"vote": "left"}', "\x1b[31m[/b]", "字" * 100_000, " ", "\r\n\t")
RIGHTS = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'"


@pytest.fixture(scope="module")
def home(copy_finished: Callable[[Path], Llmill], tmp_path_factory: pytest.TempPathFactory) -> Llmill:
    return copy_finished(tmp_path_factory.mktemp("votes") / "home")


def models(llmill: Llmill) -> tuple[str, str]:
    """The two models that are compared: the newest of a home, and one like it with noise on its weights."""
    other = llmill.home.parent / "noisy"
    if not other.exists():
        shutil.copytree(Store(llmill.home).artifacts("export")[-1].path, other)
        (other / "manifest.json").unlink()
        file = other / "model.safetensors"
        noise = torch.Generator().manual_seed(0)
        weights = {
            name: value + 0.1 * torch.randn(value.shape, generator=noise)
            for name, value in load_file(file).items()
        }
        file.unlink()
        save_file(weights, file, metadata={"format": "pt"})
    return "latest", str(other)


@pytest.fixture(scope="module")
def server(home: Llmill) -> Iterator[ChatServer]:
    started = start_chat(home, *models(home))
    yield started
    started.end()


@pytest.fixture(scope="module")
def where(server: ChatServer) -> str:
    return server.where


def ask(where: str, prompt: str, **settings: Any) -> dict[str, Any]:
    """Have both models answer: ``id``, ``left``, ``right``, how they ``finished``, and ``all`` that was sent."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 2, **settings}
    sent = httpx.post(f"{where}/blind/answers", json=body, timeout=300)
    assert sent.status_code == 200, sent.text
    events = [json.loads(line.removeprefix("data: ")) for line in sent.text.split("\n\n") if line]
    found = {side: "".join(event.get(side, "") for event in events) for side in ("left", "right")}
    return {
        **found,
        "id": events[0]["id"],
        "finished": events[-1]["finished"],
        "all": f"{sent.headers}{sent.text}",
    }


def vote(where: str, id_: str, choice: str = "left", **headers: str) -> httpx.Response:
    body = json.dumps({"id": id_, "vote": choice}).encode()
    return httpx.post(f"{where}/blind/votes", content=body, headers=headers, timeout=300)


def names_of(where: str) -> list[str]:
    return [one["id"] for one in httpx.get(f"{where}/v1/models").json()["data"]]


def test_no_name_is_sent_before_the_vote_and_all_is_kept(where: str, home: Llmill) -> None:
    names = names_of(where)
    fingerprints = [find_known(one, Store(home.home)).fingerprint for one in models(home)]
    before = len(read_votes(votes_file(home.home)).votes)
    for place, prompt in enumerate(PROMPTS * 3):
        choice = ("left", "right", "tie", "both_bad")[place % 4]
        answers = ask(where, prompt, temperature=1.5, top_p=0.9, max_tokens=5)
        for hidden in (*names, *fingerprints, "seed"):
            assert hidden not in answers["all"]
        shown = vote(where, answers["id"], choice).json()
        kept = read_votes(votes_file(home.home)).votes[-1]
        both = [kept.left, kept.right]
        assert [one.text for one in both] == [answers["left"], answers["right"]]
        assert [one.finish for one in both] == answers["finished"]
        assert [one.name for one in both] == [shown["left"], shown["right"]]
        assert [dict(zip(names, fingerprints, strict=True))[one.name] for one in both] == [
            one.fingerprint for one in both
        ]
        order = list(names)
        random.Random(kept.seed).shuffle(order)
        assert order == [one.name for one in both], "the seed fixes who is left"
        assert (kept.id, kept.vote) == (answers["id"], choice)
        assert kept.messages == ({"role": "user", "content": prompt},)
        assert (kept.temperature, kept.top_p, kept.max_tokens) == (1.5, 0.9, 5)
    votes = read_votes(votes_file(home.home))
    assert (len(votes.votes), votes.damaged) == (before + len(PROMPTS) * 3, 0)
    assert {one.left.name for one in votes.votes} == set(names), "each is left now and then"


def test_an_answer_is_the_one_that_the_model_gives_by_its_name(where: str, home: Llmill) -> None:
    vote(where, ask(where, "import os\nimport ", max_tokens=8)["id"])
    kept = read_votes(votes_file(home.home)).votes[-1]
    for one in (kept.left, kept.right):
        body = {"model": one.name, "messages": kept.messages, "seed": kept.seed, "max_tokens": kept.max_tokens,
                "temperature": kept.temperature, "top_p": kept.top_p}  # fmt: skip
        answer = httpx.post(f"{where}/v1/chat/completions", json=body, timeout=300).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (one.text, one.finish)


def test_a_vote_is_taken_once_of_known_answers_and_from_nobody_else(where: str, home: Llmill) -> None:
    answers = ask(where, "import os")
    before = read_votes(votes_file(home.home))
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        assert vote(where, answers["id"], **headers).status_code == 403
        for path in ("/", "/page/blind.js", "/blind/summary", "/blind/tally"):
            assert httpx.get(f"{where}{path}", headers=headers).status_code == 403
        asked = {"messages": [{"role": "user", "content": "x"}]}
        assert httpx.post(f"{where}/blind/answers", json=asked, headers=headers).status_code == 403
    for id_ in (f"{answers['id']}0", "", "日本語\0", "\ud800"):
        assert vote(where, id_).status_code == 404
    for choice in ("up", "", "\ud800"):
        assert vote(where, answers["id"], choice).status_code == 400
    for body in (b"", b"[]", b"{}", b'{"id": 1, "vote": "tie"}', b'{"\\ud800": 1}', b"\xff", b"[" * 100_000):
        assert httpx.post(f"{where}/blind/votes", content=body).status_code == 400
    assert read_votes(votes_file(home.home)) == before
    assert vote(where, answers["id"], Origin=where).status_code == 200
    again = vote(where, answers["id"], "right")
    assert again.status_code == 409
    assert "voted on already" in again.json()["error"]["message"]
    with ThreadPoolExecutor(8) as pool:
        at_once = ask(where, "import os")["id"]
        statuses = [one.status_code for one in pool.map(lambda _: vote(where, at_once), range(8))]
    assert sorted(statuses) == [200, *[409] * 7]
    assert len(read_votes(votes_file(home.home)).votes) == len(before.votes) + 2


def test_a_prompt_that_can_not_be_answered_is_refused_without_a_name(where: str) -> None:
    names = names_of(where)
    for content, said in (
        ("字" * 100_000, "no room"),
        ("\ud800", "surrogate"),
        (None, "no answer"),
        (1, "than text"),
    ):
        body = json.dumps({"messages": [{"role": "user", "content": content}]})
        refused = httpx.post(f"{where}/blind/answers", content=body.encode(), timeout=300)
        assert refused.status_code == 400, refused.text
        assert said in refused.text
        assert not any(name in refused.text for name in names)


def test_a_person_votes_on_the_page_and_then_sees_the_names(where: str) -> None:
    names = names_of(where)
    with open_browser() as page:
        problems: list[str] = []
        seen: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfinished", lambda one: seen.append(f"{one.url} {one.response().headers}"))
        page.goto(where)
        assert page.locator("#vote button:enabled").count() == 0
        for prompt, choice in (("日本語 <b>import</b>🦊", "left"), ("العربية </script>", "tie")):
            page.fill("#tokens", "4")
            page.fill("#text", prompt)
            page.press("#text", "Enter")
            page.locator(f"#vote button[value={choice}]:enabled").wait_for()
            assert page.locator("#prompt").inner_text() == prompt
            assert page.locator(".assistant").count() == 2
            shown = page.content() + page.evaluate("document.cookie + JSON.stringify({...localStorage})")
            assert not any(name in shown for name in names)
            page.click(f"#vote button[value={choice}]")
            page.locator("bdi:not(:empty)").nth(1).wait_for()
            assert sorted(page.locator("bdi").all_inner_texts()) == sorted(names)
            assert page.locator("#vote button:enabled").count() == 0
            assert page.locator("section.chosen").count() == (choice == "left")
        assert all(url.startswith((where, "data:")) for url in seen), "nobody else is asked"
        assert not any("/blind/tally" in url or "/v1/" in url for url in seen), (
            "who leads is told on asking only"
        )
        assert not any(name in url for url in seen for name in names)
        assert "vote" in page.locator("#summary").inner_text()
        assert not any(name in page.locator("#tally").inner_text() for name in names)
        page.click("#summary")
        page.locator("#words:not(:empty)").wait_for()
        assert all(name in page.locator("#words").inner_text() for name in names)
        assert not problems
    assert httpx.get(where).headers["Content-Security-Policy"] == RIGHTS


def test_what_is_stopped_can_not_be_voted_on_and_keeps_no_model(where: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 60}
    with httpx.stream("POST", f"{where}/blind/answers", json=body, timeout=300) as sent:
        next(sent.iter_bytes())
    assert ask(where, "import os")["id"], "both answer the next one"


@pytest.fixture(scope="module")
def blind(home: Llmill, tmp_path_factory: pytest.TempPathFactory) -> Blind:
    first, second = (find_known(one, Store(home.home)) for one in models(home))
    return Blind(first, second, file=tmp_path_factory.mktemp("kept") / "votes.jsonl", report=lambda _: None)


ASKED = BlindAsked(messages=[{"role": "user", "content": "import os"}], max_tokens=3)


def test_no_vote_before_both_answers_have_ended(blind: Blind) -> None:
    begun = blind.begin(ASKED)
    given = Given(id=begun.id, vote="left")
    answers = blind.answers(begun)
    for _ in range(3):  # the id, and pieces
        with pytest.raises(Refused, match="must have ended"):
            blind.vote(given)
        next(answers)
    for _ in answers:
        pass
    assert blind.vote(given)["summary"].startswith("1 vote: ")
    answers = blind.answers(blind.begin(ASKED))
    next(answers)
    next(answers)
    answers.close()
    assert not blind.first.lock.locked(), "who leaves gives the models back"


def test_a_vote_that_can_not_be_kept_is_said_and_can_be_given_again(
    blind: Blind, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = blind.begin(ASKED)
    list(blind.answers(begun))
    before = blind.file.read_bytes() if blind.file.exists() else b""
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:20]))  # as a disk that fills up does
        with pytest.raises(Refused, match="can't be kept"):
            blind.vote(Given(id=begun.id, vote="right"))
    assert blind.file.read_bytes() == before
    blind.vote(Given(id=begun.id, vote="right"))
    assert read_votes(blind.file).votes[-1].id == begun.id


def test_old_answers_are_forgotten(blind: Blind) -> None:
    begun = blind.begin(ASKED)
    list(blind.answers(begun))
    for _ in range(MOST_ROUNDS):
        blind.begin(ASKED)
    assert len(blind.rounds) == MOST_ROUNDS
    with pytest.raises(Refused, match="too old"):
        blind.vote(Given(id=begun.id, vote="left"))


@pytest.mark.long
def test_no_kill_loses_a_vote(copy_finished: Callable[[Path], Llmill], tmp_path: Path) -> None:
    llmill = copy_finished(tmp_path / "home")
    file = votes_file(llmill.home)
    for before in (0, 2):
        server = start_chat(llmill, *models(llmill))
        assert f"blind: {before} votes: no preference shown yet" in server.said
        for _ in range(2):
            assert vote(server.where, ask(server.where, "import os")["id"]).status_code == 200
        server.process.kill()
        server.process.communicate()
        whole = file.read_bytes()
        with file.open("ab") as torn:  # as a kill within a write leaves it
            torn.write(whole[: len(whole) // 5])
    found = read_votes(file)
    assert (len(found.votes), found.damaged) == (4, 2)
    assert "2 lines of" in llmill("votes").stdout


@pytest.mark.long
def test_two_servers_at_once_keep_each_vote_whole(home: Llmill, server: ChatServer) -> None:
    file = votes_file(home.home)
    before = len(read_votes(file).votes)
    other = start_chat(home, *models(home))
    with ThreadPoolExecutor(4) as pool:
        given = list(
            pool.map(
                lambda where: vote(where, ask(where, "日本語")["id"]).status_code,
                [server.where, other.where] * 6,
            )
        )
    said = other.end()
    assert given == [200] * 12
    found = read_votes(file)
    assert (len(found.votes), found.damaged) == (before + 12, 0)
    assert f"{before + 12} votes" in server_line(home)
    assert said.count("preference") >= 6, "a line in the terminal for each vote"


def server_line(llmill: Llmill) -> str:
    return llmill("votes").stdout


APPEND = """
import sys
from pathlib import Path
from llm.chat.votes import Vote, append_vote
vote = Vote.model_validate_json(sys.stdin.read())
for number in range(200):
    append_vote(Path(sys.argv[1]), vote.model_copy(update={"id": f"{sys.argv[2]} {number}"}))
    print(number, flush=True)
"""


def appending(file: Path, name: str, made: Vote) -> subprocess.Popen[str]:
    """A process that adds votes, and prints the number of each when it is kept."""
    process = subprocess.Popen(
        [sys.executable, "-c", APPEND, str(file), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    process.stdin.write(made.model_dump_json())
    process.stdin.close()
    return process


def test_processes_that_add_votes_at_once_and_are_killed_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "votes" / "votes.jsonl"
    made = a_vote("left", prompt="字" * 20_000)
    writers = [appending(file, name, made) for name in ("a", "b", "c")]
    kept = {}
    for name, process in zip("abc", writers, strict=True):
        assert process.stdout
        said = [process.stdout.readline() for _ in range(20 if name == "c" else 200)]
        if name == "c":
            process.kill()
        kept[name] = len(said + process.stdout.readlines())
        process.wait(timeout=600)
    found = read_votes(file)
    count = {name: sum(one.id.startswith(name) for one in found.votes) for name in "abc"}
    assert (count["a"], count["b"]) == (200, 200)
    assert count["c"] - kept["c"] in (0, 1), "one was kept, and the kill came before it was printed"
    assert found.damaged <= 1
    assert all(one.messages == made.messages for one in found.votes)


A, B, C = (Model(name=f"model {name}", fingerprint=name * 16) for name in "abc")


def a_vote(
    choice: Choice,
    *,
    prompt: str = "x",
    left: Model = A,
    right: Model = B,
    texts: tuple[str, str] = ("l", "r"),
) -> Vote:
    """A vote as a server makes it."""
    answers = [
        Answer(**model.model_dump(), text=text, finish="stop")
        for model, text in zip((left, right), texts, strict=True)
    ]
    return Vote(
        id="0" * 32,
        time="2026-11-30T12:00:00+00:00",
        vote=choice,
        messages=({"role": "user", "content": prompt},),
        left=answers[0],
        right=answers[1],
        seed=1,
        temperature=0.7,
        top_p=0.95,
        max_tokens=8,
    )


def test_votes_are_read_as_they_were_given(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    given = [a_vote("left", prompt=text, texts=(text, text[::-1] + "x")) for text in HOSTILE]
    for one in given:
        append_vote(file, one)
    assert list(read_votes(file).votes) == given
    assert file.read_bytes().count(b"\n") == len(given)
    with file.open("ab") as damaged:
        damaged.write(b'\n\n{"id": 1}\n[]\n\xff\xfe\n' + b"[" * 50_000 + b"\n")
    append_vote(file, given[0])
    found = read_votes(file)
    assert (list(found.votes), found.damaged) == ([*given, given[0]], 4)
    of_one = given[0].model_dump() | {"right": given[0].left.model_dump()}
    file.write_text(json.dumps(of_one) + "\n")
    assert (read_votes(file).votes, read_votes(file).damaged) == ([], 1)


def test_a_tally_counts_models_wherever_they_stood() -> None:
    votes = [
        *[a_vote("left")] * 3,
        *[a_vote("left", left=B, right=A)] * 2,
        *[a_vote("right", left=B, right=A)] * 4,
        *[a_vote("tie")] * 2,
        a_vote("both_bad", left=B, right=A),
        *[a_vote("right", right=C)] * 9,
    ]
    first, second = tallies(votes)
    assert (first.first_better, first.second_better, first.ties, first.both_bad) == (7, 2, 2, 1)
    assert first.summary == "12 votes (2 ties, 1 both bad): no preference shown yet"
    assert first.in_words().startswith(
        "no preference shown between model a and model b: 12 votes (2 ties, 1 both bad); model a is better in 7 of 9 "
        "that choose one, 78% (95% interval 31% to 99%, however often one looks; "
    )
    turned = tally(votes, B, A)
    assert (turned.first_better, turned.second_better) == (2, 7)
    assert turned.in_words().partition(":")[2] == first.in_words().partition(":")[2]
    assert second.summary == "9 votes: a preference is shown"
    assert second.in_words().startswith(
        "model c is preferred to model a: 9 votes; model c is better in 9 of 9"
    )
    assert second.as_json()["outcome"] == "second is preferred"
    assert tally(votes, C, A).as_json()["outcome"] == "first is preferred"
    assert tally(votes, C, A).in_words() == second.in_words()
    assert (
        tally([], A, B).in_words()
        == "no preference shown between model a and model b: 0 votes, none for one of them"
    )


def test_votes_are_a_data_set_of_preferences(tmp_path: Path) -> None:
    llmill = Llmill(tmp_path / "home", tmp_path / "none.yaml")
    assert "no votes in" in told(llmill)
    file = votes_file(llmill.home)
    hostile = A.model_copy(update={"name": "[/b] \x1b[31m 日本語"})
    for one in (
        *(a_vote("left", prompt=text, texts=(f"{text}!", text)) for text in HOSTILE),
        a_vote("right"),
        a_vote("tie"),
        a_vote("tie"),
        a_vote("both_bad"),
        a_vote("left", texts=(" ", "r")),
        a_vote("left", left=hostile, texts=("same", "same")),
    ):
        append_vote(file, one)
    out = tmp_path / "new" / "preferences.jsonl"
    said = told(llmill, "--out", str(out))
    assert "[/b] ␛[31m 日本語" in said
    assert "7 preferences in" in said
    for reason in (
        "2 (tie)",
        "1 (both bad)",
        "1 (an empty answer is better)",
        "1 (both answers are the same)",
    ):
        assert reason in said
    rows = [json.loads(line) for line in out.read_bytes().split(b"\n") if line]
    for row in rows:  # as `align` reads them
        assert pair_of(row)._asdict() == {name: row[name] for name in ("prompt", "chosen", "rejected")}
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": text}] for text in (*HOSTILE, "x")
    ]
    assert [row["chosen"][0]["content"] for row in rows] == [*(f"{text}!" for text in HOSTILE), "r"]
    assert rows[-1]["rejected"] == [{"role": "assistant", "content": "l"}]
    assert rows[-1]["chosen_fingerprint"] == B.fingerprint
    assert rows[-1]["rejected_fingerprint"] == A.fingerprint
    found = json.loads(told(llmill, "--json", "--out", str(out)))
    assert found["written"]["rows"] == 7
    assert found["written"]["left_out"]["tie"] == 2
    [pair] = found["pairs"]
    assert (pair["first_better"] + pair["second_better"], pair["ties"], pair["both_bad"]) == (9, 2, 1)


def told(llmill: Llmill, *arguments: str) -> str:
    """What ``llmill votes`` prints."""
    command = [sys.executable, "-m", "flows.cli.start", "votes", *arguments]
    done = subprocess.run(
        command, env=llmill.environment(), capture_output=True, text=True, timeout=900, check=True
    )
    return done.stdout


def test_what_can_not_be_compared_blind_is_said(home: Llmill, tmp_path: Path) -> None:
    trained, exported = "latest", str(Store(home.home).artifacts("export")[-1].path)
    for arguments, said in (
        (("--web", "--blind", trained), "name two, with --web"),
        (("--blind",), "name two, with --web"),
        (("--web", trained, trained), "the same"),
        (("--web", trained, exported), "both are model"),
    ):
        command = [sys.executable, "-m", "flows.cli.start", "chat", *arguments]
        done = subprocess.run(command, env=home.environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
