"""Enough of Slurm to run jobs on this machine: ``python slurm_stand_in.py COMMAND ARGUMENTS``, which scripts on PATH
call by the name of Slurm's command. A job's script really runs, ``srun`` really starts its command once a node, and
signals arrive where Slurm sends them. Jobs are files in the folder of SLURM_STAND_IN, with a process that follows each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

ROOT = Path(os.environ.get("SLURM_STAND_IN", "/nonexistent"))
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun")
KILL_WAIT = 30
OPTIONS = {
    "sbatch": {"--parsable", "--nodes", "--gpus-per-node", "--cpus-per-task", "--partition", "--account", "--time",
               "--signal", "--ntasks-per-node", "--requeue", "--no-requeue", "--job-name", "--output", "--open-mode",
               "--constraint"},
    "squeue": {"--jobs", "--states", "--noheader", "--format"},
    "scancel": {"--batch", "--signal"},
    "srun": {"--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit"},
}  # fmt: skip


def change(number: str, **changes: Any) -> dict[str, Any]:
    """What is known of a job, after these changes."""
    file = ROOT / f"{number}.json"
    with FileLock(ROOT / f"{number}.lock"):
        job = {**json.loads(file.read_text()), **changes} if file.exists() else changes
        if changes:
            file.write_text(json.dumps(job))
    return job


def taken_apart(command: str, words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options by name, and the words after them; an option that Slurm does not have ends it, as there."""
    options: dict[str, str] = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        if name not in OPTIONS[command]:
            sys.exit(f"{command}: unrecognized option '{name}'")
        options[name] = value
    return options, words


def sbatch(words: list[str]) -> None:
    options, [script, *arguments] = taken_apart("sbatch", words)
    lines = [line.split()[1:] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH")]
    options = {**taken_apart("sbatch", [word for line in lines for word in line])[0], **options}
    if options.get("--partition") == "nowhere":
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    number = str(len(list(ROOT.glob("*.json"))) + 1)
    change(
        number,
        state="PENDING",
        options=options,
        script=[script, *arguments],
        pid=0,
        cancelled=False,
        again=False,
        starts=0,
    )
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, "daemon", number], start_new_session=True, **quiet)
    print(number)


def daemon(words: list[str]) -> None:
    """Start a job, and once more each time that it is queued again."""
    [number] = words
    while True:
        time.sleep(0.3)
        job = change(number)
        if job["cancelled"]:
            change(number, state="CANCELLED")
            return
        code = run(number, job)
        job = change(number)
        if not job["again"]:
            change(number, state="CANCELLED" if job["cancelled"] else "FAILED" if code else "COMPLETED")
            return
        change(number, state="PENDING", again=False, pid=0)


def run(number: str, job: dict[str, Any]) -> int:
    """Run a job's script to its end, or until it has outstayed KILL_WAIT; its exit code."""
    options = job["options"]
    told = {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NUM_NODES": options["--nodes"],
        "SLURM_RESTART_COUNT": str(job["starts"]),
    }
    with open(options["--output"], "ab") as output:
        process = subprocess.Popen(
            ["bash", *job["script"]],
            env={**os.environ, **told},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    change(number, state="RUNNING", pid=process.pid, starts=job["starts"] + 1)
    family: list[psutil.Process] = []
    since = 0.0
    while process.poll() is None:
        now = change(number)
        with suppress(psutil.NoSuchProcess):
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        if (now["cancelled"] or now["again"]) and not since:
            since = time.monotonic()
            send(family, signal.SIGTERM)
        if since and time.monotonic() - since > KILL_WAIT:
            send(family, signal.SIGKILL)
        time.sleep(0.1)
    send(family, signal.SIGKILL)  # nothing of a job stays
    return process.returncode


def send(family: list[psutil.Process], number: int) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def scancel(words: list[str]) -> None:
    options, [number] = taken_apart("scancel", words)
    job = change(number)
    if "--signal" not in options:
        change(number, cancelled=True, again=False)
    elif job["pid"]:
        with suppress(psutil.NoSuchProcess):
            script = psutil.Process(job["pid"])
            told = [script] if "--batch" in options else in_steps(script)
            send(told, signal.Signals[f"SIG{options['--signal']}"])


def in_steps(script: psutil.Process) -> list[psutil.Process]:
    """What the sruns of a job have started."""
    sruns = [process for process in script.children(recursive=True) if __file__ in process.cmdline()]
    return [process for srun in sruns for process in srun.children(recursive=True)]


def scontrol(words: list[str]) -> None:
    if words[0] == "requeue":
        change(words[1], again=True)
    elif words != ["ping"]:
        sys.exit(f"scontrol: invalid keyword: {words[0]}")


def squeue(words: list[str]) -> None:
    options, _ = taken_apart("squeue", words)
    number = options["--jobs"]
    if not (ROOT / f"{number}.json").exists():
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    assert options["--format"] == "%T|%r|%N"
    state = change(number)["state"]
    print(f"{state}|{'Resources|' if state == 'PENDING' else 'None|one,two'}")


def sacct(words: list[str]) -> None:
    sys.exit("Slurm accounting storage is disabled")


def srun(words: list[str]) -> None:
    """Start the command once a node; the first to fail ends the others. Told to end, it kills them all, as Slurm's."""
    options, command = taken_apart("srun", words)
    assert options["--nodes"] == options["--ntasks"] == os.environ["SLURM_JOB_NUM_NODES"]
    nodes = range(int(options["--nodes"]))
    tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]
    signal.signal(signal.SIGTERM, lambda number, frame: [task.kill() for task in tasks])
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):
            for task in tasks:
                task.terminate()
        time.sleep(0.05)
    sys.exit(max(abs(task.returncode) for task in tasks))


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    globals()[name](rest)
