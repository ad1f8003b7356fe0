from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.clean.masking import Masking

ALL = Masking()


def mask(text: str, rules: Masking = ALL) -> tuple[str, dict[str, int]]:
    """The text with all kinds masked, and how many of each there were."""
    counts = {}
    for kind in rules.kinds():
        text, counts[kind] = rules.mask(kind, text)
    return text, counts


MASKS = {"email": "<EMAIL>", "ip": "<IP_ADDRESS>", "phone": "<PHONE_NUMBER>"}


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("email", "jane.doe+lists@mail.example.co.uk"),
        ("email", "a@b.io"),
        ("email", "x_1%y-z@sub-domain.example.museum"),
        ("ip", "8.8.8.8"),
        ("ip", "203.0.114.255"),
        ("ip", "2001:4860:4860::8888"),
        ("ip", "2606:4700:4700:0:0:0:0:1111"),
        ("phone", "+49 30 901820"),
        ("phone", "+1 (212) 555-0187"),
        ("phone", "+442079460958"),
        ("phone", "+33 1 23 45 67 89"),
        ("phone", "(212) 555-0187"),
        ("phone", "212-555-0187"),
        ("phone", "1-800-555-0199"),
        ("phone", "01 23 45 67 89"),
        ("phone", "020 7946 0958"),
        ("phone", "(0161) 496 0123"),
    ],
)
@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "Write to {}.",
        "({}), or",
        "see: <{}>\n",
        "“{}”",
        "é {}, and",
        "请联系{}谢谢。",
        "地址：{}，",
        "連絡先は{}まで",
        "ติดต่อ{}ได้",
        "пишите на{}или",
        "café{}é",
        "اتصل{}الآن",
        "संपर्क{}करें",
        "전화는{}입니다",
        "👉{}👈",
        "_{}_ and **{}**",
        "contact:{}:",
        "contact={};",
        "Bob,{},",
        "...{}...",
    ],
)
def test_what_is_personal_is_masked_and_nothing_beside_it(kind: str, found: str, around: str) -> None:
    text = around.replace("{}", found)
    masked, counts = mask(text)
    assert masked == around.replace("{}", MASKS[kind])
    assert counts == {one: around.count("{}") * (one == kind) for one in MASKS}
    assert ALL.candidates(kind, pa.array([text])).tolist() == [0]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("8.8.8.8:53", "<IP_ADDRESS>:53"),
        ("http://52.12.34.56:8080/x", "http://<IP_ADDRESS>:8080/x"),
        ("IP:8.8.8.8/24", "IP:<IP_ADDRESS>/24"),
        ("::ffff:8.8.8.8", "::ffff:<IP_ADDRESS>"),
        ("https://[2001:4860:4860::8888]:443/", "https://[<IP_ADDRESS>]:443/"),
        ("[IPv6:2001:4860::1]", "[IPv6:<IP_ADDRESS>]"),
        ("2606:4700::1111: up", "<IP_ADDRESS>: up"),
        ("８.８．８.８", "<IP_ADDRESS>"),
        ("mailto:a@example.com?subject=x", "mailto:<EMAIL>?subject=x"),
        ("...a@example.com, -b@example.com, %20c@example.com", "...<EMAIL>, -<EMAIL>, %<EMAIL>"),
        ("sip:+4930901820@example.com", "sip:<EMAIL>"),
        ("bob＠example．com", "<EMAIL>"),
        (
            "josé@example.com, иван@пример.com, b@müller.de, c@d.xn--p1ai",
            "<EMAIL>, <EMAIL>, <EMAIL>, <EMAIL>",
        ),
        ("tel:+4930901820;ext=1", "tel:<PHONE_NUMBER>;ext=1"),
        ("https://example.com/send?phone=+4930901820&x", "https://example.com/send?phone=<PHONE_NUMBER>&x"),
        ("phone=%2B4930901820&x", "phone=%2B<PHONE_NUMBER>&x"),
        ("sms://+49-30-901820", "sms://<PHONE_NUMBER>"),
        ("tel:212-555-0187 Tel.:020 7946 0958", "tel:<PHONE_NUMBER> Tel.:<PHONE_NUMBER>"),
        ('{"phone": "13800138000"}', '{"phone": "<PHONE_NUMBER>"}'),
        ("手机13800138000，电话号码是：13800138000。", "手机<PHONE_NUMBER>，电话号码是：<PHONE_NUMBER>。"),
        ("+٩٦٦ ٥٠ ١٢٣ ٤٥٦٧", "<PHONE_NUMBER>"),
        (
            "電話０３－１２３４－５６７８、ＴＥＬ：０３１２３４５６７８",
            "電話<PHONE_NUMBER>、ＴＥＬ：<PHONE_NUMBER>",
        ),
        (
            "01\u202f23\u202f45\u202f67\u202f89 and 212\u2011555\u20110187",
            "<PHONE_NUMBER> and <PHONE_NUMBER>",
        ),
    ],
)
def test_ports_schemes_labels_and_other_digits_hide_nothing(text: str, masked: str) -> None:
    assert mask(text)[0] == masked
    assert any(ALL.candidates(kind, pa.array([text])).tolist() == [0] for kind in MASKS)


@pytest.mark.parametrize(
    "text",
    [
        "user@host",  # no domain
        "@decorator.name and a@b",
        "name@example..com",
        "127.0.0.1, 10.1.2.3, 192.168.0.1, 169.254.1.1, 224.0.0.1, 0.0.0.0",
        "fe80::1 ::1 :: 2001:db8::1 fd00::7",
        "999.1.1.1 and 1.2.3.4.5 and version 1.2.3",
        "std::vector a::b cafe::x 12:30:45 10:15",
        "::8888 of a scope",
        "2024-01-15 10:30:00, 1999-2004, 15/03/2021",
        "12345678901234567890",
        "2125550187",
        "3.14159265358979 +1234567",
        "100 200 3000, 1 000 000 000",
        "+35236450.6 +000000120 +4294967296 +10011010010",
        "384 768 1536, 01 01 00 00 00 00 02",
        "112-555-0187",  # area codes begin with 2 to 9
        "ISBN 978-3-16-148410-0",
        "£1,234,567.89 0.123456789",
        "x = 0x7f and +5 -3",
        "10.1000/182 doi:10.1000/212-555-0187",
        "fd00:2001:4860::8888 x8.8.8.8 8.8.8.8x v_8.8.8.8",
        "EXIF 2024:01:15 10:30:00",
        "iphone 20201231, mobile 20201231, phone=1234567, xtel:12345678x",
        "٢٠٢٤-٠١-١٥ １２３４５６７８９０",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert mask(text) == (text, dict.fromkeys(MASKS, 0))


def test_each_kind_is_switched_off_alone_and_its_placeholder_is_the_recipes() -> None:
    text = "a@example.com 8.8.4.4 +49 30 901820"
    assert mask(text, Masking(email=None))[0] == "a@example.com <IP_ADDRESS> <PHONE_NUMBER>"
    assert mask(text, Masking(ip=None, phone=None, email="[mail]")) == (
        "[mail] 8.8.4.4 +49 30 901820",
        {"email": 1},
    )


@pytest.mark.parametrize("placeholder", ["", " x", "x\n", "a\0b"])
def test_a_placeholder_that_would_leave_a_text_empty_or_not_normal_is_refused(placeholder: str) -> None:
    with pytest.raises(ValidationError, match=r"email\n.*a placeholder can't be empty"):
        Masking(email=placeholder)


PIECES = [
    "a@b.com",
    "8.8.8.8",
    "2001:4860::1",
    "+49 30 901820",
    "212-555-0187",
    "01.23.45.67.89",
    "電話は1380013",
    "tel:",
    "８",
    "．",
    "\u00a0",
    "\u2011",
    " ",
    "é",
    "1",
    ".",
]


@given(st.lists(st.sampled_from([*PIECES, "-", "(020) 7946 0958", "\n", "@", ":"]), max_size=12).map("".join))
@settings(deadline=None)
def test_no_text_with_something_to_mask_is_passed_over(text: str) -> None:
    for kind in Masking().kinds():
        masked, count = Masking().mask(kind, text)
        assert (masked != text) == (count > 0)
        assert count == 0 or Masking().candidates(kind, pa.array([text])).tolist() == [0]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("part", ["1", " 11", "a", "a.", "a-", "1.", "2001:", "(020)", "a@", "+", " 1 11"])
def test_no_text_takes_long(part: str) -> None:
    """Patterns that try every way to read a text would take years over these."""
    for start in ("+49", "a@b.", "8.8.8.", "x", "2001:", "0"):
        mask(start + part * 20_000 + "!")
