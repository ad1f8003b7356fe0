"""Have MLflow know what runs reported while it was away."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Annotated

import typer

from data_pipeline.core.errors import UserError
from flows.cli.options import HOME, Home, refuse_read_only
from flows.engine.process import quiet_libraries
from flows.listeners.mlflow.links import target, tracking_uri, without_user


def sync(
    here: Annotated[
        bool, typer.Option("--here", help="Send what was meant for another MLflow to the present one too.")
    ] = False,
    home: Home = HOME,
) -> None:
    """Send MLflow what is left of runs that ended while it was away; the next run does so too."""
    quiet_libraries()
    from flows.listeners.mlflow.delivery import deliver, how_to_send, left_behind, refusal_warning
    from flows.listeners.mlflow.operations import Away, Gone, Mlflow
    from flows.listeners.terminal import Terminal

    if not home.exists():
        raise UserError(f"there is no home {home}")
    refuse_read_only(home)
    terminal, mlflow, sent = Terminal(), Mlflow(home, tracking_uri(home)), Counter[str]()
    place, missing = without_user(mlflow.uri), ""
    with left_behind(home, partial(terminal.note, warning=True)) as found:
        for log in found:
            if log.head["target"] != target(home) and not here:
                terminal.note(
                    f"a run reported to another MLflow: {how_to_send(log)}, or --here", warning=True
                )
                continue
            try:
                for operation, why in deliver(log, mlflow):
                    sent["refused" if why else "sent"] += 1
                    if why:
                        terminal.note(refusal_warning(log, operation, why), warning=True)
            except Gone as gone:
                missing = f"{gone}; what is left stays"
                continue
            except Away as error:
                raise UserError(f"MLflow at {place} does not answer: {error}; what is left stays") from None
            log.remove()
            sent["runs"] += 1
    if missing and not sent["runs"]:
        raise UserError(missing)
    if not sent["runs"]:
        terminal.console.print("nothing is left to send")
        return
    refused = f", {sent['refused']} refused" if sent["refused"] else ""
    terminal.console.print(
        f"sent what {sent['runs']} run(s) had left ({sent['sent']} operations{refused}) to MLflow at {place}"
    )
    if missing:
        raise UserError(missing)
