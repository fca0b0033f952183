"""data.py: every data set, every official file format, augmentations, the tokenizer, batches.

    files --open_source()--> Records (list-like, of plain dicts)
          --Views----------> samples (dicts of tensors)
          --batches()------> training batches, without end
          --iter_eval()----> a split, each item once

A *source* says what a record means: `pairs`, `vqa`, `ve`, `nlvr2`, `sts`, `hashing`, `classes`,
`clips`, `detection`. The file format is recognised from the files. Data are named as "shapes" (the
built-in world, which tools/shapes.py writes in these same formats) or as files and folders
separated by commas; `{00000..00012}` in a name counts up. Formats read, as their publishers wrote
them:

  pairs      records .json/.jsonl: image, caption (string or list) [image_id, split, tags,
             paraphrase, boxes, labels]; Karpathy's dataset_*.json; COCO's captions_*.json
             (instances_*.json in the same list adds tags and boxes by image id); .tsv
             "caption TAB path-or-url" beside a folder of images (CC, SBU); img2dataset's .tar
             shards, or a folder of them; VQA v2's and GQA's questions as captions
  vqa        VQA v2's questions.json [+ annotations.json]
  ve         SNLI-VE's .jsonl
  nlvr2      NLVR2's .json/.jsonl
  sts        SentEval's folders STS1X-en-test, stsbenchmark/, sts-*.csv
  hashing    CSQ's lists "path 0 1 0 ..."
  classes    ImageFolder
  clips      MSR-VTT's videodatainfo.json [+ the 1k-A csv] + a folder of .npy
  detection  COCO's instances_*.json; a VOCdevkit folder with VOC2007, VOC2012 or both

    python data.py check PATH [--image_root R] [--split S] [--source NAME]

reads everything, opens every image, prints a table and exits with status 1 if an image is missing
or corrupt (duplicates and captions left out are only reported).

Something wrong in a file is a DataError: one line that names file, line and key. Something merely
absent (an image that was never downloaded, an empty caption) is left out, counted in
`Records.notes` and reported once on stderr. In training an unreadable image is replaced by another
record, chosen by (seed, draw) alone; in evaluation it becomes a grey image; both have `bad` = 1.
Nothing here reads or changes a global random state: a sample is a function of (record, seed, draw).
"""

import argparse
import array
import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import struct
import sys
import tarfile
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple
from xml.etree import ElementTree

# Set before tokenizers is imported: worker processes fork, and each string is encoded alone.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models as tokenizer_models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# A truncated JPEG must fail, not come back half grey. Pictures that are too large are refused by
# load_image, so PIL need not warn of them as well.
ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")

# What publishers call a split -> our name of it.
SPLIT_NAMES = {"restval": "train", "validate": "val", "validation": "val", "valid": "val",
               "dev": "val"}


class DataError(SystemExit):
    """Something the user can put right: printed as one line, exit status 1."""


def fail(message):
    raise DataError(f"data.py: {message}")


def say(message):
    print(f"data.py: {message}", file=sys.stderr, flush=True)


def ranks():
    """-> (rank of this process, number of processes, rank on this machine), as torchrun says."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return rank, world, local_rank


def gather_objects(x):
    """A Python object from each process -> list of them by rank, the same on every process."""
    if not torch.distributed.is_initialized():
        return [x]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, x)
    return everyone


# --------------------------------------------------------------------------------------------------
# Records

class TarMember(NamedTuple):
    """A picture inside a tar file: its member, `size` bytes from byte `offset` on.

    The location of a picture is a path (str) or a TarMember. A further kind of location, in a zip
    file for example, is one more class like this one: read(), path(), size and str() are all that
    the code asks of a location that is not a path.
    """

    tar: str
    offset: int
    size: int
    member: str

    def __str__(self):
        return f"{self.tar} at byte {self.offset} ({self.size} bytes)"

    def read(self):
        """The bytes of the picture's file. Raises OSError."""
        with open(self.tar, "rb") as f:
            f.seek(self.offset)
            return f.read(self.size)

    def path(self):
        """As if the tar file were a folder."""
        return os.path.join(self.tar, self.member)


class Records:
    """A list of dicts, kept as one pickled byte string.

    Millions of records stay small this way, and forked workers copy no memory pages.

    `image` (and `image2`, `feature`) is a location: a path that opens as it is, or a TarMember.
    `image_id` is an int, the same for two records of one picture.

    Attributes: name (the source), split, root (folder of the images), notes ({what was counted:
    count}), label_names (what the ints in `labels` and `label` mean, or None), protocol (str or
    None), splits (those found in the files), regions (a Regions or None, see with_regions),
    own_ids (the files give an image_id to every record).
    """

    def __init__(self, name, split, root=None):
        self.name = name
        self.split = split
        self.root = root
        self.notes = {}
        self.label_names = None
        self.protocol = None
        self.splits = []
        self.regions = None
        self.own_ids = True

        # record i is _blob[_ends[i]:_ends[i + 1]]
        self._blob = bytearray()
        self._ends = array.array("q", [0])

    def append(self, record):
        self._blob += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._blob))

    def subset(self, indices):
        """The records at `indices`, in that order, as new Records with the same attributes."""
        out = copy.copy(self)
        out.notes = dict(self.notes)
        out._blob = bytearray()
        out._ends = array.array("q", [0])
        for i in indices:
            out.append(self[i])
        return out

    def fingerprint(self):
        """A hash of the records' number, order and captions."""
        text = json.dumps([captions_of(record) for record in self])
        return f"{len(self)} records {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return pickle.loads(memoryview(self._blob)[self._ends[i]:self._ends[i + 1]])


class Listing:
    """`path in listing`: does the file exist? Each folder is listed once.

    Asking the disk for each image is slow on network disks.
    """

    def __init__(self):
        self.folders = {}

    def __contains__(self, path):
        folder, name = os.path.split(path)
        if folder not in self.folders:
            there = os.path.isdir(folder or ".")
            self.folders[folder] = set(os.listdir(folder or ".")) if there else set()
        return name in self.folders[folder]


class Reading:
    """What a reader needs beside its files: the Records, whose notes and names it fills in, the
    split that is wanted, the splits met so far, and which files exist."""

    def __init__(self, records):
        self.records = records
        self.split = records.split
        self.here = Listing()
        self.splits = set()

    def wants(self, part):
        """Is a record of the file's own split `part` asked for? None: the file has no splits."""
        if part is None:
            return True
        part = SPLIT_NAMES.get(part, part)
        self.splits.add(part)
        return self.split in (None, part)

    def count(self, note, n=1):
        self.records.notes[note] = self.records.notes.get(note, 0) + n

    def find(self, bases, *names):
        """The first path BASE/NAME that exists. None does: the first one tried, so that it is
        reported as missing."""
        tried = [os.path.join(base, name) for name in names for base in bases]
        for path in tried:
            if path in self.here:
                return path
        return tried[0]

    def missing_file(self, record):
        """The first file of a record that does not exist, or None. Members of tars do exist."""
        for key in ("image", "image2", "feature"):
            where = record.get(key)
            if isinstance(where, str) and where not in self.here:
                return where
        return None

    def set_label_names(self, path, names):
        """Sets what the label numbers mean. Errors: an earlier file of --data has other names."""
        if self.records.label_names not in (None, names):
            fail(f"{path}: its classes differ from those of the file before it")
        self.records.label_names = names


# --------------------------------------------------------------------------------------------------
# Small tools for files

def expand(spec, flag="--data"):
    """A specification like "a.json,shards/{00..02}.tar" -> list of paths that exist.

    Errors: DataError that names the flag and the path that is missing.
    """
    # a path may hold a comma itself
    items = [spec]
    if not os.path.exists(spec):
        items = [item.strip() for item in spec.split(",") if item.strip()]

    # {00..02} counts up, with as many digits as its first number has
    paths = []
    for item in items:
        span = re.search(r"\{(\d+)\.\.(\d+)\}", item)
        if not span:
            paths.append(item)
            continue
        first, last = span.groups()
        for number in range(int(first), int(last) + 1):
            digits = str(number).zfill(len(first))
            paths.append(item[:span.start()] + digits + item[span.end():])
    if not paths:
        fail(f"{flag} is empty")

    # every path must exist
    for path in paths:
        if not os.path.exists(path):
            fail(f"{flag} {path}: no such file")
    return paths


def text_lines(path):
    """Yields the lines of a UTF-8 file without their ends.

    Splits at newlines only: captions and vocabularies hold other separators, U+2028 for example.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            for line in f:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 text ({e.reason})")
    except OSError as e:
        fail(f"{path}: {e.strerror}")


def lines_of(path):
    """Yields (where, line) for the lines that are not blank; `where` is "PATH line N"."""
    for n, line in enumerate(text_lines(path), 1):
        if line.strip():
            yield f"{path} line {n}", line


def read_json(path):
    """The JSON value in a file; of jsonl (under any extension) an iterator of (where, dict)."""
    if path.endswith(".jsonl"):
        return json_lines(path)
    text = "\n".join(text_lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        # jsonl under the name .json, as NLVR2 publishes it
        if e.msg == "Extra data" and text.lstrip()[:1] == "{":
            return json_lines(path)
        fail(f"{path} line {e.lineno}: not JSON ({e.msg})")


def json_lines(path):
    for where, line in lines_of(path):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
            fail(f"{where}: not JSON ({e.msg})")
        yield where, as_dict(value, where)


def json_records(path, data=None):
    """Yields (where, dict) of a file of records: jsonl, a list, or a single object.

    data: what read_json(path) gave, if it was called already.
    """
    if data is None:
        data = read_json(path)

    # a single object, a list, or jsonl, whose iterator names its lines
    if isinstance(data, dict):
        yield f"{path} line 1", data
    elif isinstance(data, list):
        for n, record in enumerate(data):
            where = f"{path} record {n}"
            yield where, as_dict(record, where)
    else:
        yield from data


def as_dict(value, where):
    if not isinstance(value, dict):
        fail(f"{where}: an object {{...}} expected, found {type(value).__name__}")
    return value


def get(where, record, key, kind=None):
    """record[key], or an error that names the place, the key and the keys that are there."""
    if key not in record or record[key] is None:
        fail(f"{where}: no key '{key}' (it has: {', '.join(map(str, record)) or 'nothing'})")
    value = record[key]
    if kind is not None and not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        fail(f"{where}: key '{key}' is {type(value).__name__}, not {wanted}")
    return value


def folders(path, root, *subfolders):
    """The folders in which the images of an annotation file may lie: under --image_root, or,
    without one, beside the file as its publishers laid them out."""
    home = os.path.dirname(path)
    bases = [root]
    if not root:
        bases = [home, os.path.join(home, "images"), os.path.normpath(os.path.join(home, ".."))]
    return bases + [os.path.join(base, sub) for base in bases for sub in subfolders if sub]


# --------------------------------------------------------------------------------------------------
# Image-text pairs
#
# A reader is a function (files, reading) that yields (number of the file, where, record). files:
# list of (path, image_root or None). A record may carry `split`, by which open_source filters,
# `image_id` (int or str), and locations under image, image2 and feature.

class PairFile(NamedTuple):
    """A file of image-text pairs."""

    number: int         # its place in --data
    path: str
    root: str           # its --image_root or None
    kind: str           # a key of PAIR_FORMATS
    data: object        # its JSON value; None for files that are read line by line


def read_pairs(files, reading):
    """Image-text pairs in any of PAIR_FORMATS."""
    # what is in each file
    opened = []
    for number, (path, root) in enumerate(files):
        opened.append(PairFile(number, path, root, *sniff(path)))

    # COCO image id -> tags, boxes, labels
    joined = {}
    for file in opened:
        if file.kind == "instances":
            joined.update(read_instances(file, reading))

    # Instances beside captions complete their records. Alone they are records without captions.
    kinds = {file.kind for file in opened}
    completes = bool(kinds & {"coco", "karpathy"})
    for file in opened:
        if file.kind == "instances" and completes:
            continue
        for where, record in PAIR_FORMATS[file.kind](file, reading, joined):
            if record is not None:
                yield file.number, where, record


def sniff(path):
    """-> (format, JSON value or None) of a file of image-text pairs; a format is a key of
    PAIR_FORMATS."""
    # by name
    if os.path.isdir(path) or path.endswith(".tar"):
        return "tar", None
    if path.endswith((".tsv", ".txt")):
        return "tsv", None
    if not path.endswith((".json", ".jsonl")):
        fail(f"{path}: unknown format (pairs are read from .json, .jsonl, .tsv, .tar or a folder "
             "of .tar)")

    # JSON by its keys: Karpathy's and COCO's have images, VQA's and GQA's questions
    data = read_json(path)
    if not isinstance(data, dict) or "image" in data:
        return "records", data
    images, notes = data.get("images"), data.get("annotations")
    if isinstance(images, list):
        if not images or "sentences" in as_dict(images[0], f"{path} images[0]"):
            return "karpathy", data
        if isinstance(notes, list):
            captions = bool(notes) and "caption" in notes[0]
            return "coco" if captions else "instances", data

    first = next(iter(data.values()), None)
    gqa = isinstance(first, dict) and "imageId" in first
    if gqa or isinstance(data.get("questions"), list):
        return "questions", data
    fail(f"{path}: neither records, Karpathy's, COCO's, VQA's nor GQA's json "
         f"(its keys: {', '.join(list(data)[:8])})")


def pair(where, raw, image, reading):
    """One raw record in the documented form -> our record, or None if it is left out.

    `caption` may be absent (a task that needs it says so); with empty captions alone the record is
    left out and counted.
    """
    if not reading.wants(raw.get("split")):
        return None

    # what is documented; other keys of the file are left out
    record = {"image": image}
    for key in ("image_id", "split", "tags", "boxes", "labels", "label_names"):
        if raw.get(key) is not None:
            record[key] = raw[key]

    if raw.get("caption") is not None:
        record["caption"], record["paraphrase"] = clean_captions(where, raw, reading)
        if not record["caption"]:
            reading.count("no_caption_left")
            return None

    # tags, boxes and labels of the documented form
    if "tags" in record and not is_list_of(record["tags"], str):
        fail(f"{where}: key 'tags' must be a list of strings")
    boxes = record.get("boxes", ())
    for box in boxes:
        if not is_list_of(box, (int, float)) or len(box) != 4:
            fail(f"{where}: key 'boxes' must be a list of [x1, y1, x2, y2] in pixels")
    if "labels" in record and len(record["labels"]) != len(boxes):
        fail(f"{where}: {len(record['labels'])} labels for {len(boxes)} boxes")
    return record


def is_list_of(value, kind):
    return isinstance(value, list) and all(isinstance(x, kind) for x in value)


def clean_captions(where, raw, reading):
    """-> (captions, paraphrases): lists of equal length; paraphrases may be None.

    A paraphrase is a string, or a list of strings where a caption has several wordings. Empty
    captions are left out, with their paraphrase, and counted.
    """
    # one caption or several
    captions = get(where, raw, "caption", (str, list))
    if isinstance(captions, str):
        captions = [captions]
    if not is_list_of(captions, str):
        fail(f"{where}: key 'caption' must be a string or a list of strings")

    # paraphrases: none, or one of each caption
    paraphrases = raw.get("paraphrase")
    if isinstance(paraphrases, str):
        paraphrases = [paraphrases]
    if paraphrases is not None:
        if not isinstance(paraphrases, list) or len(paraphrases) != len(captions):
            fail(f"{where}: key 'paraphrase' must hold one string per caption ({len(captions)}), "
                 "in the captions' order; several wordings of a caption are a list in its place")
        for paraphrase in paraphrases:
            if not isinstance(paraphrase, str) and not is_list_of(paraphrase, str):
                fail(f"{where}: key 'paraphrase' holds {paraphrase!r}, which is neither a string "
                     "nor a list of strings")

    # empty captions go, and their paraphrases with them
    keep = [i for i, caption in enumerate(captions) if caption.strip()]
    reading.count("empty_captions", len(captions) - len(keep))
    if paraphrases is not None:
        paraphrases = [paraphrases[i] for i in keep]
    return [captions[i].strip() for i in keep], paraphrases


def read_instances(file, reading):
    """COCO's instances -> {image id: {tags, boxes, labels}}, boxes as xyxy in pixels.

    Crowd regions give tags, but no boxes.
    """
    # a label is the position of its category by id: COCO's ids have gaps
    path, data = file.path, file.data
    categories = sorted(get(path, data, "categories", list), key=lambda c: c["id"])
    names = [category["name"] for category in categories]
    label_of = {category["id"]: n for n, category in enumerate(categories)}
    reading.set_label_names(path, names)

    # the annotations of each image
    joined = {}
    for image in data["images"]:
        joined[image["id"]] = {"tags": set(), "boxes": [], "labels": []}
    for n, note in enumerate(data["annotations"]):
        where = f"{path} annotations[{n}]"
        image_id, category_id = get(where, note, "image_id"), get(where, note, "category_id")
        if image_id not in joined or category_id not in label_of:
            fail(f"{where}: image_id {image_id} or category_id {category_id} is not in the file")

        image, label = joined[image_id], label_of[category_id]
        image["tags"].add(label)
        if not note.get("iscrowd"):
            x, y, w, h = get(where, note, "bbox", list)
            image["boxes"].append([x, y, x + w, y + h])
            image["labels"].append(label)

    # tags are the objects' names, each once, in the order of the categories
    for image in joined.values():
        image["tags"] = [names[label] for label in sorted(image["tags"])]
    return joined


def pairs_records(file, reading, joined):
    """Records in the documented form."""
    bases = folders(file.path, file.root)
    for where, raw in json_records(file.path, file.data):
        image = reading.find(bases, get(where, raw, "image", str))
        yield where, pair(where, raw, image, reading)


def pairs_karpathy(file, reading, joined):
    """Karpathy's splits of COCO, Flickr8k and Flickr30k."""
    bases = folders(file.path, file.root)
    for n, image in enumerate(file.data["images"]):
        where = f"{file.path} images[{n}]"
        # COCO's images lie in a folder of their year
        names = [get(where, image, "filename", str)]
        if image.get("filepath"):
            names.insert(0, os.path.join(image["filepath"], names[0]))

        # of a COCO image that instances were read of: tags, boxes and labels too
        captions = []
        for sentence in get(where, image, "sentences", list):
            captions.append(get(where, sentence, "raw", str))
        raw = dict(joined.get(image.get("cocoid"), {}), split=get(where, image, "split"),
                   image_id=image.get("cocoid", image.get("imgid")), caption=captions)
        yield where, pair(where, raw, reading.find(bases, *names), reading)


def pairs_coco(file, reading, joined):
    """COCO's captions, or its instances alone (then without captions)."""
    # image id -> its captions
    captions = {}
    for n, note in enumerate(file.data["annotations"]):
        if "caption" in note:
            image_id = get(f"{file.path} annotations[{n}]", note, "image_id")
            captions.setdefault(image_id, []).append(note["caption"])

    # the images of captions_val2017.json may lie in a folder val2017
    year = os.path.splitext(os.path.basename(file.path))[0].split("_")[-1]
    bases = folders(file.path, file.root, year)
    for n, image in enumerate(file.data["images"]):
        where = f"{file.path} images[{n}]"
        name, image_id = get(where, image, "file_name", str), get(where, image, "id")
        raw = dict(joined.get(image_id, {}), image_id=image_id)
        if image_id in captions:
            raw["caption"] = captions[image_id]
        yield where, pair(where, raw, reading.find(bases, name), reading)


def pairs_tsv(file, reading, joined):
    """Rows "caption TAB path-or-url" (Conceptual Captions, SBU).

    The file of a URL is row N with 9 digits, as img2dataset names it, N_crc32(url), as the common
    CC downloader names it, or the last part of the URL if no other row ends in the same.
    """
    # all rows first: whether the end of a URL is unique shows at the last one
    rows = []
    for where, line in lines_of(file.path):
        cells = line.split("\t")
        if len(cells) < 2:
            fail(f"{where}: 'caption TAB path-or-url' expected, found no TAB")
        rows.append((where, cells[0], cells[1].strip()))

    # the names that each row's file may have
    last_parts = [url.split("?")[0].rstrip("/").split("/")[-1] for _, _, url in rows]
    times = Counter(last_parts)
    bases = folders(file.path, file.root)
    for n, (where, caption, url) in enumerate(rows):
        names = [url]
        if "://" in url:
            names = [f"{n:09d}.jpg", f"{n}_{zlib.crc32(url.encode())}"]
            if last_parts[n] and times[last_parts[n]] == 1:
                names.append(last_parts[n])
        raw = {"caption": caption}
        yield where, pair(where, raw, reading.find(bases, *names), reading)


def pairs_tar(file, reading, joined):
    """img2dataset's shards: KEY.jpg with KEY.txt, or with the caption in KEY.json."""
    # one shard or a folder of them
    shards = [file.path]
    if os.path.isdir(file.path):
        names = sorted(name for name in os.listdir(file.path) if name.endswith(".tar"))
        if not names:
            fail(f"{file.path}: no .tar shards in this folder")
        shards = [os.path.join(file.path, name) for name in names]

    # a bar from 8 shards on, on a terminal
    quiet = True if len(shards) < 8 else None
    for shard in tqdm(shards, desc=f"indexing {file.path}", disable=quiet):
        for key, parts in index_tar(shard).items():
            where = f"{shard} member {key}"
            # a failed download has a caption and no picture
            image = next((parts[kind] for kind in parts if "." + kind in IMAGE_TYPES), None)
            if image is None:
                reading.count("missing")
                continue

            try:
                if "txt" in parts:
                    raw = {"caption": parts["txt"].decode()}
                else:
                    raw = as_dict(json.loads(parts.get("json", b"{}")), where)
            except ValueError as e:
                fail(f"{where}: unreadable caption ({e})")
            yield where, pair(where, {"caption": raw.get("caption")}, image, reading)


def index_tar(shard):
    """-> {key: {extension: bytes of .txt and .json, TarMember of everything else}}.

    Pictures are read later, by seeking: resuming in the middle of a corpus is arithmetic.
    """
    samples = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, kind = name.partition(".")
                if not member.isfile() or not kind:
                    continue

                # captions are small and read now, pictures are not
                content = TarMember(shard, member.offset_data, member.size, member.name)
                if kind in ("txt", "json"):
                    content = tar.extractfile(member).read()
                samples.setdefault(os.path.join(folder, stem), {})[kind.lower()] = content
    except (tarfile.TarError, EOFError, OSError) as e:
        fail(f"{shard}: not a readable tar ({e})")
    return samples


def pairs_questions(file, reading, joined):
    """Questions as the captions of their picture, one record a picture.

    VQA v2: {questions: [{image_id, question}], data_subtype}. GQA: {id: {imageId, question}}.
    """
    # the questions of test-dev are about the images of test2015
    path, data = file.path, file.data
    subtype = data.get("data_subtype", "").replace("test-dev", "test")

    # (image id, file name) -> (where its first question stands, its questions)
    asked = {}
    if isinstance(data.get("questions"), list):
        for n, raw in enumerate(data["questions"]):
            where = f"{path} questions[{n}]"
            image_id = get(where, raw, "image_id", int)
            name = vqa_image(where, raw, image_id, subtype)
            _, questions = asked.setdefault((image_id, name), (where, []))
            questions.append(get(where, raw, "question", str))
    else:
        for key, raw in data.items():
            where = f"{path} question {key}"
            image_id = str(get(where, as_dict(raw, where), "imageId"))
            _, questions = asked.setdefault((image_id, f"{image_id}.jpg"), (where, []))
            questions.append(get(where, raw, "question", str))

    bases = folders(path, file.root, subtype)
    for (image_id, name), (where, questions) in asked.items():
        raw = {"image_id": image_id, "caption": questions}
        yield where, pair(where, raw, reading.find(bases, name), reading)


def vqa_image(where, raw, image_id, subtype):
    """The file name of a question's picture: its own, or COCO's of that id and subset."""
    if "image" not in raw and not subtype:
        fail(f"{where}: no key 'image', and the file has no 'data_subtype' to name COCO's image by")
    return raw.get("image") or f"COCO_{subtype}_{image_id:012d}.jpg"


PAIR_FORMATS = {"records": pairs_records, "karpathy": pairs_karpathy, "coco": pairs_coco,
                "instances": pairs_coco, "questions": pairs_questions, "tsv": pairs_tsv,
                "tar": pairs_tar}


# --------------------------------------------------------------------------------------------------
# Questions, statements and sentences

def read_vqa(files, reading):
    """VQA v2: questions and their annotations, joined by question_id.

    `answers` is the list of the annotators' answers, None where there are none (test).
    """
    # the files in any order, told apart by their keys
    question_files, answers = [], {}
    for number, (path, root) in enumerate(files):
        data = as_dict(read_json(path), path)
        if "questions" in data:
            question_files.append((number, path, root, data))
        elif "annotations" in data:
            answers.update(vqa_answers(path, data))
        else:
            fail(f"{path}: neither 'questions' nor 'annotations' (its keys: {', '.join(data)})")
    if not question_files:
        fail(f"{files[0][0]}: VQA needs the questions file too "
             "(--data questions.json,annotations.json)")

    # one record a question
    seen = set()
    for number, path, root, data in question_files:
        # test-dev asks about the images of test2015
        subtype = data.get("data_subtype", "").replace("test-dev", "test")
        bases = folders(path, root, subtype)
        for k, raw in enumerate(data["questions"]):
            where = f"{path} questions[{k}]"
            question_id = get(where, raw, "question_id", int)
            image_id = get(where, raw, "image_id", int)
            if question_id in seen:
                fail(f"{where}: question_id {question_id} occurs twice")
            seen.add(question_id)

            image = reading.find(bases, vqa_image(where, raw, image_id, subtype))
            question = get(where, raw, "question", str)
            yield number, where, {"image": image, "image_id": image_id, "question_id": question_id,
                                  "question": question, "answers": answers.get(question_id)}

    # what the two kinds of files have without each other
    reading.count("without_answers", len(seen - answers.keys()))
    reading.count("answers_without_question", len(answers.keys() - seen))


def vqa_answers(path, data):
    """An annotations file -> {question_id: list of answers}."""
    answers = {}
    for n, note in enumerate(data["annotations"]):
        where = f"{path} annotations[{n}]"
        given = get(where, note, "answers", list)
        question_id = get(where, note, "question_id")
        answers[question_id] = [get(where, answer, "answer", str) for answer in given]
    return answers


VE_LABELS = ["entailment", "neutral", "contradiction"]


def read_ve(files, reading):
    """SNLI-VE: a photo, a hypothesis, and a label that is a position in VE_LABELS.

    Rows on which the annotators had no majority ('-') are left out and counted.
    """
    reading.set_label_names(files[0][0], VE_LABELS)
    for number, (path, root) in enumerate(files):
        bases = folders(path, root)
        for where, raw in json_records(path):
            # the annotators' majority
            label = get(where, raw, "gold_label", str)
            if label == "-":
                reading.count("without_majority_label")
                continue
            if label not in VE_LABELS:
                fail(f"{where}: gold_label '{label}' is none of {', '.join(VE_LABELS)}, -")

            # both spellings of the key were published
            photo = raw.get("Flickr30K_ID", raw.get("Flikr30kID"))
            name = raw.get("image")
            if not name:
                name = f"{photo}.jpg" if photo else get(where, raw, "image")
            yield number, where, {"image": reading.find(bases, name),
                                  "caption": get(where, raw, "sentence2", str),
                                  "label": VE_LABELS.index(label), "pair_id": raw.get("pairID")}


def read_nlvr2(files, reading):
    """NLVR2: is a sentence true of two pictures? label 1 = True.

    Identifier dev-A-B-C is sentence C about dev-A-B-img0.png (left) and dev-A-B-img1.png (right).
    """
    reading.set_label_names(files[0][0], ["False", "True"])
    for number, (path, root) in enumerate(files):
        for where, raw in json_records(path):
            identifier = get(where, raw, "identifier", str)
            label = str(get(where, raw, "label"))
            if label not in ("True", "False"):
                fail(f"{where}: label '{label}' is neither True nor False")

            # train, dev, test1 are also the names of folders; those of train are numbered inside
            kind = identifier.split("-")[0]
            subfolders = [kind, os.path.join("images", kind), "images"]
            if "directory" in raw:
                subfolders += [os.path.join(sub, str(raw["directory"])) for sub in subfolders[:2]]
            bases = folders(path, root, *subfolders)

            # the left picture, the right picture, and whether the sentence is true of them
            stem = identifier.rpartition("-")[0]
            left = raw.get("left_image") or stem + "-img0.png"
            right = raw.get("right_image") or stem + "-img1.png"
            yield number, where, {"image": reading.find(bases, left),
                                  "image2": reading.find(bases, right),
                                  "caption": get(where, raw, "sentence", str),
                                  "label": int(label == "True"), "identifier": identifier}


def read_sts(files, reading):
    """Pairs of sentences with a score of 0 to 5: s1, s2, score, dataset ("STS12", "STSB"), subset
    ("MSRpar"). Rows without a score are left out and counted."""
    for number, (path, _) in enumerate(files):
        # the tables and folders under this path, of the split that is wanted
        parts = list(sts_parts(path))
        if not parts:
            fail(f"{path}: no STS data in it (STS.input.*.txt with STS.gs.*.txt, or "
                 "sts-{train,dev,test}.csv)")

        for home, part in parts:
            if not reading.wants(part):
                continue
            for where, dataset, subset, score, s1, s2 in sts_rows(home):
                if not score.strip():
                    reading.count("unscored")
                    continue

                # a number of 0 to 5
                try:
                    value = float(score)
                except ValueError:
                    fail(f"{where}: score '{score}' is not a number")
                if not 0 <= value <= 5:
                    fail(f"{where}: score {value} is not in 0 to 5")
                yield number, where, {"s1": s1, "s2": s2, "score": value, "dataset": dataset,
                                      "subset": subset, "split": part}


def sts_parts(path):
    """Yields (csv file or SentEval folder, its split or None) for all that lies under a path."""
    if os.path.isfile(path):
        yield path, None
        return

    # a folder of SentEval: training data only by its name
    names = sorted(os.listdir(path))
    if any(name.startswith("STS.input.") for name in names):
        train = os.path.normpath(path).endswith("train")
        yield path, "train" if train else "test"

    # STS-B's tables, and folders of such folders
    for name in names:
        table = re.fullmatch(r"sts-(train|dev|test)\.csv", name)
        inside = os.path.join(path, name)
        if table:
            yield inside, SPLIT_NAMES.get(table[1], table[1])
        elif re.match(r"STS\d+-|stsbenchmark", name) and os.path.isdir(inside):
            yield from sts_parts(inside)


def sts_rows(home):
    """Yields (where, dataset, subset, score as text, s1, s2) of STS-B's table or of a SentEval
    folder, in which STS.gs.X.txt holds the scores of STS.input.X.txt."""
    # the table's columns: genre, file, year, index, score, s1, s2
    if os.path.isfile(home):
        for where, line in lines_of(home):
            cells = line.split("\t")
            if len(cells) < 7:
                fail(f"{where}: 7 columns between TABs expected (genre, file, year, index, score, "
                     f"s1, s2), found {len(cells)}")
            yield where, "STSB", cells[0], cells[4], cells[5], cells[6]
        return

    # a folder's subsets, in the order of their names
    dataset = os.path.basename(os.path.normpath(home)).split("-")[0]
    for name in sorted(os.listdir(home)):
        if not name.startswith("STS.input."):
            continue
        file = os.path.join(home, name)
        subset = name[len("STS.input."):-len(".txt")]

        # a pair without a score is an empty line among the scores
        pairs = list(text_lines(file))
        scores = list(text_lines(os.path.join(home, name.replace(".input.", ".gs."))))
        if len(pairs) != len(scores):
            fail(f"{file}: {len(pairs)} sentence pairs, but {len(scores)} scores in its .gs. file")
        for n, (line, score) in enumerate(zip(pairs, scores), 1):
            where, cells = f"{file} line {n}", line.split("\t")
            if len(cells) < 2:
                fail(f"{where}: 'sentence TAB sentence' expected")
            yield where, dataset, subset, score, cells[0], cells[1]


# --------------------------------------------------------------------------------------------------
# Labels and clips

def read_hashing(files, reading):
    """The lists of CSQ and HashNet: "path 0 1 0 ...", one 0 or 1 for each label. A folder holds
    train.txt, database.txt, test.txt.

    Paths begin with folders of their authors' disk: these are left off until the file is found.
    """
    width = None
    for number, (path, root) in enumerate(files):
        for file in hashing_lists(path, reading.split):
            bases = folders(file, root)
            for where, line in lines_of(file):
                # as many labels as in the first line
                name, *labels = line.split()
                known = bool(labels) and set(labels) <= {"0", "1"}
                if not known or len(labels) != (width or len(labels)):
                    fail(f"{where}: 'path 0 1 0 ...' with {width or 'some'} labels expected, "
                         f"found {len(labels)}")
                width = len(labels)
                if "1" not in labels:
                    reading.count("without_label")

                # the whole path, and what is left without its first folder, its first two, ...
                parts = name.split("/")
                names = [os.path.join(*parts[k:]) for k in range(len(parts))]
                yield number, where, {"image": reading.find(bases, *names),
                                      "labels": [int(label) for label in labels]}


def hashing_lists(path, split):
    """The list files that `path` stands for."""
    if not os.path.isdir(path):
        return [path]
    there = sorted(name[:-4] for name in os.listdir(path) if name.endswith(".txt"))
    if split is not None and split not in there:
        fail(f"{path}: no split '{split}' (it has: {', '.join(there) or 'no .txt lists'})")
    wanted = [split] if split else there
    return [os.path.join(path, name + ".txt") for name in wanted]


def read_classes(files, reading):
    """ImageFolder: ROOT[/train|val|test]/CLASS/*.jpg, at any depth under CLASS.

    A label is the position of the class's name among the sorted names of all splits together.
    """
    for number, (path, _) in enumerate(files):
        if not os.path.isdir(path):
            fail(f"{path}: an ImageFolder is a directory")
        # the same labels for every split
        homes, names = class_homes(path, reading.split)
        reading.set_label_names(path, names)

        # one record a picture
        for home in homes:
            for name in folder_names(home):
                for image in pictures_in(os.path.join(home, name)):
                    yield number, image, {"image": image, "class_name": name,
                                          "label": names.index(name)}


def class_homes(path, split):
    """-> (the folders of an ImageFolder that hold the split's classes, all class names sorted)."""
    # {folder of a split: our name of the split}, or no splits: the classes lie here
    splits = {}
    for name in folder_names(path):
        if SPLIT_NAMES.get(name, name) in ("train", "val", "test"):
            splits[os.path.join(path, name)] = SPLIT_NAMES.get(name, name)
    homes = list(splits) or [path]
    names = sorted({name for home in homes for name in folder_names(home)})
    if not names:
        fail(f"{path}: no class folders in it")

    # without a folder test, val is what is reported (ImageNet)
    if splits and split is not None:
        no_test = split == "test" and "test" not in splits.values()
        wanted = "val" if no_test else split
        homes = [home for home, part in splits.items() if part == wanted]
        if not homes:
            there = ", ".join(os.path.basename(home) for home in splits)
            fail(f"{path}: no split '{split}' (it has: {there})")
    return homes, names


def folder_names(path):
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def pictures_in(path):
    """Yields the paths of all image files under a folder, in order."""
    for folder, _, files in sorted(os.walk(path)):
        for name in sorted(files):
            if name.lower().endswith(IMAGE_TYPES):
                yield os.path.join(folder, name)


def read_clips(files, reading):
    """MSR-VTT: videodatainfo.json [+ the 1k-A csv] [+ a folder of VIDEO_ID.npy, (frames, D)].

    With the csv the protocol is "1k-A": test is its rows, with one caption each, and train every
    other video (9k of the whole json). Without it "full": the splits of the json.
    """
    # the kinds of files that were named
    jsons, table, home = [], None, None
    for number, (path, root) in enumerate(files):
        home = path if os.path.isdir(path) else home or root
        if path.endswith(".json"):
            jsons.append((number, path, as_dict(read_json(path), path)))
        elif path.endswith(".csv"):
            table = number, path, clip_table(path)
    reading.records.protocol = "1k-A" if table else "full"
    tested = {row["video_id"] for row in table[2]} if table else set()

    def clip(path, video_id, captions, part):
        folder = home or os.path.join(os.path.dirname(path), "features")
        return {"video_id": video_id, "feature": os.path.join(folder, f"{video_id}.npy"),
                "caption": captions, "split": part}

    # the videos of the json; those of the csv come after them
    for number, path, data in jsons:
        captions = clip_captions(path, data)
        for k, video in enumerate(get(path, data, "videos", list)):
            where = f"{path} videos[{k}]"
            video_id = get(where, video, "video_id", str)
            part = get(where, video, "split", str)
            if video_id in tested:
                continue
            if video_id not in captions:
                reading.count("no_caption_left")
                continue
            # beside the csv all of train, val and test is for training
            part = "train" if table else SPLIT_NAMES.get(part, part)
            yield number, where, clip(path, video_id, captions[video_id], part)

    # the test of 1k-A
    if table:
        number, path, rows = table
        for line, row in enumerate(rows, 2):
            caption = row["sentence"].strip()
            yield number, f"{path} line {line}", clip(path, row["video_id"], [caption], "test")


def clip_captions(path, data):
    """The sentences of a videodatainfo.json -> {video id: its captions that are not empty}."""
    captions = {}
    for n, sentence in enumerate(get(path, data, "sentences", list)):
        where = f"{path} sentences[{n}]"
        video_id = get(where, sentence, "video_id")
        caption = get(where, sentence, "caption", str).strip()
        if caption:
            captions.setdefault(video_id, []).append(caption)
    return captions


def clip_table(path):
    """The rows of the 1k-A csv, with commas or semicolons -> list of dicts."""
    lines = list(text_lines(path))
    delimiter = ";" if lines and ";" in lines[0] else ","
    rows = list(csv.reader(lines, delimiter=delimiter))
    if not rows or not {"video_id", "sentence"} <= set(rows[0]):
        fail(f"{path} line 1: columns video_id and sentence expected")
    return [dict(zip(rows[0], row)) for row in rows[1:] if row]


# --------------------------------------------------------------------------------------------------
# Detection

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()


def read_detection(files, reading):
    """The objects of each picture, from COCO's instances json or from VOC.

    boxes: xyxy in pixels; labels: positions in label_names; crowd, difficult: 0 or 1 each; height
    and width of the picture; of COCO also area and segmentation (polygons or run lengths, as
    published). Boxes without area are left out and counted.
    """
    for number, (path, root) in enumerate(files):
        if os.path.isdir(path):
            found = detection_voc(path, reading)
        else:
            found = detection_coco(path, root, reading)
        # all lists of a record have an entry for each object
        for where, record in found:
            valid = [x0 < x1 and y0 < y1 for x0, y0, x1, y1 in record["boxes"]]
            reading.count("boxes_without_area", valid.count(False))
            for key, value in record.items():
                if isinstance(value, list):
                    record[key] = list(itertools.compress(value, valid))
            yield number, where, record


def detection_coco(path, root, reading):
    """Yields (where, record) of COCO's instances, by image id."""
    if not path.endswith(".json") or sniff(path)[0] != "instances":
        fail(f"{path}: detection reads COCO's instances json or a VOCdevkit folder")
    # a label is the position of its category by id
    data = read_json(path)
    categories = sorted(get(path, data, "categories", list), key=lambda c: c["id"])
    reading.set_label_names(path, [category["name"] for category in categories])
    label_of = {category["id"]: n for n, category in enumerate(categories)}

    # the annotations of each image, in the file's order
    of_image = {}
    for n, note in enumerate(get(path, data, "annotations", list)):
        where = f"{path} annotations[{n}]"
        if note.get("category_id") not in label_of or len(note.get("bbox", ())) != 4:
            fail(f"{where}: no known category_id, or no bbox of four numbers")
        of_image.setdefault(get(where, note, "image_id"), []).append(note)

    # an image without annotations is a record without objects
    images = {}
    for n, image in enumerate(data["images"]):
        images[get(f"{path} images[{n}]", image, "id")] = image
    bases = folders(path, root, os.path.splitext(os.path.basename(path))[0].split("_")[-1])
    for image_id in sorted(images):
        where, image = f"{path} image {image_id}", images[image_id]
        name = get(where, image, "file_name", str)
        record = {"image": reading.find(bases, name), "image_id": image_id,
                  "height": get(where, image, "height", int),
                  "width": get(where, image, "width", int),
                  "boxes": [], "labels": [], "crowd": [], "difficult": [], "area": [],
                  "segmentation": []}
        for note in of_image.get(image_id, ()):
            x, y, w, h = note["bbox"]
            record["boxes"].append([x, y, x + w, y + h])
            record["labels"].append(label_of[note["category_id"]])
            record["crowd"].append(int(note.get("iscrowd", 0)))
            record["difficult"].append(0)
            record["area"].append(note.get("area"))
            record["segmentation"].append(note.get("segmentation"))
        yield where, record


def detection_voc(path, reading):
    """Yields (where, record) of VOC as published, read by torchvision.

    train is the trainval of 2007 and 2012 (those that are there), val their val, test 2007's test.
    """
    from torchvision.datasets import VOCDetection

    # torchvision wants the folder in which VOCdevkit lies
    home = os.path.normpath(path)
    home = os.path.dirname(home) if os.path.basename(home) == "VOCdevkit" else path

    # the years that have this split
    part = "trainval" if reading.split == "train" else reading.split
    years = []
    for year in ("2007",) if part == "test" else ("2007", "2012"):
        lists = os.path.join(home, "VOCdevkit", f"VOC{year}", "ImageSets", "Main")
        if os.path.isfile(os.path.join(lists, f"{part}.txt")):
            years.append(year)
    if not years:
        fail(f"{path}: no VOCdevkit/VOC2007/ImageSets/Main/{part}.txt in it")

    # one record an annotation file
    reading.set_label_names(path, VOC_CLASSES)
    for year in years:
        found = VOCDetection(home, year, part)
        for image, file in zip(found.images, found.annotations):
            try:
                notes = found.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"]
                record = voc_record(image, notes)
            except (ElementTree.ParseError, OSError, KeyError, ValueError) as e:
                fail(f"{file}: not a VOC annotation ({type(e).__name__}: {e})")
            yield file, record


def voc_record(image, notes):
    """A picture's VOC annotation (a dict of its XML) -> record. KeyError or ValueError if
    something is missing.

    VOC counts pixels from 1, corners included: the box is [xmin - 1, ymin - 1, xmax, ymax].
    """
    record = {"image": image, "height": int(notes["size"]["height"]),
              "width": int(notes["size"]["width"]),
              "boxes": [], "labels": [], "crowd": [], "difficult": []}
    for thing in notes.get("object", []):
        box = thing["bndbox"]
        record["boxes"].append([float(box["xmin"]) - 1, float(box["ymin"]) - 1,
                                float(box["xmax"]), float(box["ymax"])])
        record["labels"].append(VOC_CLASSES.index(thing["name"]))
        record["crowd"].append(0)
        record["difficult"].append(int(thing.get("difficult", 0)))
    return record


# --------------------------------------------------------------------------------------------------
# Masks of objects, as COCO writes them

def rle_counts(text):
    """COCO's compressed run lengths, str or bytes -> list of int.

    Each number is written in characters of 6 bits over "0": 5 bits of it, the lowest first, and
    one that says whether more follow. From the third number on it is the difference to the number
    two before it.
    """
    counts, number, shift = [], 0, 0
    for char in text.encode() if isinstance(text, str) else text:
        # five more bits of the number
        bits = char - 48
        number |= (bits & 31) << shift
        shift += 5

        # the last character of a number: its highest bit is the sign
        if not bits & 32:
            number -= (1 << shift) * (bits >> 4 & 1)
            if len(counts) > 2:
                number += counts[-2]
            counts.append(number)
            number, shift = 0, 0
    return counts


def polygon_mask(polygon, height, width):
    """[x0, y0, x1, y1, ...] in pixels -> (height, width) bool: the pixels that COCO's tool fills.

    Its rule: walk the outline on a grid five times finer. Wherever the walk passes into another
    column of pixels, note the row of the crossing. A pixel is inside if an odd number of crossings
    lies above it or in the columns before its own.
    """
    # the outline, side by side, on the fine grid
    points = (5 * np.asarray(polygon, float).reshape(-1, 2) + 0.5).astype(int)
    sides = [side_points(a, b) for a, b in zip(points, np.roll(points, -1, 0))]
    x, y = np.concatenate(sides, axis=1)

    # crossings, back in whole pixels: of a column's five fine positions the third is its middle
    crossed = np.flatnonzero(x[1:] != x[:-1])
    before, behind = x[crossed], x[crossed + 1]
    column = (np.where(behind < before, behind, behind - 1) + 0.5) / 5 - 0.5
    row = (np.minimum(y[crossed], y[crossed + 1]) + 0.5) / 5 - 0.5
    row = np.ceil(row.clip(0, height)).astype(int)

    # count them down the columns, one column after the other
    valid = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    positions = (column.astype(int) * height + row)[valid]
    crossings = np.bincount(positions, minlength=height * width + 1)[:height * width].cumsum()
    return (crossings % 2 == 1).reshape(width, height).T


def side_points(start, end):
    """The points on a polygon's side, both ends included: (2, n) ints, x and y.

    One point for each step along the longer direction. They are always computed from the smaller
    end, because rounding depends on it, and returned in the order of the walk.
    """
    longer = 0 if abs(end[0] - start[0]) >= abs(end[1] - start[1]) else 1
    backwards = start[longer] > end[longer]
    if backwards:
        start, end = end, start

    # along the longer direction in steps of 1, along the other one by the slope
    steps = end[longer] - start[longer]
    along = np.arange(steps + 1)
    slope = (end[1 - longer] - start[1 - longer]) / max(steps, 1)
    points = np.empty((2, steps + 1), int)
    points[longer] = start[longer] + along
    points[1 - longer] = (start[1 - longer] + slope * along + 0.5).astype(int)
    return points[:, ::-1] if backwards else points


def decode_mask(segmentation, height, width, where=""):
    """One object of COCO's annotations -> (height, width) bool.

    Polygons are united. Run lengths (a list of counts, or its compressed text) go down the columns
    and begin with a run outside the object. Errors: a DataError that begins with `where`.
    """
    try:
        if isinstance(segmentation, list):
            mask = np.zeros((height, width), bool)
            for polygon in segmentation:
                mask |= polygon_mask(polygon, height, width)
            return mask

        # runs outside and inside take turns
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            counts = rle_counts(counts)
        inside = np.arange(len(counts)) % 2 == 1
        return np.repeat(inside, counts).reshape(width, height).T
    except (ValueError, TypeError, KeyError) as e:
        fail(f"{where}: not COCO's polygons or run lengths of a {width}x{height} picture ({e})")


def encode_mask(mask):
    """(height, width) bool -> COCO's uncompressed run lengths {size, counts}."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    run_ends = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))
    return {"size": list(mask.shape), "counts": np.diff(run_ends, prepend=0).tolist()}


# --------------------------------------------------------------------------------------------------
# Opening a source

SOURCES = {"pairs": read_pairs, "vqa": read_vqa, "ve": read_ve, "nlvr2": read_nlvr2,
           "sts": read_sts, "hashing": read_hashing, "classes": read_classes,
           "clips": read_clips, "detection": read_detection}

# The built-in world's files of each source.
SHAPES = {"pairs": "pairs_{}.jsonl", "vqa": "vqa_{}_questions.json,vqa_{}_annotations.json",
          "ve": "ve_{}.jsonl", "nlvr2": "nlvr2_{}.jsonl", "sts": "sts_{}.csv",
          "hashing": "hashing/{}.txt", "classes": "classes", "clips": "clips/videodatainfo.json",
          "detection": "instances_{}.json"}


def open_source(source, spec, split, image_root=None, limit=None, seed=0, need=(),
                missing="drop"):
    """Reads `spec` ("shapes", or files and folders separated by commas) as `source` -> Records.

    split: "train", "val", "test" (hashing: "database" too), or None for everything. Files without
    splits give all they have.
    image_root: a folder, or one per item of spec separated by commas.
    limit: at most so many records, chosen by `seed`, in file order.
    need: the record keys that the views require (see `needs`).
    missing: "drop" leaves out records whose files do not exist, "keep" keeps them.
    Errors: DataError that names file, line and key.
    """
    # the files, and the folder of each one's images
    if source not in SOURCES:
        fail(f"no source '{source}' (there are: {', '.join(SOURCES)})")
    if spec == "shapes":
        spec, image_root = world_files(source, split)
    paths = expand(spec)
    roots = image_roots(image_root, paths)
    records = Records(source, split, roots[0] or os.path.dirname(paths[0]))

    # read them: records of other splits and of missing files are left out
    reading, ids, captions_seen = Reading(records), ImageIds(), set()
    first_gone = None
    for number, where, record in SOURCES[source](list(zip(paths, roots)), reading):
        if not reading.wants(record.pop("split", None)):
            continue
        check_keys(where, record, need)

        gone = reading.missing_file(record)
        if gone:
            reading.count("missing")
            first_gone = first_gone or (where, gone)
            if missing == "drop":
                continue

        # the id that the file gives, where ours differs: region files of image ids go by it
        own_id = record.get("image_id")
        record["image_id"] = ids(number, where, record, len(records))
        if own_id is None:
            records.own_ids = False
        elif own_id != record["image_id"]:
            record["own_id"] = own_id
        if source == "pairs":
            count_pair(record, captions_seen, reading)
        records.append(record)

    # report what was found: splits in the order train, val, test, and counts that are not 0
    records.splits = sorted(reading.splits, key=lambda s: (s != "train", s == "test", s))
    if source == "pairs":
        reading.count("repeated_images", ids.repeats)
    records.notes = {note: count for note, count in records.notes.items() if count}
    report_missing(records, spec, first_gone if missing == "drop" else None)

    # a random choice, in the files' order
    if limit and limit < len(records):
        chosen = random.Random(seed).sample(range(len(records)), limit)
        records = records.subset(sorted(chosen))
    return records


def world_files(source, split):
    """The built-in world's files of a source and split -> (spec, image_root)."""
    from tools import shapes                        # only here: real data needs no drawing code

    # of every split that has such a file
    world = str(shapes.ensure())
    splits = [split] if split else ["train", "val", "database", "test"]
    paths = []
    for part in splits:
        for name in SHAPES[source].split(","):
            path = os.path.join(world, name.format(part))
            if os.path.exists(path) and path not in paths:
                paths.append(path)
    if not paths:
        fail(f"shapes has no split '{split}' for {source}")
    image_root = os.path.join(world, "clips", "features") if source == "clips" else world
    return ",".join(paths), image_root


def image_roots(image_root, paths):
    """--image_root -> list of one folder (or None) for each path of --data."""
    # one folder, whose name may hold a comma, or several
    roots = [image_root]
    if image_root and not os.path.exists(image_root):
        roots = [root.strip() for root in image_root.split(",")]
    for root in roots:
        if root and not os.path.isdir(root):
            fail(f"--image_root {root}: no such directory")
    if len(roots) not in (1, len(paths)):
        fail(f"--image_root names {len(roots)} folders for {len(paths)} items of --data: give one, "
             "or one for each")
    return roots * len(paths) if len(roots) == 1 else roots


def check_keys(where, record, need):
    """Errors: a key of `need` that the record lacks. An empty list is there: a photo without
    any tag."""
    for key in need:
        if record.get(key) is None:
            there = ", ".join(k for k, value in record.items() if value is not None)
            fail(f"{where}: no key '{key}' (it has: {there})")


def count_pair(record, seen, reading):
    """Notes what a record of pairs has. seen: hashes of (image, caption), which grows."""
    captions = record.get("caption", ())
    new = {hash((record["image"], caption)) for caption in captions} - seen
    seen |= new
    reading.count("duplicates", len(captions) - len(new))
    reading.count("with_paraphrase", int(bool(record.get("paraphrase"))))
    reading.count("with_tags", int(bool(record.get("tags"))))
    reading.count("without_caption", int("caption" not in record))


def report_missing(records, spec, first_gone):
    """Says how many records were left out. Errors: there are none left.

    first_gone: (where, path) of the first missing file, None if none was missing or all are kept.
    """
    # some files were missing, or all of them
    missing = records.notes.get("missing", 0)
    if first_gone:
        where, path = first_gone
        if not len(records):
            fail(f"{where}: none of the {missing} image files is there, first {path} "
                 "(is --image_root right?)")
        if ranks()[0] == 0:                         # every process reads the same files
            say(f"{spec}: {missing} of {missing + len(records)} records left out, "
                f"their files are missing (first: {path}, {where})")

    # nothing was there, or nothing of this split
    if not len(records):
        if records.splits:
            there = ", ".join(sorted(records.splits))
            fail(f"{spec}: no split '{records.split}' (it has: {there})")
        notes = f" ({records.notes})" if records.notes else ""
        fail(f"{spec}: no records in it{notes}")


class ImageIds:
    """Gives each record its image_id.

    That is the file's own number, offset so that the ids of two files never collide, or else the
    next number for each new picture. A picture met before (the same location) keeps its id,
    whatever the record says: an image is never its own negative.
    """

    def __init__(self):
        self.by_location = {}
        self.repeats = 0            # records whose picture was met before
        self.next = 0               # larger than all ids given so far

        # of the file that is read now
        self.file = None
        self.numbered = None        # do its records carry numbers?
        self.offset = 0
        self.by_name = {}           # ids of records that carry names instead of numbers

    def __call__(self, file, where, record, index):
        """The id of a record from file number `file`; index: its place among the Records."""
        # text alone (sts) has no location: its place is its own
        location = record.get("image") or record.get("feature") or index
        own = record.get("image_id")
        is_number = isinstance(own, int)

        # a new file begins behind all ids given so far
        if file != self.file:
            self.file, self.numbered = file, is_number
            self.offset, self.by_name = self.next, {}
        if is_number != self.numbered or (is_number and own < 0):
            fail(f"{where}: key 'image_id' is {own!r}: a number >= 0 in every record of a file, "
                 "or in none")

        # met before
        if location in self.by_location:
            self.repeats += 1
            return self.by_location[location]

        # the file's number, the number of its name, or the next one
        if is_number:
            number = self.offset + own
        elif own is not None:
            number = self.by_name.setdefault(own, self.next)
        else:
            number = self.next
        self.next = max(self.next, number + 1)
        self.by_location[location] = number
        return number


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


def caption_tags(records, path):
    """Records whose tags are those words of their captions that stand in a word list, in place of
    their own tags.

    path: a text file with one word a line. A word counts as it is written, lower-cased: list
    plurals too. Errors: DataError if the file or its words are missing.
    """
    words = {line.strip().lower() for line in text_lines(path)} - {""}
    if not words:
        fail(f"{path}: no word in it")

    # records without one of the words stay, with no tags
    out = records.subset(())
    tagged = 0
    for record in records:
        spoken = re.findall(r"[^\W\d_]+", " ".join(record.get("caption") or ()).lower())
        tags = sorted(words.intersection(spoken))
        out.append(record | {"tags": tags})
        tagged += bool(tags)
    out.notes["with_tags"] = tagged
    out.notes["nouns_listed"] = len(words)
    return out


def wordings(paraphrase):
    """A caption's paraphrase in a record, one string, several or None -> list of those that are
    not empty."""
    several = [paraphrase] if isinstance(paraphrase, str) else paraphrase or []
    return [wording for wording in several if wording.strip()]


def same_words(caption):
    """What captions are joined by: their words, whatever the spaces and capitals."""
    return " ".join(caption.lower().split())


def read_paraphrases(path):
    """A file of paraphrases -> {same_words(caption): list of wordings, each once}.

    path: .jsonl or .json of {"caption": string, "paraphrase": string or list of strings}, or .tsv
    "caption TAB wording [TAB wording ...]". A caption may stand on several lines.
    """
    # (where, caption, its wordings) of each line
    rows = []
    if path.endswith(".tsv"):
        for where, line in lines_of(path):
            caption, *found = line.split("\t")
            rows.append((where, caption, found))
    else:
        for where, raw in json_records(path):
            found = get(where, raw, "paraphrase", (str, list))
            if not isinstance(found, str) and not is_list_of(found, str):
                fail(f"{where}: key 'paraphrase' must be a string or a list of strings")
            rows.append((where, get(where, raw, "caption", str), wordings(found)))

    # several lines of one caption add up
    out = {}
    for where, caption, found in rows:
        if not wordings(found):
            fail(f"{where}: a caption and at least one paraphrase of it expected")
        known = out.setdefault(same_words(caption), [])
        known += [wording.strip() for wording in wordings(found) if wording.strip() not in known]
    return out


def join_paraphrases(records, path):
    """Records whose captions have the paraphrases of a file (see read_paraphrases) beside those
    that they came with; joined by the words of the caption.

    Errors: DataError if the file has none of the captions.
    """
    if not os.path.exists(path):
        fail(f"--paraphrase {path}: no such file")
    known, out = read_paraphrases(path), records.subset(())
    captions = joined = with_paraphrase = 0
    for record in records:
        # each caption's own wordings, then those of the file
        own = record.get("paraphrase") or [None] * len(captions_of(record))
        both = []
        for caption, paraphrase in zip(captions_of(record), own):
            found = known.get(same_words(caption), [])
            both.append(wordings(paraphrase) + found)
            captions, joined = captions + 1, joined + bool(found)
        with_paraphrase += any(both)
        out.append(record | {"paraphrase": both if any(both) else None})

    if not joined:
        fail(f"--paraphrase {path}: none of its {len(known)} captions is one of the {captions} "
             "captions of these records")
    out.notes |= {"with_paraphrase": with_paraphrase, "paraphrased_captions": joined}
    return out


def twice_the_same(records, views):
    """A line for the start of a run whose views ask for paraphrases where no record has one; else
    None."""
    keys = [key for key, name in view_keys(views).items() if name.endswith("paraphrase")]
    if not keys or records.notes.get("with_paraphrase"):
        return None
    return (f"WARNING: NO CAPTION HAS A PARAPHRASE. `{keys[0]}` is the caption itself, so that "
            "both views of a text are the same. Give --paraphrase FILE (back-translations), or "
            "records with a key 'paraphrase'")


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

    Transparency is dropped, not blended; 16-bit grey is scaled to 8 bits; more than PIL's limit of
    89 million pixels are refused. Raises BadImage.
    """
    try:
        file = where if isinstance(where, str) else io.BytesIO(where.read())
        with Image.open(file) as image:
            # the size is in the header: refuse a bomb before it is decoded
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are too many")
            image.load()
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)

            # a palette with transparency, and 16 bits: PIL's own conversion loses something
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadImage("no image format PIL knows") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error,
            Image.DecompressionBombError) as e:
        reason = getattr(e, "strerror", None)
        raise BadImage(reason or str(e) or type(e).__name__) from None


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
    frames = torch.zeros(FRAMES, x.shape[1])
    frames[:len(x)] = torch.from_numpy(x.astype(np.float32))
    mask = torch.zeros(FRAMES, dtype=torch.long)
    mask[:len(x)] = 1
    return {key: frames, key + "_mask": mask}


def read_frames(path):
    """A clip's .npy -> (frames, D), memory-mapped. DataError if it is damaged or of another
    shape."""
    try:
        x = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as e:
        fail(f"{path}: not a readable .npy file ({e})")
    if x.ndim != 2 or not len(x):
        fail(f"{path}: shape {x.shape}, not (frames, D)")
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
    counts = [max(1, len(captions_of(record))) for record in records]
    counts = torch.tensor(counts)
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


def unique_images(records):
    """-> (list of the position of the first record of each picture, {image_id: its position in
    that list})."""
    first, position = [], {}
    for i, record in enumerate(records):
        if record["image_id"] not in position:
            position[record["image_id"]] = len(first)
            first.append(i)
    return first, position


def captions_of(record):
    """A record's captions as a list."""
    captions = record.get("caption") or []
    return [captions] if isinstance(captions, str) else captions


def first_captions(records, n):
    """Records with the first n captions of each picture, and their paraphrases; the others go."""
    out, seen = records.subset(()), Counter()
    for record in records:
        captions, paraphrases = captions_of(record), record.get("paraphrase")
        kept = max(0, n - seen[record["image_id"]])
        seen[record["image_id"]] += len(captions)
        record["caption"] = captions[:kept]
        if paraphrases:
            record["paraphrase"] = paraphrases[:kept]
        out.append(record)
    return out


def flat_captions(records):
    """All captions in order -> (list of str, owner (N,) int64: the position of a caption's picture
    among the unique images)."""
    _, position = unique_images(records)
    texts, owner = [], []
    for record in records:
        captions = captions_of(record)
        texts += captions
        owner += [position[record["image_id"]]] * len(captions)
    return texts, torch.tensor(owner, dtype=torch.long)


def iter_eval(records, views, tokenizer, image_size, max_text, what="sample", batch_size=64,
              rank=0, world=1, workers=0, **options):
    """Iterator of batches of this rank's share of a split: each item once, nothing padded, the last
    batch may be short.

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
        for number, i in enumerate(unique_images(records)[0]):
            items.append(Item(i, keys=keys, number=number))
    elif what == "text":
        for i, record in enumerate(records):
            for caption in range(len(captions_of(record))):
                items.append(Item(i, caption=caption, keys=keys, number=len(items)))
    elif what == "sample":
        items = [Item(i) for i in range(len(records))]
    else:
        raise ValueError(f"what={what!r}: image, text or sample")

    # every world-th of it
    items = items[rank::world]
    steps = range(math.ceil(len(items) / batch_size))
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
    steps = math.ceil(len(records) / world / batch_size)
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
    store.flush()
    barrier()
    if rank == 0:
        note.write_text(json.dumps(key))
    barrier()
    return np.load(path, mmap_mode="r")


# --------------------------------------------------------------------------------------------------
# Region features: reading what tools/regions.py makes
#
# What a detector found in N pictures, T regions in all, is one safetensors file. It is mapped into
# memory, so that it may be larger than RAM.
#   features (T, F) float16   boxes (T, 4) float32, xyxy in pixels   labels (T,) int64, -1 = none
#   scores (T,) float32       offsets (N+1,) int64: picture n has rows offsets[n]:offsets[n+1], by
#                             falling score
#   sizes (N, 2) int64: width, height                     globals (N, G) float16: optional
#   names (bytes,) uint8, name_ends (N,) int64: the pictures' file names, one behind the other
#   bytes (N,) int64: optional, the sizes of the pictures' files. Two corpora may both have a
#                     00000.tar with a 000000017.jpg in it: the size tells them apart
# Metadata: detector (text), label_names (JSON list), root (the folder that names start from; empty:
# names are image ids).

ROW_ARRAYS = {"labels": np.int64, "boxes": np.float32, "scores": np.float32,
              "features": np.float16}
SAFE_TYPES = {np.dtype(np.int64): "I64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
              np.dtype(np.uint8): "U8"}


def map_safetensors(path):
    """-> ({name: read-only memory-mapped array}, metadata). Only the header is read."""
    types = {name: dtype for dtype, name in SAFE_TYPES.items()}
    try:
        # 8 bytes with the length of the header, the header in JSON, the arrays
        blob = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(blob[:8].tobytes(), "little")
        if start > len(blob):
            fail(f"{path}: not a whole safetensors file")
        header = json.loads(blob[8:start].tobytes())
        metadata = header.pop("__metadata__", {})

        # each array is a view of the file
        arrays = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            content = blob[start + begin:start + end].view(types[entry["dtype"]])
            arrays[name] = content.reshape(entry["shape"])
        return arrays, metadata
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except (ValueError, KeyError) as e:
        fail(f"{path}: not a whole safetensors file of regions ({e})")


def picture_path(where):
    """A picture's location as an absolute path; of a tar's member as if the tar were a folder."""
    return os.path.abspath(where if isinstance(where, str) else where.path())


def picture_bytes(where):
    """The size of a picture's file; None if it is not there."""
    if not isinstance(where, str):
        return where.size
    return os.path.getsize(where) if os.path.exists(where) else None


class Regions:
    """Region files as one. regions[n] -> {name: array} of picture n.

    Attributes: dim F, classes K (0: no labels), global_dim G (0: none), most (regions of a
    picture), label_names, about (what made them), paths.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.files = [map_safetensors(path) for path in self.paths]

        # all files must be of one kind
        kinds = {}
        for path, (arrays, metadata) in zip(self.paths, self.files):
            wanted = (*ROW_ARRAYS, "offsets", "sizes", "names", "name_ends")
            lacking = [name for name in wanted if name not in arrays]
            if lacking:
                fail(f"{path}: not a regions file, it lacks {', '.join(lacking)}")
            global_dim = arrays["globals"].shape[1] if "globals" in arrays else 0
            names = metadata.get("label_names", "[]")
            kinds.setdefault((arrays["features"].shape[1], global_dim, names), path)
        if len(kinds) > 1:
            fail(f"{' and '.join(kinds.values())} differ in feature size, global feature or label "
                 "names")

        # what they have in common
        self.dim, self.global_dim, names = next(iter(kinds))
        self.label_names = json.loads(names)
        self.classes = len(self.label_names)
        detectors = [metadata["detector"] for _, metadata in self.files]
        self.about = "; ".join(dict.fromkeys(detectors))

        # file k holds the pictures ends[k - 1]:ends[k]
        counts = [np.diff(arrays["offsets"]) for arrays, _ in self.files]
        self.ends = np.cumsum([len(count) for count in counts])
        self.most = max(int(count.max(initial=0)) for count in counts)

    def __reduce__(self):
        # another process gets the paths, not the content
        return Regions, (self.paths,)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, n):
        # the file that holds picture n, and its row there
        file = int(np.searchsorted(self.ends, n, "right"))
        arrays = self.files[file][0]
        row = n - (int(self.ends[file - 1]) if file else 0)

        # its regions, and what it has once
        start, end = map(int, arrays["offsets"][row:row + 2])
        found = {name: arrays[name][start:end] for name in ROW_ARRAYS}
        found["sizes"] = arrays["sizes"][row]
        if "globals" in arrays:
            found["globals"] = arrays["globals"][row]
        return found

    def tables(self):
        """Yields for each file {name of a picture: its number here}."""
        number = 0
        for arrays, _ in self.files:
            text, start, table = arrays["names"].tobytes(), 0, {}
            for end in arrays["name_ends"].tolist():
                table[os.fsdecode(text[start:end])] = number
                number += 1
                start = end
            yield table

    def attach(self, records):
        """Records with `regions` = the number of their picture here; the others are left out and
        counted.

        Errors: a location that fits several pictures, a picture that fits several locations,
        another picture under the same name, no picture found at all.
        """
        # names are relative to the root of their file
        roots = [metadata.get("root", "") for _, metadata in self.files]
        tables = list(zip(roots, self.tables()))
        sizes = np.concatenate([arrays.get("bytes", np.zeros(len(arrays["sizes"]), np.int64))
                                for arrays, _ in self.files])       # 0: unknown
        files, image_of = ", ".join(self.paths), {}

        # exactly one picture for a record, exactly one image_id for a picture
        out = records.subset([])
        out.regions = self
        for record in records:
            where = record["image"]
            own_id = record.get("own_id", record["image_id"]) if records.own_ids else None
            numbers, exact = picture_numbers(where, own_id, tables)

            # what has the same name may be another picture
            size = picture_bytes(where) if sizes.any() else None
            fitting = {n for n in numbers if size is None or sizes[n] in (0, size)}
            if exact and numbers - fitting:
                fail(f"{where}: {files} has regions of another picture of this name "
                     f"({sizes[min(numbers)]} bytes there, {size} here)")
            numbers = fitting
            if len(numbers) > 1:
                fail(f"{where}: {len(numbers)} pictures of {files} could be this one")
            for number in numbers:
                if image_of.setdefault(number, record["image_id"]) != record["image_id"]:
                    fail(f"{where}: another picture of these records has the same name in {files}")
                out.append({**record, "regions": number})

        # the regions are there: the picture's own file need not be
        out.notes.pop("missing", None)
        lost = len(records) - len(out)
        if lost and not len(out):
            example = next((name for _, table in tables for name in table), "nothing")
            fail(f"{files}: none of the {lost} records' pictures is in it, for example "
                 f"{records[0]['image']} is not; it holds for example {example}")
        if lost:
            out.notes["without_regions"] = lost
            say(f"{lost} of {len(records)} records left out: their pictures are not in {files}")
        return out


def picture_numbers(where, own_id, tables):
    """The numbers of the pictures that a location may be -> (set, is it the file's very path?).

    tables: list of (root, {name: number}). A path is looked up as it continues a root, then, as
    folders are moved, by ever shorter ends of it. In a table of image ids (root "") the record's
    own id decides, and nothing in the file's name.
    """
    path, found = picture_path(where), set()
    for root, table in tables:
        if root and path.startswith(root + os.sep):
            found.add(table.get(path[len(root) + 1:]))
    if found - {None}:
        return found - {None}, True

    # the longest end that some file has
    parts = path.split(os.sep)
    for k in range(1, len(parts)):
        name = "/".join(parts[k:])
        found = {table[name] for root, table in tables if root and name in table}
        if found:
            return found, False
    found = {table.get(str(own_id)) for root, table in tables if not root}
    return found - {None}, False


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


# --------------------------------------------------------------------------------------------------
# python data.py check

# A key of a source's records, as it stands in the publisher's file.
TELLING_KEYS = {"questions": "vqa", "videos": "clips", "gold_label": "ve", "identifier": "nlvr2"}


def guess_source(spec):
    """The source of files or a folder, from the first one's name and first record."""
    if spec == "shapes":
        return "pairs"
    # a folder, by the files in it
    path = expand(spec)[0]
    if os.path.isdir(path):
        names = os.listdir(path)
        if any(re.match(r"STS|stsb|sts-", name) for name in names):
            return "sts"
        kinds = {os.path.splitext(name)[1] for name in names}
        if ".txt" in kinds:
            return "hashing"
        return "pairs" if ".tar" in kinds else "classes"

    # a file that is no JSON, by its name
    kind = os.path.splitext(path)[1]
    if kind in (".txt", ".csv"):
        return "hashing" if kind == ".txt" else "sts"
    if kind not in (".json", ".jsonl"):
        return "pairs"

    # the first record, or the whole where it is one object
    first = read_json(path)
    if isinstance(first, list):
        first = first[0] if first else None
    elif not isinstance(first, dict):
        first = next(first, (None, None))[1]
    if isinstance(first, dict):
        for key, source in TELLING_KEYS.items():
            if key in first:
                return source
    return "pairs"


def trouble_with(where):
    """None, "missing", or why an image or a feature file cannot be read."""
    if isinstance(where, str) and not os.path.exists(where):
        return "missing"
    try:
        if isinstance(where, str) and where.endswith(".npy"):
            shape = np.load(where, mmap_mode="r").shape
            return None if len(shape) == 2 else f"shape {shape}, not (frames, D)"
        load_image(where)
    except (BadImage, OSError, ValueError) as e:
        return str(e)


def check_split(records, title):
    """Opens every file of the records -> ({what: count} to print, list of (location, reason) of
    the unreadable ones)."""
    # each file once
    files = {}
    for record in records:
        for key in ("image", "image2", "feature"):
            if key in record:
                files[record[key]] = None

    # threads: PIL decodes outside the interpreter's lock
    troubles = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(trouble_with, files)
        for where, reason in zip(files, tqdm(reasons, title, len(files), leave=False,
                                             disable=None)):
            if reason:
                troubles.append((where, reason))

    # what to print
    rows = {"records": len(records), "images": len(files)}
    counts = [len(r["caption"]) for r in records if isinstance(r.get("caption"), list)]
    if counts:
        rows["captions"] = sum(counts)
        rows["captions an image"] = (f"{min(counts)} to {max(counts)}, "
                                     f"mean {np.mean(counts):.2f}")
    rows["missing files"] = sum(reason == "missing" for _, reason in troubles)
    rows["corrupt files"] = len(troubles) - rows["missing files"]
    if records.name == "pairs":
        rows["duplicate captions"] = records.notes.get("duplicates", 0)
    for note, count in records.notes.items():
        if note not in ("missing", "duplicates"):
            rows[note.replace("_", " ")] = count
    return rows, troubles


def check(spec, image_root=None, split=None, source=None):
    """Prints what is in the files of `spec` and opens every image -> number of missing and corrupt
    ones."""
    # read all splits once to learn their names, then each one
    source = source or guess_source(spec)
    everything = open_source(source, spec, split, image_root, missing="keep")
    table, troubles = {}, []
    for part in [split] if split else everything.splits or [None]:
        records = open_source(source, spec, part, image_root, missing="keep")
        rows, found = check_split(records, f"opening {part or ''}")
        table[part or "all"] = rows
        troubles += found

    # what was read, the counts, the first ten unreadable files
    protocol = f" ({everything.protocol})" if everything.protocol else ""
    print(f"{source}: {spec}{protocol}")
    names = everything.label_names
    if names:
        more = ", ..." if len(names) > 6 else ""
        print(f"labels: {len(names)} ({', '.join(names[:6])}{more})")
    print_table(table)
    for where, reason in troubles[:10]:
        print(f"  {where}: {reason}")
    if len(troubles) > 10:
        print(f"  ... and {len(troubles) - 10} more")
    return len(troubles)


def print_table(table):
    """{column: {row: value}} -> printed with a column for each split."""
    widths = {}
    for column, values in table.items():
        widths[column] = max(len(str(cell)) for cell in [column, *values.values()])

    print(" " * 26 + "  ".join(column.rjust(widths[column]) for column in table))
    for row in dict.fromkeys(itertools.chain(*table.values())):
        cells = [str(values.get(row, 0)).rjust(widths[column]) for column, values in table.items()]
        print(f"  {row:<24}" + "  ".join(cells))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)

    # check, the one task so far
    p = tasks.add_parser("check", help="count records and open every image; exit status 1 if one "
                                       "is missing or corrupt")
    p.add_argument("path", help='files or folders separated by commas, or "shapes"')
    p.add_argument("--image_root", help="the folder the images lie in")
    p.add_argument("--split", help="only this split (default: each)")
    p.add_argument("--source", choices=SOURCES,
                   help="what the records are (default: guessed from the files)")
    args = parser.parse_args(argv)
    return int(check(args.path, args.image_root, args.split, args.source) > 0)


if __name__ == "__main__":
    sys.exit(main())
