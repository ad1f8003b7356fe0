"""The entry point of ``llmill``: it heeds signals before it imports the command line."""

from __future__ import annotations

from flows.cli.signals import heed_signals


def main() -> None:
    """Heed signals, then import the command line and call it."""
    heed_signals()
    from flows.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
