"""Words that stand in nearly every text of a language, and how many different ones of a language a text has.

Of a script that is written without spaces a letter with its marks is a word (`data_pipeline.core.words`), so what
stands here for Chinese, Japanese, Thai and their like are the letters of their commonest words. Left out are words that
are English ones, too (Dutch ``in`` and ``is``), and single Latin letters: code and lists of English words have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.core.kernels import MULTIPLIER, code_point, kernel
from data_pipeline.core.words import IGNORED, character_classes, lower_case, next_word, words_of
from data_pipeline.documents import buffers

STOP_WORDS: dict[str, str] = {
    "en": "the be to of and that have with",  # Gopher's own
    "af": "die van en het dat vir",
    "am": "ነው እና ላይ ውስጥ ነበር ይህ ወደ ግን",
    "ar": "في من على إلى أن التي هذا عن ما كان لا مع و الذي هذه كل",
    "az": "və bu bir ilə üçün da olan",
    "be": "і не на што з як у да",
    "bg": "и на да се от за не в е с",
    "bn": "এবং এই থেকে করে ও একটি না যে হয় জন্য তার আর",
    "bo": "ནི གི གྱི ཀྱི ལ དང ན ས པའི",
    "ca": "de la el que en els per amb és",
    "cs": "se na je že jako",
    "cy": "yn yr ar mae",
    "da": "og det er en til på af med ikke der",
    "de": "der die und den von zu das mit sich ist nicht ein",
    "el": "και το της να του η με για που από είναι ο",
    "es": "de la que el en los se las por con una",
    "et": "ja ei et see oli kui",
    "eu": "eta da ez bat du ere izan",
    "fa": "و در به از که این را با است برای آن",
    "fi": "ja ei se että oli hän mutta kun myös",
    "fr": "de la le et les des en un du une que est pour dans",
    "ga": "na agus ar go le",
    "gl": "de que da en os con un",
    "gu": "છે અને આ એક માટે તે પણ કે ના",
    "ha": "da na ya ta wani cikin",
    "he": "של את על לא זה עם הוא כי גם היא אל או",
    "hi": "के में है की से और का को पर यह ने एक हैं कि नहीं",
    "hr": "je se na da su za od",
    "hu": "az és hogy nem egy meg volt de",
    "hy": "և է են որ այս մեջ էր համար",
    "id": "yang dan di dengan untuk ini itu dari dalam tidak ke pada",
    "is": "og að í er sem á til en",
    "it": "di che la il un per non è una con",
    "ja": "の に は を た が で と し て も れ",
    "ka": "და არის რომ ეს იყო არ მის",
    "kk": "және бұл үшін мен бір деп да де",
    "km": "និ ជា មា បា នេះ នៃ ដែ ពី ក្ នៅ ន",
    "kn": "ಮತ್ತು ಈ ಒಂದು ಆ ಅವರು ಎಂದು ಇದು",
    "ko": "이 그 수 있는 있다 및 등 한 것 것이다 를 은 는 에서 하는 그리고 위해 했다 대한 있습니다 합니다 때 더",
    "lo": "ທີ່ ມີ ນີ້ ບໍ່ ກໍ່ ແ ໄ ຢູ່ ຂ ນ",
    "lt": "ir yra kad su į tai buvo iš",
    "lv": "un ir ar tas uz",
    "mk": "и на во се да од за не",
    "ml": "ഒരു ഈ ആ എന്ന ഇത് എന്നാൽ",
    "mn": "нь энэ бол юм байна ба",
    "mr": "आहे आणि या हे ते व की तो एक",
    "ms": "yang dan di untuk ini dengan itu dari",
    "my": "တွ က မှာ များ သ ည် ကို နှ တ ရ ပါ",
    "ne": "र छ को मा यो पनि हो भने",
    "nl": "de van het een en dat op te zijn niet",
    "no": "og det er en til på som av med ikke",
    "pa": "ਦੇ ਹੈ ਅਤੇ ਨੂੰ ਦੀ ਵਿੱਚ ਦਾ ਇਹ",
    "pl": "na nie się że jest jak",
    "pt": "de que da em um para com não uma os",
    "ro": "de și în la că cu pe nu este din",
    "ru": "и в не на что с он как это по но из у к за",
    "si": "සහ මේ ඒ බව ද වන හා",
    "sk": "sa na je že",
    "sl": "je da se na za ki pa",
    "so": "iyo ah waa oo ku",
    "sq": "të në dhe që një për",
    "sr": "и је у да се на су за od je da se na su za",
    "sv": "och att det som en på är av för med inte",
    "sw": "ya na wa kwa ni katika la za kuwa",
    "ta": "மற்றும் இந்த ஒரு என்று அது என இது",
    "te": "మరియు ఈ ఒక ఆ కూడా అని",
    "tg": "ва дар ки аз ба ин",
    "th": "ที่ ก ม่ มี ร นี้ ด้ ป็ ล ว",
    "tl": "ang ng sa na mga ay ni",
    "tr": "ve bir bu da için de ile çok olarak daha",
    "uk": "і в не на що з як це до та у",
    "ur": "کے میں ہے کی اور سے کا کو یہ نے",
    "uz": "va bu bilan uchun bir ham deb",
    "vi": "và của là có không được các một cho trong những người",
    "zh": "的 是 在 了 不 一 和 有 我 他 这 這 為 为 也 人",
}
"""Stop words by ISO 639 code, with spaces between."""


@dataclass(frozen=True)
class StopWords:
    """Words of some languages in a hash table."""

    keys: NDArray[np.uint64]
    """Hashes of the words; 0 where a slot is free."""
    owners: NDArray[np.bool_]
    """Whose each word is, shape (slots, languages)."""

    def most(self, texts: pa.Array, enough: int) -> NDArray[np.int64]:
        """Count the different words of the one language that has most of them in each text, up to ``enough``."""
        data, offsets = buffers(texts)
        found = np.zeros(len(texts), np.int64)
        count_most(data, offsets, character_classes(), lower_case(), self.keys, self.owners, enough, found)
        return found


def word_table(lists: Mapping[str, tuple[str, ...]]) -> StopWords:
    """Return the table of the words of each list."""
    words = sorted({word for words in lists.values() for word in words})
    size = 1 << (4 * len(words)).bit_length()
    keys, owners = np.zeros(size, np.uint64), np.zeros((size, len(lists)), np.bool_)
    data, offsets = buffers(pa.array(words, pa.string()))
    hashes = np.zeros(len(words), np.uint64)
    hash_each(data, offsets, lower_case(), character_classes(), hashes)
    for word, key in zip(words, hashes.tolist(), strict=True):
        slot = key & (size - 1)
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & (size - 1)
        keys[slot] = key
        owners[slot] |= [word in mine for mine in lists.values()]
    return StopWords(keys, owners)


@cache
def of_languages(codes: tuple[str, ...]) -> StopWords:
    return word_table({code: tuple(words_of(STOP_WORDS[code])) for code in codes})


@cache
def of_list(words: tuple[str, ...]) -> StopWords:
    return word_table({"": tuple(one for word in words for one in words_of(word))})


@kernel
def hash_word(
    data: NDArray[np.uint8], begin: int, end: int, lower: NDArray[np.uint32], classes: NDArray[np.uint8]
) -> np.uint64:
    """Return a hash of a word in any case and without format characters; never 0."""
    hashed = np.uint64(1)
    at = begin
    while at < end:
        code, length = code_point(data, at)
        if code >= len(classes) or classes[code] != IGNORED:
            hashed = (hashed ^ np.uint64(lower[code] + 1 if code < len(lower) else code)) * MULTIPLIER
            hashed ^= hashed >> np.uint64(32)
        at += length
    return max(hashed, np.uint64(1))


@kernel
def hash_each(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    lower: NDArray[np.uint32],
    classes: NDArray[np.uint8],
    hashes: NDArray[np.uint64],
) -> None:
    for row in range(len(offsets) - 1):
        hashes[row] = hash_word(data, offsets[row], offsets[row + 1], lower, classes)


@kernel
def count_most(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    classes: NDArray[np.uint8],
    lower: NDArray[np.uint32],
    keys: NDArray[np.uint64],
    owners: NDArray[np.bool_],
    enough: int,
    found: NDArray[np.int64],
) -> None:
    """Fill ``found``; see `StopWords.most`."""
    mask = np.uint64(len(keys) - 1)
    seen = np.full(len(keys), -1, np.int64)  # the last row that had the word
    counts = np.zeros(owners.shape[1], np.int64)
    for row in range(len(offsets) - 1):
        counts[:] = 0
        at, end = offsets[row], offsets[row + 1]
        while at < end and found[row] < enough:
            begin, at = next_word(data, at, end, classes)
            if begin == at:
                break
            key = hash_word(data, begin, at, lower, classes)
            slot = key & mask
            while keys[slot] and keys[slot] != key:
                slot = (slot + np.uint64(1)) & mask
            if keys[slot] and seen[slot] != row:
                seen[slot] = row
                for language in range(len(counts)):
                    counts[language] += owners[slot, language]
                    found[row] = max(found[row], counts[language])
