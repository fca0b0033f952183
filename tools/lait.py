"""Weakly supervised image-text pairs from web pages, collected as ImageBERT's LAIT was (section 3,
Figure 1).

    HTML files, WARC records                                                                    map
        --> English?
        --> the dominant image, by tags and its place in the DOM
              |--> its file: larger than 300 px, natural, safe -------------------.
              '--> alt, title, caption, text around --> sentences --> cleaning ---+
                                                         candidate (image, text), score --------'
    candidates                                                                               reduce
        --> sorted by image hash: the best text of each image
        --> sorted by text hash: only texts of few images
        --> tar shards

    python -m tools.lait --in PAGES --out SHARDS --vocab vocab.txt --score RUN      # all of it
    python train.py --model codis --data SHARDS --vocab vocab.txt                   # and then

    python -m tools.lait --in CRAWL --out SHARDS --shard 3/64 ...   # the map alone, part 3 of 0-63
    python -m tools.lait --out SHARDS --merge                       # the reduce, once all 64 ran

The result does not depend on the number of parts. Nothing is downloaded: a page's images are files
below --images (default: --in) where `wget -x` puts them, http://HOST/a/b.jpg as HOST/a/b.jpg. The
relative addresses of a page file start from its folder. The map holds --part documents in memory,
the reduce --sort_lines candidates, whatever the size of the crawl. After a stop the same command
goes on: the map at its next part, the reduce from the candidates. Every document, image, sentence
and pair that is dropped is counted under its stage and reason (SHARDS/report.json), and the counts
must add up.

The shards are img2dataset's: KEY.jpg (the file's own bytes), KEY.txt, KEY.json. Pages and pictures
are taken to be hostile: sizes, nesting and time are bounded, addresses cannot leave --images, and
decompression stops at its limit.

The filters are functions that the command line can replace (--natural my_filters.py:function);
what the default ones cannot see is printed with the report. language(text, declared),
natural(PIL image) and safe(PIL image, texts, page) return None or a reason to drop.

Deviations from the paper
  1. The semantic model is one score of any run directory, the cosine of encode_image and
     encode_text, and no classifier on "hundreds of features including text-only features,
     image-content features, and text-image cross-modal features".
  2. The paper names no threshold. Default: the 95 % quantile of the scores that 2,000 of the texts
     get with other pictures.
  3. Its classifiers of unnatural and of unsafe images are not published. natural() measures
     flatness, colors, edges, long lines and shape. safe() reads the page's own label and words in
     addresses and texts, and does not look at the picture.
  4. "Heuristic rules", "normal length", "high ratio" and "too many images" are not quantified
     there: the flags' defaults are ours. Without --score a text of the image's own that is shorter
     than --min_words ("Broccoli") stays where the image has no longer one.
  5. The language is told by function words and the declared language; "the same image" means the
     same bytes.
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
import struct
import sys
import tarfile
import threading
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from typing import NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from tools import Count, Finite, Parser, Positive, Share, Size, Stop, check_out

# torch, data.py and tools/weights.py are imported where pairs are scored and nowhere else: the map
# runs in hundreds of processes, and torch alone takes hundreds of MB of each.

# Where a text may stand, the surest place first; it decides between texts that have no score.
# The last is around the image, the others are the image's own.
SOURCES = ("caption", "alt", "title", "near")

# PIL's name of a format -> the file's ending. No other decoder runs: EPS, for one, is a program.
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}

PAGE_TYPES, ARCHIVE_TYPES = (".html", ".htm", ".xhtml"), (".warc", ".warc.gz")
MAX_DEPTH = 512                     # open elements of a page
MAX_RECORD = 1 << 30                # bytes of a WARC record: one that claims more ends its archive
MAX_RATIO = 200                     # bytes that a byte of a .warc.gz may become, beyond the first
                                    # 64 MB (pages: 5 to 20)
CHANCE_TEXTS = 2000                 # texts to score with other pictures, for the default threshold


# open_image() refuses what is too large, so PIL need not warn of it as well
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def fail(message):
    raise Stop(f"tools.lait: {message}")


def lines_of(path, flag):
    """The lines of a text file without their ends. Stop: no such file, or no UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            return [line.rstrip("\r\n") for line in f]
    except UnicodeDecodeError:
        fail(f"{flag} {path}: not UTF-8 text")
    except FileNotFoundError:
        fail(f"{flag} {path}: no such file")
    except OSError as e:
        fail(f"{flag} {path}: {e.strerror}")


class Dropped(Exception):
    """A document, image or sentence that does not pass. Its text is the reason that is counted."""


# --------------------------------------------------------------------------------------------------
# Filters, each of which the command line can replace

ENGLISH = frozenset(
    "the of and to that is was for on with as by at from are were be this which have has had it "
    "its not but they she their his her you we our or an who will would can could there been when "
    "what into than about".split())


# Function words of other languages that are written in the same letters, without those that are
# English words as well: German, French, Spanish, Portuguese, Italian, Dutch, Nordic, Polish.
FOREIGN = frozenset(
    "der das und ist nicht ein eine mit für von den dem im zu auf sich auch le la les des et est "
    "une dans que qui pour sur pas au du il el los las una en y es por con del se lo che di per "
    "non della sono os um uma não com da dos het een de van dat niet op voor zijn och att det som "
    "är av og er ikke til på na nie się jest że".split())


def language(text, declared):
    """English? text: what the page shows; declared: its lang attribute or None.

    At most a fifth of the letters may be outside ASCII. From 20 words on the text decides: at least
    15 % function words. Running text has 40 %, but menus and tables of a page have none; so a page
    that declares English needs 5 % only, and more than of other languages together. A shorter text
    is judged by its letters and by `declared`, if given.
    """
    words = re.findall(r"[^\W\d_]+", text[:20000].lower())
    letters = "".join(words)
    foreign_letters = sum(c > "\x7f" for c in letters)
    if foreign_letters > 0.2 * len(letters):
        return "not English"

    # what the page says of itself
    declared = (declared or "").lower()
    says_english = re.match(r"en\b", declared)
    if len(words) < 20:
        return "not English" if declared and not says_english else None

    known = sum(word in ENGLISH for word in words)
    if says_english:
        foreign = sum(word in FOREIGN for word in words)
        return None if known >= 0.05 * len(words) and known > foreign else "not English"
    return None if known >= 0.15 * len(words) else "not English"


def natural(image):
    """A photograph? image: PIL RGB. Drawings, logos, charts, screenshots and blanks have flat areas
    (neighbors of exactly equal color), one color over most of the picture, or few colors. Text has
    hard edges on plain ground; plots, windows and tables have ruled lines in both directions,
    montages have gutters and seams. Banners are long.

    Of 972 pictures over 300 px in the manuals of scikit-learn, scikit-image and GIMP, nearly all
    plots, screenshots and montages, 10 pass; of 138 photographs (COCO, VOC, VQA) all do; of 1,000
    of Flickr8k, scaled down to 224 px, 974.
    """
    width, height = image.size
    if max(width, height) > 3.5 * min(width, height):
        return "banner"

    # the middle of a large picture will do
    left, top = max(0, width - 1024) // 2, max(0, height - 1024) // 2
    box = (left, top, min(width, left + 1024), min(height, top + 1024))
    pixels = np.asarray(image.crop(box)).astype(np.int32)           # (H, W, 3)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]

    # neighbors of equal color
    color = (red << 16) + (green << 8) + blue
    flat = (color[:, 1:] == color[:, :-1]).mean()
    if flat > 0.6:
        return "flat"

    # how many pixels have each color, at 4 bits a channel
    coarse = (red >> 4 << 8) + (green >> 4 << 4) + (blue >> 4)
    pixels_of = np.bincount(coarse.ravel(), minlength=4096)
    if pixels_of.max() > 0.7 * coarse.size:
        return "one color"
    colors = (pixels_of > 1e-4 * coarse.size).sum()
    if colors < 12:
        return "few colors"

    # hard edges beside plain ground: text, also after JPEG
    grey = pixels.sum(2) // 3                                       # (H, W)
    step = np.abs(np.diff(grey, axis=1))
    if (step <= 2).mean() > 0.5 and (step > 40).mean() > 0.12:
        return "text"

    # photographs have long lines too, but seldom both down and across
    ruled_down, gutter_down, seam_down = long_lines(grey)
    ruled_across, gutter_across, seam_across = long_lines(grey.T)
    if min(ruled_down, ruled_across) > 0.3:
        return "ruled"
    if max(gutter_down, gutter_across, seam_down, seam_across) > 0.5:
        return "montage"
    return None


def long_lines(grey):
    """Lines that run down a picture. grey: (H, W) -> three shares of its height, from 0 to 1:

    ruled:  the longest edge with one color on a side: an axis, a window's frame
    gutter: the longest band of one color, at most 5 % of the width: between two pictures
    seam:   the longest edge where montages have one, at 1/4, 1/3, 1/2, 2/3 or 3/4 of the width,
            beyond what there is beside it
    """
    width = grey.shape[1]
    jump = np.abs(np.diff(grey, axis=1)) > 16                       # (H, W - 1)
    median = np.median(grey, axis=0).astype(grey.dtype)             # (W,)
    even = np.abs(grey - median) <= 4                               # (H, W)

    # jumps to and from a column of one color; a frame around the whole picture is none
    frame = int(0.04 * width)
    into = (jump & even[:, 1:]).mean(0)[frame:-frame]
    out_of = (jump & even[:, :-1]).mean(0)[frame:-frame]
    ruled = max(into.max(), out_of.max())

    # one, and the other a few columns on
    gutter = 0.0
    for k in range(1, int(0.05 * width)):
        gutter = max(gutter, np.minimum(into[:-k], out_of[k:]).max())

    # jumps of any colors, one column wide
    seam, jumps = 0.0, jump.mean(0)                                 # (W - 1,)
    reach = max(1, int(0.004 * width))
    for part in (1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4):
        place = round(part * width) - 1
        for x in range(place - reach, place + reach + 1):
            beside = np.concatenate([jumps[x - 8:x - 3], jumps[x + 4:x + 9]])
            seam = max(seam, jumps[x] - np.median(beside))
    return ruled, gutter, seam


UNSAFE = re.compile(r"\b(?:porn\w*|xxx|nsfw|nudes?|nudity|hentai|erotica?|sex(?:y|ual|cam)?|"
                    r"escorts?|milf|fetish|camgirls?)\b")


def safe(image, texts, page):
    """Drops what labels itself (meta rating adult, mature, restricted or RTA), and what says an
    unsafe word.

    image: PIL RGB, which this default does not look at. texts: what was found beside the image, as
    it stands there. page: the Page, of which this reads `rating`, `title` and `url`.
    """
    if re.search(r"adult|mature|restricted|rta-5042", page.rating):
        return "labelled adult"
    address = re.sub(r"[^A-Za-z]+", " ", page.url)
    said = " ".join([page.title, address, *texts])
    return "unsafe words" if UNSAFE.search(said.lower()) else None


def plug(spec, default):
    """"file.py:function" -> the function; empty -> the default."""
    if not spec:
        return default
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        fail(f"{spec}: a filter is given as FILE.py:FUNCTION, and there is no file {path!r}")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        fail(f"{path}: no function {name!r} in it")
    return function


# --------------------------------------------------------------------------------------------------
# Sentences

SPAM = (
    "click here", "click to", "buy now", "shop now", "order now", "sign up", "subscribe",
    "free shipping", "add to cart", "read more", "learn more", "all rights reserved",
    "terms of service", "terms of use", "terms and conditions",
    "privacy policy", "use cookies", "uses cookies", "use of cookies", "accept cookies",
    "accept all cookies", "enable cookies", "cookies policy", "cookies settings",
    "cookies to ensure", "cookies to improve", "cookies to give", "cookies to provide",
    "cookies on this", "cookies on our", "advertisement", "sponsored", "limited offer",
    "discount code", "best price", "casino", "viagra", "download now", "follow us", "share this",
    "please log in", "log in to", "stock photo", "image may contain", "no description available",
    "lorem ipsum", "enable javascript",
)

# Words that say of no picture what it shows
NAMELESS = frozenset(
    "the and for img image images photo photos photograph picture pictures pic logo icon banner "
    "thumbnail thumb avatar untitled featured default placeholder cover header hero screenshot "
    "figure fig gallery slide slideshow attachment file download zoom enlarge click view open "
    "close home menu search share facebook twitter instagram pinterest youtube email print".split())

# What is cut out of a text
SPANS = re.compile("|".join((
    r"<[^<>]{1,200}>",                                              # tags
    r"\b(?:https?://|www\.)\S+",                                    # addresses
    r"[\w.+-]{1,64}@[\w.-]{1,64}",                                  # mail addresses
    r"[@#]\w+",                                                     # handles
    r"\b[\w%./-]{1,200}\.(?:jpe?g|png|gif|webp|html?|com|org|net)\b",       # files and sites
    r"[(\[](?:photo|image|picture|credit|source|via|ap|afp|getty|reuters)\b[^)\]]{0,100}[)\]]",
    r"\b(?:photo|image|picture)s? (?:by|credit|courtesy)\b[^.!?]{0,100}",   # credits
    r"\|[^.!?]{0,100}",                                             # site names: "A dog | Example"
)), re.I)


# A full stop behind these ends no sentence: titles, initials (J. Smith, the U.S. Army) ...
TITLES = re.compile(
    r"(?:^|[\s(\"'])(?:Mrs?|Ms|Drs?|Prof|St|Mt|Ft|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Maj|Rev|Hon|Gov|Sen|"
    r"Rep|Pres|vs)\.$|(?:^|[\s(.\"'])[A-Z]\.$")
# ... unless a word follows that often begins one ...
BEGINNING = re.compile(r"(?:The|This|That|These|It|He|She|They|We|You|There|In|On|At|And|But)\b")
# ... and these where a number follows.
NUMBERED = re.compile(
    r"\b(?:Nos?|Figs?|pp?|[Vv]ol|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$")


def split_sentences(text):
    """A text of single spaces -> list of its sentences, which " ".join() makes the text again."""
    found = []
    for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])", text):
        before = found[-1] if found else ""
        goes_on = TITLES.search(before) and not BEGINNING.match(part)
        counted = NUMBERED.search(before) and part[:1].isdigit()
        if goes_on or counted:
            found[-1] += " " + part
        else:
            found.append(part)
    return found


def sentences(text, limit=2000):
    """Yields the sentences of a text as it stands on a page, without SPANS and emoji."""
    # letters, numbers, punctuation and spaces stay; of the other signs a few
    text = unicodedata.normalize("NFKC", text[:limit])
    kept = []
    for c in text:
        stays = unicodedata.category(c)[0] in "LNPZ" or c in "$+|<>=~\n\t"
        kept.append(c if stays else " ")

    text = " ".join("".join(kept).split())
    text = SPANS.sub(" ", text)
    for part in split_sentences(text):
        yield " ".join(part.split()).strip(" -,:;|*_=~")


def reject(sentence, args, words, spam):
    """None, or the rule that a sentence breaks. words: the vocabulary's, or None: then that rule is
    off. spam: a compiled pattern."""
    found = re.findall(r"[a-z0-9]+(?:['’][a-z]+)?", sentence.lower())

    # length
    if not found:
        return "empty"
    if len(found) < args.min_words:
        return "too short"
    if len(found) > args.max_words:
        return "too long"
    if not any(len(word) > 2 and word.isalpha() and word not in NAMELESS for word in found):
        return "names nothing"

    # made of words, and of different ones
    plain = sum(c.isascii() and (c.isalpha() or c == " ") for c in sentence)
    if plain < 0.8 * len(sentence):
        return "not words"
    if repeats(found):
        return "repeated words"

    # of words that may be said, and that are known
    if UNSAFE.search(sentence.lower()):
        return "unsafe words"
    if spam.search(sentence.lower()):
        return "spam"
    if words is not None:
        judged = [word for word in found if word.isalpha()]
        unknown = sum(word not in words for word in judged)
        if unknown > args.max_oov * len(judged):
            return "out of vocabulary"
    return None


def repeats(words):
    """One word three times in a row, one pair of words three times, or few different words?"""
    for a, b, c in zip(words, words[1:], words[2:]):
        if a == b == c:
            return True
    pairs = Counter(zip(words, words[1:]))
    return len(set(words)) < 0.6 * len(words) or max(pairs.values(), default=0) > 2


# --------------------------------------------------------------------------------------------------
# Web pages

# Only these elements are tracked.
BLOCK = frozenset(
    "html body main article section div header footer nav aside figure figcaption p ul ol li table "
    "tr td th tbody thead dl dt dd h1 h2 h3 h4 h5 h6 blockquote pre form center picture noscript "
    "script style template svg select textarea title".split())
UNSEEN = frozenset("script style template svg select textarea".split())
# Whole words of class, id or role that name a margin. Nothing is made of a word's parts: the main
# picture of a WordPress page is a `post-thumbnail` in a body that `has-sidebar`.
BAD_PLACE = frozenset(
    "ad ads advert advertisement sponsor sponsored banner sidebar related recommended footer "
    "header nav menu logo navigation icon icons avatar comment comments share social promo widget "
    "sprite button badge pixel spacer tracking complementary contentinfo site-header site-footer "
    "site-logo custom-logo site-branding main-navigation nav-menu widget-area comments-area "
    "related-posts author-box".split())
NEAR = 4                            # blocks that such a word speaks for: its own and three inside
LAYOUT = frozenset("html body main article".split())        # ... on these it speaks for no margin

# Words in an image's address that name no picture of the page
BAD_FILE = frozenset(
    "ad ads advert banner logo logos icon icons avatar sprite pixel spacer tracking".split())

# Attributes in which lazily loaded images keep their addresses, the largest picture first
LISTED = ("srcset", "data-srcset", "data-lazy-srcset")
SINGLE = ("data-src", "data-lazy-src", "data-original", "src")

# Python has more decoders than these; none of them runs because a stranger names it.
CHARSETS = re.compile(
    r"utf-?8|us-ascii|ascii|latin-?1|iso-?8859-?\d{1,2}|windows-125\d|cp125\d|shift_jis|"
    r"euc-(?:jp|kr)|gb2312|gbk|gb18030|big5|koi8-[ru]", re.I)


def decode(raw, header=""):
    """bytes -> str, by byte order mark, HTTP header, <meta>, else UTF-8. What cannot be decoded is
    replaced. Dropped: no page."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "replace")
    if b"\0" in raw[:4096] or not re.search(rb"<\s*[a-zA-Z!]", raw):
        raise Dropped("not HTML")

    charset = "utf-8"
    head = header + " " + raw[:2048].decode("latin-1")
    named = re.search(r"charset\s*=\s*[\"']?([\w-]+)", head, re.I)
    if named and CHARSETS.fullmatch(named[1]):
        charset = named[1]

    # as browsers do: what calls itself ASCII or Latin-1 is Windows' superset of both
    if re.fullmatch(r"(us-)?ascii|latin-?1|iso-?8859-?1", charset, re.I):
        charset = "cp1252"
    try:
        return raw.decode(charset, "replace")
    except LookupError:
        return raw.decode("utf-8", "replace")


class Element(NamedTuple):
    """An open element of a page."""
    tag: str
    number: int                     # it is the page's number-th block; 0: the page itself
    role: str                       # "unseen", "caption", "title" or ""
    place: int                      # by its tags: 1: content, -1: margin, 0: neither
    margin: int                     # for so many blocks, its own first, a class names a margin


class Figure:
    """An open <figure>: the number of its first image, and its caption so far."""

    def __init__(self, first):
        self.first, self.caption = first, ""


class Page(HTMLParser):
    """What one page says of its images. After feed() and close():

    images: list of dicts: sources (addresses, the largest picture first); alt, title, caption,
            before, after (texts); score (is it the page's dominant image? by where it stands and
            what it says of itself); lazy (a placeholder?), noscript (in one?)
    text:   all that the page shows
    lang, title, rating, base: as the page declares them; lang and base may be None
    """

    def __init__(self, url):
        super().__init__(convert_charrefs=True)
        self.url = url                      # "" for a page file
        self.base, self.lang, self.title, self.rating = None, None, "", ""
        self.images, self.words = [], []
        self.own = set()                    # addresses that the page names as its picture

        # the blocks
        self.parents = [0]                  # of each block, by its number
        self.stack = [Element("", 0, "", 0, 0)]

        # (block number, list of strings or number of an image), in the page's order
        self.flow = []
        self.ended = True                   # does the next text begin a new entry of the flow?

        self.picture = []                   # addresses of the open <picture>
        self.figures = []                   # the open <figure>s
        self.headings = 0                   # 1: after the first <h1> and before the next image

    # What HTMLParser calls

    def handle_starttag(self, tag, attrs):
        # of an attribute that stands twice the first counts
        attrs = {key: value or "" for key, value in reversed(attrs)}
        self.declare(tag, attrs)
        if tag == "img" and self.stack[-1].role != "unseen":
            self.add_image(attrs)
            # a picture has one image, and many pages forget to close it
            if self.stack[-1].tag == "picture":
                self.close_block()

        if tag in BLOCK:
            self.open_block(tag, attrs)
        elif tag in ("br", "hr", "img"):
            self.ended = True

    def handle_endtag(self, tag):
        # nothing that is open has this name
        if tag not in BLOCK or all(element.tag != tag for element in self.stack):
            return

        # what is open inside ends with it
        while self.close_block() != tag:
            pass
        self.ended = True

    def handle_data(self, text):
        number, role = self.stack[-1].number, self.stack[-1].role
        if role == "title":
            self.title += text[:300 - len(self.title)]
        if role in ("title", "unseen") or not text.strip():
            return
        self.words.append(text)

        # a caption belongs to all images of its figure: those before it, and those to come
        if role == "caption" and self.figures:
            figure = self.figures[-1]
            figure.caption += (" " + text)[:2000 - len(figure.caption)]
            for image in self.images[figure.first:]:
                image["caption"] = figure.caption

        # other text is part of the flow
        elif self.ended:
            self.flow.append((number, [text]))
            self.ended = False
        else:
            self.flow[-1][1].append(text)

    def close(self):
        super().close()
        self.text = " ".join(" ".join(self.words).split())
        for k, (number, n) in enumerate(self.flow):
            if isinstance(n, list):
                continue
            image = self.images[n]
            image["before"] = self.text_near(k - 1, number)[-1000:]
            image["after"] = self.text_near(k + 1, number)[:1000]

            # the page has no other, describes it, or names it as its own
            if len(self.images) == 1:
                image["score"] += 1
            if max(len(image["alt"].split()), len(image["caption"].split())) >= 3:
                image["score"] += 1
            if any(same_address(a, b) for a in image["sources"] for b in self.own):
                image["score"] += 3

    # What these do with it

    def declare(self, tag, attrs):
        """What a page says of itself as a whole, and the addresses in a <picture>."""
        # language, and where relative addresses start
        if tag == "html":
            self.lang = attrs.get("lang") or attrs.get("xml:lang") or self.lang
        elif tag == "base" and self.base is None:
            self.base = attrs.get("href")

        # pictures: one that stands for the page, one in several sizes
        elif tag == "link" and attrs.get("rel", "").lower() == "image_src":
            self.own.add(attrs.get("href", "").strip())
        elif tag == "source" and self.stack[-1].tag == "picture":
            for key in LISTED:
                self.picture += srcset(attrs.get(key, ""))

        # the same in <meta>, and the rating
        elif tag == "meta":
            name = (attrs.get("property") or attrs.get("name") or "").lower()
            if name in ("og:image", "og:image:url", "twitter:image"):
                self.own.add(attrs.get("content", "").strip())
            elif name == "rating":
                self.rating = attrs.get("content", "").lower()[:100]

    def open_block(self, tag, attrs):
        if ends_unsaid(self.stack[-1].tag, tag):
            self.close_block()
        if len(self.stack) > MAX_DEPTH:
            raise Dropped("hostile: nested too deep")
        parent = self.stack[-1]

        # what its text is
        role = {"title": "title", "figcaption": "caption"}.get(tag, "")
        hidden = re.search(r"display\s*:\s*none", attrs.get("style", "")[:500])
        if "hidden" in attrs or tag in UNSEEN or hidden:
            role = "unseen"
        elif parent.role:
            role = parent.role

        # content or margin by its tag; what is inside such a margin stays there. Articles have
        # headers of their own, with the title and often the picture.
        is_main = tag == "main" or attrs.get("role") == "main"
        place = parent.place
        if place < 0 or tag in ("nav", "footer", "aside") or tag == "header" and place == 0:
            place = -1
        elif is_main or tag in ("article", "figure"):
            place = 1

        # margin by its class, for the blocks near it; no margin holds <main>
        margin = 0 if is_main else max(parent.margin - 1, 0)
        if tag not in LAYOUT and not is_main and bad_name(attrs):
            margin = NEAR

        self.stack.append(Element(tag, len(self.parents), role, place, margin))
        self.parents.append(parent.number)
        self.ended = True
        if tag == "h1":
            self.headings += 1
        if tag == "figure":
            self.figures.append(Figure(len(self.images)))

    def close_block(self):
        """Ends the innermost open block -> its tag."""
        tag = self.stack.pop().tag
        if tag == "figure":
            self.figures.pop()
        if tag == "picture":
            self.picture = []
        return tag

    def add_image(self, attrs):
        # its addresses, each once, the largest picture first
        found = list(self.picture)
        for key in LISTED:
            found += srcset(attrs.get(key, ""))
        found += [attrs.get(key, "").strip() for key in SINGLE]
        sources = list(dict.fromkeys(address for address in found if address))[:20]

        image = {"sources": sources, "alt": attrs.get("alt", "")[:2000],
                 "title": attrs.get("title", "")[:2000], "caption": "", "before": "", "after": "",
                 "score": self.place_score(attrs, sources), "lazy": looks_lazy(attrs),
                 "noscript": any(element.tag == "noscript" for element in self.stack)}
        if self.figures:
            image["caption"] = self.figures[-1].caption
        if self.join_lazy(image):
            return

        # it follows the first <h1>
        if self.headings == 1:
            image["score"] += 1
            self.headings = 2
        self.flow.append((self.stack[-1].number, len(self.images)))
        self.images.append(image)

    def place_score(self, attrs, sources):
        """How dominant an image is by its place, its names and the size it is shown at."""
        element = self.stack[-1]
        score = {1: 2, 0: 0, -1: -3}[element.place]
        if element.margin and element.place >= 0:
            score = -3
        if bad_name(attrs) or bad_file(sources):
            score -= 3

        # width and height, as far as they are given: an icon's, a preview's, a picture's. The file
        # of a preview may be larger than it is shown.
        sides = []
        for key in ("width", "height"):
            if digits := re.match(r"\d{1,5}", attrs.get(key, "").strip()):
                sides.append(int(digits[0]))
        if sides and min(sides) <= 100:
            return score - 3
        if sides and min(sides) <= 300:
            return score - 1
        return score + 1 if len(sides) == 2 else score

    def join_lazy(self, image):
        """Is an image the one that stands right before it? Pages show a placeholder until a script
        loads the picture, and the picture itself in a <noscript> beside it. Then the earlier entry
        gets what this one says."""
        if not self.flow or not isinstance(self.flow[-1][1], int):
            return False

        # one of the two stands in a <noscript>, the other is a placeholder
        other = self.images[self.flow[-1][1]]
        shown, lazy = other, image
        if image["noscript"]:
            shown, lazy = image, other
        if not shown["noscript"] or lazy["noscript"] or not lazy["lazy"]:
            return False

        # pixels that count visitors stand in a <noscript> too
        if shown["score"] <= -3:
            return False

        # the picture's addresses come before its placeholder's
        other["sources"] = list(dict.fromkeys(shown["sources"] + lazy["sources"]))[:20]
        other["score"] = max(shown["score"], lazy["score"])
        for key in ("alt", "title"):
            other[key] = max(lazy[key], shown[key], key=len)
        other["noscript"] = other["lazy"] = False
        return True

    def around(self, number):
        """Yields the numbers of a block, its parent, its grandparent ..., the page."""
        yield number
        while number:
            number = self.parents[number]
            yield number

    def text_near(self, k, number):
        """The k-th entry of the flow, if it is a text inside the grandparent of block `number`; ""
        for what is farther away."""
        if not 0 <= k < len(self.flow):
            return ""
        block, text = self.flow[k]
        if not isinstance(text, list):
            return ""
        *_, part = itertools.islice(self.around(number), 3)
        return "".join(text) if part in self.around(block) else ""


def ends_unsaid(tag, following):
    """Does an open element end where the following one begins? HTML lets some stay unclosed."""
    if tag == "picture":
        return following not in UNSEEN | {"noscript"}
    if tag == "p":
        return following not in UNSEEN | {"noscript", "picture"}
    if tag in ("li", "tr") and following == tag:
        return True
    return {tag, following} <= {"td", "th"} or {tag, following} <= {"dt", "dd"}


def bad_name(attrs):
    """Does a word of an element's class, id or role name a margin, an advertisement or an icon?"""
    called = " ".join([attrs.get(key, "")[:1000] for key in ("class", "id", "role")])
    return not BAD_PLACE.isdisjoint(called.lower().split())


def bad_file(sources):
    """Does the path of the plainest address of an image say that it is an icon or the like?"""
    path = re.sub(r"^([a-z]+:)?//[^/]*", "", "".join(sources[-1:])[:1000].lower())
    return not BAD_FILE.isdisjoint(re.split(r"[^a-z]+", path))


def looks_lazy(attrs):
    """Is an <img> a placeholder whose picture a script loads later?"""
    held = any(attrs.get(key) for key in (*LISTED[1:], *SINGLE[:-1]))
    source = attrs.get("src", "").strip()
    return held or not source or source.startswith("data:") or "lazy" in attrs.get("class", "")


def same_address(a, b):
    """Are these addresses of one picture? One of them may be relative."""
    a, b = (re.sub(r"^(https?:)?//", "", address).split("?")[0].lstrip("./") for address in (a, b))
    return bool(a) and (a == b or a.endswith("/" + b) or b.endswith("/" + a))


def srcset(text):
    """"a.jpg 1x, b.jpg 800w" -> addresses, the largest picture first."""
    entry = r"([^\s,]\S*[^\s,])(?:\s+(\d{1,6}(?:\.\d{1,3})?)[wx])?\s*(?:,|$)"
    found = re.findall(entry, text[:4000])
    found.sort(key=lambda pair: -float(pair[1] or 1))
    return [address for address, _ in found]


@contextmanager
def cpu_limit(seconds):
    """Dropped after so many seconds of this process's own time. Signals reach the main thread only;
    elsewhere there is no limit."""
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
    """str -> Page. Dropped: nested deeper than 512 blocks, or so made that parsing takes longer
    than `seconds`."""
    page = Page(url)
    with cpu_limit(seconds):
        # html.parser chokes on <![endif]>
        html = re.sub(r"<!\[[^<>]{0,100}>", " ", html).replace("<![", "&lt;![")
        page.feed(html)
        page.close()
    return page


# --------------------------------------------------------------------------------------------------
# Documents

def listing(root, shard=0, shards=1):
    """Yields (path, name from root) of the page files and archives that are this shard's, in a
    fixed order. root: a folder, below which links to folders are not followed, or one file."""
    if os.path.isdir(root):
        top, walk = root, os.walk(root)
    else:
        top = os.path.dirname(root)
        walk = [(top, [], [os.path.basename(root)])]

    # the shard depends on the name alone, not on what else is there
    for folder, folders, names in walk:
        folders.sort()                      # os.walk goes on in this order
        for file in sorted(names):
            if not file.lower().endswith(PAGE_TYPES + ARCHIVE_TYPES):
                continue
            path = os.path.join(folder, file)
            name = os.path.relpath(path, top or ".")
            if zlib.crc32(name.encode("utf-8", "surrogateescape")) % shards == shard:
                yield path, name


def documents(files, root, limit):
    """Yields (name, address or None, bytes or Dropped, Content-Type) for each page file and for
    each response in an archive. files: (path, name); limit: bytes of a page."""
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

        # it is counted like any other
        except Dropped as e:
            yield name, None, e, ""
        except OSError:
            yield name, None, Dropped("unreadable file"), ""


def inside(path, root):
    """Dropped: a link that leads out of root, or no plain file (a pipe would wait forever)."""
    real, home = os.path.realpath(path), os.path.realpath(root)
    if real != home and not real.startswith(os.path.join(home, "")):
        raise Dropped("link out of the folder")
    if not os.path.isfile(real):
        raise Dropped("not a file")


def archive(path, name, limit):
    """Yields what documents() yields for the responses in a WARC file, gzipped or not, which is
    read as a stream. Dropped: a decompression bomb."""
    try:
        with open(path, "rb") as raw:
            f = gzip.GzipFile(fileobj=raw) if name.lower().endswith(".gz") else raw
            while record := read_record(f, raw, limit):
                fields, block = record
                if fields["warc-type"] != "response":
                    continue

                if block is None:
                    page, content_type = Dropped("page too large"), ""
                else:
                    page, content_type = response(block, limit)
                address = (fields["warc-target-uri"] or "").strip("<> ")
                yield f"{name} {address}", address, page, content_type

    # what came before the broken place stays
    except (OSError, EOFError, ValueError, http.client.HTTPException, zlib.error):
        yield name, None, Dropped("broken archive"), ""


def read_record(f, raw, limit):
    """The next record of a WARC file -> (its fields, its block or None if nobody wants it); None at
    the end. f: the stream; raw: the file below it, whose position tells how much was unpacked."""
    line = b"\n"
    for _ in range(100):
        if line not in (b"\r\n", b"\n"):
            break
        line = f.readline(1 << 16)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise ValueError("no WARC record")

    # its size; an archive that grows and grows is left
    fields = http.client.parse_headers(f)
    size = int(fields["content-length"] or "none")
    if not 0 <= size <= MAX_RECORD or f.tell() > MAX_RATIO * raw.tell() + (64 << 20):
        raise Dropped("decompression bomb")

    # responses of a page's size are read, all else goes by in pieces
    block, left = None, size
    if fields["warc-type"] == "response" and size <= 2 * limit + (1 << 16):
        block = f.read(size)
        left -= len(block)
    while left:
        piece = f.read(min(left, 1 << 20))
        if not piece:
            raise EOFError
        left -= len(piece)
    return fields, block


class Recorded(io.BytesIO):
    """Bytes that http.client takes for a socket."""

    def makefile(self, mode):
        return self


def response(block, limit):
    """The HTTP response in a record -> (page bytes or Dropped, Content-Type)."""
    try:
        block = re.sub(rb"\AHTTP/[\d.]+", b"HTTP/1.1", block)
        reply = http.client.HTTPResponse(Recorded(block))
        reply.begin()

        # is it a page?
        content_type = reply.headers["content-type"] or ""
        if reply.status != 200:
            raise Dropped("HTTP status not 200")
        if "html" not in content_type.lower():
            raise Dropped("not HTML")
        return unpacked(reply, limit), content_type

    # one response more or less: the archive goes on
    except Dropped as e:
        return e, ""
    except (ValueError, http.client.HTTPException, zlib.error):
        return Dropped("broken response"), ""


def unpacked(reply, limit):
    """The body of a response, decompressed: at most `limit` bytes."""
    try:
        body = reply.read()
    except http.client.IncompleteRead as e:
        body = e.partial                    # crawlers cut pages off, but leave some of them
        if not body:
            raise

    coding = (reply.headers["content-encoding"] or "identity").lower()
    if coding in ("gzip", "x-gzip", "deflate"):
        # zlib's own numbers: gzip or zlib by their headers, or no header at all
        headers = "gzip" in coding or body[:1] == b"\x78"
        engine = zlib.decompressobj(47 if headers else -15)
        body = engine.decompress(body, limit + 1)           # more is never made
        if len(body) > limit:
            raise Dropped("decompression bomb")
    elif coding != "identity":
        raise Dropped("unknown encoding")

    if len(body) > limit:
        raise Dropped("page too large")
    return body


# --------------------------------------------------------------------------------------------------
# Images

def locate(source, name, page, root):
    """An image's address on a page -> the name of its file from `root`. Dropped: there is none, or
    the address is no image's.

    name: the page file's name from the root; page.url: "" for a page file, else the address that it
    was read from.
    """
    for candidate in file_names(source, name, page):
        candidate = os.path.normpath(candidate)
        if candidate.startswith("..") or os.path.isabs(candidate):
            raise Dropped("path trick")
        try:
            if os.path.isfile(os.path.join(root, candidate)):
                inside(os.path.join(root, candidate), root)
                return candidate
        except Dropped:
            raise Dropped("path trick") from None
        except (ValueError, OSError):
            continue                        # a name that no file system takes
    raise Dropped("missing file")


def file_names(source, name, page):
    """The names that the file of an address may have, from the root, the likelier one first."""
    # inline data has no file
    source = re.sub(r"[\t\n\r]", "", source)
    if source[:5].lower() == "data:":
        raise Dropped("inline data")

    # the whole address
    source, base = forward_slashes(source), forward_slashes(page.base or "")
    try:
        base = urljoin(page.url, base)
        if re.match(r"(https?:)?//", base, re.I):
            source = urljoin(base, source)
        address, start = urlsplit(source), urlsplit(base)
        host, port, path = (address.hostname or "").lower(), address.port, unquote(address.path)
    except ValueError:
        raise Dropped("broken address") from None

    # a page file's <base> may name a folder from the page's own
    if not (address.scheme or address.netloc or start.scheme or path.startswith("/")):
        path = "".join(unquote(start.path).rpartition("/")[:2]) + path

    # is it a picture's?
    if address.scheme not in ("http", "https", ""):
        raise Dropped("foreign scheme")
    if "\0" in path or "\\" in path or ".." in host:
        raise Dropped("path trick")
    if address.netloc and ".." in path.split("/"):
        raise Dropped("path trick")

    # of a page that was fetched, where wget -x stores it, with the query or without
    if address.netloc or address.scheme:
        if not re.fullmatch(r"[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?", host):
            raise Dropped("broken address")
        hosts = [host] if port is None else [f"{host}:{port}", host]
        names = []
        for folder in hosts:
            plain = f"{folder}/{path.lstrip('/')}"
            names += [f"{plain}?{address.query}", plain] if address.query else [plain]
        return names

    # of a page file: from its site, which is wget -x's first folder, from the root, or beside it
    if path.startswith("/"):
        return [name.split(os.sep)[0] + path, path.lstrip("/")]
    return [os.path.join(os.path.dirname(name), path)]


def forward_slashes(address):
    """An address as browsers read it: a backslash before its query is a slash."""
    path, mark, rest = re.match(r"([^?#]*)([?#]?)(.*)", address, re.S).groups()
    return path.replace("\\", "/") + mark + rest


def open_image(path, args):
    """-> (PIL RGB image, extension, sha256 of the bytes), the image as data.load_image() reads it.
    Dropped: unreadable, a bomb, too small, animated."""
    try:
        if os.path.getsize(path) > args.max_image << 20:
            raise Dropped("file too large")
        with open(path, "rb") as f:
            digest = hashlib.sha256(f.read()).hexdigest()

        # what the header says, before anything is decoded
        with Image.open(path, formats=list(FORMATS)) as image:
            kind = image.format
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if min(image.size) <= args.min_side:
                raise Dropped(f"side up to {args.min_side} px")
            if getattr(image, "is_animated", False):
                raise Dropped("unnatural: animated")

            image.load()
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            # a palette with transparency, and 16 bits: PIL's own conversion loses something
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode.startswith("I"):
                grey = (np.asarray(image) >> 8).clip(0, 255)
                image = Image.fromarray(grey.astype(np.uint8))
            return image.convert("RGB"), FORMATS[kind], digest

    except Image.DecompressionBombError:
        raise Dropped("decompression bomb") from None
    except UnidentifiedImageError:
        raise Dropped("unknown format") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error):
        raise Dropped("corrupt") from None


# --------------------------------------------------------------------------------------------------
# Scoring

class Scorer:
    """How well text and picture fit, by a run directory: the cosine of encode_image and
    encode_text."""

    def __init__(self, run, device, batch_size):
        # not at the top of this file: see there
        import data
        import torch
        from tools.weights import load_run

        if device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda: there is no CUDA device here")
        self.model, info = load_run(run, device)
        self.device, self.batch_size = device, batch_size
        step = info.get("step", "?")
        self.about = f"cosine of {run} ({info['model']} {info['task']}, step {step})"

        offered = getattr(self.model, "offers", dir(self.model))
        if not {"encode_image", "encode_text"} <= set(offered):
            fail(f"--score {run}: a {info['task']} run that offers no encode_image and encode_text")

        # the run must read pictures and captions; what else it reads in training is left out
        views = sys.modules[type(self.model).__module__].VIEWS[info["task"]]
        keys = data.view_keys(views)
        images = {key for key, view in keys.items() if view in data.IMAGE_VIEWS}
        texts = {key for key, view in keys.items() if view in ("caption", "paraphrase")}
        if "caption" not in keys.values() or not images or views["source"] != "pairs":
            fail(f"--score {run}: it reads {', '.join(keys.values())}; here are only pictures and "
                 "sentences: name a run whose views are an image and a caption")
        dropped = set(keys) - images - texts
        dropped |= {f"{key}_eval" for key in dropped}
        self.views = {key: view for key, view in views.items() if key not in dropped}

        self.tokenizer = data.get_tokenizer(os.path.join(info["path"], "vocab.txt"))
        if self.tokenizer.vocab_size != self.model.cfg.vocab_size:
            fail(f"{info['path']}/vocab.txt: {self.tokenizer.vocab_size} tokens, "
                 f"the run has {self.model.cfg.vocab_size}")

    def encode(self, encoder, what, pairs):
        """pairs: list of (path, text) -> (N, d) float64 of all of them, on the CPU.

        The last batch is filled up with its last pair, so that all batches have one shape: what
        else is in a batch then does not show in the result.
        """
        import data
        import torch

        records = data.Records("pairs", None)
        missing = -len(pairs) % self.batch_size
        for n, (path, text) in enumerate(pairs + pairs[-1:] * missing):
            records.append({"image": path, "image_id": n, "caption": [text]})

        cfg, out = self.model.cfg, []
        for batch in data.iter_eval(records, self.views, self.tokenizer, cfg.image_size,
                                    cfg.max_text, what=what, batch_size=self.batch_size):
            out.append(encoder(data.move(batch, self.device)).double().cpu())
        return torch.cat(out)[:len(pairs)]

    def __call__(self, pairs):
        """pairs: list of (path of a picture, text) -> list of float, rounded to four digits."""
        import torch

        # each picture once
        paths = list(dict.fromkeys(path for path, _ in pairs))
        row = {path: n for n, path in enumerate(paths)}
        with torch.inference_mode():
            image = self.encode(self.model.encode_image, "image", [(path, "") for path in paths])
            text = self.encode(self.model.encode_text, "text", pairs)

        score = (image[[row[path] for path, _ in pairs]] * text).sum(1)
        if not score.isfinite().all():
            fail(f"--score: the {self.about} gives scores that are no numbers")
        return [round(x, 4) for x in score.tolist()]


# --------------------------------------------------------------------------------------------------
# The map: documents -> candidates

def vocabulary(path):
    """The words of BERT's vocab.txt, one a line -> set. Stop: another file."""
    words = set(lines_of(path, "--vocab"))
    if "[UNK]" not in words:
        fail(f"--vocab {path}: not a BERT vocabulary, it lacks [UNK]")
    return words


class Harvest:
    """Documents -> candidates, with the filters and limits of the command line. `counts`:
    {(stage, what): how many}."""

    def __init__(self, args):
        self.args, self.counts, self.found = args, Counter(), []
        self.language = plug(args.language, language)
        self.natural = plug(args.natural, natural)
        self.safe = plug(args.safe, safe)
        self.words = vocabulary(args.vocab) if args.vocab else None
        self.scorer = Scorer(args.score, args.device, args.batch_size) if args.score else None

        phrases = SPAM
        if args.spam:
            phrases = [line.strip().lower() for line in lines_of(args.spam, "--spam")]
            phrases = [phrase for phrase in phrases if phrase]
        patterns = [rf"\b{re.escape(phrase)}\b" for phrase in phrases]
        self.spam = re.compile("|".join(patterns) or r"(?!)")       # of no phrase: never matches

        # for texts that may have a single word
        self.brief = argparse.Namespace(**{**vars(args), "min_words": 1})

    def document(self, name, address, raw, content_type):
        """Adds the candidates of one document to `found`. Takes what documents() yields."""
        self.counts["pages", "in"] += 1
        try:
            page = self.page(address, raw, content_type)
        except Dropped as e:
            self.counts["pages", str(e)] += 1
            return
        self.counts["pages", "out"] += 1

        # the dominant image first; of equals the earlier one
        ranked = sorted(page.images, key=lambda image: -image["score"])
        for n, image in enumerate(ranked):
            self.counts["images", "in"] += 1
            try:
                if n >= self.args.per_page or image["score"] <= 0:
                    raise Dropped("not dominant")
                self.found += self.image(image, name, page)
                self.counts["images", "out"] += 1
            except Dropped as e:
                self.counts["images", str(e)] += 1

    def page(self, address, raw, content_type):
        if isinstance(raw, Dropped):
            raise raw
        page = parse(decode(raw, content_type), address or "", self.args.page_seconds)
        shown = page.text or " ".join(image["alt"] for image in page.images)
        if reason := self.language(shown, page.lang):
            raise Dropped(reason)
        if not page.images:
            raise Dropped("no image")
        return page

    def image(self, image, name, page):
        """One dominant image -> its candidates: a list of (sha256, record)."""
        file, (picture, kind, digest) = self.first_readable(image["sources"], name, page)
        beside = {key: [image[key]] for key in ("caption", "alt", "title")}
        beside["near"] = [image["before"], image["after"]]

        # is the picture one to keep?
        if reason := self.natural(picture):
            raise Dropped(f"unnatural: {reason}")
        said = [text for texts in beside.values() for text in texts if text]
        if reason := self.safe(picture, said, page):
            raise Dropped(f"unsafe: {reason}")

        sources = self.good_sentences(beside)
        if not sources:
            raise Dropped("no text left")
        about = {"image": file, "kind": kind, "width": picture.width, "height": picture.height,
                 "page": name}
        return [(digest, {**about, "text": text, "source": source})
                for text, source in sources.items()]

    def first_readable(self, sources, name, page):
        """The first of an image's addresses whose file is here and can be used -> (the file's name,
        what open_image() gives). Dropped: no address has one."""
        absent, unusable = Dropped("no address"), None
        for source in sources:
            try:
                file = locate(source, name, page, self.args.images)
            except Dropped as e:
                if str(e) == "path trick":          # no address beside a trick is trusted
                    raise
                absent = e
                continue

            # a format that PIL does not read, or a placeholder: another address may do
            try:
                return file, open_image(os.path.join(self.args.images, file), self.args)
            except Dropped as e:
                unusable = unusable or e
        raise unusable or absent

    def good_sentences(self, beside):
        """{source: texts} -> {sentence: source} of those that pass."""
        found = []
        for source in SOURCES:
            for n, text in enumerate(beside[source]):
                here = list(sentences(text)) if text.strip() else []
                # of the text before and after the picture the two sentences that are next to it
                if source == "near":
                    here = here[-2:] if n == 0 else here[:2]
                found += [(sentence, source) for sentence in here]

        # A word or two that the page says of this image say more than the text around it, which may
        # be of anything. Where a model scores the pairs, one rule of length holds for all of them.
        good, reasons = self.passing(found, self.args)
        if not self.scorer and set(good.values()) <= {"near"}:
            good, reasons = self.passing(found, self.brief)

        # each counts once, as passed or under its reason
        self.counts["texts", "in"] += len(found)
        self.counts.update([("texts", reason or "out") for reason in reasons])
        return good

    def passing(self, found, own_limits):
        """found: list of (sentence, source) -> ({sentence: source} of those that pass, for each of
        `found` the rule that it breaks, or None). own_limits: the limits of what the page says of
        the image itself; text around it has those of the command line."""
        good, reasons, seen = {}, [], set()
        for sentence, source in found:
            limits = self.args if source == "near" else own_limits
            reason = reject(sentence, limits, self.words, self.spam)
            if not reason and normal(sentence) in seen:
                reason = "said twice of one image"
            if not reason:
                good[sentence] = source
                seen.add(normal(sentence))
            reasons.append(reason)
        return good, reasons

    def candidates(self):
        """The pairs found since the last call, as lines "image hash TAB text hash TAB json"."""
        found, self.found = self.found, []
        scores = [None] * len(found)
        if self.scorer and found:
            scores = self.scorer([(os.path.join(self.args.images, row["image"]), row["text"])
                                  for _, row in found])

        lines = []
        for (digest, row), score in zip(found, scores):
            text = hashlib.sha256(normal(row["text"]).encode()).hexdigest()
            lines.append(f"{digest}\t{text}\t{json.dumps({**row, 'score': score})}\n")
        return lines


def normal(text):
    """What two texts must share to be the same: the words, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def write(path, lines):
    """A text file, whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.writelines(lines)
    os.replace(f"{path}.tmp", path)


def first_line(path):
    """The JSON value in a file's first line."""
    with open(path, encoding="utf-8") as f:
        return json.loads(f.readline())


@contextmanager
def alone(folder):
    """The lock of a folder: two processes never write one shard. It ends with the process, however
    that ends."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"{folder}: another process is at work on it")
        yield


# all shards of a map share these
MAP_SETTINGS = ("images language natural safe vocab spam score min_side per_page min_words "
                "max_words max_oov max_page max_image page_seconds part").split()


def finished_parts(folder):
    """The files of a shard's finished parts, in order."""
    files = (os.path.join(folder, f"part-{n:06d}.txt") for n in itertools.count())
    return list(itertools.takewhile(os.path.exists, files))


def map_plan(args, shard, shards):
    """What a shard of the map is made with: its settings and a hash of its list of files."""
    digest = hashlib.sha256()
    for path, name in listing(args.pages, shard, shards):
        line = f"{name}\0{os.lstat(path).st_size}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    settings = {key: getattr(args, key) for key in MAP_SETTINGS}
    return {**settings, "in": args.pages, "files": digest.hexdigest()}


def run_map(args, shard, shards):
    """Documents of one shard -> OUT/candidates/I-of-N/part-*.txt: a line of JSON {counts, last},
    then candidates. A finished part is never made again; settings and files must be those that the
    shard was begun with."""
    folder = os.path.join(args.out, "candidates", f"{shard:05d}-of-{shards:05d}")
    with alone(folder):
        plan, note = map_plan(args, shard, shards), os.path.join(folder, "plan.json")
        heads = [first_line(path) for path in finished_parts(folder)]
        if heads:
            old = first_line(note)
            if changed := [key for key in plan if plan[key] != old.get(key)]:
                fail(f"{folder}: begun with other {', '.join(changed)} (see plan.json): "
                     "go on with those, or delete the folder")
        write(note, [json.dumps(plan)])
        if heads and heads[-1]["last"]:
            return

        # pass over the documents of the finished parts
        done = 0
        for head in heads:
            done += sum(n for *key, n in head["counts"] if key == ["pages", "in"])
        harvest = Harvest(args)
        stream = documents(listing(args.pages, shard, shards), args.pages, args.max_page << 20)
        stream = tqdm(itertools.islice(stream, done, None), f"pages {shard}/{shards}",
                      initial=done, unit="page", disable=None)
        stream = iter(stream)               # once: each iter() of a tqdm starts another bar

        for part in itertools.count(len(heads)):
            seen = 0
            for document in itertools.islice(stream, args.part):
                harvest.document(*document)
                seen += 1

            # the candidates, and counts of what became of all else; a short part is the last
            lines, last = harvest.candidates(), seen < args.part
            counts = [[*key, n] for key, n in sorted(harvest.counts.items())]
            head = json.dumps({"counts": counts, "last": last})
            write(os.path.join(folder, f"part-{part:06d}.txt"), [head + "\n"] + lines)
            harvest.counts.clear()
            if last:
                return


# --------------------------------------------------------------------------------------------------
# The reduce: candidates -> shards

def external_sort(lines, folder, most, fan=32):
    """Yields lines (str, each with its newline) in order, holding at most `most` of them: sorted
    runs on disk, merged `fan` at a time."""
    os.makedirs(folder, exist_ok=True)
    levels, number, lines = defaultdict(list), itertools.count(), iter(lines)

    def spill(ordered, level):
        path = os.path.join(folder, f"run-{next(number):06d}.txt")
        with open(path, "w", encoding="utf-8") as f:
            f.writelines(ordered)

        # so many runs of one level become one of the next
        levels[level].append(path)
        if len(levels[level]) == fan:
            spill(merged(levels.pop(level)), level + 1)

    def merged(paths):
        with ExitStack() as stack:
            files = [stack.enter_context(open(path, encoding="utf-8", newline="\n"))
                     for path in paths]
            yield from heapq.merge(*files)
        for path in paths:
            os.remove(path)

    while chunk := list(itertools.islice(lines, most)):
        spill(sorted(chunk), 0)
    yield from merged([path for level in levels.values() for path in level])


def all_parts(out):
    """-> (the parts of all shards of the map, the settings they share). Stop: a shard is missing or
    was made with other settings."""
    home = os.path.join(out, "candidates")
    names = sorted(os.listdir(home)) if os.path.isdir(home) else []
    names = [name for name in names if re.fullmatch(r"\d+-of-\d+", name)]
    if not names:
        fail(f"{home}: no candidates here: run the map first (--in PAGES --out {out})")
    divisions = {name.split("-of-")[1] for name in names}
    if len(divisions) > 1:
        fail(f"{home}: holds shards of different divisions ({', '.join(names[:4])} ...): "
             "delete those of one")

    # each shard is finished, and made as the first
    found, plan, shards = [], None, int(divisions.pop())
    for i in range(shards):
        folder = os.path.join(home, f"{i:05d}-of-{shards:05d}")
        mine = finished_parts(folder)
        if not mine or not first_line(mine[-1])["last"]:
            fail(f"{folder}: not finished: run --shard {i}/{shards} (again) before --merge")
        found += mine

        own = first_line(os.path.join(folder, "plan.json"))
        plan = plan or own
        if different := [key for key in MAP_SETTINGS if plan[key] != own[key]]:
            fail(f"{folder}: made with other settings than shard 0: {', '.join(different)}")
    return found, plan


def candidates_of(files):
    """Yields the candidates' lines in the parts of the map."""
    for file in files:
        with open(file, encoding="utf-8", newline="\n") as f:
            f.readline()                    # the counts
            yield from f


def threshold(lines, plan, root, args):
    """-> (least score of a pair or None, how it came about). lines: some candidates, sorted by
    image hash: their pictures are a random choice."""
    if not plan["score"]:
        if args.min_score is not None:
            fail("--min_score: these candidates were not scored (--score RUN)")
        order = ", else its ".join(SOURCES)
        return None, f"none (no --score): the best text of an image is its {order}"
    if args.min_score is not None:
        return args.min_score, f"by {plan['score']}; at least {args.min_score:g} (--min_score)"

    # each text with the picture of the line half the list away
    rows = [(line.split("\t", 1)[0], json.loads(line.split("\t", 2)[2])) for line in lines]
    half = len(rows) // 2
    pairs = []
    for (image, row), (other_image, other) in zip(rows, rows[half:] + rows[:half]):
        if image != other_image:
            pairs.append((os.path.join(root, other["image"]), row["text"]))
    if len(pairs) < 100:
        fail(f"{len(pairs)} texts to score with other pictures are too few for a threshold: "
             "give --min_score")

    scorer = Scorer(plan["score"], args.device, args.batch_size)
    least = round(float(np.quantile(scorer(pairs), args.chance_quantile)), 4)
    share = f"{args.chance_quantile:.0%} quantile of {len(pairs):,} texts with other pictures"
    return least, f"{scorer.about}; at least {least:.4f}, the {share}"


def best_texts(lines, least, counts):
    """lines, sorted -> yields "text hash TAB image hash TAB json", the best text of each image."""
    for image, group in itertools.groupby(lines, lambda line: line.split("\t", 1)[0]):
        best = previous = None
        for line in group:
            _, text, row = line.rstrip("\n").split("\t", 2)
            row = json.loads(row)
            counts["pairs", "in"] += 1
            if least is not None and row["score"] < least:
                counts["pairs", "below the score"] += 1
                continue

            # of two texts one goes; equal ones stand side by side
            if best:
                again = text == previous
                reason = "same pair on several pages" if again else "not the best text"
                counts["pairs", reason] += 1
            previous = text

            # by the score, else by the source; the rest only settles ties
            score = 0 if least is None else row["score"]
            rank = (score, -SOURCES.index(row["source"]), row["text"], row["page"])
            if best is None or rank > best[0]:
                best = rank, text, row
        if best:
            _, text, row = best
            yield f"{text}\t{image}\t{json.dumps(row)}\n"


def rare_texts(lines, most, counts):
    """lines, sorted by text hash -> yields those whose text belongs to at most `most` images. All
    pairs of another text go: a text that fits many images says little of any."""
    for _, group in itertools.groupby(lines, lambda line: line.split("\t", 1)[0]):
        few = list(itertools.islice(group, most))
        more = sum(1 for _ in group)
        if more:
            counts["pairs", "text of too many images"] += len(few) + more
        else:
            yield from few


def run_merge(args):
    """All candidates -> OUT/00000.tar ..., OUT/report.json, which is printed. After a stop it
    begins anew; a merge that is done stays."""
    files, plan = all_parts(args.out)
    home, report = os.path.join(args.out, "candidates"), os.path.join(args.out, "report.json")
    with alone(home):
        root = args.images or plan["images"]
        if not os.path.isdir(root):
            fail(f"--images {root}: no such directory")

        # what may be here of this merge, or of another
        note, settings = os.path.join(home, "merge.json"), merge_settings(args, files)
        same = os.path.exists(note) and first_line(note) == settings
        if same and os.path.exists(report):
            with open(report, encoding="utf-8") as f:
                return show(json.load(f), args.out)
        tars = [name for name in sorted(os.listdir(args.out)) if name.endswith(".tar")]
        if tars and not same:
            fail(f"{args.out}: holds {len(tars)} shards of another merge ({tars[0]} ...): "
                 "delete them, or name another --out")
        if os.path.exists(report):
            os.remove(report)
        write(note, [json.dumps(settings)])

        result = reduce(args, files, plan, root, os.path.join(home, "merge"))
        write(report, [json.dumps(result, indent=1)])
        show(result, args.out)


def merge_settings(args, files):
    """What a merge is made with: its settings and a hash of the map's files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path} {os.path.getsize(path)}\n".encode())
    settings = {key: getattr(args, key)
                for key in ("min_score", "chance_quantile", "max_images", "shard_size")}
    return {**settings, "candidates": digest.hexdigest()}


def reduce(args, files, plan, root, work):
    """Writes the tars -> the report. work: a folder for the sorts, deleted before and after."""
    shutil.rmtree(work, ignore_errors=True)
    counts = Counter()
    for file in files:
        counts.update({(stage, what): n for stage, what, n in first_line(file)["counts"]})

    # sorted by image; the first candidates also set the threshold
    lines = tqdm(candidates_of(files), "sorting", total=counts["texts", "out"], unit="pair",
                 disable=None)
    lines = external_sort(lines, os.path.join(work, "by-image"), args.sort_lines)
    some = list(itertools.islice(lines, CHANCE_TEXTS))
    least, how = threshold(some, plan, root, args)
    lines = best_texts(itertools.chain(some, lines), least, counts)

    # sorted by text
    lines = external_sort(lines, os.path.join(work, "by-text"), args.sort_lines)
    lines = rare_texts(lines, args.max_images, counts)

    words, number = 0, itertools.count()
    lines = iter(tqdm(lines, "writing shards", unit="pair", disable=None))
    while chunk := list(itertools.islice(lines, args.shard_size)):
        path = os.path.join(args.out, f"{next(number):05d}.tar")
        words += pack(path, chunk, root, plan["max_image"] << 20, counts)
    shutil.rmtree(work, ignore_errors=True)
    return summary(plan, counts, how, words)


def pack(path, lines, root, limit, counts):
    """Candidates -> a tar of their pictures' own bytes, texts and records. Returns the number of
    words in the texts."""
    words = 0
    with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as tar:
        for k, line in enumerate(lines):
            _, digest, row = line.rstrip("\n").split("\t", 2)
            row = json.loads(row)

            # the picture, unless it is gone or another since the map
            try:
                with open(os.path.join(root, row["image"]), "rb") as f:
                    raw = f.read(limit + 1)
            except OSError:
                raw = b""
            if hashlib.sha256(raw).hexdigest() != digest:
                counts["pairs", "file changed since the map"] += 1
                continue

            # three members of one key
            key = f"{os.path.basename(path)[:-4]}{k:06d}"
            about = {"caption": row["text"], "url": row["image"], "key": key, "sha256": digest}
            about |= {name: row[name] for name in ("page", "source", "score", "width", "height")}
            contents = {row["kind"]: raw, "txt": row["text"].encode(),
                        "json": json.dumps(about).encode()}
            for kind, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{kind}")
                member.size, member.mode = len(content), 0o644
                tar.addfile(member, io.BytesIO(content))
            counts["pairs", "out"] += 1
            words += len(row["text"].split())
    os.replace(f"{path}.tmp", path)
    return words


# what is not looked at where the setting of this name has its default
LIMITS = {
    "safe": "unsafe content: only labels and words were read, no picture was looked at (--safe)",
    "natural": "unnatural pictures: told by flatness, colors, edges, long lines and shape, "
               "no trained classifier (--natural)",
    "vocab": "out-of-vocabulary rule: off, no --vocab was given",
}


def summary(plan, counts, how, words):
    """The report as a dict. AssertionError: the counts of a stage do not add up, a fault of this
    program."""
    # the most frequent reason first
    ordered = sorted(counts.items(), key=lambda count: (-count[1], count[0]))
    stages = {}
    for stage in ("pages", "images", "texts", "pairs"):
        dropped = {}
        for (own, what), n in ordered:
            if own == stage and n and what not in ("in", "out"):
                dropped[what] = n

        entered, left = counts[stage, "in"], counts[stage, "out"]
        whole = entered == left + sum(dropped.values())
        assert whole, f"{stage}: {entered} in, {left} out, {dropped} dropped"
        stages[stage] = {"in": entered, "dropped": dropped, "out": left}

    pairs = stages["pairs"]["out"]
    return {"stages": stages, "scoring": how,
            "limits": [text for key, text in LIMITS.items() if not plan[key]],
            "mean_words": words / pairs if pairs else None, "map": plan}


def show(report, out):
    """Prints a report."""
    for stage, row in report["stages"].items():
        print(f"{stage:<8}{row['in']:>12,} in")
        for what, n in row["dropped"].items():
            print(f"{-n:>20,} {what}")
        print(f"{row['out']:>20,} out")

    print("scoring: " + report["scoring"], *report["limits"], sep="\n")
    pairs = report["stages"]["pairs"]["out"]
    mean = f"{report['mean_words']:.1f}" if report["mean_words"] else "no"
    print(f"{pairs:,} images, each with one text of {mean} words on average (LAIT: 13) -> {out}")


# --------------------------------------------------------------------------------------------------
# The command line

def read_flags(argv):
    parser = Parser(prog="python -m tools.lait", description=__doc__)
    add = parser.add_argument_group("files and passes").add_argument
    add("--in", dest="pages", help="folder of pages (.html) and archives (.warc, .warc.gz), "
        "or one of these files")
    add("--out", required=True,
        help="folder of the shards; OUT/candidates holds what the map found")
    add("--images", help="folder of the pages' images, as wget -x stores them (default: --in)")
    add("--shard", help="I/N: only the map, and of it the I-th of N parts of the files (I from 0)")
    add("--merge", action="store_true", help="only the reduce")

    add = parser.add_argument_group("map: pages and pictures").add_argument
    add("--language", default="", help="FILE.py:FUNCTION instead of language()")
    add("--natural", default="", help="FILE.py:FUNCTION instead of natural()")
    add("--safe", default="", help="FILE.py:FUNCTION instead of safe()")
    add("--per_page", type=Size, default=1, help="most dominant images of a page [1]")
    add("--min_side", type=Count, default=300,
        help="both sides of an image must be larger, in pixels [300, the paper's]")
    add("--max_page", type=Size, default=4, help="largest page, in MB [4]")
    add("--max_image", type=Size, default=32, help="largest image file, in MB [32]")
    add("--page_seconds", type=Positive, default=5.0, help="most CPU seconds to parse a page [5]")
    add("--part", type=Size, default=1000,
        help="documents held and written at once; a stop loses no more [1000]")

    add = parser.add_argument_group("map: sentences").add_argument
    add("--vocab", default="",
        help="BERT's vocab.txt for the out-of-vocabulary rule (default: that rule is off)")
    add("--max_oov", type=Share, default=0.3,
        help="largest share of a sentence's words outside the vocabulary [0.3]")
    add("--min_words", type=Size, default=4, help="least words of a sentence; without --score, a "
        "shorter one that is the image's own stays where it has no longer one [4]")
    add("--max_words", type=Size, default=40, help="most words of a sentence [40]")
    add("--spam", default="", help="file of phrases, one a line, instead of the built-in spam list")

    add = parser.add_argument_group("scoring: map, and the reduce's threshold").add_argument
    add("--score", default="", help="run directory whose model scores each pair "
        "(default: the text of the surest source is taken)")
    add("--device", default="cpu", choices=("cuda", "cpu"), help="of the scoring model [cpu]")
    add("--batch_size", type=Size, default=64, help="of the scoring model [64]")

    add = parser.add_argument_group("reduce").add_argument
    add("--min_score", type=Finite, help="least score of a pair (default: see --chance_quantile)")
    add("--chance_quantile", type=Share, default=0.95,
        help="the least score is this quantile of the scores with other pictures [0.95]")
    add("--max_images", type=Size, default=10,
        help="a text of more images than this is dropped with all of them [10]")
    add("--sort_lines", type=Size, default=500_000,
        help="candidates that a sort holds in memory [500000]")
    add("--shard_size", type=Size, default=1000, help="pairs in a tar [1000]")
    return parser.parse_args(argv)


def check_flags(args):
    """Stop for a value that cannot be meant. Fills in --images."""
    if args.min_words > args.max_words:
        fail(f"--min_words {args.min_words}: more than --max_words {args.max_words}")
    if args.merge and args.shard:
        fail("--shard makes a part of the candidates, --merge puts all together: one of the two")
    check_out(args.out, "tools.lait: --out", folder=True)
    if args.merge:
        return

    # the map reads pages, and pictures below them or elsewhere
    if not args.pages:
        fail("--in: name the folder of the pages")
    if not os.path.exists(args.pages):
        fail(f"--in {args.pages}: no such file or folder")
    if not args.images:
        folder = args.pages if os.path.isdir(args.pages) else os.path.dirname(args.pages)
        args.images = folder or "."
    if not os.path.isdir(args.images):
        fail(f"--images {args.images}: no such directory")
    if next(listing(args.pages), None) is None:
        fail(f"--in {args.pages}: no {', '.join(PAGE_TYPES + ARCHIVE_TYPES)} in it")


def main(argv=None):
    args = read_flags(argv)
    check_flags(args)

    if not args.merge:
        part = re.fullmatch(r"(\d{1,5})/(\d{1,5})", args.shard or "0/1")
        if not part or not int(part[1]) < int(part[2]):
            fail(f"--shard {args.shard}: I/N with I from 0 to N-1")
        run_map(args, int(part[1]), int(part[2]))
    if not args.shard:
        run_merge(args)


if __name__ == "__main__":
    main()
