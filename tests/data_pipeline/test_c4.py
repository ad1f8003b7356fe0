"""C4's rules by hand, and the kernel against plain Python."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_words import cut_words

from data_pipeline.clean.c4 import LINE_REASONS, POLICIES, C4Rules
from data_pipeline.clean.stage import CleanConfig, clean_batch
from data_pipeline.documents import SCHEMA

OFF = {name: None if field.annotation is not bool else False for name, field in C4Rules.model_fields.items()}


def c4(**rules: object) -> C4Rules:
    """Some rules on, all others off."""
    return C4Rules.model_validate(OFF | rules)


def cleaned(rules: C4Rules, text: str) -> tuple[str, str, dict[str, int]]:
    """The verdict on a document, its text after the rules, and what was counted."""
    batch = pa.RecordBatch.from_pylist([{"id": "1", "text": text, "source": "s", "meta": "{}"}], SCHEMA)
    done = clean_batch(CleanConfig(gopher=None, c4=rules).resolve(), batch)
    return done.verdicts.reason(0), done.texts[0].as_py(), done.counts


@pytest.mark.parametrize(
    ("rule", "value", "text", "left"),
    [
        (
            "terminal_mark",
            True,
            'One.\nTwo\nThree?\nFour!\n"Five"\n“Six”\nSeven...\nEight,',
            'One.\nThree?\nFour!\n"Five"\n“Six”',
        ),
        ("terminal_mark", True, "Indented.\n  So\n  too. \nend.", "Indented.\n  too.\nend."),
        (
            "min_words_per_line",
            3,
            "one two three\none two\nfour  five\tsix",
            "one two three\nfour  five\tsix",
        ),
        ("max_word_length", 3, "abc d\nabcd e\nééé", "abc d\nééé"),
        ("javascript", True, "Please enable JavaScript.\nfine\njava script", "fine\njava script"),
        ("policy", True, "Read our Privacy Policy now\nwe USE COOKIES\nuse  cookies\nok", "use  cookies\nok"),
        (
            "remove_citations",
            True,
            "As shown[1][23], [edit]and [citation needed][] [a]",
            "As shown, and  [a]",
        ),
    ],
)
def test_each_rule_on_lines_removes_what_it_names_alone(
    rule: str, value: object, text: str, left: str
) -> None:
    assert cleaned(c4(**{rule: value}), text)[:2] == ("kept", left)
    assert cleaned(c4(), text)[:2] == ("kept", text)


@pytest.mark.parametrize(
    ("rule", "value", "kept", "dropped"),
    [
        ("lorem_ipsum", True, "Lorem dolor", "The Lorem Ipsum dolor"),
        ("curly_brackets", True, "f(x) [y]", "body {"),
        ("curly_brackets", True, "f(x) [y]", "} end"),
        ("min_sentences", 3, "One. Two! Three", "One. Two!"),
        ("min_sentences", 2, 'He said "no." She left.', "version 1.5 of e.g.this"),
        ("min_sentences", 2, "一二。三四。", "一二。"),
        ("min_sentences", 2, "a heading\nand a line", "... !! one ?"),
    ],
)
def test_each_rule_on_documents_keeps_what_is_at_its_limit(
    rule: str, value: object, kept: str, dropped: str
) -> None:
    assert cleaned(c4(**{rule: value}), kept)[0] == "kept"
    assert cleaned(c4(**{rule: value}), dropped)[0] == f"c4_{rule}"
    assert cleaned(c4(), dropped)[0] == "kept"


def test_paragraphs_stay_apart_and_removed_lines_are_counted() -> None:
    text = "Menu\n\n\nThe first paragraph is here.\nShare\nIt has two lines.\n"
    text += " \nHome\n\nThe second paragraph is this.\n\nFoot"
    verdict, left, counts = cleaned(C4Rules(min_words_per_line=4), text)
    assert verdict == "kept"
    assert left == "The first paragraph is here.\nIt has two lines.\n\nThe second paragraph is this."
    assert counts == {"lines_removed/no_terminal_mark": 4}


def test_a_document_of_which_no_line_is_left_is_dropped() -> None:
    assert cleaned(c4(terminal_mark=True), "Menu\nHome")[0] == "c4_no_terminal_mark"


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ({"min_words_per_line": 5}, "One two.\nThree four.", "few_words"),
        ({"max_word_length": 3}, "abcd\nefgh", "long_word"),
        ({"javascript": True}, "Enable JavaScript.", "javascript"),
        ({"policy": True}, "Our privacy policy", "policy"),
        ({"remove_citations": True}, "[1] [edit]", "citations"),
        ({"terminal_mark": True, "min_words_per_line": 2}, "a b\nc d\ne.", "no_terminal_mark"),
    ],
)
def test_the_reason_of_a_document_that_is_gone_is_the_rule_that_took_most_of_it(
    rules: dict[str, object], text: str, reason: str
) -> None:
    assert cleaned(c4(**rules), text)[0] == f"c4_{reason}"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("他去了。她「来了！」我们走吧？", 3),
        ("هل ذهبت؟ نعم. حسنا۔", 3),
        ("वह गया। वह आई॥ कौन है?", 3),
        ("ខ្ញុំទៅ។ គាត់មក។", 2),
        ("သူသွားသည်။ သူလာသည်။", 2),
        ("ང་འགྲོ། ཁོང་ཡོང་།", 2),
        ("Նա եկավ։ Գնաց։", 2),
        ("እሱ ሄደ። እሷ መጣች።", 2),
        ("เขาไปแล้ว เธอมาแล้ว เราไปกัน", 3),
        ("ລາວໄປແລ້ວ ເຮົາມາແລ້ວ", 2),
    ],
)
def test_sentences_end_as_they_do_in_each_script(text: str, sentences: int) -> None:
    for least, reason in ((sentences, "kept"), (sentences + 1, "c4_min_sentences")):
        assert cleaned(c4(min_sentences=least, terminal_mark=True), text) == (reason, text, {})


def reference(rules: C4Rules, text: str) -> tuple[str, list[int]]:
    """The text without the lines that go, and how many went for each reason."""
    counts = [0] * len(LINE_REASONS)
    left: list[str] = []
    for line in text.split("\n"):
        reason = reference_reason(rules, line.strip()) if line.strip() else None
        if reason:
            counts[LINE_REASONS.index(reason)] += 1
        else:
            left.append(line.rstrip())
    if not any(counts):
        return text, counts
    return re.sub(r"\n{3,}", "\n\n", "\n".join(left)).strip(), counts


def reference_reason(rules: C4Rules, line: str) -> str | None:
    words = cut_words(line)
    if rules.max_word_length is not None and max(map(len, words)) > rules.max_word_length:
        return "long_word"
    if rules.terminal_mark and (
        not line.endswith((".", "?", "!", '"', "”", "。", "ย", "؟")) or line.endswith("...")
    ):
        return "no_terminal_mark"
    if rules.min_words_per_line and len(words) < rules.min_words_per_line:
        return "few_words"
    if rules.javascript and "javascript" in line.lower():
        return "javascript"
    return "policy" if rules.policy and any(one in line.lower() for one in POLICIES) else None


PIECES = [
    "a ",
    "word. ",
    "Use Cookies",
    "JAVAscript",
    "privacy policy",
    "...",
    "!",
    "?",
    "”",
    "\n",
    "\n\n",
    "\n \n",
]
TEXTS = st.lists(
    st.sampled_from([*PIECES, "\u2003", "é", "日本。", "日本語です", "ไทย", "؟", "x1", "👍 ", ".\n"]),
    max_size=30,
).map("".join)


@given(
    st.lists(TEXTS, max_size=5),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 2, 3]), st.sampled_from([None, 6]),
)  # fmt: skip
@settings(deadline=None, max_examples=300)
def test_the_kernel_removes_lines_as_plain_python_does(
    texts: list[str], mark: bool, javascript: bool, policy: bool, words: int | None, length: int | None
) -> None:
    rules = c4(
        terminal_mark=mark,
        javascript=javascript,
        policy=policy,
        min_words_per_line=words,
        max_word_length=length,
    )
    normal = [text.strip() for text in texts]
    found, counts, _ = rules.remove_lines(pa.array(["outside", *normal], pa.string()).slice(1))
    assert [*zip(found.to_pylist(), counts[:, :-1].tolist(), strict=True)] == [
        reference(rules, one) for one in normal
    ]
