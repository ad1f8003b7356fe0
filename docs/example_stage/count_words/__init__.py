"""A stage that counts words: the row by which llmill knows it. It must import little, for each command reads it."""

from flows.stage import Stage

STAGE = Stage(
    name="count_words",
    body_at="count_words.stage:count_words",
    config_at="count_words.stage:CountWordsConfig",
    takes=("documents",),
    makes="folder",
    version=1,
    headline=("words",),
)
