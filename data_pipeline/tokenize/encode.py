"""From a column of texts to token ids: by `gigatoken`, or by `tokenizers` where the two disagree.

`gigatoken` reads the same ``tokenizer.json`` and is tens of times faster. It reads Arrow's text buffers in place
and gives offsets and ids back as arrays, so no Python object is made for a document. A run relies on it only
after it has given the same ids as `tokenizers` for a sample of its own documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.core.text import first_line
from data_pipeline.train_tokenizer.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import awkward

Encoded = tuple[NDArray[np.int64], NDArray[np.uint32]]
"""Offsets (documents + 1) into ids (tokens): document i is ``ids[offsets[i] : offsets[i + 1]]``."""
Encoder = Callable[[pa.Array], Encoded]
EncoderName = Literal["gigatoken", "tokenizers"]


CACHE_BYTES = 1 << 28
"""Growth of the process at which a `gigatoken` tokenizer is replaced: it keeps every distinct word it has met."""
CHECKED_CHARACTERS = 1 << 12
"""How far into a document the two encoders are compared."""
PROBES = (
    "我们在北京学习中文，天气很好。 日本語のテキスト、カタカナ",
    "ภาษาไทยไม่มีช่องว่าง ระหว่างคำ\u200bมรดก",
    "مرحبا بالعالم، كيف حالك؟ السَّلَامُ عَلَيْكُم",
    "नमस्ते दुनिया, क्षत्रिय। தமிழ் 한국어",
    "def f(x):\n\treturn x**2  # hi\n\n\n    if x:\r\n        pass\n",
    "🙂👩\u200d👩\u200d👧\u200d👦🇫🇷 ✊🏽",
    "  a   b \n\n  c\t\t d\u00a0\u3000e   ",
    "I'M don't WE'LL she's 12345678 3.14 1,000 ½ ① Ⅷ",
    "Cafe\u0301 ﬁ İstanbul ǅ I'ſ a\u2028b\ufeff",
    "control \x00\x04\x1b\x7f\x85 signs",
)
"""Texts on which the two encoders are compared besides a run's own: scripts, white space, digits, signs."""


def load_encoder(name: EncoderName, folder: Path, *, parallel: bool = False) -> Encoder:
    """Return the encoder of the tokenizer in ``folder``; no text yields a special token.

    Raises:
        Unsupported: `gigatoken` doesn't know a part of this tokenizer, or does it otherwise. The encoder raises it
            where it fails.
    """
    if name == "tokenizers":
        return with_tokenizers(folder)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if why_not := inexact(description):
        raise Unsupported(f"gigatoken can't use this tokenizer: {why_not}")
    encode = with_gigatoken(description, parallel)
    spelled = [f"a{token['content']}b {token['content']}" for token in description["added_tokens"]]
    if fault := find_fault(pa.array([*PROBES, *spelled]), encode, with_tokenizers(folder)):
        raise Unsupported(fault)
    return encode


def inexact(description: Mapping[str, Any]) -> str:
    """Return what of a tokenizer `gigatoken` does otherwise than `tokenizers`, on texts that are rare; often nothing.

    Its NFC knows other characters, and it reads added tokens out of a text only if they are given to it, the special
    ones too.
    """
    if description.get("normalizer"):
        return f"it normalises texts ({description['normalizer'].get('type')})"
    if more := [token["content"] for token in description["added_tokens"] if not token["special"]]:
        return f"it has added tokens that a text may yield ({', '.join(more[:3])})"
    return ""


@lru_cache(maxsize=4)
def kept_encoder(name: EncoderName, folder: Path, parallel: bool, tokenizer_sha256: str) -> Encoder:
    """`load_encoder`, once a process: loading takes as long as encoding several megabytes."""
    return load_encoder(name, folder, parallel=parallel)


class Unsupported(Exception):
    """A tokenizer or text that `gigatoken` can't use."""


def with_gigatoken(description: Mapping[str, Any], parallel: bool) -> Encoder:
    """Return the encoder of the tokenizer that a ``tokenizer.json`` describes."""
    import awkward  # half a second, which plans and most stages need not wait for

    # Without its added tokens: else "<|endoftext|>" written in a text would become the special token.
    tokenizer = Renewed(json.dumps({**description, "added_tokens": []}, allow_nan=False))

    def encode(texts: pa.Array) -> Encoded:
        if not len(texts):
            return empty()
        try:
            layout = awkward.to_layout(tokenizer.get().encode_batch(in_place(texts), parallel=parallel))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of its Rust code is no Exception
            raise Unsupported(f"gigatoken failed: {first_line(error)}") from error
        offsets = np.asarray(layout.offsets.data).astype(np.int64)
        return offsets - offsets[0], np.asarray(layout.content.data)[offsets[0] : offsets[-1]]

    return encode


class Renewed:
    """A `gigatoken` tokenizer, loaded anew whenever the process has grown by `CACHE_BYTES`.

    Its cache of words is what makes it fast and has no bound: 580 MB of random words took 6 GB.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._process = psutil.Process()
        self._load()

    def _load(self) -> None:
        import gigatoken

        try:
            self._tokenizer: Any = gigatoken.Tokenizer.from_json(self._description)
        except (RuntimeError, ValueError) as error:
            raise Unsupported(f"gigatoken can't use this tokenizer: {first_line(error)}") from error
        self._least = self._process.memory_info().rss

    def get(self) -> Any:
        now = self._process.memory_info().rss
        self._least = min(self._least, now)
        if now - self._least > CACHE_BYTES:
            self._load()
        return self._tokenizer


def in_place(texts: pa.Array) -> awkward.Array:
    """Arrow's strings as awkward's, sharing the buffers. (`awkward.from_arrow` makes them nullable at times,
    which `gigatoken` refuses.)
    """
    import awkward

    _, offsets, data = texts.buffers()
    characters = np.frombuffer(data or b"", np.uint8)
    starts = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    contents = awkward.contents
    return awkward.Array(
        contents.ListOffsetArray(
            awkward.index.Index64(starts.astype(np.int64)),
            contents.NumpyArray(characters, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
    )


def with_tokenizers(folder: Path) -> Encoder:
    tokenizer = load_tokenizer(folder)

    def encode(texts: pa.Array) -> Encoded:
        if not len(texts):
            return empty()
        ids = [np.array(one.ids, np.uint32) for one in tokenizer.encode_batch_fast(texts.to_pylist())]
        return np.cumsum([0, *map(len, ids)], dtype=np.int64), np.concatenate(ids)

    return encode


def empty() -> Encoded:
    return np.zeros(1, np.int64), np.zeros(0, np.uint32)


def append_to_each(encoded: Encoded, token: int) -> Encoded:
    """Every document with ``token`` after its last."""
    offsets, ids = encoded
    return offsets + np.arange(len(offsets)), np.insert(ids, offsets[1:], token)


def find_fault(texts: pa.Array, fast: Encoder, slow: Encoder) -> str | None:
    """Return how two encoders differ on the beginnings of ``texts``; None where they give the same ids."""
    if not len(texts):
        return None
    begun = pc.utf8_slice_codeunits(texts, 0, CHECKED_CHARACTERS)
    (offsets, ids), (slow_offsets, slow_ids) = fast(begun), slow(begun)
    if np.array_equal(offsets, slow_offsets) and np.array_equal(ids, slow_ids):
        return None
    return "gigatoken gave other ids than tokenizers"
