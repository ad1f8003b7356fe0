"""``llmill chat --web``: OpenAI's client and a browser talk to it, and nobody else may."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from browser import open_browser
from chat_server import start_chat
from command_line import Llmill

from flows.engine.store import Store


@pytest.fixture(scope="module")
def home(copy_finished: Callable[[Path], Llmill], tmp_path_factory: pytest.TempPathFactory) -> Llmill:
    return copy_finished(tmp_path_factory.mktemp("web") / "home")


@pytest.fixture(scope="module")
def where(home: Llmill) -> Iterator[str]:
    exported = Store(home.home).artifacts("export")[-1].path
    server = start_chat(home, "latest", str(exported), "--open")
    yield server.where
    server.end()


def test_openais_client_talks_to_it(where: str) -> None:
    client = openai.OpenAI(base_url=f"{where}/v1", api_key="none is needed")
    names = [one.id for one in client.models.list()]
    assert len(names) == 2
    asked = {
        "model": names[0],
        "messages": [{"role": "user", "content": "import os\nimport "}],
        "temperature": 0.0,
    }
    answer = client.chat.completions.create(**asked, max_tokens=8)
    text = answer.choices[0].message.content
    assert answer.usage
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer.choices[0].finish_reason in ("length", "stop")
    pieces = [
        one.choices[0].delta.content or ""
        for one in client.chat.completions.create(**asked, max_tokens=8, stream=True)
    ]
    assert "".join(pieces) == text
    assert len(pieces) > 2
    plain = client.completions.create(
        model=names[1], prompt="import os\nimport ", temperature=0.0, max_tokens=8
    )
    assert plain.choices[0].text == text, "the export of the same model"
    assert text
    stop = text[-1]
    cut = client.chat.completions.create(**asked, max_tokens=8, stop=[stop, "never"])
    assert cut.choices[0].message.content == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    for wrong, kind, said in (
        ({"model": "nobody"}, openai.NotFoundError, "there is no model nobody"),
        ({"n": 2}, openai.BadRequestError, "n: "),
        ({"tools": [{}]}, openai.BadRequestError, "can not do that"),
        ({"messages": [{"role": "alien", "content": "x"}]}, openai.BadRequestError, "unknown role"),
        (
            {"messages": [{"role": "user", "content": "x " * 500}]},
            openai.BadRequestError,
            "no room in the model",
        ),
    ):
        with pytest.raises(kind, match=said):
            client.chat.completions.create(**{**asked, **wrong})


def test_a_request_of_half_characters_is_refused_in_words(where: str) -> None:
    for body in (b'{"model": "\\ud800", "messages": [1]}', b'{"\\ud800": 1}'):
        refused = httpx.post(f"{where}/v1/chat/completions", content=body)
        assert refused.status_code in (400, 404)
        assert refused.json()["error"]["message"]


def test_who_leaves_in_the_middle_of_an_answer_leaves_the_model_to_others(where: str) -> None:
    name = httpx.get(f"{where}/v1/models").json()["data"][0]["id"]
    body = {"model": name, "messages": [{"role": "user", "content": "import os"}], "max_tokens": 50}
    for _ in range(3):
        with httpx.stream(
            "POST", f"{where}/v1/chat/completions", json={**body, "stream": True}, timeout=60
        ) as sent:
            next(sent.iter_bytes())
    assert httpx.post(f"{where}/v1/chat/completions", json=body, timeout=60).status_code == 200


def test_no_web_page_of_others_can_use_it(where: str) -> None:
    body = {"model": "x", "messages": [{"role": "user", "content": "x"}]}
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        answered = httpx.post(f"{where}/v1/chat/completions", json=body, headers=headers)
        assert answered.status_code == 403
        assert "access-control-allow-origin" not in answered.headers
    asks = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{where}/v1/chat/completions", headers=asks)
    assert preflight.status_code == 403
    assert httpx.get(f"{where}/v1/models", headers={"Origin": where}).status_code == 200


def test_others_are_let_in_with_a_key_only(home: Llmill) -> None:
    command = [sys.executable, "-m", "flows.cli.start", "chat", "--web", "--port", "0", "--host", "0.0.0.0"]
    done = subprocess.run(command, env=home.environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "give a key" in done.stderr
    server = start_chat(home, "--host", "0.0.0.0", LLMILL_CHAT_KEY="geheim")
    where = server.where.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{where}/v1/models").status_code == 401
    assert openai.OpenAI(base_url=f"{where}/v1", api_key="geheim").models.list().data
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{where}/v1", api_key="falsch").models.list()
    server.end()


def test_a_person_talks_with_both_on_the_page(where: str) -> None:
    with open_browser() as page:
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(where)
        page.wait_for_selector("section:nth-of-type(2)")
        page.fill("#tokens", "6")
        page.fill("#text", "日本語 <b>import</b>")
        page.press("#text", "Enter")
        page.locator(".speed").nth(1).wait_for()
        assert page.locator(".user").all_inner_texts() == ["日本語 <b>import</b>"] * 2
        answers = page.locator(".assistant").all_inner_texts()
        assert len(answers) == 2
        page.click("#reset")
        assert page.locator(".said").count() == 0
        assert not problems
