"""Where a stage's time goes: a context that times the items of `map`, and a sampler that says what code ran in them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from data_pipeline.stage import Item, LocalContext, Result

SAMPLE_SECONDS = 0.005

IMPORT = "importing modules"

Profile = dict[str, float]
"""Seconds by function: the innermost Python function, which stands for the native code that it calls."""


class WatchedContext(LocalContext):
    """`LocalContext` that notes when each item ran and what it did."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.profile: Profile = {}
        self.item_seconds = 0.0
        self.map_seconds = 0.0
        self.items = 0

    def map(
        self, fn: Callable[[Item], Result], items: Sequence[Item], *, names: Sequence[str] | None = None
    ) -> list[Result]:
        start = time.perf_counter()
        watched = super().map(partial(watch_item, fn), items, names=names)
        self.map_seconds += time.perf_counter() - start
        for _, seconds, profile in watched:
            self.items += 1
            self.item_seconds += seconds
            add(self.profile, profile)
        return [result for result, _, _ in watched]


def watch_item(fn: Callable[[Item], Result], item: Item) -> tuple[Result, float, Profile]:
    """Return what ``fn`` gives for an item, the seconds that it took, and what ran."""
    start = time.perf_counter()
    with sampled() as profile:
        result = fn(item)
    return result, time.perf_counter() - start, profile


@contextmanager
def sampled() -> Iterator[Profile]:
    """Fill a profile with the seconds that the calling thread spends in each function."""
    profile: Profile = {}
    thread, done = threading.get_ident(), threading.Event()

    def sample() -> None:
        before = time.perf_counter()
        while not done.wait(SAMPLE_SECONDS):
            frame, now = sys._current_frames().get(thread), time.perf_counter()
            if frame:
                # A late sample weighs more: native code held the GIL.
                add(profile, {function_of(frame): now - before})
            before = now

    sampler = threading.Thread(target=sample, name="sampler", daemon=True)
    sampler.start()
    try:
        yield profile
    finally:
        done.set()
        sampler.join()


def function_of(frame: FrameType | None) -> str:
    """``module.function`` of a frame; `IMPORT` where it is part of importing a module."""
    assert frame
    innermost = f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_qualname}"
    while frame:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return IMPORT
        frame = frame.f_back
    return innermost


def summary(context: WatchedContext, driver: Profile, seconds: float) -> dict[str, Any]:
    """Seconds of a stage that took ``seconds``, by what they went to; JSON."""
    return {
        "seconds": seconds,
        "items": context.items,
        "map_seconds": context.map_seconds,
        "item_seconds": context.item_seconds,
        "import_seconds": context.profile.get(IMPORT, 0.0),
        "item_profile": largest(context.profile),
        "driver_profile": largest(driver),
    }


def add(profile: Profile, more: Profile) -> None:
    """Add the seconds of another profile to ``profile``."""
    for function, seconds in more.items():
        profile[function] = profile.get(function, 0.0) + seconds


def largest(profile: Profile, count: int = 20) -> Profile:
    """The functions that most time went to."""
    return dict(sorted(profile.items(), key=lambda pair: -pair[1])[:count])
