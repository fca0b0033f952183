"""lait.py: weakly supervised image-text pairs from web pages, the way ImageBERT's LAIT was collected (section 3,
Figure 1).

    HTML files, WARC records --> language --> dominant image (tags, place in the DOM) --> its file: over 300 px,
                                                     |                                |             natural, safe
                        alt, title, caption, text around --> sentences --> cleaning --+--> (image, text) --> score   map
    candidates --sort by image hash--> best text per image --sort by text hash--> texts of few images
                                                                                      --> tar shards              reduce

    python -m tools.lait --in PAGES --out SHARDS --vocab vocab.txt --score RUN     all of it in one process, then:
    python train.py --model codis --data SHARDS --vocab vocab.txt

    python -m tools.lait --in CRAWL --out SHARDS --shard 3/64 ...  the map alone, its part 3 of 0 to 63: any engine runs these
    python -m tools.lait --out SHARDS --merge                      the reduce, when all 64 are there

The result does not depend on the number of parts. Nothing is fetched: a page's images are files below --images
(default: --in), where `wget -x` puts them: http://HOST/a/b.jpg is HOST/a/b.jpg. A page file's own relative addresses
start from its folder. Both passes need the memory of --part documents or of --sort_lines candidates, whatever the size
of the crawl. After a stop the same command goes on (the map at its next part, the reduce from the candidates). Every
document, image, sentence and pair that is dropped is counted under its stage and reason (SHARDS/report.json);
the counts must add up.

Shards are img2dataset's: KEY.jpg (the file's own bytes), KEY.txt, KEY.json. Pages and pictures are taken to be hostile:
sizes, nesting and time are bounded, addresses cannot leave --images, compressed data stops at its limit.

Filters are functions, exchangeable from the command line (--natural my_filters.py:function); what the default ones
cannot see is printed with the report. language(text, declared), natural(PIL image) and safe(PIL image, texts, page)
return None or a reason.

Deviations from the paper
  1. The semantic model is one score of any run directory (cosine of encode_image and encode_text), no classifier on
     "hundreds of features including text-only features, image-content features, and text-image cross-modal features".
  2. The paper names no threshold. Default: the 95 % quantile of the scores that 2,000 of the texts get with other
     pictures.
  3. Its classifiers of unnatural and of unsafe images are not published. natural() measures flatness, colors and shape;
     safe() reads the page's own label and words in addresses and texts, and does not look at the picture.
  4. "Heuristic rules", "normal length", "high ratio", "too many images" are not quantified there:
     the flags' defaults are ours.
  5. Language is told by function words and the declared language; "the same image" means the same bytes.
"""
import argparse
import fcntl
import gzip
import hashlib
import heapq
import http.client
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import sys
import tarfile
import threading
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import data
from tools import weights

SOURCES = ("caption", "alt", "title", "near")       # of texts, the surest first: decides where there is no score
# no other decoder runs (EPS is a program)
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
PAGE_TYPES, ARCHIVE_TYPES = (".html", ".htm", ".xhtml"), (".warc", ".warc.gz")
MAX_DEPTH = 512                         # open elements of a page
MAX_RECORD = 1 << 30                    # bytes of a WARC record: one that claims more ends its archive
MAX_RATIO = 200                 # bytes that a byte of a .warc.gz may become, beyond the first 64 MB (pages: 5 to 20)
CHANCE_TEXTS = 2000                     # texts that are scored with other pictures, where that sets the threshold


def fail(message):
    raise SystemExit(f"lait.py: {message}")


class Dropped(Exception):
    """A document, image or sentence that does not pass; its text is the reason it is counted under."""


# ----------------------------------------------------------------------------------------------- filters (exchangeable)

ENGLISH = frozenset("the of and to that is was for on with as by at from are were be this which have has had it its "
                    "not but they she their his her you we our or an who will would can could there been when what "
                    "into than about".split())


def language(text, declared):
    """English? text: what the page shows; declared: its lang attribute or None. From 20 words on the text decides:
    at most a fifth of its letters outside ASCII, at least 15 % function words. A shorter one: its letters,
    and `declared`, if given."""
    words = re.findall(r"[^\W\d_]+", text[:20000].lower())
    letters = "".join(words)
    if letters and sum(c > "\x7f" for c in letters) > 0.2 * len(letters):
        return "not English"
    if len(words) >= 20:
        return None if sum(w in ENGLISH for w in words) >= 0.15 * len(words) else "not English"
    return "not English" if declared and not declared.lower().startswith("en") else None


def natural(image):
    """A photograph? image: PIL RGB. Drawings, logos, charts, screenshots and blanks have flat areas (neighbors
    of exactly equal color), one color over most of the picture, or few colors; banners are long."""
    width, height = image.size
    if max(width, height) > 3.5 * min(width, height):
        return "banner"
    left, top = max(0, width - 1024) // 2, max(0, height - 1024) // 2
    pixels = (np.asarray(image.crop((left, top, min(width, left + 1024), min(height, top + 1024))))
              .astype(np.int32))  # (H, W, 3)
    packed = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
    if (packed[:, 1:] == packed[:, :-1]).mean() > 0.6:
        return "flat"
    bins = np.bincount(((pixels[..., 0] >> 4 << 8) + (pixels[..., 1] >> 4 << 4) + (pixels[..., 2] >> 4)).ravel(),
                       minlength=4096)
    if bins.max() > 0.7 * bins.sum():
        return "one color"
    return "few colors" if (bins > 1e-4 * bins.sum()).sum() < 12 else None


UNSAFE = re.compile(r"\b(?:porn\w*|xxx|nsfw|nudes?|nudity|hentai|erotica?|sex(?:y|ual|cam)?|escorts?|milf|fetish|"
                    r"camgirls?)\b")


def safe(image, texts, page):
    """image: PIL RGB, which this default does not look at. texts: the image's, raw; page: the Page (`rating`, `title`,
    `url`). Drops what labels itself (meta rating adult, mature, restricted or RTA) and what says an unsafe word."""
    if re.search(r"adult|mature|restricted|rta-5042", page.rating):
        return "labelled adult"
    said = " ".join([page.title, re.sub(r"[^A-Za-z]+", " ", page.url), *texts])
    return "unsafe words" if UNSAFE.search(said.lower()) else None


def plug(spec, default):
    """"file.py:function" -> the function; empty -> the default."""
    if not spec:
        return default
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        fail(f"{spec}: a filter is given as FILE.py:FUNCTION, and there is no file {path!r}")
    function = runpy.run_path(path).get(name)
    return function if callable(function) else fail(f"{path}: no function {name!r} in it")


# ------------------------------------------------------------------------------------------------------------ sentences

SPAM = ("click here", "click to", "buy now", "shop now", "order now", "sign up", "subscribe", "free shipping",
        "add to cart", "read more", "learn more", "all rights reserved", "terms of", "privacy policy", "cookies",
        "advertisement", "sponsored", "limited offer", "discount code", "best price", "casino", "viagra",
        "download now", "follow us", "share this", "log in", "stock photo", "image may contain",
        "no description available", "lorem ipsum", "enable javascript")
SPANS = re.compile("|".join((
    # tags, addresses, handles
    r"<[^<>]{1,200}>", r"\b(?:https?://|www\.)\S+", r"[\w.+-]{1,64}@[\w.-]{1,64}", r"[@#]\w+",
    r"\b[\w%./-]{1,200}\.(?:jpe?g|png|gif|webp|html?|com|org|net)\b",                       # names of files and sites
    r"[(\[](?:photo|image|picture|credit|source|via|ap|afp|getty|reuters)\b[^)\]]{0,100}[)\]]",        # credits
    # and site names after |
    r"\b(?:photo|image|picture)s? (?:by|credit|courtesy)\b[^.!?]{0,100}", r"\|[^.!?]{0,100}")), re.I)


def sentences(text, limit=2000):
    """A raw text -> its sentences, without bad spans (SPANS) and emoji."""
    text = unicodedata.normalize("NFKC", text[:limit])
    text = "".join(c if unicodedata.category(c)[0] in "LNPZ" or c in "$+|<>=~\n\t" else " " for c in text)
    for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])", SPANS.sub(" ", " ".join(text.split()))):
        yield " ".join(part.split()).strip(" -,:;|*_=~")


def reject(sentence, args, words, spam):
    """None, or the rule that a sentence breaks. words: the vocabulary's (None: that rule is off);
    spam: a compiled pattern."""
    found = re.findall(r"[a-z0-9]+(?:['’][a-z]+)?", sentence.lower())
    if not found:
        return "empty"
    if len(found) < args.min_words:
        return "too short"
    if len(found) > args.max_words:
        return "too long"
    if sum(c.isascii() and (c.isalpha() or c == " ") for c in sentence) < 0.8 * len(sentence):
        return "not words"
    thrice = any(a == b == c for a, b, c in zip(found, found[1:], found[2:]))
    if thrice or len(set(found)) < 0.6 * len(found) or max(Counter(zip(found, found[1:])).values(), default=0) > 2:
        return "repeated words"
    if UNSAFE.search(sentence.lower()):
        return "unsafe words"
    if spam.search(sentence.lower()):
        return "spam"
    judged = [w for w in found if w.isalpha()]
    if words is not None and sum(w not in words for w in judged) > args.max_oov * len(judged):
        return "out of vocabulary"
    return None


# ------------------------------------------------------------------------------------------------------------ web pages

VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
BLOCK = frozenset("html body main article section div header footer nav aside figure figcaption p ul ol li table tr td "
                  "th tbody thead dl dt dd h1 h2 h3 h4 h5 h6 blockquote pre form center picture noscript script style "
                  "template svg select textarea title".split())
CLOSES_ITSELF = frozenset("p li tr td th dt dd".split())            # HTML lets these end unsaid where the next begins
UNSEEN = frozenset("script style template svg select textarea".split())
BAD_PLACE = frozenset("ad ads advert advertisement sponsor sponsored banner sidebar related recommended footer header "
                      "nav menu logo navigation icon icons avatar thumb thumbs thumbnail comment comments share social "
                      "promo widget sprite button badge pixel spacer tracking".split())
# no other decoder of Python's is run on a stranger's word
CHARSETS = re.compile(r"utf-?8|us-ascii|ascii|latin-?1|iso-?8859-?\d{1,2}|windows-125\d|cp125\d|shift_jis|"
                      r"euc-(?:jp|kr)|gb2312|gbk|gb18030|big5|koi8-[ru]", re.I)


def decode(raw, header=""):
    """bytes -> str, by byte order mark, HTTP header, <meta>, else UTF-8; what does not decode is replaced.
    Dropped: no page."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "replace")
    if b"\0" in raw[:4096] or not re.search(rb"<\s*[a-zA-Z!]", raw):
        raise Dropped("not HTML")
    named = re.search(r"charset\s*=\s*[\"']?([\w-]+)", header + " " + raw[:2048].decode("latin-1"), re.I)
    named = named[1] if named and CHARSETS.fullmatch(named[1]) else "utf-8"
    try:
        return raw.decode("cp1252" if re.fullmatch(r"(us-)?ascii|latin-?1|iso-?8859-?1", named, re.I) else named,
                          "replace")
    except LookupError:
        return raw.decode("utf-8", "replace")


class Page(HTMLParser):
    """What one page says of its images. After feed() and close(): `images`, a list of dicts (sources: addresses, the
    largest first; alt, title, caption, before, after; score: is it the page's dominant one, by where it stands and what
    it says of itself); `text`, all it shows; `lang`, `title`, `rating`, `base` (or None). Only block elements are
    tracked."""

    def __init__(self, url):
        super().__init__(convert_charrefs=True)
        self.url, self.base, self.lang, self.title, self.rating = url, None, None, "", ""
        self.parents = [0]                      # of each block element, by its number in the page; 0: the page
        self.stack = [("", 0, "", 0)]  # (tag, number, role: "" unseen caption title, place: 1 content, -1 margin, or 0)
        self.flow = []                      # (block number, list of strings or number of an image), in the page's order
        self.ended = True                       # does the next text begin a new block of text?
        self.words, self.images, self.own, self.picture, self.figures, self.headings = [], [], set(), [], [], 0

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in reversed(attrs)}                # the first of a doubled attribute counts
        top, _, role, place = self.stack[-1]
        if tag == "img":
            if role != "unseen":                                    # else nobody sees it: it is no image of the page
                self.add_image(attrs)
        elif tag == "html":
            self.lang = attrs.get("lang") or attrs.get("xml:lang") or self.lang
        elif tag == "base" and self.base is None:
            self.base = attrs.get("href")
        elif tag == "meta":
            name = (attrs.get("property") or attrs.get("name") or "").lower()
            if name in ("og:image", "og:image:url", "twitter:image"):
                self.own.add(attrs.get("content", "").strip())
            elif name == "rating":
                self.rating = attrs.get("content", "").lower()[:100]
        elif tag == "source" and top == "picture":
            self.picture += srcset(attrs.get("srcset", ""))
        elif tag == "link" and attrs.get("rel", "").lower() == "image_src":
            self.own.add(attrs.get("href", "").strip())
        if tag in VOID or tag not in BLOCK:
            self.ended |= tag in ("br", "hr", "img")
            return
        if top in CLOSES_ITSELF and (top in (tag, "p") or {top, tag} in ({"td", "th"}, {"dt", "dd"})):
            if not (top == "p" and tag in UNSEEN | {"noscript", "picture"}):
                self.stack.pop()
        if len(self.stack) > MAX_DEPTH:
            raise Dropped("hostile: nested too deep")
        _, parent, role, place = self.stack[-1]
        if "hidden" in attrs or tag in UNSEEN or re.search(r"display\s*:\s*none", attrs.get("style", "")[:500]):
            role = "unseen"
        called = " ".join(attrs.get(k, "") for k in ("class", "id", "role"))
        here = (-1 if tag in ("nav", "header", "footer", "aside") or bad_name(called)
                else tag in ("article", "main", "figure"))
        self.stack.append((tag, len(self.parents), role or {"title": "title", "figcaption": "caption"}.get(tag, ""),
                           -1 if place < 0 else here or place))
        self.parents.append(parent)
        self.ended = True
        self.headings += tag == "h1"
        if tag == "figure":
            self.figures.append(len(self.images))

    def handle_endtag(self, tag):
        if tag not in BLOCK or all(entry[0] != tag for entry in self.stack):
            return
        ended = None
        while ended != tag:
            ended = self.stack.pop()[0]
            if ended == "figure" and self.figures:
                self.figures.pop()
        self.ended = True
        if tag == "picture":
            self.picture = []

    def handle_data(self, text):
        _, number, role, _ = self.stack[-1]
        if role == "title":
            self.title += text[:300 - len(self.title)]
        if role in ("title", "unseen") or not text.strip():
            return
        self.words.append(text)
        if role == "caption" and self.figures:
            for image in self.images[self.figures[-1]:]:
                image["caption"] += (" " + text)[:2000 - len(image["caption"])]
        elif self.ended:
            self.flow.append((number, [text]))
            self.ended = False
        else:
            self.flow[-1][1].append(text)

    def add_image(self, attrs):
        sources = [*self.picture, *srcset(attrs.get("srcset") or attrs.get("data-srcset") or ""), attrs.get("data-src"),
                   attrs.get("data-original"), attrs.get("src")]
        image = {"sources": list(dict.fromkeys(s.strip() for s in sources if s and s.strip()))[:20],
                 "caption": "", "before": "", "after": "",
                 "alt": attrs.get("alt", "")[:2000], "title": attrs.get("title", "")[:2000]}
        sides = [int(m[0]) for m in (re.match(r"\d{1,5}", attrs.get(k, "").strip()) for k in ("width", "height")) if m]
        called = " ".join([attrs.get("class", ""), attrs.get("id", ""), *image["sources"][-1:]])
        place = self.stack[-1][3]
        image["score"] = 2 * (place > 0) - 3 * (place < 0) - 3 * bad_name(called) + (self.headings == 1)
        if sides:
            image["score"] += -3 if min(sides) <= 300 else len(sides) == 2
        self.headings += self.headings == 1                             # only the first image after <h1> is that
        self.flow.append((self.stack[-1][1], len(self.images)))
        self.images.append(image)

    def around(self, number):
        """A block, its parent, its grandparent ..., the page."""
        yield number
        while number:
            number = self.parents[number]
            yield number

    def close(self):
        super().close()
        self.text = " ".join(" ".join(self.words).split())
        for k, (number, n) in enumerate(self.flow):
            if isinstance(n, list):
                continue
            image = self.images[n]
            # its block's grandparent: what is outside is not near
            part = list(itertools.islice(self.around(number), 3))[-1]
            for side, j in (("before", k - 1), ("after", k + 1)):
                if (0 <= j < len(self.flow) and isinstance(self.flow[j][1], list)
                        and part in self.around(self.flow[j][0])):
                    text = "".join(self.flow[j][1])
                    image[side] = text[-1000:] if side == "before" else text[:1000]
            described = max(len(image["alt"].split()), len(image["caption"].split())) >= 3
            own = any(same_address(a, b) for a in image["sources"] for b in self.own)           # og:image
            image["score"] += (len(self.images) == 1) + described + 3 * own


def bad_name(text):
    return not BAD_PLACE.isdisjoint(re.split(r"[^a-z]+", text[:1000].lower()))


def same_address(a, b):
    """Two addresses of one picture, one of which may be relative."""
    a, b = (re.sub(r"^(https?:)?//", "", x).split("?")[0].lstrip("./") for x in (a, b))
    return bool(a) and (a == b or a.endswith("/" + b) or b.endswith("/" + a))


def srcset(text):
    """"a.jpg 1x, b.jpg 800w" -> addresses, the largest first."""
    found = re.findall(r"([^\s,]\S*[^\s,])(?:\s+(\d{1,6}(?:\.\d{1,3})?)[wx])?\s*(?:,|$)", text[:4000])
    return [address for address, size in sorted(found, key=lambda f: -float(f[1] or 1))]


@contextmanager
def cpu_limit(seconds):
    """Dropped after so many seconds of this process's own time (the main thread's;
    elsewhere there is no such limit)."""
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
        html = re.sub(r"<!\[[^<>]{0,100}>", " ", html).replace("<![", "&lt;![")     # html.parser chokes on <![endif]>
        page.feed(html)
        page.close()
    return page


# ------------------------------------------------------------------------------------------------------------ documents

def listing(root, shard=0, shards=1):
    """Yields (path, name from root) of the page files and archives below a folder (or of the one file) that are this
    shard's, in a fixed order. Links to folders are not followed."""
    top, files = os.path.dirname(root), [(os.path.dirname(root), [], [os.path.basename(root)])]
    if os.path.isdir(root):
        top, files = root, os.walk(root)
    for folder, folders, names in files:
        folders.sort()
        for path in (os.path.join(folder, n) for n in sorted(names) if n.lower().endswith(PAGE_TYPES + ARCHIVE_TYPES)):
            name = os.path.relpath(path, top or ".")
            if zlib.crc32(name.encode("utf-8", "surrogateescape")) % shards == shard:
                yield path, name


def documents(files, root, limit):
    """files: (path, name) -> yields (name, address or None, bytes or Dropped, Content-Type), one for each page file
    and each response in an archive. limit: bytes of a page."""
    for path, name in files:
        try:
            inside(path, root)
            if name.lower().endswith(ARCHIVE_TYPES):
                yield from archive(path, name, limit)
            elif os.path.getsize(path) > limit:
                raise Dropped("page too large")
            else:
                with open(path, "rb") as f:
                    yield name, None, f.read(), ""
        except Dropped as e:
            yield name, None, e, ""
        except OSError:
            yield name, None, Dropped("unreadable file"), ""


def inside(path, root):
    """Dropped: no plain file (a pipe would wait forever), or a link that leads out of root."""
    real, home = os.path.realpath(path), os.path.realpath(root)
    if real != home and not real.startswith(os.path.join(home, "")):
        raise Dropped("link out of the folder")
    if not os.path.isfile(real):
        raise Dropped("not a file")


def archive(path, name, limit):
    """Yields what documents() yields for the response records of a WARC file, gzipped or not, as a stream.
    Dropped: a bomb."""
    try:
        with open(path, "rb") as raw, (gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw) as f:
            while True:
                line = next((x for x in (f.readline(1 << 16) for _ in range(100)) if x not in (b"\r\n", b"\n")),
                            b"blank")
                if not line:
                    return
                if not line.startswith(b"WARC/"):
                    raise ValueError("no WARC record")
                fields = http.client.parse_headers(f)
                size, kind = int(fields["content-length"] or "none"), fields["warc-type"]
                if not 0 <= size <= MAX_RECORD or f.tell() > MAX_RATIO * raw.tell() + (64 << 20):
                    raise Dropped("decompression bomb")
                wanted = kind == "response" and size <= 2 * limit + (1 << 16)
                body = f.read(size) if wanted else b""
                passed = len(body)
                while passed < size:                                    # what is not wanted goes by in pieces
                    passed += len(piece := f.read(min(size - passed, 1 << 20)))
                    if not piece:
                        raise EOFError
                if kind == "response":
                    address = (fields["warc-target-uri"] or "").strip("<> ")
                    found = response(body, limit) if wanted else (Dropped("page too large"), "")
                    yield f"{name} {address}", address, *found
    except (OSError, EOFError, ValueError, http.client.HTTPException, zlib.error):          # what came before it stays
        yield name, None, Dropped("broken archive"), ""


class Recorded(io.BytesIO):
    """Bytes that http.client takes for a socket."""

    def makefile(self, mode):
        return self


def response(block, limit):
    """The HTTP response in a record -> (page bytes or Dropped, Content-Type)."""
    try:
        reply = http.client.HTTPResponse(Recorded(re.sub(rb"\AHTTP/[\d.]+", b"HTTP/1.1", block)))
        reply.begin()
        content_type = reply.headers["content-type"] or ""
        if reply.status != 200:
            raise Dropped("HTTP status not 200")
        if "html" not in content_type.lower():
            raise Dropped("not HTML")
        try:
            body = reply.read()
        except http.client.IncompleteRead as e:                 # crawlers cut pages off; one without a byte is broken
            body = e.partial
            if not body:
                raise
        coding = (reply.headers["content-encoding"] or "identity").lower()
        if coding in ("gzip", "x-gzip", "deflate"):                     # never more than limit + 1 bytes are made
            engine = zlib.decompressobj(47 if "gzip" in coding or body[:1] == b"\x78" else -15)
            body = engine.decompress(body, limit + 1)
            if len(body) > limit:
                raise Dropped("decompression bomb")
        elif coding != "identity":
            raise Dropped("unknown encoding")
        if len(body) > limit:
            raise Dropped("page too large")
        return body, content_type
    except Dropped as e:
        return e, ""
    except (ValueError, http.client.HTTPException, zlib.error):
        return Dropped("broken response"), ""


# --------------------------------------------------------------------------------------------------------------- images

def locate(source, name, page, root):
    """An image's address on a page -> the name of its file from `root`. Dropped: there is none,
    or the address is no image's.

    name: the page file's name from the root; page.url: "" for a page file, else the address it was read from."""
    source = re.sub(r"[\t\n\r]", "", source)
    if source[:5].lower() == "data:":
        raise Dropped("inline data")
    try:
        base = urljoin(page.url, page.base or "")
        address = urlsplit(urljoin(base, source) if re.match(r"(https?:)?//", base, re.I) else source)
        host, path = (address.hostname or "").lower(), unquote(address.path)
    except ValueError:
        raise Dropped("broken address") from None
    if address.scheme not in ("http", "https", ""):
        raise Dropped("foreign scheme")
    if "\0" in path or "\\" in path or ".." in host or address.netloc and ".." in path.split("/"):
        raise Dropped("path trick")
    if address.netloc or address.scheme:
        if not re.fullmatch(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?", host):
            raise Dropped("broken address")
        names = [f"{host}/{path.lstrip('/')}"]
        names = [f"{names[0]}?{address.query}"] * bool(address.query) + names
    elif path.startswith("/"):
        names = [name.split(os.sep)[0] + path, path.lstrip("/")]        # wget -x: the first folder is the host
    else:
        names = [os.path.join(os.path.dirname(name), path)]
    for candidate in map(os.path.normpath, names):
        if candidate.startswith("..") or os.path.isabs(candidate):
            raise Dropped("path trick")
        try:
            if os.path.isfile(os.path.join(root, candidate)):
                inside(os.path.join(root, candidate), root)
                return candidate
        except Dropped:
            raise Dropped("path trick") from None
        except (ValueError, OSError):                                   # a name that no file system takes
            continue
    raise Dropped("missing file")


def open_image(path, args):
    """-> (PIL RGB image, extension, sha256 of the bytes). Dropped: unreadable, a bomb, too small, animated."""
    try:
        if os.path.getsize(path) > args.max_image << 20:
            raise Dropped("file too large")
        with open(path, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()
        with Image.open(path, formats=list(FORMATS)) as image:          # the header only
            kind = image.format
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if min(image.size) <= args.min_side:
                raise Dropped(f"side up to {args.min_side} px")
            if getattr(image, "is_animated", False):
                raise Dropped("unnatural: animated")
        return data.load_image(path), FORMATS[kind], digest
    except Image.DecompressionBombError:
        raise Dropped("decompression bomb") from None
    except UnidentifiedImageError:
        raise Dropped("unknown format") from None
    except (data.BadImage, OSError, ValueError, SyntaxError, EOFError, zlib.error):
        raise Dropped("corrupt") from None


# -------------------------------------------------------------------------------------------------------------- scoring

class Scorer:
    """How well text and picture fit, by a run directory: the cosine of encode_image and encode_text."""

    def __init__(self, run, device, batch_size):
        self.model, info = weights.load_run(run, device)
        views = sys.modules[type(self.model).__module__].VIEWS[info["task"]]
        keys = data.view_keys(views)
        if not all(callable(getattr(self.model, m, None)) for m in ("encode_image", "encode_text")):
            fail(f"--score {run}: a {info['task']} run that offers no encode_image and encode_text")
        if ("caption" not in keys.values() or views["source"] != "pairs"
                or not set(keys.values()) & set(data.IMAGE_VIEWS)):
            fail(f"--score {run}: it reads {', '.join(keys.values())}; here are only pictures and sentences: "
                 "name a run whose views are an image and a caption")
        drop = {k for k, v in keys.items() if v not in data.IMAGE_VIEWS and v not in ("caption", "paraphrase")}
        self.views = {k: v for k, v in views.items() if k not in drop}
        self.tokenizer = data.get_tokenizer(os.path.join(info["path"], "vocab.txt"))
        if self.tokenizer.vocab_size != self.model.cfg.vocab_size:
            fail(f"{info['path']}/vocab.txt: {self.tokenizer.vocab_size} tokens, "
                 f"the run has {self.model.cfg.vocab_size}")
        self.device, self.batch_size = device, batch_size
        self.about = f"cosine of {run} ({info['model']} {info['task']}, step {info.get('step', '?')})"

    def run(self, fn, what, pairs):
        """pairs: list of (path, text) -> fn of all of them, on the CPU.
        The last batch is filled up: all have one shape."""
        records = data.Records("pairs", None)
        for n, (path, text) in enumerate(pairs + pairs[-1:] * (-len(pairs) % self.batch_size)):
            records.append({"image": path, "image_id": n, "caption": [text]})
        sizes, out = (self.model.cfg.image_size, self.model.cfg.max_text), []
        for batch in data.iter_eval(records, self.views, self.tokenizer, *sizes, what=what, batch_size=self.batch_size):
            out.append(fn(data.move(batch, self.device)).double().cpu())
        return torch.cat(out)[:len(pairs)]

    @torch.inference_mode()
    def __call__(self, pairs):
        """pairs: list of (path of a picture, text) -> list of float, rounded: what else is in the batch does
        not show."""
        place = {path: n for n, path in enumerate(dict.fromkeys(path for path, _ in pairs))}
        image = self.run(self.model.encode_image, "image", [(path, "") for path in place])
        text = self.run(self.model.encode_text, "text", pairs)
        score = (image[[place[path] for path, _ in pairs]] * text).sum(1)
        if not score.isfinite().all():
            fail(f"--score: the {self.about} gives scores that are no numbers")
        return [round(x, 4) for x in score.tolist()]


# ------------------------------------------------------------------------------------------------------------------ map

class Harvest:
    """Documents -> candidates, with the filters and limits of the command line. `counts`: (stage, what) -> how many."""

    def __init__(self, args):
        self.args, self.counts, self.found = args, Counter(), []
        self.language, self.natural, self.safe = (plug(args.language, language), plug(args.natural, natural),
                                                  plug(args.safe, safe))
        self.words = set(data.get_tokenizer(args.vocab).words) if args.vocab else None
        phrases = SPAM if not args.spam else [line.strip().lower() for _, line in data.lines_of(args.spam)]
        self.spam = re.compile("|".join(rf"\b{re.escape(p)}\b" for p in phrases) or r"(?!)")
        self.scorer = Scorer(args.score, args.device, args.batch_size) if args.score else None

    def document(self, name, address, raw, content_type):
        """Adds the candidates of one document to `found`."""
        self.counts["pages", "in"] += 1
        try:
            if isinstance(raw, Dropped):
                raise raw
            page = parse(decode(raw, content_type), address or "", self.args.page_seconds)
            reason = self.language(page.text or " ".join(i["alt"] for i in page.images), page.lang)
            if reason or not page.images:
                raise Dropped(reason or "no image")
        except Dropped as e:
            self.counts["pages", str(e)] += 1
            return
        self.counts["pages", "out"] += 1
        for n, image in enumerate(sorted(page.images, key=lambda i: -i["score"])):      # stable: of equals the earlier
            self.counts["images", "in"] += 1
            try:
                if n >= self.args.per_page or image["score"] <= 0:
                    raise Dropped("not dominant")
                self.found += self.image(image, name, page)
                self.counts["images", "out"] += 1
            except Dropped as e:
                self.counts["images", str(e)] += 1

    def image(self, image, name, page):
        """One dominant image -> its candidates: a list of (sha256, record)."""
        trouble = Dropped("no address")
        for source in image["sources"]:
            try:
                file = locate(source, name, page, self.args.images)
                break
            except Dropped as e:                                        # another may do, but not beside a trick
                if str(e) == "path trick":
                    raise
                trouble = e
        else:
            raise trouble
        picture, kind, digest = open_image(os.path.join(self.args.images, file), self.args)
        raw = {k: [image[k]] for k in ("caption", "alt", "title")} | {"near": [image["before"], image["after"]]}
        if reason := self.natural(picture):
            raise Dropped(f"unnatural: {reason}")
        if reason := self.safe(picture, [t for texts in raw.values() for t in texts if t], page):
            raise Dropped(f"unsafe: {reason}")
        texts = {}
        for source in SOURCES:
            for n, text in enumerate(raw[source]):
                found = list(sentences(text)) if text.strip() else []
                if source == "near":
                    found = found[:2] if n else found[-2:]              # the two sentences next to the picture
                for sentence in found:
                    reason = reject(sentence, self.args, self.words, self.spam)
                    if not reason and normal(sentence) in map(normal, texts):
                        reason = "said twice of one image"
                    self.counts["texts", "in"] += 1
                    self.counts["texts", reason or "out"] += 1
                    if not reason:
                        texts[sentence] = source
        if not texts:
            raise Dropped("no text left")
        about = {"image": file, "kind": kind, "width": picture.width, "height": picture.height, "page": name}
        return [(digest, {**about, "text": text, "source": source}) for text, source in texts.items()]

    def candidates(self):
        """The pairs found since the last call -> list of lines "image hash TAB text hash TAB json"."""
        found, self.found, scores = self.found, [], itertools.repeat(None)
        if self.scorer and found:
            scores = self.scorer([(os.path.join(self.args.images, row["image"]), row["text"]) for _, row in found])
        return [f"{digest}\t{hashlib.sha256(normal(row['text']).encode()).hexdigest()}\t"
                f"{json.dumps({**row, 'score': score})}\n"
                for (digest, row), score in zip(found, scores)]


def normal(text):
    """What two texts must share to be the same: the words, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def write(path, lines):
    """A text file, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.writelines(lines)
    os.replace(f"{path}.tmp", path)


def first_line(path):
    with open(path, encoding="utf-8") as f:
        return json.loads(f.readline())


@contextmanager
def alone(folder):
    """The lock of a folder: two processes never write one shard. It ends with the process, however that ends."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{folder}: another process is at work on it")
        yield


MAP_SETTINGS = ("images language natural safe vocab spam score min_side per_page min_words max_words max_oov max_page "
                "max_image page_seconds part").split()


def parts(folder):
    """The parts of a shard that are finished, in order."""
    files = (os.path.join(folder, f"part-{n:06d}.txt") for n in itertools.count())
    return list(itertools.takewhile(os.path.exists, files))


def run_map(args, shard, shards):
    """Documents of one shard -> OUT/candidates/I-of-N/part-*.txt: a line of JSON {counts, last}, then candidates.
    A finished part is never made again; the settings and the list of files must be those it was begun with."""
    folder = os.path.join(args.out, "candidates", f"{shard:05d}-of-{shards:05d}")
    with alone(folder):
        digest = hashlib.sha256()
        for path, name in listing(args.pages, shard, shards):
            digest.update(f"{name}\0{os.lstat(path).st_size}\n".encode("utf-8", "surrogateescape"))
        plan = {k: getattr(args, k) for k in MAP_SETTINGS} | {"in": args.pages, "files": digest.hexdigest()}
        note, finished = os.path.join(folder, "plan.json"), [first_line(p) for p in parts(folder)]
        if finished:
            old = first_line(note)
            if changed := [k for k in plan if plan[k] != old.get(k)]:
                fail(f"{folder}: begun with other {', '.join(changed)} (see plan.json): "
                     "go on with those, or delete the folder")
        write(note, [json.dumps(plan)])
        done = sum(n for head in finished for *key, n in head["counts"] if key == ["pages", "in"])
        if finished and finished[-1]["last"]:
            return
        harvest = Harvest(args)
        stream = documents(listing(args.pages, shard, shards), args.pages, args.max_page << 20)
        stream = tqdm(itertools.islice(stream, done, None), f"pages {shard}/{shards}",
                      initial=done, unit="page", disable=None)
        stream = iter(stream)                                           # once: each iter() of a tqdm is a new one
        for part in itertools.count(len(finished)):
            n = 0
            for n, document in enumerate(itertools.islice(stream, args.part), 1):
                harvest.document(*document)
            lines = harvest.candidates()
            head = {"counts": [[*key, n] for key, n in sorted(harvest.counts.items())], "last": n < args.part}
            write(os.path.join(folder, f"part-{part:06d}.txt"), [json.dumps(head) + "\n"] + lines)
            harvest.counts.clear()
            if head["last"]:
                return


# --------------------------------------------------------------------------------------------------------------- reduce

def external_sort(lines, folder, most, fan=32):
    """Yields lines (str, each with its newline) in order, holding at most `most` of them: sorted runs on disk,
    merged."""
    os.makedirs(folder, exist_ok=True)
    levels, number, lines = defaultdict(list), itertools.count(), iter(lines)

    def spill(ordered, level):
        path = os.path.join(folder, f"run-{next(number):06d}.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(ordered)
        levels[level].append(path)
        if len(levels[level]) == fan:
            spill(merged(levels.pop(level)), level + 1)

    def merged(paths):
        with ExitStack() as stack:
            yield from heapq.merge(*(stack.enter_context(open(p, encoding="utf-8", newline="\n")) for p in paths))
        for p in paths:
            os.remove(p)

    while chunk := list(itertools.islice(lines, most)):
        spill(sorted(chunk), 0)
    yield from merged([p for level in levels.values() for p in level])


def all_parts(out):
    """-> (the parts of all shards of the map, the settings they share). SystemExit: a shard is missing or of other
    settings."""
    home = os.path.join(out, "candidates")
    names = sorted(n for n in os.listdir(home) if re.fullmatch(r"\d+-of-\d+", n)) if os.path.isdir(home) else []
    if not names:
        fail(f"{home}: no candidates here: run the map first (--in PAGES --out {out})")
    if len({n.split("-of-")[1] for n in names}) > 1:
        fail(f"{home}: holds shards of different divisions ({', '.join(names[:4])} ...): delete those of one")
    found, plan, shards = [], None, int(names[0].split("-of-")[1])
    for i in range(shards):
        folder = os.path.join(home, f"{i:05d}-of-{shards:05d}")
        mine = parts(folder)
        if not mine or not first_line(mine[-1])["last"]:
            fail(f"{folder}: not finished: run --shard {i}/{shards} (again) before --merge")
        own = first_line(os.path.join(folder, "plan.json"))
        plan, found = plan or own, found + mine
        if different := [k for k in MAP_SETTINGS if plan[k] != own[k]]:
            fail(f"{folder}: made with other settings than shard 0: {', '.join(different)}")
    return found, plan


def candidates_of(files):
    for file in files:
        with open(file, encoding="utf-8", newline="\n") as f:
            f.readline()
            yield from f


def threshold(lines, plan, root, args):
    """lines: candidates, some sorted by image hash (a hash's order is random) -> (least score or None,
    how it came about)."""
    if not plan["score"]:
        if args.min_score is not None:
            fail("--min_score: these candidates were not scored (--score RUN)")
        return None, f"none (no --score): the best text of an image is its {', else its '.join(SOURCES)}"
    if args.min_score is not None:
        return args.min_score, f"by {plan['score']}; at least {args.min_score:g} (--min_score)"
    rows = [(line.split("\t", 1)[0], json.loads(line.split("\t", 2)[2])) for line in lines]
    half = len(rows) // 2
    pairs = [(os.path.join(root, other["image"]), row["text"])
             for (a, row), (b, other) in zip(rows, rows[half:] + rows[:half]) if a != b]
    if len(pairs) < 100:
        fail(f"{len(pairs)} texts to score with other pictures are too few for a threshold: give --min_score")
    scorer = Scorer(plan["score"], args.device, args.batch_size)
    least = round(float(np.quantile(scorer(pairs), args.chance_quantile)), 4)
    share = f"{args.chance_quantile:.0%} quantile of {len(pairs):,} texts with other pictures"
    return least, f"{scorer.about}; at least {least:.4f}, the {share}"


def best_texts(lines, least, counts):
    """lines, sorted -> yields "text hash TAB image hash TAB json" of the best text of each image."""
    for image, group in itertools.groupby(lines, lambda line: line.split("\t", 1)[0]):
        best = last = None
        for _, text, row in (line.rstrip("\n").split("\t", 2) for line in group):
            counts["pairs", "in"] += 1
            row = json.loads(row)
            if least is not None and row["score"] < least:
                counts["pairs", "below the score"] += 1
                continue
            if best:                                            # one of the two goes; the same texts stand side by side
                counts["pairs", "same pair on several pages" if text == last else "not the best text"] += 1
            rank = (row["score"] if least is not None else 0, -SOURCES.index(row["source"]), row["text"], row["page"])
            best, last = max(best or (rank, text, row), (rank, text, row), key=lambda b: b[0]), text
        if best:
            yield f"{best[1]}\t{image}\t{json.dumps(best[2])}\n"


def rare_texts(lines, most, counts):
    """lines sorted by text hash -> yields those whose text belongs to at most `most` images; of the others none."""
    for _, group in itertools.groupby(lines, lambda line: line.split("\t", 1)[0]):
        few = list(itertools.islice(group, most))
        if more := sum(1 for _ in group):
            counts["pairs", "text of too many images"] += len(few) + more
        else:
            yield from few


def run_merge(args):
    """All candidates -> OUT/00000.tar ..., OUT/report.json, which is printed. Begins anew after a stop;
    what is done stays."""
    files, plan = all_parts(args.out)
    home, report = os.path.join(args.out, "candidates"), os.path.join(args.out, "report.json")
    with alone(home):
        root, note, work = args.images or plan["images"], os.path.join(home, "merge.json"), os.path.join(home, "merge")
        if not os.path.isdir(root):
            fail(f"--images {root}: no such directory")
        digest = hashlib.sha256("".join(f"{p} {os.path.getsize(p)}\n" for p in files).encode()).hexdigest()
        settings = {k: getattr(args, k) for k in ("min_score", "chance_quantile", "max_images", "shard_size")}
        settings["candidates"] = digest
        same = os.path.exists(note) and first_line(note) == settings
        if same and os.path.exists(report):
            with open(report, encoding="utf-8") as f:
                return show(json.load(f), args.out)
        if not same and (tars := [n for n in sorted(os.listdir(args.out)) if n.endswith(".tar")]):
            fail(f"{args.out}: holds {len(tars)} shards of another merge ({tars[0]} ...): "
                 "delete them, or name another --out")
        if os.path.exists(report):
            os.remove(report)
        write(note, [json.dumps(settings)])
        shutil.rmtree(work, ignore_errors=True)
        counts = Counter()
        for file in files:
            counts.update({(stage, what): n for stage, what, n in first_line(file)["counts"]})
        lines = tqdm(candidates_of(files), "sorting", total=counts["texts", "out"], unit="pair", disable=None)
        lines = external_sort(lines, os.path.join(work, "by-image"), args.sort_lines)
        some = list(itertools.islice(lines, CHANCE_TEXTS))
        least, how = threshold(some, plan, root, args)
        lines = best_texts(itertools.chain(some, lines), least, counts)
        lines = external_sort(lines, os.path.join(work, "by-text"), args.sort_lines)
        lines = iter(tqdm(rare_texts(lines, args.max_images, counts), "writing shards", unit="pair", disable=None))
        words, number = 0, itertools.count()
        while chunk := list(itertools.islice(lines, args.shard_size)):
            words += pack(os.path.join(args.out, f"{next(number):05d}.tar"), chunk, root,
                          plan["max_image"] << 20, counts)
        shutil.rmtree(work, ignore_errors=True)
        result = summary(plan, counts, how, words)
        write(report, [json.dumps(result, indent=1)])
        show(result, args.out)


def pack(path, lines, root, limit, counts):
    """Candidates -> a tar of their pictures' own bytes, texts and records -> how many words the texts have."""
    words = 0
    with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as tar:
        for k, line in enumerate(lines):
            _, digest, row = line.rstrip("\n").split("\t", 2)
            row, key = json.loads(row), f"{os.path.basename(path)[:-4]}{k:06d}"
            try:
                with open(os.path.join(root, row["image"]), "rb") as f:
                    raw = f.read(limit + 1)
            except OSError:
                raw = b""
            if hashlib.sha256(raw).hexdigest() != digest:               # gone, or another picture since the map
                counts["pairs", "file changed since the map"] += 1
                continue
            about = {"caption": row["text"], "url": row["image"], "key": key, "sha256": digest}
            about |= {k: row[k] for k in ("page", "source", "score", "width", "height")}
            for kind, content in ((row["kind"], raw), ("txt", row["text"].encode()),
                                  ("json", json.dumps(about).encode())):
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
            counts["pairs", "out"] += 1
            words += len(row["text"].split())
    os.replace(f"{path}.tmp", path)
    return words


def summary(plan, counts, how, words):
    """The report as a dict. AssertionError: the counts of a stage do not add up, a fault of this program."""
    limits = {"safe": "unsafe content: only labels and words were read, no picture was looked at (--safe)",
              "natural": "unnatural pictures: told by flatness, number of colors and shape, "
                         "no trained classifier (--natural)",
              "vocab": "out-of-vocabulary rule: off, no --vocab was given"}
    stages = {}
    for stage in ("pages", "images", "texts", "pairs"):
        rows = {what: n for (s, what), n in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if s == stage and n}
        entered, left = rows.pop("in", 0), rows.pop("out", 0)
        assert entered == left + sum(rows.values()), f"{stage}: {entered} in, {left} out, {rows} dropped"
        stages[stage] = {"in": entered, "dropped": rows, "out": left}
    out = stages["pairs"]["out"]
    return {"stages": stages, "scoring": how, "limits": [text for k, text in limits.items() if not plan[k]],
            "mean_words": words / out if out else None, "map": plan}


def show(report, out):
    for stage, row in report["stages"].items():
        print(f"{stage:<8}{row['in']:>12,} in")
        for what, n in row["dropped"].items():
            print(f"{-n:>20,} {what}")
        print(f"{row['out']:>20,} out")
    print("scoring: " + report["scoring"], *report["limits"], sep="\n")
    mean = f"{report['mean_words']:.1f}" if report["mean_words"] else "no"
    print(f"{row['out']:,} images, each with one text of {mean} words on average (LAIT: 13) -> {out}")


# ----------------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools.lait", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("files and passes").add_argument
    add("--in", dest="pages", help="folder of pages (.html) and archives (.warc, .warc.gz), or one of these files")
    add("--out", required=True, help="folder of the shards; OUT/candidates holds what the map found")
    add("--images", help="folder of the pages' images, as wget -x stores them (default: --in)")
    add("--shard", help="I/N: only the map, only the I-th of N parts of the input files (I from 0)")
    add("--merge", action="store_true", help="only the reduce")
    add = parser.add_argument_group("map: pages and pictures").add_argument
    add("--language", default="", help="FILE.py:FUNCTION instead of language()")
    add("--natural", default="", help="FILE.py:FUNCTION instead of natural()")
    add("--safe", default="", help="FILE.py:FUNCTION instead of safe()")
    add("--per_page", type=int, default=1, help="so many dominant images of a page at most [1]")
    add("--min_side", type=int, default=300, help="both sides of an image must be larger, in pixels [300, the paper's]")
    add("--max_page", type=int, default=4, help="largest page, in MB [4]")
    add("--max_image", type=int, default=32, help="largest image file, in MB [32]")
    add("--page_seconds", type=float, default=5.0, help="CPU seconds that a page may take to parse [5]")
    add("--part", type=int, default=1000, help="documents held and written at once; a stop loses no more [1000]")
    add = parser.add_argument_group("map: sentences").add_argument
    add("--vocab", default="", help="BERT vocab.txt of the out-of-vocabulary rule; without one that rule is off")
    add("--max_oov", type=float, default=0.3,
        help="share of a sentence's words that may lie outside the vocabulary [0.3]")
    add("--min_words", type=int, default=4, help="words of a sentence, at least [4]")
    add("--max_words", type=int, default=40, help="and at most [40]")
    add("--spam", default="", help="file of phrases, one a line, instead of the built-in spam list")
    add = parser.add_argument_group("scoring (also of the reduce, where that sets the threshold)").add_argument
    add("--score", default="",
        help="run directory whose model scores each pair; without one the surest source is taken")
    add("--device", default="cpu", help="of the scoring model [cpu]")
    add("--batch_size", type=int, default=64, help="of the scoring model [64]")
    add = parser.add_argument_group("reduce").add_argument
    add("--min_score", type=float, help="pairs below are dropped (default: see --chance_quantile)")
    add("--chance_quantile", type=float, default=0.95,
        help="this quantile of the scores with other pictures is the least [0.95]")
    add("--max_images", type=int, default=10, help="a text of more images than this is dropped with all of them [10]")
    add("--sort_lines", type=int, default=500_000, help="candidates held in memory by a sort [500000]")
    add("--shard_size", type=int, default=1000, help="pairs in a tar [1000]")
    args = parser.parse_args(argv)
    for name in "max_images per_page min_words max_page max_image part sort_lines shard_size batch_size".split():
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
            fail(f"--in {args.pages}: no such file or folder" if args.pages else "--in: name the folder of the pages")
        args.images = args.images or (args.pages if os.path.isdir(args.pages) else os.path.dirname(args.pages) or ".")
        if not os.path.isdir(args.images):
            fail(f"--images {args.images}: no such directory")
        if next(listing(args.pages), None) is None:
            fail(f"--in {args.pages}: no {', '.join(PAGE_TYPES + ARCHIVE_TYPES)} in it")
        where = re.fullmatch(r"(\d{1,5})/(\d{1,5})", args.shard or "0/1")
        if not where or not int(where[1]) < int(where[2]):
            fail(f"--shard {args.shard}: I/N with I from 0 to N-1")
        run_map(args, int(where[1]), int(where[2]))
    if not args.shard:
        run_merge(args)


if __name__ == "__main__":
    main()
