"""A user's mistake ends with exit code 2 and one or two clear lines, and what was sealed stays sealed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from command_line import Llmill


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["clean.min_charz=3"], "did you mean min_chars?"),
        (["pretrain.lr=fast"], "pretrain.lr"),
        (["download.sources.0.path=/no/such/folder"], "/no/such/folder"),
        (["pretrain.batch_tokens=67108864"], "lower pretrain.batch_tokens"),
        (["train_tokenizer.vocab_size=200000"], "lower train_tokenizer.vocab_size"),
        (["pretrain.runtime.ranks=4096", "pretrain.batch_tokens=262144"], "pretrain.runtime.ranks is 4096"),
    ],
)
def test_a_mistake_is_told_in_one_or_two_lines(finished: Llmill, settings, told):
    before = finished.payloads()
    result = finished.run(*[part for setting in settings for part in ("--set", setting)], code=2)
    assert told in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert before.items() <= finished.payloads().items()


def test_debug_shows_the_trace(finished: Llmill):
    path = "download.sources.0.path=/no/such"
    result = finished.afresh("run", str(finished.recipe), "--set", path, "--debug", code=1)
    assert "Traceback" in result.stderr


def test_an_empty_corpus_is_an_error(finished: Llmill, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    path = f"download.sources.0.path={tmp_path}"
    result = finished.afresh("run", str(finished.recipe), "--set", path, code=2)
    assert len(result.stderr.strip().splitlines()) <= 2
    assert "no document" in result.stderr.lower()


def test_a_damaged_shard_is_named_with_the_way_out(finished: Llmill, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(finished.home, home)
    llmill = Llmill(home, finished.recipe)
    shard = sorted(llmill.made("dedup").glob("documents-*.parquet"))[0]
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-100] + b"x" * 100)
    result = llmill.run("--set", "train_tokenizer.vocab_size=500", code=2)
    assert str(shard.name) in result.stderr
    assert "verify" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    damaged = llmill("verify", code=2)
    assert f"{shard.name}: its content is not what was sealed" in damaged.stdout
    assert "--force dedup" in damaged.stdout
    llmill.run("--force", "dedup")
    llmill("verify")


@pytest.mark.long
def test_a_full_disk_is_an_error_and_what_was_sealed_stays(finished: Llmill, tmp_path):
    allowed = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)],
        capture_output=True,
    )
    if allowed.returncode:
        pytest.skip(f"this system lets us mount no small disk: {allowed.stderr.decode().strip()}")
    llmill = Llmill(tmp_path / "home", finished.recipe)
    command = f"{sys.executable} -m flows.cli.main"
    script = f"""
        mount -t tmpfs -o size=30m tmpfs {tmp_path}
        {command} run {llmill.recipe} --only download
        dd if=/dev/zero of={tmp_path}/filler bs=1k count=30720; truncate -s -200K {tmp_path}/filler
        {command} run {llmill.recipe}; echo code $?
        {command} verify
        rm {tmp_path}/filler
        {command} run {llmill.recipe} --only clean; echo code $?
        {command} status
    """
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        env=llmill.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert [line for line in result.stdout.splitlines() if line.startswith("code")] == ["code 2", "code 0"], (
        result
    )
    assert "the disk is full" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "✓ download" in result.stdout
    assert "2 sealed" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompt", "x", "--seed", "99999999999999999999"], "--seed"),
        (["--prompt", "x", "--seed=-1"], "--seed"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature"),
        (["--prompt", "x", "--temperature", "inf"], "--temperature"),
        (["--prompt", "x", "--top-p", "nan"], "--top-p"),
        (["--prompt", "x", "-n", "0"], "samples"),
        (["--prompt", "a\udcff"], "the prompt is not UTF-8: byte 0xff after 1 characters"),
        (["--prompt", "x", "--model", "{empty}"], "holds no model: it has no config.json"),
        (["--prompt", "x", "--model", "no-such"], "no exported model no-such"),
    ],
)
def test_a_mistake_of_generate_is_told_with_what_is_wrong(finished: Llmill, tmp_path, arguments, told):
    result = finished("generate", *(word.replace("{empty}", str(tmp_path)) for word in arguments), code=2)
    assert told in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not result.stdout


def test_generate_writes_samples_of_a_prompt_on_standard_input(finished: Llmill):
    command = [
        sys.executable,
        "-m",
        "flows.cli.main",
        "generate",
        "-n",
        "2",
        "--seed",
        "3",
        "--max-tokens",
        "8",
    ]
    made = subprocess.run(
        command, input="def ä(\n".encode(), env=finished.environment(), capture_output=True, timeout=300
    )
    assert made.returncode == 0, made.stderr.decode()
    assert made.stderr.decode().startswith("model ")
    said = made.stdout.decode()
    assert said.startswith("--- 1 of 2, seed 3\ndef ä(")
    assert "--- 2 of 2, seed 4\ndef ä(" in said
    prompt = ["--prompt", "def ä(", "--max-tokens", "8", "--json"]
    lines = finished("generate", *prompt, "-n", "2", "--seed", "3").stdout.splitlines()
    both = [json.loads(line) for line in lines]
    assert [(one["seed"], one["prompt"]) for one in both] == [(3, "def ä("), (4, "def ä(")]
    assert all(one["prompt"] + one["text"] in said for one in both)
