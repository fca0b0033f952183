"""lait.py: weakly supervised image-text pairs from web pages, the way ImageBERT's LAIT was collected (section 3, Figure 1).

    HTML files, WARC records --> language --> dominant image (tags, place in the DOM) --> its local file: over 300 px, natural, safe
                                                     |                                          |
                             alt, title, caption, text around --> sentences --> cleaning rules -+-> (image, text) --> score    map
    candidates --sort by image hash--> best text per image --sort by text hash--> texts of few images --> tar shards          reduce

    python lait.py --in PAGES --out SHARDS --vocab vocab.txt --score RUN     all of it in one process, then:
    python train.py --model codis --data SHARDS --vocab vocab.txt

    python lait.py --in CRAWL --out SHARDS --shard 3/64 ...      the map alone, its 4th part of 64 (0 to 63): any engine runs these
    python lait.py --out SHARDS --merge                          the reduce, when all 64 are there

Nothing is fetched: a page's images are files below --images (default: --in), where `wget -x` puts them: http://HOST/a/b.jpg is
HOST/a/b.jpg. A page file's own relative addresses start from its folder. Both passes need the memory of one part (--part documents)
or of one sorted run (--sort_lines), whatever the size of the crawl; both go on where they were stopped, by the same command. Every
document, image, sentence and pair that is dropped is counted under its stage and reason (SHARDS/report.json); the counts must add up.

Shards are img2dataset's: KEY.jpg (the file's own bytes), KEY.txt, KEY.json. Pages and pictures are taken to be hostile: sizes,
nesting and time are bounded, addresses cannot leave --images, compressed data stops at its limit.

Filters are functions, exchangeable from the command line (--natural my_filters.py:function); what the default ones cannot see is
printed with the report. language(text, declared) and natural(PIL image) and safe(PIL image, texts, page) return None or a reason.

Deviations from the paper
  1. The semantic model is one score of any run directory (cosine of encode_image and encode_text, else match), not a classifier on
     "hundreds of features including text-only features, image-content features, and text-image cross-modal features".
  2. The paper names no threshold. Default: the 95th percentile of the scores that the same texts get with other pictures.
  3. Its classifiers of unnatural and of unsafe images are not published. natural() measures flatness, colors and shape; safe() reads
     the page's own label and words in addresses and texts, and does not look at the picture.
  4. "Heuristic rules", "normal length", "high ratio", "too many images" are not quantified there: the defaults of the flags are ours.
  5. Language is told by function words and the declared language; "the same image" means the same bytes.
"""
import argparse
import gzip
import hashlib
import heapq
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tarfile
import threading
import unicodedata
import zlib
from collections import Counter
from contextlib import contextmanager
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
from PIL import Image
from tqdm import tqdm

import data

PAPER_WORDS = 13                        # mean length of LAIT's descriptions (section 3)
SOURCES = ("caption", "alt", "title", "near")       # of texts, the surest first: decides where there is no score
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}     # no other decoder ever runs (EPS starts a program)
PAGE_TYPES, ARCHIVE_TYPES = (".html", ".htm", ".xhtml"), (".warc", ".warc.gz")
MAX_DEPTH = 512                         # open elements of a page
MAX_RECORD = 1 << 30                    # bytes of a WARC record: one that claims more ends its archive


class LaitError(SystemExit):
    """Something the user can put right: printed as one line `lait.py: ...`, exit status 1."""


def fail(message):
    raise LaitError(f"lait.py: {message}")


class Dropped(Exception):
    """A document, image or sentence that does not pass; its text is the reason it is counted under."""


# ---------------------------------------------------------------------------------------------------------- filters (exchangeable)

ENGLISH = frozenset("the of and to that is was for on with as by at from are were be this which have has had it its not but they "
                    "their she his her you we our or an who will would can could there been when what into than about after".split())


def language(text, declared):
    """English? text: what the page shows; declared: its lang attribute or None. From 20 words on the text decides: at most a fifth of
    its letters outside ASCII, at least 15 % function words. A shorter one: its letters, and the declared language if there is one."""
    words = re.findall(r"[^\W\d_]+", text[:20000].lower())
    letters = "".join(words)
    if letters and sum(c > "\x7f" for c in letters) > 0.2 * len(letters):
        return "not English"
    if len(words) >= 20:
        return None if sum(w in ENGLISH for w in words) >= 0.15 * len(words) else "not English"
    return "not English" if declared and not declared.lower().startswith("en") else None


def natural(image):
    """A photograph? image: PIL RGB. Drawings, logos, charts, screenshots and blanks have flat areas (neighbors of exactly equal
    color), one color over most of the picture, or few colors; banners are long."""
    width, height = image.size
    if max(width, height) > 3.5 * min(width, height):
        return "banner"
    left, top = max(0, width - 1024) // 2, max(0, height - 1024) // 2
    pixels = np.asarray(image.crop((left, top, min(width, left + 1024), min(height, top + 1024)))).astype(np.int32)    # (H, W, 3)
    packed = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
    if (packed[:, 1:] == packed[:, :-1]).mean() > 0.6:
        return "flat"
    bins = np.bincount(((pixels[..., 0] >> 4 << 8) + (pixels[..., 1] >> 4 << 4) + (pixels[..., 2] >> 4)).ravel(), minlength=4096)
    if bins.max() > 0.7 * bins.sum():
        return "one color"
    return "few colors" if (bins > 1e-4 * bins.sum()).sum() < 12 else None


UNSAFE = re.compile(r"\b(?:porn\w*|xxx|nsfw|nudes?|nudity|hentai|erotica?|sex(?:y|ual|cam)?|escorts?|milf|blowjob|fetish|camgirls?|hookups?)\b")


def safe(image, texts, page):
    """image: PIL RGB, which this default does not look at. texts: the image's raw texts; page: the Page, for its `rating`, `title`
    and `url`. Drops what labels itself (meta rating adult, mature, restricted or RTA) and what says an unsafe word."""
    if re.search(r"adult|mature|restricted|rta-5042", page.rating):
        return "labelled adult"
    return "unsafe words" if UNSAFE.search(" ".join([page.title, re.sub(r"[^a-z]+", " ", page.url.lower()), *texts]).lower()) else None


def plug(spec, default):
    """"file.py:function" -> the function; empty -> the default."""
    if not spec:
        return default
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        fail(f"{spec}: a filter is given as FILE.py:FUNCTION, and there is no file {path!r}")
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("lait_filter", path))
    found.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        fail(f"{path}: no function {name!r} in it")

    def guarded(*args):
        try:
            return function(*args)
        except Exception as e:
            fail(f"{spec} raised {type(e).__name__}: {e}")
    return guarded


# ------------------------------------------------------------------------------------------------------------------------ sentences

SPAM = ("click here", "click to", "buy now", "shop now", "order now", "sign up", "subscribe", "free shipping", "add to cart", "read more",
        "learn more", "all rights reserved", "terms of", "privacy policy", "cookies", "advertisement", "sponsored", "limited offer",
        "discount code", "best price", "casino", "viagra", "download now", "follow us", "share this", "log in", "stock photo",
        "image may contain", "no description available", "lorem ipsum", "enable javascript")
SPANS = re.compile(r"<[^<>]{1,200}>|\b(?:https?://|www\.)\S+|[\w.+-]{1,64}@[\w.-]{1,64}|[@#]\w+|\b[\w%./-]{1,200}\.(?:jpe?g|png|gif|webp|html?|com|org|net)\b"
                   r"|[(\[](?:photo|image|picture|credit|source|via|ap|afp|getty|reuters)\b[^)\]]{0,100}[)\]]"
                   r"|\b(?:photo|image|picture)s? (?:by|credit|courtesy)\b.{0,100}|\b(?:photo|image) ?credit:.{0,100}|\|.{0,100}$", re.I)


def sentences(text, limit=2000):
    """A raw text -> its sentences without bad spans: tags, addresses, file names, handles, credits, site names after |, emoji."""
    text = unicodedata.normalize("NFKC", text[:limit])
    text = "".join(c if unicodedata.category(c)[0] in "LNPZ" or c in "$+|<>\n\t" else " " for c in text)
    for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])", " ".join(text.split())):
        yield " ".join(SPANS.sub(" ", part).split()).strip(" -,:;|*_")


def reject(sentence, args, words, spam):
    """None, or the rule that a sentence breaks. words: the vocabulary's (None: that rule is off); spam: a compiled pattern."""
    found = re.findall(r"[a-z0-9]+(?:['’][a-z]+)?", sentence.lower())
    if not found:
        return "empty"
    if len(found) < args.min_words:
        return "too short"
    if len(found) > args.max_words:
        return "too long"
    if sum(c.isascii() and (c.isalpha() or c == " ") for c in sentence) < 0.8 * len(sentence):
        return "not words"
    pairs = Counter(zip(found, found[1:]))
    if len(set(found)) < 0.6 * len(found) or max(pairs.values()) > 2 or any(a == b == c for a, b, c in zip(found, found[1:], found[2:])):
        return "repeated words"
    if UNSAFE.search(sentence.lower()):
        return "unsafe words"
    if spam.search(sentence.lower()):
        return "spam"
    judged = [w for w in found if w.isalpha()]
    if words is not None and sum(w not in words for w in judged) > args.max_oov * len(judged):
        return "out of vocabulary"
    return None


# ------------------------------------------------------------------------------------------------------------------------ web pages

VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
BLOCK = frozenset("html body main article section div header footer nav aside figure figcaption p ul ol li table tr td th tbody thead dl dt "
                  "dd h1 h2 h3 h4 h5 h6 blockquote pre form center picture noscript script style template svg select textarea title".split())
CLOSES_ITSELF = frozenset("p li tr td th dt dd".split())            # HTML lets these end unsaid where the next begins
UNSEEN = frozenset("script style template svg select textarea".split())
BAD_PLACE = frozenset("ad ads advert advertisement sponsor sponsored banner sidebar related recommended footer header nav menu logo icon "
                      "icons avatar thumb thumbs thumbnail comment comments share social promo widget sprite button badge pixel spacer "
                      "tracking".split())
CHARSETS = re.compile(r"utf-?8|us-ascii|ascii|latin-?1|iso-?8859-?\d{1,2}|windows-125\d|cp125\d|shift_jis|euc-(?:jp|kr)|gb2312|gbk|gb18030|big5|"
                      r"koi8-[ru]", re.I)                           # no other decoder of Python's is run on a stranger's word


def decode(raw, header=""):
    """bytes -> str, by byte order mark, HTTP header, <meta>, else UTF-8; what does not decode is replaced. Dropped: not a page."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "replace")
    if b"\0" in raw[:4096] or not re.search(rb"<\s*[a-zA-Z!]", raw):
        raise Dropped("not HTML")
    named = re.search(r"charset\s*=\s*[\"']?([\w-]+)", header + " " + raw[:2048].decode("latin-1"), re.I)
    named = named[1] if named and CHARSETS.fullmatch(named[1]) else "utf-8"
    try:
        return raw.decode("cp1252" if re.fullmatch(r"(us-)?ascii|latin-?1|iso-?8859-?1", named, re.I) else named, "replace")
    except LookupError:
        return raw.decode("utf-8", "replace")


class Page(HTMLParser):
    """What one page says of its images. After feed() and close(): `images`, a list of dicts (sources: addresses, the largest first;
    alt, title, caption, before, after, score); `text`, all it shows; `lang`, `title`, `rating` (lower case), `base` (or None).

    Only block elements are tracked. An image is scored for dominance by where it stands and what it says of itself: DOMINANCE."""

    DOMINANCE = {"the page's own picture (og:image)": 3, "in article, main or figure": 2, "first after the heading": 1, "described": 1,
                 "alone": 1, "declared over 300 px": 1, "declared up to 300 px": -3, "in nav, header, footer, aside": -3,
                 "called logo, icon, ad ...": -3}

    def __init__(self, url):
        super().__init__(convert_charrefs=True)
        self.url, self.base, self.lang, self.title, self.rating = url, None, None, "", ""
        self.stack, self.flow, self.words, self.images, self.own = [], [], [], [], set()    # stack: [tag, number, unseen, place]
        self.picture, self.number, self.headings, self.figures = [], 0, 0, []

    def place(self, tag, attrs):
        """+1 content, -1 margin, 0 as its parent."""
        called = set(re.split(r"[^a-z]+", f"{attrs.get('class') or ''} {attrs.get('id') or ''} {attrs.get('role') or ''}".lower()[:500]))
        if tag in ("nav", "header", "footer", "aside") or called & BAD_PLACE or "navigation" in called:
            return -1
        return 1 if tag in ("article", "main", "figure") else 0

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in reversed(attrs)}                # the first of a doubled attribute counts
        if tag == "img":
            return self.add_image(attrs)
        if tag == "html":
            self.lang = attrs.get("lang") or attrs.get("xml:lang") or self.lang
        elif tag == "base" and self.base is None:
            self.base = attrs.get("href")
        elif tag == "meta":
            name = (attrs.get("property") or attrs.get("name") or "").lower()
            if name in ("og:image", "og:image:url", "twitter:image"):
                self.own.add(attrs.get("content", "").strip())
            elif name == "rating":
                self.rating = attrs.get("content", "").lower()[:100]
        elif tag == "source" and self.stack and self.stack[-1][0] == "picture":
            self.picture += srcset(attrs.get("srcset", ""))
        elif tag == "link" and attrs.get("rel", "").lower() == "image_src":
            self.own.add(attrs.get("href", "").strip())
        if tag in VOID or tag not in BLOCK:
            self.flow += [None] if tag in ("br", "hr") else []
            return
        top = self.stack[-1][0] if self.stack else None
        if top in CLOSES_ITSELF and (top == tag or top == "p" or (top, tag) in (("td", "th"), ("th", "td"), ("dt", "dd"), ("dd", "dt"))):
            if not (top == "p" and tag in UNSEEN | {"noscript", "picture"}):
                self.stack.pop()
        if len(self.stack) >= MAX_DEPTH:
            raise Dropped("hostile: nested too deep")
        self.number += 1
        hidden = "hidden" in attrs or re.search(r"display\s*:\s*none", attrs.get("style", "")[:500])
        _, _, unseen, place = self.stack[-1] if self.stack else (None, 0, False, 0)
        here = self.place(tag, attrs)
        self.stack.append([tag, self.number, unseen or bool(hidden) or tag in UNSEEN, -1 if place < 0 else here or place])
        self.flow.append(None)                                          # a block ends the text before it
        self.headings += tag == "h1"
        if tag == "figure":
            self.figures.append(len(self.images))

    def handle_endtag(self, tag):
        if tag not in BLOCK or all(entry[0] != tag for entry in self.stack):
            return
        while True:
            ended = self.stack.pop()[0]
            if ended == "figure" and self.figures:
                self.figures.pop()
            if ended == tag:
                break
        self.flow.append(None)
        if tag == "picture":
            self.picture = []

    def handle_data(self, text):
        if not text.strip():
            return
        if self.stack and self.stack[-1][0] == "title":
            self.title += text[:300 - len(self.title)]
            return
        if self.stack and self.stack[-1][2]:
            return
        self.words.append(text)
        if any(entry[0] == "figcaption" for entry in self.stack) and self.figures:
            for image in self.images[self.figures[-1]:]:
                image["caption"] += (" " + text)[:2000 - len(image["caption"])]
        else:
            self.flow.append((text, [entry[1] for entry in self.stack]))

    def add_image(self, attrs):
        if self.stack and self.stack[-1][2]:                            # nobody sees it: not even counted as an image of the page
            return
        sources = [*self.picture, *srcset(attrs.get("srcset") or attrs.get("data-srcset") or ""), attrs.get("data-src"),
                   attrs.get("data-original"), attrs.get("src")]
        image = {"sources": list(dict.fromkeys(s.strip() for s in sources if s and s.strip()))[:20], "caption": "", "before": "", "after": "",
                 "alt": attrs.get("alt", "")[:2000], "title": attrs.get("title", "")[:2000]}
        sides = [int(m[0]) for m in (re.match(r"\d{1,5}", attrs.get(k, "").strip()) for k in ("width", "height")) if m]
        called = set(re.split(r"[^a-z]+", " ".join([attrs.get("class", ""), attrs.get("id", ""), *image["sources"][-1:]]).lower()[:1000]))
        place = self.stack[-1][3] if self.stack else 0
        image["marks"] = {"in article, main or figure": place > 0, "in nav, header, footer, aside": place < 0,
                          "called logo, icon, ad ...": bool(called & BAD_PLACE), "first after the heading": self.headings == 1,
                          "declared over 300 px": len(sides) == 2 and min(sides) > 300, "declared up to 300 px": bool(sides) and min(sides) <= 300}
        self.headings += self.headings == 1                             # only the first image after <h1> is that
        self.flow.append((len(self.images), [entry[1] for entry in self.stack]))
        self.images.append(image)

    def close(self):
        super().close()
        self.text = " ".join(" ".join(self.words).split())
        blocks = []                                                     # [text or image number, ancestors], in the page's order
        for open_, item in zip([None] + self.flow, self.flow):
            if item is None:
                continue
            if open_ and isinstance(item[0], str) and isinstance(open_[0], str):
                blocks[-1][0] += item[0]
            else:
                blocks.append(list(item))
        for k, (number, mine) in enumerate(blocks):
            if isinstance(number, str):
                continue
            image = self.images[number]
            for side, j in (("before", k - 1), ("after", k + 1)):       # the next text, unless it stands in another part of the page
                text, path = blocks[j] if 0 <= j < len(blocks) else (0, [])
                if isinstance(text, str) and path[:max(1, len(mine) - 2)] == mine[:max(1, len(mine) - 2)]:
                    image[side] = text[-1000:] if side == "before" else text[:1000]
            marks = image.pop("marks")
            marks["alone"] = len(self.images) == 1
            marks["described"] = max(len(image["alt"].split()), len(image["caption"].split())) >= 3
            marks["the page's own picture (og:image)"] = any(same_address(a, b) for a in image["sources"] for b in self.own)
            image["score"] = sum(self.DOMINANCE[m] for m, holds in marks.items() if holds)


def same_address(a, b):
    """Two addresses of one picture, one of which may be relative."""
    a, b = (re.sub(r"^(https?:)?//", "", x).split("?")[0].lstrip("./") for x in (a, b))
    return bool(a) and (a == b or a.endswith("/" + b) or b.endswith("/" + a))


def srcset(text):
    """"a.jpg 1x, b.jpg 800w" -> addresses, the largest first."""
    found = [(float(m[2] or 1), m[1]) for m in re.finditer(r"([^\s,]\S*[^\s,])(?:\s+(\d{1,6}(?:\.\d{1,3})?)[wx])?\s*(?:,|$)", text[:4000])]
    return [address for _, address in sorted(found, key=lambda f: -f[0])]


@contextmanager
def cpu_limit(seconds):
    """Dropped after so many seconds of this process's own time (the main thread's; elsewhere there is no such limit)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise Dropped("hostile: too slow to parse")
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def parse(html, url, seconds=5.0):
    """str -> Page. Dropped: nested deeper than 512 blocks, or so made that parsing takes longer than `seconds`."""
    page = Page(url)
    with cpu_limit(seconds):
        html = re.sub(r"<!\[[^<>]{0,100}>", " ", html).replace("<![", "&lt;![")     # <![endif]> and its like; html.parser chokes on them
        page.feed(html)
        page.close()
    return page


# ------------------------------------------------------------------------------------------------------------------------ documents

def listing(root):
    """Yields (path, name from root) of every page file and archive below a folder (or of the one file), in a fixed order."""
    if os.path.isfile(root):
        yield root, os.path.basename(root)
        return
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith(PAGE_TYPES + ARCHIVE_TYPES):
                path = os.path.join(folder, file)
                yield path, os.path.relpath(path, root)


def documents(files, root, limit, skip=0):
    """files: (path, name) -> yields (name, address or None, bytes or Dropped, Content-Type), one for each page file and each response
    in an archive, without the first `skip`. limit: bytes of a page."""
    inside = os.path.realpath(root)
    for path, name in files:
        if name.lower().endswith(ARCHIVE_TYPES):
            for document in archive(path, name, limit):
                if skip:
                    skip -= 1
                else:
                    yield document
        elif skip:
            skip -= 1
        else:
            yield name, None, page_file(path, inside, limit), ""


def page_file(path, inside, limit):
    real = os.path.realpath(path)
    if os.path.islink(path) and real != inside and not real.startswith(inside + os.sep):
        return Dropped("link out of the folder")
    if not os.path.isfile(real):                                        # a pipe would wait forever
        return Dropped("not a file")
    try:
        if os.path.getsize(real) > limit:
            return Dropped("page too large")
        with open(real, "rb") as f:
            return f.read()
    except OSError:
        return Dropped("unreadable file")


def archive(path, name, limit):
    """Yields what documents() yields for the response and resource records of a WARC file, gzipped or not, read as a stream."""
    try:
        with open(path, "rb") as raw, (gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw) as f:
            while True:
                line = f.readline(1 << 16)
                while line in (b"\r\n", b"\n"):
                    line = f.readline(1 << 16)
                if not line:
                    return
                if not line.startswith(b"WARC/"):
                    raise ValueError("no WARC record")
                fields = header_lines(f)
                size = int(fields.get("content-length", "x"))
                if not 0 <= size <= MAX_RECORD:
                    yield name, None, Dropped("decompression bomb"), ""
                    return
                kind, wanted = fields.get("warc-type"), size <= 2 * limit + (1 << 16)
                body = f.read(size) if wanted else skip_bytes(f, size)
                if wanted and len(body) < size:
                    raise EOFError
                if kind in ("response", "resource"):
                    address = fields.get("warc-target-uri", "").strip("<> ")
                    if not wanted:
                        found, content_type = Dropped("page too large"), ""
                    elif kind == "resource":
                        content_type = fields.get("content-type", "")
                        found = body if "html" in content_type else Dropped("not HTML")
                    else:
                        found, content_type = response(body, limit)
                    yield f"{name} {address}", address, found, content_type
    except (OSError, EOFError, ValueError, zlib.error):                 # what came before it stays; the next archive goes on
        yield name, None, Dropped("broken archive"), ""


def header_lines(f):
    fields = {}
    for _ in range(1000):
        line = f.readline(1 << 16)
        if not line.strip():
            return fields
        key, _, value = line.decode("utf-8", "replace").partition(":")
        fields[key.strip().lower()] = value.strip()
    raise ValueError("no end of the header")


def skip_bytes(f, size):
    while size > 0:
        got = len(f.read(min(size, 1 << 20)))
        if not got:
            raise EOFError
        size -= got


def response(body, limit):
    """The HTTP response in a record -> (page bytes or Dropped, Content-Type)."""
    f = io.BytesIO(body)
    status = f.readline(1 << 16).split(None, 2)
    try:
        fields = header_lines(f)
        content_type = fields.get("content-type", "")
        if len(status) < 2 or status[1] != b"200":
            raise Dropped("HTTP status not 200")
        if "html" not in content_type.lower():
            raise Dropped("not HTML")
        body = f.read()
        if "chunked" in fields.get("transfer-encoding", "").lower():
            body = dechunk(body)
        coding = fields.get("content-encoding", "identity").lower()
        if coding in ("gzip", "x-gzip", "deflate"):
            body = inflate(body, limit, coding)
        elif coding not in ("identity", ""):
            raise Dropped("unknown encoding")
        if len(body) > limit:
            raise Dropped("page too large")
        return body, content_type
    except Dropped as e:
        return e, ""
    except (ValueError, zlib.error):
        return Dropped("broken response"), ""


def dechunk(body):
    out, at = [], 0
    while True:
        end = body.index(b"\n", at)
        size = int(body[at:end].split(b";")[0].strip(), 16)
        if size < 0:
            raise ValueError("chunk of negative size")
        if size == 0:
            return b"".join(out)
        out.append(body[end + 1:end + 1 + size])
        at = end + 1 + size + 2


def inflate(body, limit, coding):
    """gzip or deflate -> bytes; never more than limit + 1 of them are made."""
    engine = zlib.decompressobj(47 if "gzip" in coding or body[:1] == b"\x78" else -15)
    out = engine.decompress(body, limit + 1)
    if len(out) > limit:
        raise Dropped("decompression bomb")
    return out


# --------------------------------------------------------------------------------------------------------------------------- images

def locate(source, name, page, root):
    """An image's address on a page -> the name of its file from `root`. Dropped: there is none, or the address is no image's.

    name: the page file's name from the root; page.url: "" for a page file, else the address it was read from."""
    source = re.sub(r"[\t\n\r]", "", source)
    if source[:5].lower() == "data:":
        raise Dropped("inline data")
    try:
        base = urljoin(page.url or "", page.base or "") if page.url or re.match(r"(https?:)?//", page.base or "", re.I) else ""
        address = urlsplit(urljoin(base, source) if base else source)
        host = (address.hostname or "").lower()
    except ValueError:
        raise Dropped("broken address") from None
    if address.scheme not in ("http", "https", ""):
        raise Dropped("foreign scheme")
    path = unquote(address.path)
    if "\0" in path or "\\" in path:
        raise Dropped("path trick")
    if host or address.netloc:
        if not re.fullmatch(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?", host) or ".." in host:
            raise Dropped("path trick" if ".." in host or "/" in host else "broken address")
        if ".." in path.split("/"):
            raise Dropped("path trick")
        names = [host + "/" + path.lstrip("/")]
        names = [f"{names[0]}?{address.query}"] * bool(address.query) + names
    elif address.scheme:
        raise Dropped("broken address")
    elif path.startswith("/"):
        names = [name.split(os.sep)[0] + path, path.lstrip("/")]        # wget -x: the first folder is the host
    else:
        names = [os.path.join(os.path.dirname(name), path)]
    inside = os.path.realpath(root)
    for candidate in names:
        clean = os.path.normpath(candidate)
        if clean.startswith("..") or os.path.isabs(clean):
            raise Dropped("path trick")
        try:
            file = os.path.join(root, clean)
            if not os.path.isfile(file):
                continue
            if not os.path.realpath(file).startswith(inside + os.sep):
                raise Dropped("path trick")
        except (ValueError, OSError):
            continue
        return clean
    raise Dropped("missing file")


def open_image(path, args):
    """-> (PIL RGB image, extension, sha256 of the bytes). Dropped: unreadable, a bomb, too small."""
    try:
        if os.path.getsize(path) > args.max_image << 20:
            raise Dropped("file too large")
        with open(path, "rb") as f:
            raw = f.read()
        with Image.open(io.BytesIO(raw), formats=list(FORMATS)) as image:   # the header only
            kind, (width, height) = image.format, image.size
            if width * height > Image.MAX_IMAGE_PIXELS:
                raise Dropped("decompression bomb")
            if min(width, height) <= args.min_side:
                raise Dropped(f"side up to {args.min_side} px")
            if getattr(image, "is_animated", False):
                raise Dropped("unnatural: animated")
        return data.load_image(path), FORMATS[kind], hashlib.sha256(raw).hexdigest()
    except Image.DecompressionBombError:
        raise Dropped("decompression bomb") from None
    except (data.BadImage, OSError, ValueError, SyntaxError, EOFError, zlib.error) as e:
        known = "unknown format" if type(e).__name__ == "UnidentifiedImageError" else "corrupt"
        raise Dropped(known) from None


# -------------------------------------------------------------------------------------------------------------------------- scoring

class Scorer:
    """How well text and picture fit, by a run directory: the cosine of encode_image and encode_text, else match."""

    def __init__(self, run, device, batch_size):
        import eval as evaluation
        self.model, info = evaluation.load_run(run, device)
        views = sys.modules[type(self.model).__module__].VIEWS[info["task"]]
        keys = data.view_keys(views)
        self.dual = all(callable(getattr(self.model, m, None)) for m in ("encode_image", "encode_text"))
        if not self.dual and not callable(getattr(self.model, "match", None)):
            fail(f"--score {run}: a {info['task']} run that offers neither encode_image and encode_text nor match")
        if "caption" not in keys.values() or views["source"] != "pairs" or not set(keys.values()) & set(data.IMAGE_VIEWS):
            fail(f"--score {run}: it reads {', '.join(f'{k} ({v})' for k, v in keys.items())}; here are only pictures and sentences: "
                 "name a run whose views are an image and a caption")
        drop = {k for k, v in keys.items() if v not in data.IMAGE_VIEWS and v not in ("caption", "paraphrase")}
        self.views = {k: v for k, v in views.items() if k not in drop}
        self.tokenizer = data.get_tokenizer(os.path.join(info["path"], "vocab.txt"))
        if self.tokenizer.vocab_size != self.model.cfg.vocab_size:
            fail(f"{info['path']}/vocab.txt: {self.tokenizer.vocab_size} tokens, the run has {self.model.cfg.vocab_size}")
        self.device, self.batch_size, cfg = device, batch_size, self.model.cfg
        self.sizes = (cfg.image_size, cfg.max_text)
        self.about = f"{'cosine' if self.dual else 'match'} of {run} ({info['model']}, {info['task']}, step {info.get('step', '?')})"

    def batches(self, records, what):
        for batch in data.iter_eval(records, self.views, self.tokenizer, *self.sizes, what=what, batch_size=self.batch_size):
            yield {k: v.to(self.device) for k, v in batch.items()}

    def __call__(self, images):
        """images: list of (path, hash, list of texts) -> (score, other), both (texts in all,) float64: of each text with its picture, and
        with another picture of the list (NaN where there is none)."""
        import torch
        owner = np.repeat(np.arange(len(images)), [len(texts) for _, _, texts in images])
        half = (owner + max(1, len(images) // 2)) % len(images)
        other = np.array([next((j for j in (h, (h + 1) % len(images)) if images[j][1] != images[o][1]), -1) for o, h in zip(owner, half)])
        with torch.inference_mode():
            if self.dual:
                records = data.Records("pairs", None)
                for n, (path, _, texts) in enumerate(images):
                    records.append({"image": path, "image_id": n, "caption": texts})
                image = torch.cat([self.model.encode_image(b).float().cpu() for b in self.batches(records, "image")]).numpy()
                text = torch.cat([self.model.encode_text(b).float().cpu() for b in self.batches(records, "text")]).numpy()
                pairs = lambda rows: (image[rows] * text).sum(1, dtype=np.float64)
            else:
                flat = [t for _, _, texts in images for t in texts]

                def pairs(rows):
                    records = data.Records("pairs", None)
                    for n, (row, text) in enumerate(zip(rows, flat)):
                        records.append({"image": images[row][0], "image_id": n, "caption": [text]})
                    return torch.cat([self.model.match(b).float().cpu() for b in self.batches(records, "sample")]).double().numpy()
            return pairs(owner), np.where(other >= 0, pairs(other), np.nan)


# ------------------------------------------------------------------------------------------------------------------------------ map

class Harvest:
    """Documents -> candidates, with the filters and limits of the command line. `counts`: (stage, what) -> how many."""

    def __init__(self, args):
        self.args, self.counts, self.found = args, Counter(), []
        self.language, self.natural, self.safe = plug(args.language, language), plug(args.natural, natural), plug(args.safe, safe)
        self.words = set(data.get_tokenizer(args.vocab).words) if args.vocab else None
        phrases = SPAM if not args.spam else [line.strip().lower() for _, line in data.lines_of(args.spam)]
        self.spam = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in phrases) or r"(?!)")
        self.scorer = Scorer(args.score, args.device, args.batch_size) if args.score else None

    def drop(self, stage, reason, n=1):
        self.counts[stage, str(reason)] += n

    def document(self, name, address, raw, content_type):
        """Adds the candidates of one document to `found`."""
        self.counts["pages", "in"] += 1
        try:
            if isinstance(raw, Dropped):
                raise raw
            page = parse(decode(raw, content_type), address or "", self.args.page_seconds)
            reason = self.language(page.text or " ".join(i["alt"] for i in page.images), page.lang)
            if reason:
                raise Dropped(reason)
            if not page.images:
                raise Dropped("no image")
        except Dropped as e:
            return self.drop("pages", e)
        self.counts["pages", "out"] += 1
        self.counts["images", "in"] += len(page.images)
        ranked = sorted(page.images, key=lambda i: -i["score"])         # stable: earlier first
        for n, image in enumerate(ranked):
            try:
                if n >= self.args.per_page or image["score"] <= 0:
                    raise Dropped("not dominant")
                self.image(image, name, page)
                self.counts["images", "out"] += 1
            except Dropped as e:
                self.drop("images", e)

    def image(self, image, name, page):
        trouble, file = Dropped("no address"), None
        for source in image["sources"]:
            try:
                file = locate(source, name, page, self.args.images)
                break
            except Dropped as e:
                trouble = e
                if str(e) == "path trick":
                    break
        if file is None:
            raise trouble
        path = os.path.join(self.args.images, file)
        picture, kind, digest = open_image(path, self.args)
        reason = self.natural(picture)
        if reason:
            raise Dropped(f"unnatural: {reason}")
        raw = {"caption": [image["caption"]], "alt": [image["alt"]], "title": [image["title"]], "near": [image["before"], image["after"]]}
        reason = self.safe(picture, [t for texts in raw.values() for t in texts if t], page)
        if reason:
            raise Dropped(f"unsafe: {reason}")
        texts = {}
        for source in SOURCES:
            for text, side in zip(raw[source], (-1, 1)):
                found = [s for s in sentences(text)]
                found = [] if found == [""] and not text.strip() else found
                if source == "near":
                    found = found[-2:] if side < 0 else found[:2]       # the two sentences next to the picture
                for sentence in found:
                    self.counts["texts", "in"] += 1
                    reason = reject(sentence, self.args, self.words, self.spam)
                    if reason is None and any(normal(sentence) == normal(t) for t in texts):
                        reason = "said twice of one image"
                    if reason:
                        self.drop("texts", reason)
                    else:
                        texts[sentence] = source
        if not texts:
            raise Dropped("no text left")
        self.counts["texts", "out"] += len(texts)
        self.found.append({"path": file, "hash": digest, "kind": kind, "size": picture.size, "page": name, "texts": texts})

    def candidates(self):
        """The pairs found since the last call -> list of lines "image hash TAB text hash TAB json"."""
        found, self.found, lines = self.found, [], []
        if self.scorer and found:
            score, other = self.scorer([(os.path.join(self.args.images, f["path"]), f["hash"], list(f["texts"])) for f in found])
            if not np.isfinite(score).all():
                fail(f"--score {self.args.score}: it gives scores that are no numbers")
            score, other = score.tolist(), [None if math.isnan(o) else o for o in other.tolist()]
        else:
            score = other = [None] * sum(len(f["texts"]) for f in found)
        pairs = ((f, text, source) for f in found for text, source in f["texts"].items())
        for (f, text, source), s, o in zip(pairs, score, other):
            row = {"image": f["path"], "kind": f["kind"], "width": f["size"][0], "height": f["size"][1], "page": f["page"], "text": text,
                   "source": source, "score": s, "other": o}
            lines.append(f"{f['hash']}\t{hashlib.sha256(normal(text).encode()).hexdigest()}\t{json.dumps(row)}\n")
        return lines


def normal(text):
    """What two texts must share to be the same: the words, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def write(path, lines):
    """A text file, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.writelines(lines)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


@contextmanager
def alone(folder):
    """The lock of a folder: two processes never write one shard. It ends with the process, however that ends."""
    import fcntl
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{folder}: another process is at work on it")
        yield


MAP_SETTINGS = ("images", "language", "natural", "safe", "vocab", "spam", "score", "min_side", "per_page", "min_words", "max_words", "max_oov",
                "max_page", "max_image", "page_seconds", "part")


def run_map(args, shard, shards):
    """Documents of one shard -> OUT/candidates/I-of-N/part-*.txt: a line of JSON {counts, last, scored}, then candidates. A finished part
    is never made again; the settings and the list of files must be those it was begun with."""
    folder = os.path.join(args.out, "candidates", f"{shard:05d}-of-{shards:05d}")
    with alone(folder):
        mine, digest = [], hashlib.sha256()
        for path, name in listing(args.pages):
            if zlib.crc32(name.encode("utf-8", "surrogateescape")) % shards == shard:
                size = os.lstat(path).st_size
                digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
                mine.append((path, name))
        plan = {k: getattr(args, k) for k in MAP_SETTINGS} | {"in": args.pages, "files": len(mine), "listing": digest.hexdigest()}
        note = os.path.join(folder, "plan.json")
        if os.path.exists(os.path.join(folder, "part-000000.txt")):
            with open(note, encoding="utf-8") as f:
                old = json.load(f)
            changed = [k for k in plan if plan[k] != old.get(k)]
            if changed:
                what = "the files in --in have changed" if set(changed) <= {"files", "listing"} else f"other {', '.join(changed)}"
                fail(f"{folder}: begun with other settings ({what}; see plan.json): go on with those, or delete the folder")
        write(note, [json.dumps(plan, indent=1)])
        done = last = 0
        for part in itertools.count():
            file = os.path.join(folder, f"part-{part:06d}.txt")
            if not os.path.exists(file):
                break
            with open(file, encoding="utf-8") as f:
                head = json.loads(f.readline())
            done, last = done + sum(n for stage, what, n in head["counts"] if (stage, what) == ("pages", "in")), head["last"]
        if last:
            return
        harvest = Harvest(args)
        stream = documents(mine, args.pages, args.max_page << 20, done)
        with tqdm(desc=f"pages {shard}/{shards}", initial=done, unit="page", disable=None) as bar:
            while not last:
                n = 0
                for document in itertools.islice(stream, args.part):
                    harvest.document(*document)
                    n += 1
                    bar.update()
                last, lines = n < args.part, harvest.candidates()
                head = {"counts": [[*key, n] for key, n in sorted(harvest.counts.items())], "last": last,
                        "scored": harvest.scorer.about if harvest.scorer else None}
                write(os.path.join(folder, f"part-{part:06d}.txt"), [json.dumps(head) + "\n"] + lines)
                harvest.counts.clear()
                part += 1


# --------------------------------------------------------------------------------------------------------------------------- reduce

def external_sort(lines, folder, most, fan=32):
    """Yields lines (str that end in a newline) in order, holding at most `most` of them: sorted runs on disk, merged `fan` at a time."""
    os.makedirs(folder, exist_ok=True)
    lines, levels, number = iter(lines), [[]], itertools.count()

    def spill(ordered):
        path = os.path.join(folder, f"run-{next(number):06d}.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(ordered)
        return path

    def merged(paths):
        files = [open(p, encoding="utf-8", newline="\n") for p in paths]
        try:
            yield from heapq.merge(*files)
        finally:
            for f in files:
                f.close()
            for p in paths:
                os.remove(p)

    while chunk := list(itertools.islice(lines, most)):
        levels[0].append(spill(sorted(chunk)))
        for k in itertools.count():
            if len(levels[k]) < fan:
                break
            levels += [[]] if k + 1 == len(levels) else []
            levels[k + 1].append(spill(merged(levels[k])))
            levels[k] = []
    yield from merged([p for level in levels for p in level])


def parts_of(out):
    """-> (parts, plan): the files of all shards of the map, in order. LaitError: a shard is missing or not finished."""
    home = os.path.join(out, "candidates")
    names = sorted(n for n in os.listdir(home) if re.fullmatch(r"\d+-of-\d+", n)) if os.path.isdir(home) else []
    if not names:
        fail(f"{home}: no candidates here: run the map first (--in PAGES --out {out})")
    if len({n.split("-of-")[1] for n in names}) > 1:
        fail(f"{home}: holds shards of different divisions ({', '.join(names[:4])} ...): delete those of one")
    shards, parts, plans = int(names[0].split("-of-")[1]), [], []
    for i in range(shards):
        folder, last = os.path.join(home, f"{i:05d}-of-{shards:05d}"), False
        for part in itertools.count():
            file = os.path.join(folder, f"part-{part:06d}.txt")
            if not os.path.exists(file):
                break
            parts.append(file)
            with open(file, encoding="utf-8") as f:
                last = json.loads(f.readline())["last"]
        if not last:
            fail(f"{folder}: not finished: run --shard {i}/{shards} (again) before --merge")
        with open(os.path.join(folder, "plan.json"), encoding="utf-8") as f:
            plans.append(json.load(f))
        different = [k for k in MAP_SETTINGS if plans[0][k] != plans[-1][k]]
        if different:
            fail(f"{folder}: made with other settings than shard 0: {', '.join(different)}")
    return parts, plans[0]


def candidates_of(parts):
    for file in parts:
        with open(file, encoding="utf-8", newline="\n") as f:
            f.readline()
            yield from f


def threshold(parts, args):
    """-> (least score or None, how it came about). By default the 95th percentile of the `other` scores, of a sample of 100,000."""
    rng, sample, seen, scored = random.Random(0), [], 0, None
    for file in parts:
        with open(file, encoding="utf-8", newline="\n") as f:
            scored = json.loads(f.readline())["scored"] or scored
            for line in f if scored and args.min_score is None else ():
                other = json.loads(line.split("\t", 2)[2])["other"]
                if other is None:
                    continue
                seen += 1
                if len(sample) < 100_000:
                    sample.append(other)
                elif (k := rng.randrange(seen)) < 100_000:
                    sample[k] = other
    if scored is None:
        if args.min_score is not None:
            fail("--min_score: these candidates were not scored (--score RUN)")
        return None, f"none (no --score): the best text of an image is its {', else its '.join(SOURCES)}"
    if args.min_score is not None:
        return args.min_score, f"{scored}; at least {args.min_score:g} (--min_score)"
    if len(sample) < 100:
        fail(f"{len(sample)} scores of texts with other pictures are too few for a threshold: give --min_score")
    least = float(np.quantile(sample, args.chance_quantile))
    return least, f"{scored}; at least {least:.4f}, the {args.chance_quantile:.0%} quantile of {seen:,} texts with other pictures"


def best_texts(lines, least, counts):
    """lines sorted by image hash -> yields "text hash TAB image hash TAB json" of the best text of each image."""
    for image, group in itertools.groupby(lines, lambda line: line.split("\t", 1)[0]):
        best, seen = None, {}
        for line in group:
            _, text, row = line.rstrip("\n").split("\t", 2)
            counts["pairs", "in"] += 1
            row = json.loads(row)
            if least is not None and row["score"] < least:
                counts["pairs", "below the score"] += 1
                continue
            rank = (row["score"] if least is not None else 0, -SOURCES.index(row["source"]), row["text"], row["page"])
            if best is not None:                                        # one of the two goes
                counts["pairs", "same pair on several pages" if text in seen else "not the best text"] += 1
            seen[text] = None if len(seen) < 1000 else seen.get(text)   # enough to tell the two reasons apart; bounded
            if best is None or rank > best[0]:
                best = rank, text, row
        if best:
            yield f"{best[1]}\t{image}\t{json.dumps(best[2])}\n"


def rare_texts(lines, most, counts):
    """lines sorted by text hash -> yields those whose text belongs to at most `most` images; of the others none."""
    for _, group in itertools.groupby(lines, lambda line: line.split("\t", 1)[0]):
        few = list(itertools.islice(group, most))
        more = sum(1 for _ in group)
        if more:
            counts["pairs", "text of too many images"] += len(few) + more
        else:
            yield from few


def run_merge(args):
    """All candidates -> OUT/00000.tar ..., OUT/report.json."""
    parts, plan = parts_of(args.out)
    with alone(os.path.join(args.out, "candidates")):
        root, work = args.images or plan["images"], os.path.join(args.out, "candidates", "merge")
        if not os.path.isdir(root):
            fail(f"--images {root}: no such directory")
        sizes = hashlib.sha256("".join(f"{p} {os.path.getsize(p)}\n" for p in parts).encode()).hexdigest()
        settings = {k: getattr(args, k) for k in ("min_score", "chance_quantile", "max_images", "shard_size")} | {"candidates": sizes}
        note, kept = os.path.join(work, "plan.json"), os.path.join(work, "kept.txt")
        tars = [n for n in os.listdir(args.out) if n.endswith(".tar")]
        old = None
        if os.path.exists(note):
            with open(note, encoding="utf-8") as f:
                old = json.load(f)
        if old != settings:
            if tars:
                fail(f"{args.out}: holds {len(tars)} shards of another merge ({tars[0]} ...): delete them first, or name another --out")
            if os.path.exists(kept):
                os.remove(kept)
            os.makedirs(work, exist_ok=True)
            write(note, [json.dumps(settings, indent=1)])
        if not os.path.exists(kept):                                    # both sorts again, unless they are done
            counts = Counter()
            for file in parts:
                with open(file, encoding="utf-8") as f:
                    counts.update({(stage, what): n for stage, what, n in json.loads(f.readline())["counts"]})
            least, how = threshold(parts, args)
            for leftover in (n for n in os.listdir(work) if os.path.isdir(os.path.join(work, n))):
                for file in os.listdir(os.path.join(work, leftover)):
                    os.remove(os.path.join(work, leftover, file))
            lines = tqdm(candidates_of(parts), "sorting by image", total=counts["texts", "out"], unit="pair", disable=None)
            by_image = external_sort(lines, os.path.join(work, "by-image"), args.sort_lines)
            by_text = external_sort(best_texts(by_image, least, counts), os.path.join(work, "by-text"), args.sort_lines)
            with open(f"{kept}.body", "w", encoding="utf-8") as f:
                total = 0
                for line in rare_texts(by_text, args.max_images, counts):
                    f.write(line)
                    total += 1
            head = {"counts": [[*key, n] for key, n in sorted(counts.items())], "how": how, "total": total}
            with open(f"{kept}.body", encoding="utf-8", newline="\n") as f:
                write(kept, itertools.chain([json.dumps(head) + "\n"], f))
            os.remove(f"{kept}.body")
        with open(kept, encoding="utf-8", newline="\n") as f:
            head = json.loads(f.readline())
            counts = Counter({(stage, what): n for stage, what, n in head["counts"]})
            with tqdm(total=head["total"], desc="writing shards", unit="pair", disable=None) as bar:
                words = sum(pack(f, n, args, root, counts, bar) for n in range(math.ceil(head["total"] / args.shard_size)))
        report(args, plan, counts, head["how"], words)


def pack(lines, number, args, root, counts, bar):
    """The next shard_size lines -> OUT/NNNNN.tar (and NNNNN.json with its counts, img2dataset's habit), unless it is there -> its words."""
    tar, stats = (os.path.join(args.out, f"{number:05d}.{kind}") for kind in ("tar", "json"))
    chunk = list(itertools.islice(lines, args.shard_size))
    if not (os.path.exists(tar) and os.path.exists(stats)):
        done = {"pairs": 0, "changed": 0, "words": 0}
        with tarfile.open(f"{tar}.tmp", "w", format=tarfile.USTAR_FORMAT) as out:
            for k, line in enumerate(chunk):
                _, digest, row = line.rstrip("\n").split("\t", 2)
                row, key = json.loads(row), f"{number:05d}{k:06d}"
                try:
                    with open(os.path.join(root, row["image"]), "rb") as f:
                        raw = f.read((args.max_image << 20) + 1)
                except OSError:
                    raw = b""
                bar.update()
                if hashlib.sha256(raw).hexdigest() != digest:           # gone, or another picture since the map
                    done["changed"] += 1
                    continue
                about = {"caption": row["text"], "url": row["image"], "key": key, "sha256": digest, **{k: row[k] for k in
                         ("page", "source", "score", "width", "height")}}
                for kind, content in ((row["kind"], raw), ("txt", row["text"].encode()), ("json", json.dumps(about).encode())):
                    member = tarfile.TarInfo(f"{key}.{kind}")
                    member.size, member.mode = len(content), 0o644
                    out.addfile(member, io.BytesIO(content))
                done["pairs"] += 1
                done["words"] += len(row["text"].split())
        os.replace(f"{tar}.tmp", tar)
        write(stats, [json.dumps(done)])
    else:
        bar.update(len(chunk))
    with open(stats, encoding="utf-8") as f:
        done = json.load(f)
    counts["pairs", "out"] += done["pairs"]
    if done["changed"]:
        counts["pairs", "file changed since the map"] += done["changed"]
    return done["words"]


def report(args, plan, counts, how, words):
    """Prints and writes what each stage dropped. AssertionError: the counts of a stage do not add up, a fault of this program."""
    out, off = counts["pairs", "out"], []
    if not plan["vocab"]:
        off.append("out-of-vocabulary rule: off, no --vocab was given")
    if not plan["safe"]:
        off.append("unsafe content: only labels and words were read, no picture was looked at (--safe FILE.py:FUNCTION)")
    if not plan["natural"]:
        off.append("unnatural pictures: told by flatness, number of colors and shape, no trained classifier (--natural FILE.py:FUNCTION)")
    table = {stage: {what: n for (s, what), n in sorted(counts.items(), key=lambda c: -c[1]) if s == stage and n} for stage in
             ("pages", "images", "texts", "pairs")}
    for stage, rows in table.items():
        entered, left = rows.pop("in", 0), rows.pop("out", 0)
        assert entered == left + sum(rows.values()), f"{stage}: {entered} in, {left} out, {rows} dropped"
        table[stage] = {"in": entered, "dropped": rows, "out": left}
        print(f"{stage:<8}{entered:>12,} in")
        for what, n in rows.items():
            print(f"{'':8}{-n:>12,} {what}")
        print(f"{'':8}{left:>12,} out")
    mean = words / out if out else None
    print(f"scoring: {how}")
    print(*off, sep="\n")
    print(f"{out:,} images, each with one text of {f'{mean:.1f}' if out else 'no'} words on average (LAIT: {PAPER_WORDS}) -> {args.out}")
    write(os.path.join(args.out, "report.json"), [json.dumps({"stages": table, "scoring": how, "limits": off, "mean_words": mean, "map": plan}, indent=1)])


# ----------------------------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    parser = argparse.ArgumentParser(prog="lait.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--in", dest="pages", help="folder of pages (.html) and archives (.warc, .warc.gz), or one of these files")
    add("--out", required=True, help="folder of the shards; OUT/candidates holds what the map found")
    add("--images", help="folder of the pages' images, as wget -x stores them (default: --in)")
    add("--shard", help="I/N: only the map, only the I-th of N parts of the input files (I from 0)")
    add("--merge", action="store_true", help="only the reduce")
    add("--vocab", default="", help="BERT vocab.txt of the out-of-vocabulary rule; without one that rule is off")
    add("--score", default="", help="run directory whose model scores each pair; without one the surest source is taken")
    add("--min_score", type=float, help="pairs below are dropped (default: see --chance_quantile)")
    add("--chance_quantile", type=float, default=0.95, help="least score = this quantile of the scores with other pictures [0.95]")
    add("--max_images", type=int, default=10, help="a text of more images than this is dropped with all of them [10]")
    add("--language", default="", help="FILE.py:FUNCTION instead of language()")
    add("--natural", default="", help="FILE.py:FUNCTION instead of natural()")
    add("--safe", default="", help="FILE.py:FUNCTION instead of safe()")
    add("--spam", default="", help="file of phrases, one a line, instead of the built-in spam list")
    add("--min_side", type=int, default=300, help="both sides of an image must be larger, in pixels [300, the paper's]")
    add("--per_page", type=int, default=1, help="so many dominant images of a page at most [1]")
    add("--min_words", type=int, default=4, help="words of a sentence, at least [4]")
    add("--max_words", type=int, default=40, help="and at most [40]")
    add("--max_oov", type=float, default=0.3, help="share of words that may lie outside the vocabulary [0.3]")
    add("--max_page", type=int, default=4, help="largest page, in MB [4]")
    add("--max_image", type=int, default=32, help="largest image file, in MB [32]")
    add("--page_seconds", type=float, default=5.0, help="CPU seconds that a page may take to parse [5]")
    add("--part", type=int, default=1000, help="documents held and written at once; a stop loses no more [1000]")
    add("--sort_lines", type=int, default=500_000, help="candidates held in memory by a sort [500000]")
    add("--shard_size", type=int, default=1000, help="pairs in a tar [1000]")
    add("--batch_size", type=int, default=64, help="of the scoring model [64]")
    add("--device", default="cpu", help="of the scoring model [cpu]")
    args = parser.parse_args(argv)
    for name in ("max_images", "per_page", "min_words", "max_page", "max_image", "part", "sort_lines", "shard_size", "batch_size"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: at least 1")
    if not 0 <= args.chance_quantile <= 1:
        fail(f"--chance_quantile {args.chance_quantile}: between 0 and 1")
    if args.merge and args.shard:
        fail("--shard makes a part of the candidates, --merge puts all together: one of the two")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        fail(f"--out {args.out}: a file, not a folder")
    if not args.merge:
        if not args.pages or not os.path.exists(args.pages):
            fail(f"--in {args.pages or ''}: " + ("no such file or folder" if args.pages else "name the folder of the pages"))
        args.images = args.images or (args.pages if os.path.isdir(args.pages) else os.path.dirname(args.pages) or ".")
        if not os.path.isdir(args.images):
            fail(f"--images {args.images}: no such directory")
        if next(listing(args.pages), None) is None or not next(listing(args.pages))[1].lower().endswith(PAGE_TYPES + ARCHIVE_TYPES):
            fail(f"--in {args.pages}: no {', '.join(PAGE_TYPES + ARCHIVE_TYPES)} in it")
        where = re.fullmatch(r"(\d{1,5})/(\d{1,5})", args.shard or "0/1")
        if not where or not int(where[1]) < int(where[2]):
            fail(f"--shard {args.shard}: I/N with I from 0 to N-1")
        run_map(args, int(where[1]), int(where[2]))
    if not args.shard:
        run_merge(args)


if __name__ == "__main__":
    main()
