"""Words by the definition, a character at a time and by characters' names: what kernels and tables are held to."""

from __future__ import annotations

import random
import unicodedata

from data_pipeline.core.words import LETTER, OTHER, character_classes
from data_pipeline.core.words import UNSPACED as UNSPACED_LETTER

UNSPACED = ("CJK UNIFIED", "CJK COMPAT", "IDEOGRAPHIC IT", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "THAI", "LAO",
            "KHMER", "MYANMAR", "TIBETAN", "YI ", "BOPOMOFO", "TAI ", "NEW TAI")  # fmt: skip
"""How the names of characters begin whose scripts are written without spaces."""


def plain_words(text: str, *, letters: str = "", joined: bool = False) -> list[tuple[int, str]]:
    """Where each word begins, and its characters, lower-cased, without those that nobody sees."""
    words: list[tuple[int, str]] = []
    word = ""  # what is open: a run of letters, one unspaced letter, or nothing
    for at, character in enumerate(text):
        category, name = unicodedata.category(character), unicodedata.name(character, "")
        lowered = character.lower() if len(character.lower()) == 1 else character
        if category == "Cf" and name != "ZERO WIDTH SPACE":
            continue
        if category[0] == "M" or (
            "KATAKANA" in name and "VOICED SOUND MARK" in name and character > "\uff00"
        ):
            if word:
                words[-1] = (words[-1][0], words[-1][1] + lowered)
        elif category[0] in "LN" or character in letters:
            unspaced = name.startswith(UNSPACED) and category not in ("Nd", "No")
            if word == "run" and not unspaced:
                words[-1] = (words[-1][0], words[-1][1] + lowered)
            else:
                words.append((at, lowered))
            word = "one" if unspaced else "run"
        elif character.isspace() or not joined or character in "–—―":
            word = ""
    return words


def cut_words(text: str) -> list[str]:
    """What stands between white space, cut where an unspaced letter and another letter or digit meet."""
    classes = character_classes()
    words = []
    for token in text.split():
        piece, seen = "", set()
        for character in token:
            kind = int(classes[ord(character)]) if ord(character) < len(classes) else OTHER
            if (
                kind in (LETTER, UNSPACED_LETTER)
                and UNSPACED_LETTER in {kind, *seen}
                and seen & {LETTER, UNSPACED_LETTER}
            ):
                words.append(piece)
                piece, seen = "", set()
            piece += character
            seen.add(kind)
        words.append(piece)
    return words


SYLLABLES = {
    "thai": "กา ที่ นี่ เรา ไป วัด เรือ แมว น้ำ ฝน ลม ภู เขา ปลา ดี มาก บ้าน ใหม่ ต้น ไม้",
    "lao": "ກາ ທີ່ ນີ້ ເຮົາ ໄປ ວັດ ເຮືອ ແມວ ນ້ຳ ຝົນ ລົມ ພູ ປາ ດີ ຫຼາຍ ບ້ານ ໃໝ່ ຕົ້ນ ໄມ້ ຄົນ",
    "khmer": "កា ទី នេះ យើង ទៅ វត្ត ទូក ឆ្មា ទឹក ភ្លៀង ខ្យល់ ភ្នំ ត្រី ល្អ ណាស់ ផ្ទះ ថ្មី ដើម ឈើ មនុស្ស",
    "burmese": "က ဒီ နေ့ ကျွန် တော် သွား ကျောင်း လှေ ကြောင် ရေ မိုး လေ တောင် ငါး ကောင်း အိမ် သစ် ပင် လူ မြို့",
    "tibetan": "ཀ དེ་ འདི་ ང་ འགྲོ་ དགོན་ གྲུ་ བྱི་ ཆུ་ ཆར་ རླུང་ རི་ ཉ་ བཟང་ པོ་ ཁང་ གསར་ ཤིང་ མི་ གྲོང་",
    "chinese": "我 们 去 公 园 散 步 今 天 气 很 好 山 水 风 雨 新 房 子 人",
    "japanese": "わた し は 公 園 へ いき ます 今日 天気 が いい 山 水 カ メ ラ 家 新 人",
    "hindi": "मैं हम घर में जा ते हैं नदी पहा ड़ी हवा वर्षा मछली अच्छा नया पेड़ लोग गाँव बिल्ली नाव",
}
"""Pieces of words, of which texts are made."""


def run_of(script: str, count: int, draw: random.Random) -> list[str]:
    """Pieces at random; where words are parted by spaces, each is a word."""
    pieces = draw.choices(SYLLABLES[script].split(), k=count)
    return [f"{piece} " for piece in pieces] if script == "hindi" else pieces
