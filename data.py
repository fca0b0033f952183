"""data.py: records -> what a model trains on: views, augmentations, the tokenizer, batches.

    files --open_source()--> Records (formats.py: what a record is, every file format)
          --Views----------> samples (dicts of tensors)
          --batches()------> training batches, without end
          --iter_eval()----> a split, each item once

    python data.py check PATH [--image_root R] [--split S] [--source NAME] [--json]

reads everything, opens every image, prints a table and five records, and exits with status 1 if an
image is missing or corrupt (duplicates and captions left out are only reported).

In training an unreadable image is replaced by another record, chosen by (seed, draw) alone; in
evaluation it becomes a grey image; both have `bad` = 1. Nothing here reads or changes a global
random state: a sample is a function of (record, seed, draw).
"""

import io
import itertools
import json
import math
import os
import random
import re
import stat
import struct
import sys
import tokenize
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

# Set before tokenizers is imported: worker processes fork, and each string is encoded alone.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models as tokenizer_models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import formats
from formats import (DataError, Regions, SOURCES, captions_of, decode_mask, expand, fail,
                     guess_source, one_line, open_source, say, text_lines, unique_images, wordings)
# not used here: train.py, eval.py and the tools know them as data.NAME
from formats import (ROW_ARRAYS, Records, SAFE_TYPES, caption_tags,             # noqa: F401
                     encode_mask, join_paraphrases, lines_of, map_safetensors, picture_bytes,
                     picture_path, pictures_in, ranks, read_answers, world_files)
from tools import Parser

# A truncated JPEG must fail, not come back half grey. Pictures that are too large are refused by
# load_image, so PIL need not warn of them as well.
ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# --------------------------------------------------------------------------------------------------
# What a model must know of the data

def answer_list(records, n=3192):
    """The n most frequent normalised answers of VQA records -> list of str.

    Each annotator counts once; ties go by the alphabet. The paper's list has 3,192 answers; its
    rule is not published.
    """
    counts = Counter()
    for record in records:
        counts.update(normalize_answer(answer) for answer in record["answers"] or ())
    del counts[""]
    return most_frequent(counts, n)


def tag_list(records, n=None):
    """The n most frequent tags -> list of str, ties by the alphabet: the vocabulary of the "tags"
    view."""
    counts = Counter()
    for record in records:
        counts.update(record.get("tags") or ())
    return most_frequent(counts, n)


def most_frequent(counts, n):
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def tag_width(records):
    """The largest number of tags that a record has, at least 1."""
    return max([1] + [len(record.get("tags") or ()) for record in records])


def region_stats(records, answers, tags):
    regions = records.regions
    return {"region_dim": regions.dim, "region_classes": regions.classes,
            "global_dim": regions.global_dim, "regions": regions.about}


def tag_stats(records, answers, tags):
    names = tag_list(records, tags)
    return {"tags": names, "num_labels": len(names), "tag_width": tag_width(records)}


def detection_stats(records, answers, tags):
    return {"num_labels": len(records.label_names), "label_names": records.label_names}


def answer_stats(records, answers, tags):
    return {"answers": answer_list(records, answers)}


def hashing_stats(records, answers, tags):
    return {"num_labels": len(records[0]["labels"])}


def clip_stats(records, answers, tags):
    return {"frame_width": read_frames(records[0]["feature"]).shape[1]}


def label_stats(records, answers, tags):
    largest = max(record["label"] for record in records)
    num_labels = max(len(records.label_names or ()), largest + 1)
    return {"num_labels": num_labels, "label_names": records.label_names}


# What stats() returns. The first row counts whose word is a key of the records, a view that is
# asked for, or the source.
STATS = (("key", "regions", region_stats),
         ("view", "tags", tag_stats),
         ("view", "any_tags", tag_stats),
         ("source", "detection", detection_stats),
         ("source", "vqa", answer_stats),
         ("source", "hashing", hashing_stats),
         ("source", "clips", clip_stats),
         ("key", "label", label_stats))


def stats(records, answers=3192, views=None, tags=None):
    """What a model must know of the training records -> dict.

    With regions: region_dim, region_classes, global_dim, regions (what made them). Where `views`
    ask for tags: tags, the `tags` most frequent ones; num_labels of them; tag_width, the most that
    a record has. Of vqa: answers, the `answers` most frequent ones. Of clips: frame_width. Where
    there are labels: num_labels and (but for hashing) label_names.
    """
    words = {"key": records[0], "source": [records.name],
             "view": view_keys(views or {}).values()}
    for kind, word, tell in STATS:
        if word in words[kind]:
            return tell(records, answers, tags)
    return {}


# --------------------------------------------------------------------------------------------------
# The wording of VQA's answers

def contraction_table():
    """{what people type without its apostrophe: the word}, for every form with one apostrophe left
    out (dont, couldn'tve)."""
    endings = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was "
               "were wo would",
        "n't've": "could had might should would",
        "'d've": "he it she somebody someone something there they we who you",
        "'ve": "could might must not should we what where who would they you",
        "'d": "he how it someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you y'all",
        "'re": "there they what why you",
        "'s": "he how somebody someone that there what when where who why"}

    # the words as they should be written
    full = ["ma'am", "o'clock", "'ow's'at", "'twas", "y'all", "y'all'd've"]
    for ending, stems in endings.items():
        full += [stem + ending for stem in stems.split()]

    # each of their apostrophes left out
    table = {}
    for word in full:
        for i, char in enumerate(word):
            if char == "'":
                table[word[:i] + word[i + 1:]] = word
    table["somebody'd"] = "somebodyd"       # the official table has this one the wrong way round
    return table


NUMBER_WORDS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
                "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
CONTRACTIONS = contraction_table()


def normalize_answer(text):
    """The official VQA v2 wording of an answer, str -> str: punctuation, lower case, number words,
    articles, contractions.

    After the evaluation code of visualqa.org, whose rule for periods lacks the look-behind that it
    was meant to have: only a period before a digit stays.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out, comma_in_number = text, re.search(r"\d,\d", text)

    # between letters a mark becomes a space ("t-shirt" -> "t shirt"), else nothing ("yes !")
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_space or comma_in_number else " ")

    # periods go, except in numbers; then word by word
    words = []
    for word in re.sub(r"\.(?!\d)", "", out).lower().split():
        word = NUMBER_WORDS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


# --------------------------------------------------------------------------------------------------
# Tokenizer

class Tokenizer:
    """BERT's WordPiece in lower case, on a vocab.txt with one token a line.

    Words like "[MASK]" in a caption are plain text here.

    Attributes: vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id, first_word (ids from first_word
    on are ordinary tokens).
    """

    def __init__(self, path):
        # a token's id is the number of its line
        self.words = list(text_lines(path))
        ids = {}
        for n, word in enumerate(self.words):
            if not word:
                fail(f"{path} line {n + 1}: an empty line is no token")
            if word in ids:
                fail(f"{path} line {n + 1}: '{word}' stands in line {ids[word] + 1} already")
            ids[word] = n

        # BERT's special tokens
        specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        lacking = [word for word in specials if word not in ids]
        if lacking:
            fail(f"{path}: not a BERT vocabulary, it lacks {', '.join(lacking)}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(ids.get, specials)
        self.vocab_size = len(self.words)

        # ordinary tokens stand behind the last one that is not
        self.first_word = 0
        for n, word in enumerate(self.words):
            if word in specials or re.fullmatch(r"\[unused\d+\]", word):
                self.first_word = n + 1
        if self.first_word >= self.vocab_size:
            fail(f"{path}: words must stand after the special and [unusedN] tokens")

        # lower case without accents, split at spaces and punctuation, then into word pieces
        model = tokenizer_models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100)
        self.rust = RustTokenizer(model)
        self.rust.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text, max_text):
        """str -> list of at most max_text ids, [CLS] and [SEP] included (max_text >= 2)."""
        return [self.cls_id] + self.rust.encode(text).ids[:max_text - 2] + [self.sep_id]

    def batch(self, texts, max_text):
        """N strings -> ids, mask: (N, max_text) int64 each; mask: 1 = a token, 0 = padding."""
        ids = torch.full((len(texts), max_text), self.pad_id)
        mask = torch.zeros(len(texts), max_text, dtype=torch.long)
        for n, text in enumerate(texts):
            row = self.encode(text, max_text)
            ids[n, :len(row)] = torch.tensor(row)
            mask[n, :len(row)] = 1
        return ids, mask

    def tokens(self, ids):
        return [self.words[int(i)] for i in ids]

    def decode(self, ids):
        """ids -> str: up to the first [SEP], without [CLS] and [PAD], word pieces joined."""
        ids = itertools.takewhile(lambda i: int(i) != self.sep_id, ids)
        words = [word for word in self.tokens(ids) if word not in ("[CLS]", "[PAD]")]
        return " ".join(words).replace(" ##", "")


def get_tokenizer(vocab_path):
    """The path of a vocab.txt, or "shapes" for the built-in world's -> Tokenizer."""
    if vocab_path == "shapes":
        from tools import shapes

        vocab_path = shapes.ensure() / "vocab.txt"
    if not os.path.isfile(vocab_path):
        fail(f"--vocab {vocab_path}: no such file")
    return Tokenizer(vocab_path)


# --------------------------------------------------------------------------------------------------
# Images

class BadImage(Exception):
    """An image file that is absent, truncated, too large, or no image."""


def load_image(where):
    """A location (a path or a TarMember) -> PIL image, RGB, upright by its EXIF orientation.

    Of several frames the first. Transparency is dropped, not blended, and gamma is not applied.
    Grey values of more than 8 bits are scaled, see grey_levels(). More than PIL's limit of 89
    million pixels are refused. Raises BadImage.
    """
    try:
        # opening a pipe or a device would wait for ever
        if isinstance(where, str) and not stat.S_ISREG(os.stat(where).st_mode):
            raise BadImage("no picture: not a file")
        file = where if isinstance(where, str) else io.BytesIO(where.read())
        with Image.open(file) as image:
            # the size is in the header: refuse a bomb before it is decoded
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are too many")
            image.load()
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)

            # a palette with transparency, and more than 8 bits: PIL's conversion loses something
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode[0] in "IF":
                image = Image.fromarray(grey_levels(np.asarray(image)))
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadImage("no image format PIL knows") from None
    except UNREADABLE as e:
        reason = getattr(e, "strerror", None)
        raise BadImage(reason or str(e) or type(e).__name__) from None


# What PIL raises of damaged files; its readers of TIFF stumble over types and lengths, too.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, TypeError,
              LookupError, ArithmeticError, Image.DecompressionBombError)


def grey_levels(x):
    """Grey values of 16 or 32 bits, whole or not, (H, W) -> (H, W) uint8.

    The largest value decides what is white: 1, or the largest number of 8, 12 or 16 bits, the
    first that it does not exceed (1 counts only where values are not whole). Raises BadImage of
    values that are negative, larger or not finite.
    """
    if not np.isfinite(x).all() or x.min() < 0 or x.max() > 65535:
        raise BadImage(f"grey values of {x.min()} to {x.max()}: what is white?")
    whites = (255, 4095, 65535) if x.dtype.kind in "iu" else (1, 255, 4095, 65535)
    white = next(white for white in whites if x.max() <= white)
    return (x * np.float32(256 / (white + 1) if white > 1 else 255)).astype(np.uint8)


def open_picture(where):
    """load_image() with a DataError, one line for the user, in place of BadImage."""
    try:
        return load_image(where)
    except BadImage as e:
        fail(f"{where}: {e}")


# Image views: functions (PIL RGB image, size, rng, crop_scale) -> PIL RGB image of size x size
# pixels. rng: the sample's random.Random.

def resize(image, size, rng=None, crop_scale=None):
    """The whole picture squeezed to a square (bicubic)."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def center(image, size, rng=None, crop_scale=None):
    """The short side to `size`, then the square in the middle."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def crop(image, size, rng, crop_scale):
    """RandomResizedCrop: a share of the area in crop_scale, an aspect of 3/4 to 4/3, resized to a
    square (bicubic; Inception's)."""
    # up to ten tries to find a crop that lies inside
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*crop_scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            box = (left, top, left + w, top + h)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=box)

    # a picture that is very wide or very high
    return center(image, size)


def mirror(image, rng):
    if rng.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


GREY = (128, 128, 128)      # what moves into a picture from outside


def affine(image, a, b, c, d, e, f):
    """Pixel (x, y) of the output is pixel (ax + by + c, dx + ey + f) of the image."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=GREY)


# RandAugment without the operations that change colours (ALBEF's list): functions of an image, a
# magnitude m in 0..1 and a sign. Shifts are 10/256 of the side at full magnitude, so that they mean
# the same at any resolution.
RANDAUGMENT = (
    lambda image, m, sign: image,
    lambda image, m, sign: ImageOps.autocontrast(image),
    lambda image, m, sign: ImageOps.equalize(image),
    lambda image, m, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * m),
    lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * m),
    lambda image, m, sign: affine(image, 1, 0.3 * m * sign, 0, 0, 1, 0),
    lambda image, m, sign: affine(image, 1, 0, 0, 0.3 * m * sign, 1, 0),
    lambda image, m, sign: affine(image, 1, 0, 10 / 256 * image.width * m * sign, 0, 1, 0),
    lambda image, m, sign: affine(image, 1, 0, 0, 0, 1, 10 / 256 * image.height * m * sign),
    lambda image, m, sign: image.rotate(30 * m * sign, fillcolor=GREY),
)


def randaug(image, size, rng, crop_scale):
    """RandomResizedCrop, then RandAugment (2 operations, magnitude 7 of 10).

    No flip: captions say left and right.
    """
    image = crop(image, size, rng, crop_scale)
    for _ in range(2):
        operation = rng.choice(RANDAUGMENT)
        image = operation(image, 0.7, rng.choice((-1, 1)))
    return image


def flip(image, size, rng, crop_scale):
    return mirror(crop(image, size, rng, crop_scale), rng)


def jitter(image, rng, brightness, contrast, saturation, hue):
    """Colour jitter in random order (torchvision's ColorJitter): factors of 1 +- the strength; the
    hue moves by +- its strength, a share of the circle."""
    steps = [("Brightness", brightness), ("Contrast", contrast), ("Color", saturation),
             ("hue", hue)]
    rng.shuffle(steps)
    for name, strength in steps:
        # PIL has no enhancer for the hue, a number of 0 to 255
        if name == "hue":
            hues, saturations, values = image.convert("HSV").split()
            shift = round(255 * rng.uniform(-strength, strength))
            hues = hues.point([(i + shift) % 256 for i in range(256)])
            image = Image.merge("HSV", (hues, saturations, values)).convert("RGB")
        else:
            enhancer = getattr(ImageEnhance, name)(image)
            image = enhancer.enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def grey(image):
    return image.convert("L").convert("RGB")


def blur(image, rng):
    """Gaussian blur with a sigma of 0.1 to 2 pixels at 224 pixels, scaled with the side."""
    sigma = rng.uniform(0.1, 2.0) * image.width / 224
    return image.filter(ImageFilter.GaussianBlur(sigma))


def moco(image, size, rng, crop_scale):
    """MoCo v2's: crop, colour jitter (.4 .4 .4 .1) p .8, grey p .2, blur p .5, flip."""
    image = crop(image, size, rng, crop_scale)
    if rng.random() < 0.8:
        image = jitter(image, rng, 0.4, 0.4, 0.4, 0.1)
    if rng.random() < 0.2:
        image = grey(image)
    if rng.random() < 0.5:
        image = blur(image, rng)
    return mirror(image, rng)


def simclr(image, size, rng, crop_scale):
    """SimCLR's: crop, flip, colour jitter (.8 .8 .8 .2) p .8, grey p .2, blur p .5."""
    image = mirror(crop(image, size, rng, crop_scale), rng)
    if rng.random() < 0.8:
        image = jitter(image, rng, 0.8, 0.8, 0.8, 0.2)
    if rng.random() < 0.2:
        image = grey(image)
    if rng.random() < 0.5:
        image = blur(image, rng)
    return image


IMAGE_VIEWS = {"plain": resize, "resize": resize, "center": center, "crop": crop,
               "randaug": randaug, "flip": flip, "moco": moco, "simclr": simclr}

# Mean and standard deviation of each colour, of values 0 to 1.
NORMS = {"clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
         "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
         "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}


# --------------------------------------------------------------------------------------------------
# Views: what a model asks of a record, by name

class Draft:
    """A sample while it is made: what a view gets to see.

    views: the Views; index: the record's position in them; record; rng: the sample's random.Random;
    caption: the position of the caption drawn, which all text views of a sample share.
    """

    def __init__(self, views, index, rng, caption=None):
        self.views, self.index, self.rng = views, index, rng
        self.record = views.records[index]
        self.opened = {}

        # drawn first, so that it does not depend on the views
        captions = self.record.get("caption")
        if caption is None and views.train and isinstance(captions, list):
            caption = rng.randrange(len(captions))
        self.caption = caption or 0

    def location(self, key):
        """Where the picture of a batch key lies; "image2" is the record's second, if it has two."""
        if key == "image2" and "image2" in self.record:
            return self.record["image2"]
        return self.record["image"]

    def picture(self, key):
        """The picture of a batch key as PIL RGB image, read once a sample. Raises BadImage."""
        where = self.location(key)
        if where not in self.opened:
            self.opened[where] = load_image(where)
        return self.opened[where]

    def text(self, key, string):
        """-> {KEY: (max_text,) ids, KEY_mask: (max_text,), 1 = a token}, int64."""
        ids, mask = self.views.tokenizer.batch([string], self.views.max_text)
        return {key: ids[0], key + "_mask": mask[0]}


# A view is a function (draft, batch key) -> {batch key: tensor}.

def view_image(draft, key):
    """(3, S, S) float32, augmented and normalised. Raises BadImage."""
    views = draft.views
    augment = IMAGE_VIEWS[views.keys[key]]
    image = augment(draft.picture(key), views.size, draft.rng, views.crop_scale)
    return {key: views.pixels(image)}


def blank_image(draft, key):
    """The mean colour, never another record's picture."""
    return {key: torch.zeros(3, draft.views.size, draft.views.size)}


def view_objects(draft, key):
    """The picture at its own size with its objects, mirrored in half of the training samples.

    KEY (3, H, W), boxes (n, 4) xyxy in pixels, labels (n,); "masks" adds masks (n, H, W) uint8.
    Sizes differ, so these are lists of one tensor. Crowds are no targets. Raises BadImage.
    """
    record, views = draft.record, draft.views
    image = draft.picture(key)
    if image.size != (record["width"], record["height"]):
        raise BadImage(f"{image.width}x{image.height} pixels, its annotation says "
                       f"{record['width']}x{record['height']}")

    # the objects that are no crowds; COCO has a few boxes without width or height
    keep = []
    for i, (x0, y0, x1, y1) in enumerate(record["boxes"]):
        if not record["crowd"][i] and x1 > x0 and y1 > y0:
            keep.append(i)
    boxes = [record["boxes"][i] for i in keep]
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([record["labels"][i] for i in keep], dtype=torch.long)
    # published boxes reach over the edge now and then: a target does not
    boxes[:, 0::2].clamp_(0, image.width)
    boxes[:, 1::2].clamp_(0, image.height)
    out = {key: views.pixels(image), "labels": labels}
    if views.keys[key] == "masks":
        masks = np.zeros((len(keep), image.height, image.width), np.uint8)
        for n, i in enumerate(keep):
            masks[n] = decode_mask(record["segmentation"][i], image.height, image.width,
                                   record["image"])
        out["masks"] = torch.from_numpy(masks)

    # mirror the picture, its masks and its boxes
    if views.train and draft.rng.random() < 0.5:
        for name in out.keys() & {key, "masks"}:
            out[name] = out[name].flip(-1)
        x0, y0, x1, y1 = boxes.unbind(1)
        boxes = torch.stack([image.width - x1, y0, image.width - x0, y1], 1)
    out["boxes"] = boxes
    return {name: [tensor] for name, tensor in out.items()}


def blank_objects(draft, key):
    """A grey picture of the right size, without objects.

    It has every key that the other samples of its batch have.
    """
    size = draft.record["height"], draft.record["width"]
    out = {key: [torch.full((3, *size), 0.5)], "boxes": [torch.zeros(0, 4)],
           "labels": [torch.zeros(0, dtype=torch.long)]}
    if draft.views.keys[key] == "masks":
        out["masks"] = [torch.zeros(0, *size, dtype=torch.uint8)]
    return out


def view_features(draft, key):
    """What a frozen model made of the picture: a row of views.features (see store_features)."""
    return {key: torch.from_numpy(np.array(draft.views.features[draft.index]))}


def view_regions(draft, key):
    """The max_regions regions with the highest scores, padded with zeros; of a file without scores
    (it says so) the first ones.

    KEY (R, F) float16, KEY_box (R, 4) xyxy in pixels, KEY_label (R,), -1 = none, KEY_mask (R,),
    1 = a region, KEY_size (2,) width and height of the picture, KEY_global (G,) float16 where the
    file has it.
    """
    # regions lie by falling score: the first ones are the best
    regions = draft.views.records.regions
    found = regions[draft.record["regions"]]
    most = draft.views.max_regions or regions.most
    n = min(most, len(found["labels"]))

    out = {key: torch.zeros(most, regions.dim, dtype=torch.float16),
           key + "_box": torch.zeros(most, 4),
           key + "_label": torch.full((most,), -1),
           key + "_mask": torch.zeros(most, dtype=torch.long),
           key + "_size": torch.tensor(found["sizes"].tolist(), dtype=torch.float32)}
    # np.array copies from the mapped file, which is read-only
    out[key][:n] = torch.from_numpy(np.array(found["features"][:n]))
    out[key + "_box"][:n] = torch.from_numpy(np.array(found["boxes"][:n]))
    out[key + "_label"][:n] = torch.from_numpy(np.array(found["labels"][:n]))
    out[key + "_mask"][:n] = 1
    if regions.global_dim:
        out[key + "_global"] = torch.from_numpy(np.array(found["globals"]))

    # a damaged file shows here at the latest
    finite = all(x.isfinite().all() for x in out.values())
    if not finite or (out[key + "_label"] >= max(1, regions.classes)).any():
        fail(f"{draft.record['image']}: its regions in {', '.join(regions.paths)} hold numbers "
             "that are not finite, or a label without a name")
    return out


FRAMES = 32                 # the most frames of a clip


def view_frames(draft, key):
    """(FRAMES, D) float32 features of a clip, padded with zeros, and KEY_mask, 1 = a frame.

    Of a longer clip FRAMES frames, evenly spread.
    """
    x = read_frames(draft.record["feature"])
    if len(x) > FRAMES:
        x = x[np.linspace(0, len(x) - 1, FRAMES).round().astype(int)]

    # pad
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        fail(f"{draft.record['feature']}: its numbers are not finite")
    frames = torch.zeros(FRAMES, x.shape[1])
    frames[:len(x)] = torch.from_numpy(x)
    mask = torch.zeros(FRAMES, dtype=torch.long)
    mask[:len(x)] = 1
    return {key: frames, key + "_mask": mask}


def read_frames(path):
    """A clip's .npy -> (frames, D) numbers, memory-mapped. DataError if it is damaged or of
    another shape."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            fail(f"{path}: not a file")
        x = np.load(path, mmap_mode="r")
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, tokenize.TokenError) as e:
        fail(f"{path}: not a readable .npy file ({e})")
    if not isinstance(x, np.ndarray) or x.ndim != 2 or not x.size or x.dtype.kind not in "fiu":
        fail(f"{path}: shape {getattr(x, 'shape', None)}, not (frames, D) numbers")
    return x


def view_caption(draft, key):
    captions = draft.record["caption"]
    return draft.text(key, captions[draft.caption] if isinstance(captions, list) else captions)


def view_any_caption(draft, key):
    """A caption and KEY_valid = 1; an empty text and 0 where the record has none."""
    valid = bool(draft.record.get("caption"))
    out = view_caption(draft, key) if valid else draft.text(key, "")
    out[key + "_valid"] = torch.tensor(int(valid))
    return out


def view_paraphrase(draft, key):
    """The paraphrase of the caption drawn; without one that caption itself and KEY_is_copy = 1.

    Of several wordings one is drawn; in evaluation it is the first.
    """
    paraphrases = draft.record.get("paraphrase")
    found = wordings(paraphrases[draft.caption]) if paraphrases else []
    string = found[0] if found else draft.record["caption"][draft.caption]
    if len(found) > 1 and draft.views.train:
        string = draft.rng.choice(found)

    out = draft.text(key, string)
    out[key + "_is_copy"] = torch.tensor(int(not found))
    return out


def view_any_paraphrase(draft, key):
    """As "paraphrase", but an empty text where the record has no caption."""
    if draft.record.get("caption"):
        return view_paraphrase(draft, key)
    return draft.text(key, "") | {key + "_is_copy": torch.tensor(0)}


def view_question(draft, key):
    return draft.text(key, draft.record["question"])


def view_answer(draft, key):
    """One of the annotators' answers, drawn so that each wording comes as often as they gave it,
    and KEY_weight = 1; an empty text and 0 where no answer is known."""
    answers = draft.record["answers"]
    answer = normalize_answer(draft.rng.choice(answers)) if answers else ""
    return draft.text(key, answer) | {key + "_weight": torch.tensor(float(bool(answers)))}


def view_sentence(draft, key):
    """One sentence of a graded pair; the batch key is its name in the record, `s1` or `s2`."""
    return draft.text(key, draft.record[key])


def view_tags(draft, key):
    """(L,) ids in views.tag_names, padded with -1; L = the most tags that a record has."""
    return {key: draft.views.tag_row(draft.record)}


def view_label(draft, key):
    return {key: torch.tensor(draft.record["label"])}


def view_labels(draft, key):
    return {key: torch.tensor(draft.record["labels"], dtype=torch.float32)}


class View(NamedTuple):
    """A row of VIEW_TABLE."""

    make: Callable                  # (draft, batch key) -> {batch key: tensor}
    needs: str = ""                 # the record key that every record must have
    side: str = ""                  # "image" or "text": the side of a pair that iter_eval makes
    evaluated: str = ""             # the view in its place in evaluation, if VIEWS names no other
    blank: Callable = None          # like make: what stands for an unreadable picture in evaluation


VIEW_TABLE = {name: View(view_image, "", "image", "resize", blank_image) for name in IMAGE_VIEWS}
VIEW_TABLE |= {
    "caption": View(view_caption, "caption", "text"),
    "any_caption": View(view_any_caption, side="text"),
    "paraphrase": View(view_paraphrase, "caption", "text"),
    "any_paraphrase": View(view_any_paraphrase, side="text"),
    "question": View(view_question, "question"),
    "answer": View(view_answer, "answers"),
    "sentence": View(view_sentence),
    "tags": View(view_tags, "tags"),
    "any_tags": View(view_tags),
    "label": View(view_label, "label"),
    "labels": View(view_labels, "labels"),
    "frames": View(view_frames, side="image"),
    "regions": View(view_regions, side="image"),
    "features": View(view_features, evaluated="resize"),
    "objects": View(view_objects, "boxes", blank=blank_objects),
    "masks": View(view_objects, "segmentation", blank=blank_objects),
}


def view_keys(views):
    """A model's VIEWS[task] -> {batch key: view name}: all but source, norm and the KEY_eval."""
    keys = {}
    for key, name in views.items():
        if key not in ("source", "norm") and not key.endswith("_eval"):
            keys[key] = name
    return keys


def check_views(views):
    """Errors: a word in VIEWS[task] that is no source, norm, batch key, KEY_eval or view."""
    # source and norm
    for word, known in (("source", SOURCES), ("norm", NORMS)):
        if word in views and views[word] not in known:
            fail(f"no {word} '{views[word]}' (there are: {', '.join(known)})")

    # batch keys may have any name; what they ask for must be a view
    keys = view_keys(views)
    for key, name in keys.items():
        if name not in VIEW_TABLE:
            fail(f"no view '{name}' for '{key}' (there are: {', '.join(VIEW_TABLE)})")

    # KEY_eval may be None; of a picture it must be a view of a picture
    for word, name in views.items():
        if not word.endswith("_eval"):
            continue
        key = word.removesuffix("_eval")
        if key not in keys:
            fail(f"VIEWS has '{word}', but no key '{key}' (its keys: {', '.join(keys)})")
        known = IMAGE_VIEWS if VIEW_TABLE[keys[key]].evaluated else VIEW_TABLE
        if name is not None and name not in known:
            fail(f"no view '{name}' for '{key}' (there are: {', '.join(known)})")


def needs(views):
    """The record keys that VIEWS[task] cannot do without, for open_source(need=)."""
    check_views(views)
    return tuple(sorted({VIEW_TABLE[name].needs for name in view_keys(views).values()} - {""}))


def absent(views):
    """open_source(missing=) for VIEWS[task]: pictures may be missing where only their regions are
    looked at, as users of bottom-up-attention files often have no pictures."""
    names = set(view_keys(views).values())
    return "keep" if "regions" in names and not names & set(IMAGE_VIEWS) else "drop"


def with_regions(records, views, files=""):
    """The records with the regions that VIEWS[task] asks for; as they are where it asks for none.

    files: region files separated by commas. The built-in world brings its own.
    """
    if "regions" not in view_keys(views).values():
        return records
    # the built-in world is known by its version.json
    root = records.root or ""
    if not files and os.path.exists(os.path.join(root, "version.json")):
        own = os.path.join(root, f"regions_{records.split}.safetensors")
        files = own if os.path.exists(own) else ""
    if not files:
        fail("this model looks at regions: name their files, --regions FILE "
             "(python -m tools.regions makes them)")
    return Regions(expand(files, "--regions")).attach(records)


def twice_the_same(records, views):
    """A line for the start of a run whose views ask for paraphrases where no record has one; else
    None."""
    keys = [key for key, name in view_keys(views).items() if name.endswith("paraphrase")]
    if not keys or records.notes.get("with_paraphrase"):
        return None
    return (f"WARNING: NO CAPTION HAS A PARAPHRASE. `{keys[0]}` is the caption itself, so that "
            "both views of a text are the same. Give --paraphrase FILE (back-translations), or "
            "records with a key 'paraphrase'")


class Views(Dataset):
    """Records and VIEWS[task] -> samples, dicts of tensors.

    Of an image view KEY (3, S, S) float32; of a text view KEY (max_text,) int64 ids and KEY_mask
    (1 = a token); of the others what VIEW_TABLE's function says. Always image_id, index (the
    record's position) and bad (1 = stands in for an unreadable image), 0-d int64. A value that is
    a list of one tensor (objects, whose sizes differ) becomes a list of tensors in a batch.

    `ds[i, draw]`: every random choice is a function of (seed, i, draw). `ds[i]` is draw 0.

    train=False: each KEY has the view KEY_eval ("resize" if there is none; None: it is not made)
    and caption 0. A key with the view "features" is a row of the attribute `features` in training,
    and in evaluation the picture, as `image`, in the view KEY_eval.
    image_view: in place of the training view of each key "image*".
    max_bad: the largest share of unreadable images in training.
    tag_names: the vocabulary of the "tags" view (default: all tags of these records); evaluation
    takes the training one.
    max_regions: the width of the "regions" view (default: the most regions of a picture).
    """

    def __init__(self, records, views, tokenizer, image_size, max_text, train=True, seed=0,
                 crop_scale=(0.2, 1.0), image_view=None, max_bad=0.1, tag_names=None,
                 max_regions=None):
        self.records, self.tokenizer = records, tokenizer
        self.size, self.max_text, self.max_regions = image_size, max_text, max_regions
        self.train, self.seed, self.max_bad = train, seed, max_bad
        self.crop_scale = tuple(crop_scale)
        self.features = None

        # what is asked of each record
        check_views(views)
        if views.get("source", records.name) != records.name:
            fail(f"these views are of '{views['source']}', the records are '{records.name}'")
        if max_text is not None and max_text < 3:
            fail(f"--max_text {max_text}: [CLS], one token and [SEP] need 3")
        self.keys = chosen_views(views, train, image_view)

        # normalisation of bytes: x * scale + shift
        mean, std = torch.tensor(NORMS[views.get("norm", "clip")]).view(2, 3, 1, 1)
        self.scale, self.shift = 1 / (255 * std), -mean / std

        # the vocabulary of tags, only where they are asked for
        self.tag_names = tag_names
        if {"tags", "any_tags"} & set(self.keys.values()):
            self.tag_names = tag_list(records) if tag_names is None else list(tag_names)
            self.tag_ids = {tag: n for n, tag in enumerate(self.tag_names)}
            self.tag_width = tag_width(records)

        # samples made so far, stand-ins among them, unreadable files that were reported
        self.seen = self.bad = 0
        self.named = set()

    def __len__(self):
        return len(self.records)

    def __getitem__(self, at):
        sample, trouble = self.sample(*at) if isinstance(at, tuple) else self.sample(at)
        self.report(trouble)
        return sample

    def sample(self, i, draw=0, caption=None, keys=None):
        """-> (sample, list of "file: reason" for the unreadable images met).

        caption: the position of a caption (default: drawn in training, 0 in evaluation). keys: the
        batch keys to make (default: all).
        """
        i, trouble = int(i), []
        for attempt in range(100):
            # no two of (attempt, seed, draw, i) give the same number
            rng = random.Random((attempt << 160) ^ (self.seed << 96) ^ (int(draw) << 40) ^ i)
            # after an unreadable picture another record stands in
            index = i
            if attempt:
                index, caption = rng.randrange(len(self.records)), None
            sample = self.build(index, rng, caption, keys, trouble)
            if sample is not None:
                sample["bad"] = torch.tensor(int(bool(trouble)))
                return sample, trouble
        fail(f"100 unreadable images in a row, the last is {trouble[-1]}")

    def build(self, index, rng, caption, keys, trouble):
        """The sample of a record; None if its picture is unreadable in training.

        Adds a line to `trouble` for each unreadable picture.
        """
        draft = Draft(self, index, rng, caption)
        out = {"image_id": torch.tensor(draft.record["image_id"]), "index": torch.tensor(index)}
        for key, name in self.keys.items():
            if keys is not None and key not in keys:
                continue
            view = VIEW_TABLE[name]
            try:
                out.update(view.make(draft, key))
            except BadImage as e:
                # evaluation keeps the place, training looks for another record
                line = f"{draft.location(key)}: {e}"
                if line not in trouble:
                    trouble.append(line)
                if self.train:
                    return None
                out.update(view.blank(draft, key))
        return out

    def pixels(self, image):
        """PIL RGB -> (3, H, W) float32, normalised."""
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()
        return x.mul_(self.scale).add_(self.shift)

    def tag_row(self, record):
        """A record's tags -> (tag_width,) int64 ids, each once, padded with -1. Tags outside
        tag_names are left out."""
        tags = dict.fromkeys(record.get("tags") or ())
        ids = [self.tag_ids[tag] for tag in tags if tag in self.tag_ids]
        return torch.tensor(ids + [-1] * (self.tag_width - len(ids)))

    def tag_rows(self):
        """(N, tag_width) int64: the "tags" view of every record, without opening a picture."""
        return torch.stack([self.tag_row(record) for record in self.records])

    def report(self, trouble, samples=1, bad=None):
        """Counts samples and the stand-ins among them, and names each unreadable file once.

        Errors: more than max_bad of 100 or more training samples are stand-ins.
        """
        # bad counts samples, one of which may hold two unreadable pictures
        self.seen += samples
        self.bad += bool(trouble) if bad is None else bad

        # each file is named once
        done = "another record stands in" if self.train else "evaluated as a grey image"
        for line in trouble:
            if line not in self.named:
                self.named.add(line)
                say(f"unreadable image {line}; {done}")

        # a few files are damaged in every crawl; many are a mistake
        if self.train and self.seen >= 100 and self.bad > self.max_bad * self.seen:
            fail(f"{self.bad} of {self.seen} images were unreadable, more than "
                 f"--max_bad {self.max_bad}")


def chosen_views(views, train, image_view=None):
    """VIEWS[task] -> {batch key: view name} as training or evaluation makes them."""
    if image_view and image_view not in IMAGE_VIEWS:
        fail(f"--image_view: no view '{image_view}' (there are: {', '.join(IMAGE_VIEWS)})")

    keys = {}
    for key, name in view_keys(views).items():
        # training: as it says, or with --image_view
        if train:
            forced = image_view and name in IMAGE_VIEWS and key.startswith("image")
            keys[key] = image_view if forced else name
            continue

        # evaluation; stored features are of training's records, so it gets the picture itself
        shown = views.get(key + "_eval", VIEW_TABLE[name].evaluated or name)
        if shown is not None:
            keys["image" if name == "features" else key] = shown
    return keys


# --------------------------------------------------------------------------------------------------
# Batches

def collate(samples):
    """List of samples -> dict of stacked tensors (B, ...); lists of tensors are joined to one."""
    batch = {}
    for key, value in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(value, list):
            batch[key] = list(itertools.chain(*values))
        else:
            batch[key] = torch.stack(values)
    return batch


def move(batch, device):
    """A batch on a device."""
    def to(x):
        if isinstance(x, list):
            return [to(part) for part in x]
        return x.to(device, non_blocking=True)

    return {key: to(value) for key, value in batch.items()}


def gather_objects(x):
    """A Python object from each process -> list of them by rank, the same on every process."""
    if not torch.distributed.is_initialized():
        return [x]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, x)
    return everyone


class Item(NamedTuple):
    """What one sample of a batch is made of: arguments of Views.sample()."""

    record: int
    draw: int = 0
    caption: int = None
    keys: list = None
    number: int = None              # the sample's `index`, if it is not the record's position


class Plan(Dataset):
    """plan[t] = (the whole batch t, list of troubles), made in one worker.

    items: a function t -> list of Items. A DataError, which cannot leave a worker, is returned as
    its message.
    """

    def __init__(self, dataset, items):
        self.dataset, self.items = dataset, items

    def __getitem__(self, t):
        samples, troubles = [], []
        for item in self.items(t):
            # a worker cannot raise a SystemExit
            try:
                sample, trouble = self.dataset.sample(*item[:4])
            except DataError as e:
                return str(e)
            if item.number is not None:
                sample["index"] = torch.tensor(item.number)
            samples.append(sample)
            troubles += trouble
        return collate(samples), troubles

    def run(self, steps, workers):
        """Yields the batches of the numbers in `steps`, in order, made by `workers` processes (0:
        by this one)."""
        made = map(self.__getitem__, steps)
        if workers:
            # a generator of its own: the global random state stays as it is
            made = DataLoader(self, batch_size=None, sampler=steps, num_workers=workers,
                              worker_init_fn=one_thread, generator=torch.Generator())
        for got in made:
            # the troubles are counted here, in the main process
            if isinstance(got, str):
                raise DataError(got)
            batch, troubles = got
            self.dataset.report(troubles, len(batch["bad"]), int(batch["bad"].sum()))
            yield batch


def one_thread(worker):
    torch.set_num_threads(1)
    os.setpgid(0, 0)                    # a signal to the trainer's group, to save, is not for it


class Stream:
    """stream(t) -> this rank's Items of global step t.

    Each pass over the data is a new permutation; its last, incomplete batch is dropped. The global
    batch of step t depends on (seed, batch_size * world) alone, so that resuming is arithmetic.

    units: what a pass goes over, a number of records or caption_units().
    """

    def __init__(self, units, batch_size, seed, rank, world):
        self.units, self.seed = units, seed
        self.length = units if isinstance(units, int) else len(units)
        self.batch, self.total = batch_size, batch_size * world
        self.first = rank * batch_size              # this rank's part of the global batch
        self.steps = self.length // self.total      # steps of a pass
        self.now, self.order = None, None           # the pass whose permutation is kept

    def __call__(self, t):
        # the permutation of this pass
        epoch, step = divmod(t, self.steps)
        if epoch != self.now:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(self.length, generator=generator)
            self.now = epoch

        # this rank's part; the draw is the number of the sample in the whole stream
        start = step * self.total + self.first
        mine = self.order[start:start + self.batch]
        draw = t * self.total + self.first
        if isinstance(self.units, int):
            return [Item(record, draw + k) for k, record in enumerate(mine.tolist())]
        pairs = self.units[mine].tolist()
        return [Item(record, draw + k, caption) for k, (record, caption) in enumerate(pairs)]


def caption_units(records):
    """Every caption of every record -> (N, 2) int32: the record, and which of its captions. A
    record without captions, or with a single string, is there once."""
    counts = torch.from_numpy(records.column("captions")).clamp(min=1).long()
    owners = torch.arange(len(counts)).repeat_interleave(counts)
    firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.stack([owners, torch.arange(len(owners)) - firsts], 1).int()


def batches(dataset, batch_size, seed, rank=0, world=1, start=0, workers=0, units=None):
    """Infinite iterator of batches of this rank, `batch_size` samples each, from global step
    `start` on. They are the same for any number of workers.

    units: None, a pass goes over records and draws a caption of each; caption_units(), over
    captions, each of them once.
    Errors: DataError if the data are fewer than batch_size * world.
    """
    stream = Stream(len(dataset) if units is None else units, batch_size, seed, rank, world)
    if not stream.steps:
        what = "records" if units is None else "captions"
        fail(f"{stream.length} {what} are fewer than one global batch ({batch_size} x {world} "
             "ranks): use a smaller --batch_size")
    return Plan(dataset, stream).run(itertools.count(start), workers)


class Chunks:
    """chunks(t) -> the Items of batch t of a list."""

    def __init__(self, items, size):
        self.items, self.size = items, size

    def __call__(self, t):
        return self.items[t * self.size:(t + 1) * self.size]


def first_captions(records, n):
    """Records with the first n captions of each picture, and their paraphrases; the others go."""
    out, (first, picture) = records.subset(()), unique_images(records)
    seen = np.zeros(len(first), np.int64)
    for record, image in zip(records, picture):
        captions, paraphrases = captions_of(record), record.get("paraphrase")
        kept = max(0, n - seen[image])
        seen[image] += len(captions)
        record["caption"] = captions[:kept]
        if paraphrases:
            record["paraphrase"] = paraphrases[:kept]
        out.append(record)
    return out


def flat_captions(records):
    """All captions in order -> (list of str, owner (N,) int64: the position of a caption's picture
    among the unique images)."""
    texts = list(itertools.chain.from_iterable(map(captions_of, records)))
    owner = np.repeat(unique_images(records)[1], records.column("captions"))
    return texts, torch.from_numpy(owner)


def iter_eval(records, views, tokenizer, image_size, max_text, what="sample", batch_size=64,
              rank=0, world=1, workers=0, **options):
    """Iterator of batches of this rank's share of a split: each item once, nothing padded, the last
    batch may be short. Shares are whole batches, so that these are the same for any number of
    ranks; one may get none.

    what="image": each picture, `index` = its position among the unique images; "text": each
    caption, `index` = its position in flat_captions; "sample": each record, `index` = its position.
    options: more of Views' arguments.
    """
    # of a picture the keys of its side alone, of a caption those of the text
    dataset = Views(records, views, tokenizer, image_size, max_text, train=False, **options)
    keys = [key for key, name in dataset.keys.items() if VIEW_TABLE[name].side == what]

    # what there is to make, in order
    items = []
    if what == "image":
        for number, i in enumerate(unique_images(records)[0].tolist()):
            items.append(Item(i, keys=keys, number=number))
    elif what == "text":
        for i, count in enumerate(records.column("captions").tolist()):
            for caption in range(count):
                items.append(Item(i, caption=caption, keys=keys, number=len(items)))
    elif what == "sample":
        items = [Item(i) for i in range(len(records))]
    else:
        raise ValueError(f"what={what!r}: image, text or sample")

    # every world-th batch of it
    steps = range(rank, math.ceil(len(items) / batch_size), world)
    return Plan(dataset, Chunks(items, batch_size)).run(steps, workers)


def store_features(path, key, fn, records, views, tokenizer, image_size, max_text, device,
                   batch_size=64, rank=0, world=1, workers=0):
    """What a frozen function fn(batch) -> (B, D) makes of every record's picture under the
    evaluation views, computed once -> (N, D) float32, memory-mapped from `path`.

    key: a JSON value that identifies model and data. A file made with the same key is used again.
    Every rank computes its share and writes its rows into rank 0's file: the folder is shared.
    """
    note = path.with_suffix(".json")
    if path.is_file() and note.is_file() and json.loads(note.read_text()) == key:
        return np.load(path, mmap_mode="r")

    def barrier():
        if world > 1:
            torch.distributed.barrier()

    # of all views the stored features alone
    kept = {name for name, view in view_keys(views).items() if view == "features"}
    kept |= {name + "_eval" for name in kept} | {"source", "norm"}
    views = {name: view for name, view in views.items() if name in kept}
    made = iter_eval(records, views, tokenizer, image_size, max_text, "sample", batch_size, rank,
                     world, workers)
    steps = math.ceil(len(records) / batch_size / world)
    store = None
    for batch in tqdm(made, "features", steps, leave=False, delay=2, disable=rank > 0):
        rows = fn(move(batch, device)).float().cpu().numpy()

        # the first rows tell D: rank 0 makes the file, then everyone opens it
        if store is None:
            if rank == 0:
                note.unlink(missing_ok=True)
                shape = (len(records), rows.shape[1])
                np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
            barrier()
            store = np.load(path, mmap_mode="r+")
        store[batch["index"].numpy()] = rows

    # the note comes last: it says that the file is whole
    if store is None:                               # a rank without a batch: rank 0 made the file
        barrier()
    else:
        store.flush()
    barrier()
    if rank == 0:
        note.write_text(json.dumps(key))
    barrier()
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------
# python data.py check

def trouble_with(where):
    """None, "missing", or why an image or a feature file cannot be read."""
    if isinstance(where, str) and not os.path.exists(where):
        return "missing"
    try:
        if isinstance(where, str) and where.endswith(".npy"):
            read_frames(where)
        else:
            load_image(where)
    except BadImage as e:
        return str(e)
    except DataError as e:
        return str(e).removeprefix(f"data.py: {where}: ")


def files_of(record):
    """The locations of a record's pictures or features."""
    return [record[key] for key in ("image", "image2", "feature") if key in record]


def check_split(records, title):
    """Opens every file of the records -> ({what: count} to print, list of (location, reason) of
    the unreadable ones)."""
    # each file once
    files = {}
    for record in records:
        files.update(dict.fromkeys(files_of(record)))

    # threads: PIL decodes outside the interpreter's lock
    troubles = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(trouble_with, files)
        for where, reason in zip(files, tqdm(reasons, title, len(files), leave=False,
                                             disable=None)):
            if reason:
                troubles[where] = reason

    # what to print
    rows = {"records": len(records), "images": len(files)}
    counts = [len(r["caption"]) for r in records if isinstance(r.get("caption"), list)]
    if counts:
        rows["captions"] = sum(counts)
        rows["captions an image"] = (f"{min(counts)} to {max(counts)}, "
                                     f"mean {np.mean(counts):.2f}")
    rows["missing files"] = sum(reason == "missing" for reason in troubles.values())
    rows["corrupt files"] = len(troubles) - rows["missing files"]

    # what a tar lost has no record; records of missing files are kept here, and are counted too
    kept = sum(any(troubles.get(file) == "missing" for file in files_of(r)) for r in records)
    lost = records.notes.get("missing", 0) - kept
    if lost:
        rows["samples without a picture"] = lost
    if records.name == "pairs":
        rows["duplicate captions"] = records.notes.get("duplicates", 0)
    for note, count in records.notes.items():
        if note not in ("missing", "duplicates"):
            rows[note.replace("_", " ")] = count
    return rows, list(troubles.items())


def check(spec, image_root=None, split=None, source=None, as_json=False):
    """Prints what is in the files of `spec` and opens every image -> number of missing and corrupt
    ones, and of samples that lost theirs."""
    # read all splits once to learn their names, then each one
    source = source or guess_source(spec)
    everything = open_source(source, spec, split, image_root, missing="keep")
    report = {"source": source, "data": spec, "protocol": everything.protocol,
              "labels": everything.label_names, "splits": {}, "troubles": [], "samples": []}
    for part in [split] if split else everything.splits or [None]:
        records = open_source(source, spec, part, image_root, missing="keep")
        rows, found = check_split(records, f"opening {part or ''}")
        report["splits"][part or "all"] = rows
        report["troubles"] += [[str(where), reason] for where, reason in found]

    # five records, always the same ones: a wrong pairing shows at a glance
    for i in sorted(random.Random(0).sample(range(len(everything)), min(5, len(everything)))):
        where = ", ".join(map(str, files_of(everything[i])))
        report["samples"].append([where, in_words(everything[i], everything.label_names)])
    lost = sum(rows.get("samples without a picture", 0) for rows in report["splits"].values())
    text = json.dumps(report, indent=1) if as_json else in_lines(report)
    print(text.encode("utf-8", "backslashreplace").decode())
    return len(report["troubles"]) + lost


def in_words(record, label_names):
    """What a record says of its picture, on one line."""
    told = []
    for key in ("question", "answers", "caption", "s1", "s2", "score", "label", "labels"):
        value = record.get(key)
        if value in (None, []):
            continue
        # names of labels; of hashing's row of 0 and 1 the positions
        if key == "labels":
            value = [n for n, on in enumerate(value) if on] if not record.get("boxes") else value
            value = "labels " + " ".join(str(label_names[n] if label_names else n) for n in value)
        elif key == "label" and label_names:
            value = label_names[value]
        elif isinstance(value, list):
            value = value[0] + f" (and {len(value) - 1} more)" * (len(value) > 1)
        told.append(str(value))
    return one_line(" | ".join(told)) or "no caption"


def in_lines(report):
    """The report of check() -> the text that is printed."""
    protocol = f" ({report['protocol']})" if report["protocol"] else ""
    lines = [f"{report['source']}: {report['data']}{protocol}"]
    names = report["labels"]
    if names:
        more = ", ..." if len(names) > 6 else ""
        lines.append(f"labels: {len(names)} ({', '.join(names[:6])}{more})")

    # a column for each split
    table, widths = report["splits"], {}
    for column, values in table.items():
        widths[column] = max(len(str(cell)) for cell in [column, *values.values()])
    lines.append(" " * 30 + "  ".join(column.rjust(widths[column]) for column in table))
    for row in dict.fromkeys(itertools.chain(*table.values())):
        cells = [str(values.get(row, 0)).rjust(widths[column]) for column, values in table.items()]
        lines.append(f"  {row:<28}" + "  ".join(cells))

    # the first ten unreadable files, five records
    troubles = report["troubles"]
    lines += [f"  {where}: {reason}" for where, reason in troubles[:10]]
    if len(troubles) > 10:
        lines.append(f"  ... and {len(troubles) - 10} more")
    lines.append("for example:")
    for where, words in report["samples"]:
        lines.append(f"  {where}: {words}" if where else f"  {words}")
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(prog="data.py", description=f"{__doc__}\n{formats.__doc__}")
    tasks = parser.add_subparsers(dest="task", required=True)

    # check, the one task so far
    p = tasks.add_parser("check", help="count records and open every image; exit status 1 if one "
                                       "is missing or corrupt")
    p.add_argument("path", help='files or folders separated by commas, or "shapes"')
    p.add_argument("--image_root", help="the folder the images lie in")
    p.add_argument("--split", help="only this split (default: each)")
    p.add_argument("--source", choices=SOURCES,
                   help="what the records are (default: guessed from the files)")
    p.add_argument("--json", action="store_true", help="print all of it as JSON")
    args = parser.parse_args(argv)
    return int(check(args.path, args.image_root, args.split, args.source, args.json) > 0)


if __name__ == "__main__":
    sys.exit(main())
