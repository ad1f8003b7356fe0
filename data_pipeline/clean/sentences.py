"""Where sentences end, by script."""

from __future__ import annotations

ASCII_ENDS = ".?!"
"""End a sentence where white space, or the end of the line, follows."""
OTHER_ENDS = (
    "‼⁇⁈⁉"
    "。！？｡．"  # Chinese, Japanese
    "؟۔؞"  # Arabic, Urdu
    "।॥"  # Hindi, Bengali and others of India
    "።፧፨"  # Amharic
    "။"  # Burmese
    "។៕"  # Khmer
    "།༎༏༐༑"  # Tibetan
    "᠃᠉"  # Mongolian
    "։՜՞"  # Armenian
    "܀܁܂"  # Syriac
    "߹"  # N'Ko
    "꓿꘎꘏꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫"  # Lisu, Vai, Phags-pa, Saurashtra, Kayah Li, Javanese, Cham, Meitei
    "᙮᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿"  # Cree, Limbu, Tai Tham, Balinese, Lepcha, Ol Chiki
)
"""End a sentence wherever they stand."""
UNENDED = ((0x0E01, 0x0EFF),)
"""Scripts that mark no end of a sentence (Thai, Lao): a space, or the end of the line, is one."""
CLOSING_QUOTES = '"”」』»›﹂﹄＂｣'


def unended_letters() -> list[str]:
    """Return the characters of the scripts that mark no end of a sentence."""
    return [chr(code) for first, last in UNENDED for code in range(first, last + 1)]
