"""Pages whose main text is known: made-up articles in nine languages, each in seven layouts with what stands around it.

The words are drawn from short lists by a seed, so that pages are the same everywhere; the layouts are those that the
web has had: tables of the nineties, blogs, news with teasers, documentation with code, forums, single-page frameworks.
"""

from __future__ import annotations

import html
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPACED, WHOLE = " ", ""


@dataclass(frozen=True)
class Language:
    """Words to draw from, what stands between them, and what ends a sentence."""

    code: str
    words: str
    menu: str
    space: str = SPACED
    stop: str = ". "


LANGUAGES = (
    Language("en", "river stone the a light of market over garden when letters found evening slowly captain wrote and "
                   "harbour bread under window teacher about engine silver", "Home News Contact Login Privacy About"),
    Language("de", "Fluss Stein der das Licht von Markt über Garten wenn Briefe fand Abend langsam Kapitän schrieb und "
                   "Hafen Brot unter Fenster Lehrer Straße größer", "Startseite Nachrichten Kontakt Datenschutz"),
    Language("ru", "река камень и свет рынок над садом когда письма нашёл вечер медленно капитан писал гавань хлеб под "
                   "окном учитель о двигателе серебро", "Главная Новости Контакты Войти О_нас"),
    Language("el", "ποτάμι πέτρα το φως της αγοράς πάνω από κήπο όταν γράμματα βρήκε βράδυ αργά καπετάνιος έγραψε και "
                   "λιμάνι ψωμί κάτω παράθυρο", "Αρχική Νέα Επικοινωνία Σύνδεση"),
    Language("ar", "نهر حجر الضوء من السوق فوق الحديقة عندما وجد الرسائل مساء ببطء القبطان كتب و الميناء خبز "
                   "تحت النافذة المعلم عن المحرك", "الرئيسية أخبار اتصل دخول الخصوصية"),
    Language("hi", "नदी पत्थर और प्रकाश बाज़ार ऊपर बगीचा जब पत्र मिला शाम धीरे कप्तान ने लिखा बंदरगाह "
                   "रोटी नीचे खिड़की शिक्षक", "मुख्य समाचार संपर्क लॉगिन", stop="। "),
    Language(code="zh",
             words="河流 石头 的 光线 市场 花园 上面 当 信件 找到 晚上 慢慢 船长 写道 和 港口 面包 窗户 老师 关于 机器",
             menu="首页 新闻 联系 登录 隐私", space=WHOLE, stop="。"),
    Language(code="ja",
             words="川 石 の 光 市場 庭 上 とき 手紙 を 見つけた 夕方 ゆっくり 船長 は 書いた 港 パン 窓 先生 について",
             menu="ホーム ニュース 連絡先 ログイン", space=WHOLE, stop="。"),
    Language(code="th",
             words="แม่น้ำ หิน และ แสง ตลาด เหนือ สวน เมื่อ จดหมาย พบ เย็น ช้า กัปตัน เขียน ท่าเรือ "
                   "ขนมปัง ใต้ หน้าต่าง ครู", menu="หน้าแรก ข่าว ติดต่อ", space=WHOLE, stop=" "),
)  # fmt: skip


@dataclass(frozen=True)
class Page:
    """A page with its main text."""

    name: str
    source: str
    text: str


class Writer:
    """Draws text of one language."""

    def __init__(self, language: Language, seed: int) -> None:
        self.language, self._draw = language, random.Random(f"{language.code} {seed}")
        self._words = language.words.split()

    def sentence(self) -> str:
        words = self._draw.choices(self._words, k=self._draw.randint(6, 18))
        return self.language.space.join(words).capitalize()

    def paragraph(self, sentences: int = 5) -> str:
        stop = self.language.stop
        return (stop.join(self.sentence() for _ in range(sentences)) + stop).strip()

    def teaser(self) -> str:
        return self.language.space.join(self._draw.choices(self._words, k=5)).capitalize()

    def menu(self) -> list[str]:
        return [word.replace("_", " ") for word in self.language.menu.split()]


def links(texts: list[str]) -> str:
    return "".join(
        f'<li><a href="/{number}">{html.escape(text)}</a></li>' for number, text in enumerate(texts)
    )


def paragraphs(parts: list[str]) -> str:
    return "".join(f"<p>{html.escape(part)}</p>\n" for part in parts)


def article(w: Writer) -> tuple[str, str]:
    """Semantic elements, menus above and below, a sidebar."""
    title, body = w.teaser(), [w.paragraph() for _ in range(6)]
    aside = "".join(f"<p>{w.teaser()}</p>" for _ in range(4))
    page = f"""<header><nav><ul>{links(w.menu())}</ul></nav></header><div id="page"><main><article><h1>{title}</h1>
{paragraphs(body)}</article></main><aside class="sidebar"><h3>{w.teaser()}</h3>{aside}</aside></div>
<footer><ul>{links(w.menu())}</ul><p>© 2024 {w.teaser()}</p></footer>"""
    return page, "\n".join([title, *body])


def blog(w: Writer) -> tuple[str, str]:
    """Names of classes, a quotation, a list, comments."""
    title, body, items = w.teaser(), [w.paragraph(4) for _ in range(4)], [w.sentence() for _ in range(4)]
    quote = w.paragraph(2)
    comments = "".join(
        f'<div class="comment"><b>{w.teaser()}</b><p>{w.sentence()}</p></div>' for _ in range(5)
    )
    entry = f"{paragraphs(body[:2])}<blockquote>{quote}</blockquote><ul>{''.join(f'<li>{i}</li>' for i in items)}</ul>"
    page = f"""<div class="wrap"><div id="menu" class="menu"><ul>{links(w.menu())}</ul></div><div class="content"><div
class="post"><h2 class="post-title">{title}</h2><div class="post-body entry-content">{entry}{paragraphs(body[2:])}</div>
<div class="share">Facebook Twitter</div></div><div id="comments" class="comments">{comments}</div></div>
<div class="sidebar widget-area"><ul>{links([w.teaser() for _ in range(12)])}</ul></div></div>"""
    return page, "\n".join([title, *body[:2], quote, *items, *body[2:]])


def news(w: Writer) -> tuple[str, str]:
    """A cookie banner, teasers of other articles between the paragraphs, scripts and advertisement."""
    title, body = w.teaser(), [w.paragraph(3) for _ in range(8)]
    others = links([w.teaser() for _ in range(6)])
    teasers = f'<div class="related-articles"><h4>{w.teaser()}</h4><ul>{others}</ul></div>'
    page = f"""<div class="cookie-banner" role="dialog"><p>{w.sentence()}</p><button>OK</button></div><div
class="topbar"><ul>{links(w.menu())}</ul></div><script>var data = {{"a": [1, 2, 3]}};</script><div class="layout"><div
class="article-wrapper"><h1 class="headline">{title}</h1><div class="article-body" itemprop="articleBody">
{paragraphs(body[:4])}{teasers}{paragraphs(body[4:])}</div></div><div class="ad-slot">{w.sentence()}</div></div>
<div class="footer">{w.sentence()}</div>"""
    return page, "\n".join([title, *body])


def documentation(w: Writer) -> tuple[str, str]:
    """A tree of pages beside the text, code, a table."""
    title, body = w.teaser(), [w.paragraph(2) for _ in range(5)]
    code = "def main(argument):\n    return [argument, 1]"
    rows = [[w.teaser(), w.teaser()] for _ in range(4)]
    cells = "".join(f"<tr><td>{one}</td><td>{other}</td></tr>" for one, other in rows)
    page = f"""<div class="wy-grid"><nav class="wy-nav-side"><ul>{links([w.teaser() for _ in range(25)])}</ul></nav>
<section class="content-wrap"><div role="main" class="document"><section><h1>{title}</h1>{paragraphs(body[:3])}<div
class="highlight"><pre>{code}</pre></div>{paragraphs(body[3:])}<table>{cells}</table></section></div>
<footer><a href="/n">{w.menu()[0]}</a></footer></section></div>"""
    return page, "\n".join([title, *body[:3], code, *body[3:], *(cell for row in rows for cell in row)])


def tables(w: Writer) -> tuple[str, str]:
    """A layout of tables, without a paragraph."""
    title, body = w.teaser(), [w.paragraph(4) for _ in range(5)]
    page = f"""<table width="100%"><tr><td colspan="2"><center>{" | ".join(f'<a href="/{m}">{m}</a>' for m in w.menu())}
</center></td></tr><tr><td width="150">{"<br>".join(f'<a href="/">{w.teaser()}</a>' for _ in range(8))}</td><td><font
face="Arial"><b>{title}</b><br><br>{"<br><br>".join(body)}</font></td></tr></table>"""
    return page, "\n".join([title, *body])


def forum(w: Writer) -> tuple[str, str]:
    """Posts with their authors beside them: all posts are the main text."""
    title, posts = w.teaser(), [w.paragraph(3) for _ in range(7)]
    made = "".join(f'<div class="post"><div class="author">user{n}</div><div class="message">{post}</div></div>'
                   for n, post in enumerate(posts))  # fmt: skip
    page = f"""<div class="navbar"><ul>{links(w.menu())}</ul></div><div class="container"><h1>{title}</h1><div
class="thread">{made}</div></div><div class="footer"><ul>{links(w.menu())}</ul></div>"""
    return page, "\n".join([title, *posts])


def nested(w: Writer) -> tuple[str, str]:
    """Nameless divisions in divisions, as frameworks make them."""
    title, body = w.teaser(), [w.paragraph() for _ in range(5)]
    inner = "".join(f'<div class="css-1a{n}"><span>{part}</span></div>' for n, part in enumerate(body))
    menu = "".join(f'<a class="css-x" href="/{word}">{word}</a>' for word in w.menu())
    page = f"""<div id="root"><div><div><div>{menu}</div><div>
<div><div><h1>{title}</h1></div><div>{inner}</div></div></div><div><div>{w.teaser()}</div></div></div></div></div>"""
    return page, "\n".join([title, *body])


LAYOUTS: tuple[Callable[[Writer], tuple[str, str]], ...] = (
    article,
    blog,
    news,
    documentation,
    tables,
    forum,
    nested,
)


def pages(of_each: int, noise: int = 0) -> Iterator[Page]:
    """Make ``of_each`` pages of every language in every layout; ``noise`` bytes of script and style stand in each."""
    filler = f"<style>{'.a{color:red}' * (noise // 26)}</style><script>{'var a=1;' * (noise // 16)}</script>"
    for language in LANGUAGES:
        for layout in LAYOUTS:
            for number in range(of_each):
                body, text = layout(Writer(language, number))
                head = f'<meta charset="utf-8"><title>{language.code} {number}</title>{filler}'
                source = f'<!DOCTYPE html><html lang="{language.code}"><head>{head}</head><body>{body}</body></html>'
                yield Page(f"{language.code}/{layout.__name__}/{number}", source, text)
