"""data.py: every data set, every official file format, transforms, tokenizer.

    files --open_source()--> Records (list-like of plain dicts) --Views--> sample: dict of tensors
                                                                                   --batches()--> training batches
                                                                                   --iter_eval()--> a split, once

A *source* names what a record means (`pairs`, `vqa`, `ve`, `nlvr2`, `sts`, `hashing`, `classes`, `clips`, `detection`);
the file format is recognised from the files. The spec is "shapes" (the built-in world, written by tools/shapes.py in these
same formats) or a comma-separated list of files and folders; `{00000..00012}` in a name counts up. Formats read,
as their publishers wrote them:

  pairs      records .json/.jsonl: image, caption (str or list) [image_id, split, tags, paraphrase, boxes, labels];
             Karpathy dataset_*.json; COCO captions_*.json (+ instances_*.json in the same list: joins tags and boxes
             by image id); .tsv "caption TAB path-or-url" beside a folder of images (CC, SBU); img2dataset .tar shards
             (or a folder of them)
  vqa        VQA v2 questions.json [+ annotations.json]      ve     SNLI-VE .jsonl    nlvr2   NLVR2 .json/.jsonl
  sts        SentEval folders STS1X-en-test, stsbenchmark/, sts-*.csv                 hashing CSQ list "path 0 1 0 ..."
  classes    ImageFolder                             clips    MSR-VTT videodatainfo.json [+ 1k-A csv] + a folder of .npy
  detection  COCO instances_*.json; a VOCdevkit folder with VOC2007 and/or VOC2012

`python data.py check PATH [--image_root R] [--split S] [--source NAME]` reads everything, opens every image, prints
a table and exits with status 1 if an image is missing or corrupt (duplicates and skipped captions are only reported).

What is wrong in a file is a DataError: one line naming file, line and key. What is merely absent (an image that was
never downloaded, an empty caption) is left out and counted in `Records.notes`, and said once on stderr. In training
an unreadable image is replaced by another record, chosen by (seed, draw) alone; in evaluation it becomes a grey image;
both have `bad` = 1. Nothing here reads or moves a global random state: a sample is a function of (record, seed, draw).
"""
import argparse
import array
import base64
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
from xml.etree import ElementTree

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # workers fork, and we encode one string at a time
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFile, ImageFilter, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer as RustTokenizer, models as tokenizer_models, normalizers, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

ImageFile.LOAD_TRUNCATED_IMAGES = False     # a truncated JPEG must fail, not come back half grey
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)      # load_image refuses such files itself

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
# foreign -> ours
SPLIT_NAMES = {"restval": "train", "validate": "val", "validation": "val", "valid": "val", "dev": "val"}


class DataError(SystemExit):
    """Something the user can put right: printed as one line `data.py: ...`, exit status 1."""


def fail(message):
    raise DataError(f"data.py: {message}")


def say(message):
    print(f"data.py: {message}", file=sys.stderr, flush=True)


def ranks():
    """(this process's number, how many there are, its number on this machine), as torchrun tells them."""
    return tuple(int(os.environ.get(name, default))
                 for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def gather_objects(x):
    """Any Python object of every process -> list of them, by rank, the same on every process."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    everyone = [x] * world
    if world > 1:
        torch.distributed.all_gather_object(everyone, x)
    return everyone


# -------------------------------------------------------------------------------------------------------------- records

class Records:
    """List-like of dicts, kept as one pickled byte string: millions of records are small,
    and forked workers copy no pages.

    `image` (and `image2`, `feature`) is a path that opens as it is, or (tar path, offset, size) in bytes. `image_id` is
    an int, the same for two records of one picture. Attributes: name (the source), split, root, notes (dict of counts),
    label_names (list or None: what the ints in `labels`/`label` mean), protocol (str or None),
    splits (those in the files), regions (Regions or None: see with_regions)."""

    def __init__(self, name, split, root=None):
        self.name, self.split, self.root = name, split, root
        self.notes, self.label_names, self.protocol, self.splits, self.regions = {}, None, None, [], None
        self._blob, self._ends = bytearray(), array.array("q", [0])

    def append(self, record):
        self._blob += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._blob))

    def subset(self, indices):
        """The records at `indices`, in that order, as new Records with the same attributes."""
        out = copy.copy(self)
        out.notes, out._blob, out._ends = dict(self.notes), bytearray(), array.array("q", [0])
        for i in indices:
            out.append(self[i])
        return out

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = int(i) % len(self)
        return pickle.loads(memoryview(self._blob)[self._ends[i]:self._ends[i + 1]])


class Listing:
    """`path in listing`: existence by one directory listing per folder (a stat per image is slow on network disks)."""

    def __init__(self):
        self.folders = {}

    def __contains__(self, path):
        folder, name = os.path.split(path)
        if folder not in self.folders:
            self.folders[folder] = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        return name in self.folders[folder]

    def first(self, candidates):
        """The first path that exists, else the first candidate (it is then reported as missing)."""
        return next((c for c in candidates if c in self), candidates[0])


class Reading:
    """What a reader needs beside its files: the Records it fills in notes and names, the directory listings,
    the split wanted."""

    def __init__(self, records):
        self.records, self.here, self.splits = records, Listing(), set()

    def wants(self, part):
        """Is a record of the file's own split `part` (None: the file has no splits) asked for?"""
        if part is None:
            return True
        part = SPLIT_NAMES.get(part, part)
        self.splits.add(part)
        return self.records.split in (None, part)

    def count(self, note, n=1):
        self.records.notes[note] = self.records.notes.get(note, 0) + n


# ----------------------------------------------------------------------------------------------------- small file tools

def expand(spec, flag="--data"):
    """ "a.json,shards/{00..02}.tar" -> list of existing paths; a missing one is an error, which names the flag."""
    paths = []
    for item in [spec] if os.path.exists(spec) else [s.strip() for s in spec.split(",") if s.strip()]:
        span = re.search(r"\{(\d+)\.\.(\d+)\}", item)
        numbers = range(int(span[1]), int(span[2]) + 1) if span else ()
        paths += ([item[:span.start()] + str(n).zfill(len(span[1])) + item[span.end():] for n in numbers]
                  if span else [item])
    if not paths:
        fail(f"{flag} is empty")
    for path in paths:
        if not os.path.exists(path):
            fail(f"{flag} {path}: no such file")
    return paths


def text_lines(path):
    """Yields the lines of a UTF-8 file without their ends. Splits at newlines only: captions and vocabularies
    hold U+2028."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            for line in f:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as e:
        fail(f"{path}: not UTF-8 text ({e.reason})")
    except OSError as e:
        fail(f"{path}: {e.strerror}")


def lines_of(path):
    """Yields (where, line) for the lines that are not blank."""
    return ((f"{path} line {n}", line) for n, line in enumerate(text_lines(path), 1) if line.strip())


def read_json(path):
    """The JSON value in a file; for jsonl (under any extension) an iterator of (where, dict)."""
    if path.endswith(".jsonl"):
        return json_lines(path)
    text = "\n".join(text_lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data" and text.lstrip()[:1] == "{":      # jsonl under the name .json, as NLVR2 publishes it
            return json_lines(path)
        fail(f"{path} line {e.lineno}: not JSON ({e.msg})")


def json_lines(path):
    for where, line in lines_of(path):
        try:
            yield where, as_dict(json.loads(line), where)
        except json.JSONDecodeError as e:
            fail(f"{where}: not JSON ({e.msg})")


def json_records(path, data=None):
    """Yields (where, dict) of a records file: jsonl, a list, or one lonely object."""
    data = read_json(path) if data is None else data
    if isinstance(data, list):
        return ((f"{path} record {n}", as_dict(r, f"{path} record {n}")) for n, r in enumerate(data))
    return iter([(f"{path} line 1", data)]) if isinstance(data, dict) else data


def as_dict(value, where):
    return (value if isinstance(value, dict)
            else fail(f"{where}: an object {{...}} expected, found {type(value).__name__}"))


def get(where, record, key, kind=None):
    """record[key], or an error naming the place, the key and the keys that are there."""
    if key not in record or record[key] is None:
        fail(f"{where}: no key '{key}' (it has: {', '.join(map(str, record)) or 'nothing'})")
    if kind is not None and not isinstance(record[key], kind):
        fail(f"{where}: key '{key}' is {type(record[key]).__name__}, "
             f"not {getattr(kind, '__name__', 'one of the allowed types')}")
    return record[key]


def folders(path, root, *subfolders):
    """Where the images of an annotation file may lie: under --image_root, or, without one,
    beside the file as published."""
    home = os.path.dirname(path)
    bases = [root] if root else [home, os.path.join(home, "images"), os.path.normpath(os.path.join(home, ".."))]
    return bases + [os.path.join(b, s) for b in bases for s in subfolders if s]


def under(bases, *names):
    return [os.path.join(b, n) for n in names for b in bases]


# -------------------------------------------------------------------------------------------------------------- readers
# reader(files, split, ctx) yields (file number, where, record). files: list of (path, image_root or None). A record may
# carry `split` (open_source filters by it), `image_id` (int or str) and paths under image, image2, feature.

def clean_captions(where, raw, ctx):
    """`caption` and `paraphrase` of a record as equally long lists of non-empty strings; empty captions are counted."""
    captions = [raw["caption"]] if isinstance(raw["caption"], str) else get(where, raw, "caption", list)
    if not all(isinstance(c, str) for c in captions):
        fail(f"{where}: key 'caption' must be a string or a list of strings")
    other = raw.get("paraphrase")
    other = [other] if isinstance(other, str) else other
    if other is not None and (not isinstance(other, list) or len(other) != len(captions)):
        fail(f"{where}: key 'paraphrase' must hold one string per caption ({len(captions)}), in the captions' order")
    keep = [i for i, c in enumerate(captions) if c.strip()]
    ctx.count("empty_captions", len(captions) - len(keep))
    return [captions[i].strip() for i in keep], None if other is None else [other[i] for i in keep]


def pair(where, raw, image, ctx):
    """One documented record -> our record. `caption` may be absent (a task that needs it says so);
    empty is left out."""
    if not ctx.wants(raw.get("split")):
        return None
    record = {"image": image}
    record.update({k: raw[k] for k in ("image_id", "split", "tags", "boxes", "labels", "label_names")
                   if raw.get(k) is not None})
    if raw.get("caption") is not None:
        record["caption"], record["paraphrase"] = clean_captions(where, raw, ctx)
        if not record["caption"]:
            ctx.count("no_caption_left")
            return None
    if "tags" in record and not (isinstance(record["tags"], list) and all(isinstance(t, str) for t in record["tags"])):
        fail(f"{where}: key 'tags' must be a list of strings")
    for box in record.get("boxes", ()):
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) for v in box)):
            fail(f"{where}: key 'boxes' must be a list of [x1, y1, x2, y2] in pixels")
    if "labels" in record and len(record["labels"]) != len(record.get("boxes", ())):
        fail(f"{where}: {len(record['labels'])} labels for {len(record.get('boxes', ()))} boxes")
    return record


def sniff(path):
    """(format, data) of a file of image-text pairs: tar, tsv, records, karpathy, coco, instances, questions."""
    if os.path.isdir(path) or path.endswith(".tar"):
        return "tar", None
    if path.endswith((".tsv", ".txt")):
        return "tsv", None
    if not path.endswith((".json", ".jsonl")):
        fail(f"{path}: unknown format (pairs are read from .json, .jsonl, .tsv, .tar or a folder of .tar)")
    data = read_json(path)
    if not isinstance(data, dict) or "image" in data:
        return "records", data
    images, notes = data.get("images"), data.get("annotations")
    if isinstance(images, list) and (not images or "sentences" in as_dict(images[0], f"{path} images[0]")):
        return "karpathy", data
    if isinstance(images, list) and isinstance(notes, list):
        return "coco" if any("caption" in n for n in notes[:1]) else "instances", data
    first = next(iter(data.values()), None)
    if isinstance(data.get("questions"), list) or isinstance(first, dict) and "imageId" in first:
        return "questions", data
    fail(f"{path}: neither records, Karpathy's, COCO's, VQA's nor GQA's json (its keys: {', '.join(list(data)[:8])})")


def read_instances(path, data, ctx):
    """COCO instances -> {image id: tags, boxes (xyxy pixels), labels}. Crowd regions give tags but no boxes."""
    categories = sorted(get(path, data, "categories", list), key=lambda c: c["id"])
    names, place = [c["name"] for c in categories], {c["id"]: n for n, c in enumerate(categories)}
    if ctx.records.label_names not in (None, names):
        fail(f"{path}: its categories differ from those of the instances file before it")
    ctx.records.label_names = names
    joined = {image["id"]: {"tags": set(), "boxes": [], "labels": []} for image in data["images"]}
    for n, ann in enumerate(data["annotations"]):
        where = f"{path} annotations[{n}]"
        target, label = joined.get(get(where, ann, "image_id")), place.get(get(where, ann, "category_id"))
        if target is None or label is None:
            fail(f"{where}: image_id {ann['image_id']} or category_id {ann['category_id']} is not in the file")
        target["tags"].add(label)
        if not ann.get("iscrowd"):
            x, y, w, h = get(where, ann, "bbox", list)
            target["boxes"].append([x, y, x + w, y + h])
            target["labels"].append(label)
    for target in joined.values():
        target["tags"] = [names[t] for t in sorted(target["tags"])]
    return joined


def read_pairs(files, split, ctx):
    sniffed = [(n, path, root) + sniff(path) for n, (path, root) in enumerate(files)]
    joined = {}                                                             # COCO image id -> tags, boxes, labels
    for n, path, root, kind, data in sniffed:
        if kind == "instances":
            joined.update(read_instances(path, data, ctx))
    alone = not any(kind in ("coco", "karpathy") for *_, kind, _ in sniffed)
    for n, path, root, kind, data in sniffed:
        if kind != "instances" or alone:
            for where, record in PAIR_FORMATS[kind](path, root, data, ctx, joined):
                if record is not None:
                    yield n, where, record


def pairs_records(path, root, data, ctx, joined):
    bases = folders(path, root)
    for where, raw in json_records(path, data):
        image = get(where, raw, "image", str)
        yield where, pair(where, raw, ctx.here.first(under(bases, image)), ctx)


def pairs_karpathy(path, root, data, ctx, joined):
    bases = folders(path, root)
    for n, raw in enumerate(data["images"]):
        where = f"{path} images[{n}]"
        name = get(where, raw, "filename", str)
        names = [os.path.join(raw["filepath"], name), name] if raw.get("filepath") else [name]
        raw = dict(joined.get(raw.get("cocoid"), {}), split=get(where, raw, "split"),
                   image_id=raw.get("cocoid", raw.get("imgid")),
                   caption=[get(where, s, "raw", str) for s in get(where, raw, "sentences", list)])
        yield where, pair(where, raw, ctx.here.first(under(bases, *names)), ctx)


def pairs_coco(path, root, data, ctx, joined):
    """COCO captions, or instances alone (then without captions). val2017's images may lie in a folder of that name."""
    year = os.path.splitext(os.path.basename(path))[0].split("_")[-1]
    bases, captions = folders(path, root, year), {}
    for n, ann in enumerate(data["annotations"]):
        if "caption" in ann:
            captions.setdefault(get(f"{path} annotations[{n}]", ann, "image_id"), []).append(ann["caption"])
    for n, raw in enumerate(data["images"]):
        where = f"{path} images[{n}]"
        image, key = get(where, raw, "file_name", str), get(where, raw, "id")
        raw = dict(joined.get(key, {}), image_id=key, **({"caption": captions[key]} if key in captions else {}))
        yield where, pair(where, raw, ctx.here.first(under(bases, image)), ctx)


def pairs_tsv(path, root, data, ctx, joined):
    """Rows "caption TAB path-or-url". The file of a URL: its last part where no other row has the same, img2dataset's
    9-digit row number, or row_crc32(url) as the common CC downloader writes it. Rows without a file are counted
    as missing."""
    rows = []
    for where, line in lines_of(path):
        cells = line.split("\t")
        if len(cells) < 2:
            fail(f"{where}: 'caption TAB path-or-url' expected, found no TAB")
        rows.append((where, cells[0], cells[1].strip()))
    last = [u.split("?")[0].rstrip("/").split("/")[-1] for _, _, u in rows]
    seen, bases = Counter(last), folders(path, root)
    for n, (where, caption, url) in enumerate(rows):
        if "://" in url:
            names = ([f"{n:09d}.jpg", f"{n}_{zlib.crc32(url.encode())}"]
                     + ([last[n]] if seen[last[n]] == 1 and last[n] else []))
        else:
            names = [url]
        yield where, pair(where, {"caption": caption}, ctx.here.first(under(bases, *names)), ctx)


def pairs_tar(path, root, data, ctx, joined):
    """img2dataset shards: KEY.jpg + KEY.txt (or the caption of KEY.json). Members are indexed once and read by seek."""
    shards = [path]
    if os.path.isdir(path):
        shards = sorted(os.path.join(path, f) for f in os.listdir(path) if f.endswith(".tar"))
        if not shards:
            fail(f"{path}: no .tar shards in this folder")
    for shard in tqdm(shards, desc=f"indexing {path}", disable=len(shards) < 8 or None):
        samples = {}
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    folder, name = os.path.split(member.name)
                    stem, _, kind = name.partition(".")
                    if member.isfile() and kind:
                        content = (tar.extractfile(member).read() if kind in ("txt", "json")
                                   else (member.offset_data, member.size))
                        samples.setdefault(os.path.join(folder, stem), {})[kind.lower()] = content
        except (tarfile.TarError, EOFError, OSError) as e:
            fail(f"{shard}: not a readable tar ({e})")
        for key, parts in samples.items():
            where, image = f"{shard} member {key}", next((parts[k] for k in parts if "." + k in IMAGE_TYPES), None)
            if image is None:
                ctx.count("missing")
                continue
            try:
                raw = {"caption": parts["txt"].decode()} if "txt" in parts else json.loads(parts.get("json", b"{}"))
            except ValueError as e:
                fail(f"{where}: unreadable caption ({e})")
            yield where, pair(where, {"caption": raw.get("caption")}, (shard,) + image, ctx)


def pairs_questions(path, root, data, ctx, joined):
    """The questions of VQA v2 {questions: [{image_id, question}], data_subtype} or GQA {id: {imageId, question}} as
    the captions of their picture, one record each."""
    subtype, asked = data.get("data_subtype", ""), {}
    if isinstance(data.get("questions"), list):
        for n, raw in enumerate(data["questions"]):
            where = f"{path} questions[{n}]"
            key = get(where, raw, "image_id", int)
            image = raw.get("image") or f"COCO_{subtype.replace('test-dev', 'test')}_{key:012d}.jpg"
            if "image" not in raw and not subtype:
                fail(f"{where}: no key 'image', and the file has no 'data_subtype' to name COCO's image by")
            asked.setdefault((key, image), (where, []))[1].append(get(where, raw, "question", str))
    else:
        for name, raw in data.items():
            where = f"{path} question {name}"
            key = str(get(where, as_dict(raw, where), "imageId"))
            asked.setdefault((key, f"{key}.jpg"), (where, []))[1].append(get(where, raw, "question", str))
    bases = folders(path, root, subtype.replace("test-dev", "test"))
    for (key, image), (where, questions) in asked.items():
        yield where, pair(where, {"image_id": key, "caption": questions}, ctx.here.first(under(bases, image)), ctx)


PAIR_FORMATS = {"records": pairs_records, "karpathy": pairs_karpathy, "coco": pairs_coco, "instances": pairs_coco,
                "questions": pairs_questions, "tsv": pairs_tsv, "tar": pairs_tar}


def read_vqa(files, split, ctx):
    """VQA v2: questions joined with annotations by question_id; `answers` is None where there are none (test)."""
    questions, answers = [], {}
    for n, (path, root) in enumerate(files):
        data = as_dict(read_json(path), path)
        if "questions" in data:
            questions.append((n, path, root, data))
        elif "annotations" in data:
            for k, ann in enumerate(data["annotations"]):
                where = f"{path} annotations[{k}]"
                answers[get(where, ann, "question_id")] = [get(where, a, "answer", str)
                                                           for a in get(where, ann, "answers", list)]
        else:
            fail(f"{path}: neither 'questions' nor 'annotations' (its keys: {', '.join(data)})")
    if not questions:
        fail(f"{files[0][0]}: VQA needs the questions file too (--data questions.json,annotations.json)")
    seen = set()
    for n, path, root, data in questions:
        subtype = data.get("data_subtype", "").replace("test-dev", "test")      # test-dev asks about test2015's images
        bases = folders(path, root, subtype)
        for k, raw in enumerate(data["questions"]):
            where = f"{path} questions[{k}]"
            key, image_id = get(where, raw, "question_id", int), get(where, raw, "image_id", int)
            if key in seen:
                fail(f"{where}: question_id {key} occurs twice")
            seen.add(key)
            if "image" not in raw and not subtype:
                fail(f"{where}: no key 'image', and the file has no 'data_subtype' to name COCO's image by")
            image = raw.get("image") or f"COCO_{subtype}_{image_id:012d}.jpg"
            yield n, where, {"image": ctx.here.first(under(bases, image)), "image_id": image_id, "question_id": key,
                             "question": get(where, raw, "question", str), "answers": answers.get(key)}
    ctx.count("without_answers", sum(key not in answers for key in seen))
    ctx.count("answers_without_question", sum(key not in seen for key in answers))


VE_LABELS = ["entailment", "neutral", "contradiction"]


def read_ve(files, split, ctx):
    """SNLI-VE: photo, hypothesis, entailment 0 / neutral 1 / contradiction 2.
    Rows without a majority ('-') are left out."""
    ctx.records.label_names = VE_LABELS
    for n, (path, root) in enumerate(files):
        bases = folders(path, root)
        for where, raw in json_records(path):
            label = get(where, raw, "gold_label", str)
            if label == "-":
                ctx.count("without_majority_label")
                continue
            if label not in VE_LABELS:
                fail(f"{where}: gold_label '{label}' is none of {', '.join(VE_LABELS)}, -")
            photo = raw.get("Flickr30K_ID", raw.get("Flikr30kID"))              # both spellings were published
            image = raw.get("image") or (f"{photo}.jpg" if photo else get(where, raw, "image"))
            yield n, where, {"image": ctx.here.first(under(bases, image)), "caption": get(where, raw, "sentence2", str),
                             "label": VE_LABELS.index(label), "pair_id": raw.get("pairID")}


def read_nlvr2(files, split, ctx):
    """NLVR2: identifier dev-A-B-C is sentence C about dev-A-B-img0.png (left) and -img1.png (right); label 1 = True."""
    ctx.records.label_names = ["False", "True"]
    for n, (path, root) in enumerate(files):
        for where, raw in json_records(path):
            name = get(where, raw, "identifier", str)
            kind = name.split("-")[0]                                       # train, dev, test1: also the folders' names
            subfolders = [kind, os.path.join("images", kind), "images"]
            if "directory" in raw:                                              # train/ has numbered folders
                subfolders += [os.path.join(s, str(raw["directory"])) for s in (kind, os.path.join("images", kind))]
            bases, label = folders(path, root, *subfolders), str(get(where, raw, "label"))
            if label not in ("True", "False"):
                fail(f"{where}: label '{label}' is neither True nor False")
            stem = name.rpartition("-")[0]
            left, right = raw.get("left_image") or stem + "-img0.png", raw.get("right_image") or stem + "-img1.png"
            yield n, where, {"image": ctx.here.first(under(bases, left)), "image2": ctx.here.first(under(bases, right)),
                             "caption": get(where, raw, "sentence", str), "label": int(label == "True"),
                             "identifier": name}


def sts_parts(path):
    """Yields (csv file or SentEval folder, its split or None) under a path; folders of such folders are walked."""
    if os.path.isfile(path):
        yield path, None
        return
    if any(name.startswith("STS.input.") for name in os.listdir(path)):
        yield path, "train" if os.path.normpath(path).endswith("train") else "test"
    for name in sorted(os.listdir(path)):
        table = re.fullmatch(r"sts-(train|dev|test)\.csv", name)
        if table:
            yield os.path.join(path, name), SPLIT_NAMES.get(table[1], table[1])
        elif re.match(r"STS\d+-|stsbenchmark", name) and os.path.isdir(os.path.join(path, name)):
            yield from sts_parts(os.path.join(path, name))


def sts_rows(home):
    """Yields (where, dataset, subset, score as text, s1, s2) of STS.input.X.txt + STS.gs.X.txt, or of STS-B's table."""
    if os.path.isfile(home):                                                # genre, file, year, index, score, s1, s2
        for where, line in lines_of(home):
            cells = line.split("\t")
            if len(cells) < 7:
                fail(f"{where}: 7 columns between TABs expected (genre, file, year, index, score, s1, s2), "
                     f"found {len(cells)}")
            yield where, "STSB", cells[0], cells[4], cells[5], cells[6]
        return
    for name in sorted(f for f in os.listdir(home) if f.startswith("STS.input.")):
        file = os.path.join(home, name)
        pairs, gold = list(text_lines(file)), list(text_lines(os.path.join(home, name.replace(".input.", ".gs."))))
        if len(pairs) != len(gold):                                             # an unscored row is an empty line in gs
            fail(f"{file}: {len(pairs)} sentence pairs, but {len(gold)} scores in its .gs. file")
        for n, (line, score) in enumerate(zip(pairs, gold), 1):
            where, cells = f"{file} line {n}", line.split("\t")
            if len(cells) < 2:
                fail(f"{where}: 'sentence TAB sentence' expected")
            dataset = os.path.basename(os.path.normpath(home)).split("-")[0]
            yield where, dataset, name[len("STS.input."):-len(".txt")], score, cells[0], cells[1]


def read_sts(files, split, ctx):
    """Graded sentence pairs 0-5: s1, s2, score, dataset ("STS12", "STSB"), subset ("MSRpar").
    Unscored rows are left out."""
    for n, (path, _) in enumerate(files):
        parts = list(sts_parts(path))
        if not parts:
            fail(f"{path}: no STS data in it (STS.input.*.txt with STS.gs.*.txt, or sts-{{train,dev,test}}.csv)")
        for home, part in parts:
            for where, dataset, subset, score, s1, s2 in sts_rows(home) if ctx.wants(part) else ():
                if not score.strip():
                    ctx.count("unscored")
                    continue
                try:
                    value = float(score)
                except ValueError:
                    fail(f"{where}: score '{score}' is not a number")
                if not 0 <= value <= 5:
                    fail(f"{where}: score {value} is not in 0 to 5")
                yield n, where, {"s1": s1, "s2": s2, "score": value, "dataset": dataset,
                                 "subset": subset, "split": part}


def read_hashing(files, split, ctx):
    """CSQ/HashNet lists: "path 0 1 0 ...", a multi-hot label vector per image; a folder holds train/database/test.txt.
    Leading folders of the path (the authors' own disk) are left off until the file is found."""
    width = None
    for n, (path, root) in enumerate(files):
        if os.path.isdir(path):
            lists = sorted(f[:-4] for f in os.listdir(path) if f.endswith(".txt"))
            if split is not None and split not in lists:
                fail(f"{path}: no split '{split}' (it has: {', '.join(lists) or 'no .txt lists'})")
            lists = [os.path.join(path, s + ".txt") for s in ([split] if split else lists)]
        else:
            lists = [path]
        for file in lists:
            bases = folders(file, root)
            for where, line in lines_of(file):
                name, *labels = line.split()
                if not labels or any(v not in ("0", "1") for v in labels) or len(labels) != (width or len(labels)):
                    fail(f"{where}: 'path 0 1 0 ...' with {width or 'some'} labels expected, found {len(labels)}")
                width, parts = len(labels), name.split("/")
                ctx.count("without_label", int("1" not in labels))
                image = ctx.here.first([os.path.join(b, *parts[k:]) for k in range(len(parts)) for b in bases])
                yield n, where, {"image": image, "labels": [int(v) for v in labels]}


def read_classes(files, split, ctx):
    """ImageFolder: ROOT[/train|val|test]/CLASS/*.jpg. Label numbers are the sorted class names of all splits
    together."""
    for n, (path, _) in enumerate(files):
        if not os.path.isdir(path):
            fail(f"{path}: an ImageFolder is a directory")
        def children(p):
            return sorted(e.name for e in os.scandir(p) if e.is_dir())
        splits = [s for s in children(path) if SPLIT_NAMES.get(s, s) in ("train", "val", "test")]
        homes = [(s, os.path.join(path, s)) for s in splits] or [(None, path)]
        names = sorted({c for _, home in homes for c in children(home)})
        if not names:
            fail(f"{path}: no class folders in it")
        if ctx.records.label_names not in (None, names):
            fail(f"{path}: its classes differ from those of the folder before it")
        ctx.records.label_names = names
        use = [h for h in homes if split is None or h[0] is None or SPLIT_NAMES.get(h[0], h[0]) == split]
        if not use and split == "test":                                     # ImageNet's habit: val is what is reported
            use = [h for h in homes if SPLIT_NAMES.get(h[0]) == "val" or h[0] == "val"]
        if not use:
            fail(f"{path}: no split '{split}' (it has: {', '.join(splits)})")
        for _, home in use:
            for name in children(home):
                for folder, _, found in sorted(os.walk(os.path.join(home, name))):
                    for file in sorted(f for f in found if f.lower().endswith(IMAGE_TYPES)):
                        yield n, os.path.join(folder, file), {"image": os.path.join(folder, file), "class_name": name,
                                                              "label": names.index(name)}


def read_clips(files, split, ctx):
    """MSR-VTT: videodatainfo.json [+ the 1k-A csv] [+ a folder of VIDEO_ID.npy, (frames, D)]. Protocol "1k-A"
    with the csv: test = its rows, one caption each, train = every other video (9k of the whole json);
    else "full": the json's splits."""
    jsons, table, home = [], None, None
    for n, (path, root) in enumerate(files):
        home = path if os.path.isdir(path) else home or root
        if path.endswith(".json"):
            jsons.append((n, path, as_dict(read_json(path), path)))
        elif path.endswith(".csv"):
            lines = list(text_lines(path))
            rows = list(csv.reader(lines, delimiter=";" if lines and ";" in lines[0] else ","))
            if not rows or not {"video_id", "sentence"} <= set(rows[0]):
                fail(f"{path} line 1: columns video_id and sentence expected")
            table = n, path, [dict(zip(rows[0], r)) for r in rows[1:] if r]
    ctx.records.protocol = "1k-A" if table else "full"
    ids = {row["video_id"] for row in table[2]} if table else set()

    def clip(path, video, captions, part):
        feature = os.path.join(home or os.path.join(os.path.dirname(path), "features"), f"{video}.npy")
        return {"video_id": video, "feature": feature, "caption": captions, "split": part}

    for n, path, data in jsons:
        captions = {}
        for k, s in enumerate(get(path, data, "sentences", list)):
            where = f"{path} sentences[{k}]"
            captions.setdefault(get(where, s, "video_id"), []).append(get(where, s, "caption", str))
        for k, video in enumerate(get(path, data, "videos", list)):
            where = f"{path} videos[{k}]"
            key, part = get(where, video, "video_id", str), get(where, video, "split", str)
            part = SPLIT_NAMES.get(part, part) if not table else "train"        # 9k: the rest of train, val and test
            texts = [c.strip() for c in captions.get(key, ()) if c.strip()]
            if key in ids:
                continue
            if not texts:
                ctx.count("no_caption_left")
                continue
            yield n, where, clip(path, key, texts, part)
    if table:
        for k, row in enumerate(table[2], 2):
            yield table[0], f"{table[1]} line {k}", clip(table[1], row["video_id"], [row["sentence"].strip()], "test")


VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
               "pottedplant sheep sofa train tvmonitor").split()


def read_detection(files, split, ctx):
    """Objects of each picture, from COCO's instances json or from VOC, by torchvision's readers: boxes (xyxy pixels),
    labels (place in label_names), crowd, difficult (0/1 each), height, width, and of COCO area and segmentation
    (polygons or RLE, as published)."""
    for n, (path, root) in enumerate(files):
        for where, record in (detection_voc(path, split, ctx) if os.path.isdir(path)
                              else detection_coco(path, root, ctx)):
            flat = [i for i, (x0, y0, x1, y1) in enumerate(record["boxes"]) if x1 <= x0 or y1 <= y0]
            ctx.count("boxes_without_area", len(flat))
            for key in [k for k, v in record.items() if isinstance(v, list)]:
                record[key] = [v for i, v in enumerate(record[key]) if i not in flat]
            yield n, where, record


def detection_names(path, names, ctx):
    if ctx.records.label_names not in (None, names):
        fail(f"{path}: its classes differ from those of the files before it")
    ctx.records.label_names = names


def detection_coco(path, root, ctx):
    if not path.endswith(".json") or sniff(path)[0] != "instances":
        fail(f"{path}: detection reads COCO's instances json or a VOCdevkit folder")
    data = read_json(path)
    categories = sorted(get(path, data, "categories", list), key=lambda c: c["id"])
    detection_names(path, [c["name"] for c in categories], ctx)
    place = {c["id"]: n for n, c in enumerate(categories)}
    bases = folders(path, root, os.path.splitext(os.path.basename(path))[0].split("_")[-1])

    # the annotations of each image, in the file's order
    of_image = {}
    for n, ann in enumerate(get(path, data, "annotations", list)):
        where = f"{path} annotations[{n}]"
        if ann.get("category_id") not in place or len(ann.get("bbox", ())) != 4:
            fail(f"{where}: no known category_id, or no bbox of four numbers")
        of_image.setdefault(get(where, ann, "image_id"), []).append(ann)

    # an image without annotations is a record without objects
    images = {get(f"{path} images[{n}]", image, "id"): image for n, image in enumerate(data["images"])}
    for key in sorted(images):
        where, raw, notes = f"{path} image {key}", images[key], of_image.get(key, [])
        yield where, {"image": ctx.here.first(under(bases, get(where, raw, "file_name", str))), "image_id": key,
                      "height": get(where, raw, "height", int), "width": get(where, raw, "width", int),
                      "boxes": [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in notes)],
                      "labels": [place[a["category_id"]] for a in notes],
                      "crowd": [int(a.get("iscrowd", 0)) for a in notes],
                      "difficult": [0] * len(notes), "area": [a.get("area") for a in notes],
                      "segmentation": [a.get("segmentation") for a in notes]}


def detection_voc(path, split, ctx):
    """VOC as published: train = trainval of 2007 and 2012 (those that are there), val = their val, test = 2007's test.
    XML counts pixels from 1, corners included: the box is [xmin - 1, ymin - 1, xmax, ymax]."""
    from torchvision.datasets import VOCDetection
    home = os.path.dirname(os.path.normpath(path)) if os.path.basename(os.path.normpath(path)) == "VOCdevkit" else path
    part = {"train": "trainval"}.get(split, split)
    years = [y for y in (("2007",) if part == "test" else ("2007", "2012"))
             if os.path.isfile(os.path.join(home, "VOCdevkit", f"VOC{y}", "ImageSets", "Main", f"{part}.txt"))]
    if not years:
        fail(f"{path}: no VOCdevkit/VOC2007/ImageSets/Main/{part}.txt in it")
    detection_names(path, VOC_CLASSES, ctx)
    for year in years:
        found = VOCDetection(home, year, part)
        for image, file in zip(found.images, found.annotations):
            try:
                raw = found.parse_voc_xml(ElementTree.parse(file).getroot())["annotation"]
                things, size = raw.get("object", []), raw["size"]
                record = {"image": image, "height": int(size["height"]), "width": int(size["width"]),
                          "boxes": [[float(o["bndbox"][k]) - k.endswith("min")
                                     for k in ("xmin", "ymin", "xmax", "ymax")] for o in things],
                          "labels": [VOC_CLASSES.index(o["name"]) for o in things], "crowd": [0] * len(things),
                          "difficult": [int(o.get("difficult", 0)) for o in things]}
            except (ElementTree.ParseError, OSError, KeyError, ValueError) as e:
                fail(f"{file}: not a VOC annotation ({type(e).__name__}: {e})")
            yield file, record


def rle_counts(text):
    """COCO's compressed run lengths, a str or bytes -> list of int.

    Each number stands in characters of 6 bits over "0": 5 bits of it, the lowest first, and one that says
    whether more follow. From the third on it is the difference to the number two places before.
    """
    counts, number, shift = [], 0, 0
    for char in text.encode() if isinstance(text, str) else text:
        bits = char - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:                                                       # the number's last character
            number -= (1 << shift) * (bits >> 4 & 1)                            # its highest bit is the sign
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    return counts


def polygon_mask(polygon, height, width):
    """[x0, y0, x1, y1, ...] in pixels -> (height, width) bool, the pixels that COCO's own tool fills.

    Its rule: walk the outline on a grid five times finer; wherever it passes into another column of pixels,
    note the row of that crossing; a pixel is inside if an odd number of crossings lies above it or in columns
    before its own.
    """
    points = (5 * np.asarray(polygon, float).reshape(-1, 2) + 0.5).astype(int)
    columns, rows = [], []
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0)):
        # a step along the longer side, always counted from its smaller end, as rounding depends on it
        steps = max(abs(x1 - x0), abs(y1 - y0))
        along = np.arange(steps + 1)
        flat = abs(x1 - x0) >= abs(y1 - y0)
        back = x0 > x1 if flat else y0 > y1
        if back:
            x0, y0, x1, y1 = x1, y1, x0, y0
        slope = ((y1 - y0) if flat else (x1 - x0)) / max(steps, 1)
        across = ((y0 if flat else x0) + slope * along + 0.5).astype(int)
        line = (x0 + along, across) if flat else (across, y0 + along)
        columns.append(line[0][::-1] if back else line[0])
        rows.append(line[1][::-1] if back else line[1])
    x, y = np.concatenate(columns), np.concatenate(rows)

    # crossings, back in whole pixels: of a column's five fine places the third is its middle
    crossed = np.flatnonzero(x[1:] != x[:-1])
    column = (np.where(x[crossed + 1] < x[crossed], x[crossed + 1], x[crossed + 1] - 1) + 0.5) / 5 - 0.5
    row = np.ceil(((np.minimum(y[crossed], y[crossed + 1]) + 0.5) / 5 - 0.5).clip(0, height)).astype(int)
    valid = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    places = column[valid].astype(int) * height + row[valid]
    crossings = np.bincount(places, minlength=height * width + 1)[:height * width].cumsum()
    return (crossings % 2 == 1).reshape(width, height).T


def decode_mask(segmentation, height, width, where=""):
    """One object of COCO's annotations -> (height, width) bool. Polygons are united; run lengths (a list of
    counts, or its compressed text) go down the columns and begin with a run outside the object."""
    try:
        if isinstance(segmentation, list):
            masks = [polygon_mask(polygon, height, width) for polygon in segmentation]
            return np.logical_or.reduce(masks) if masks else np.zeros((height, width), bool)
        counts = segmentation["counts"]
        counts = counts if isinstance(counts, list) else rle_counts(counts)
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    except (ValueError, TypeError, KeyError) as e:
        fail(f"{where}: not COCO's polygons or run lengths of a {width}x{height} picture ({e})")


def encode_mask(mask):
    """(height, width) bool -> COCO's uncompressed run lengths {size, counts}."""
    flat = np.asarray(mask, bool).T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1:]))      # where each run ends
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


SOURCES = {"pairs": read_pairs, "vqa": read_vqa, "ve": read_ve, "nlvr2": read_nlvr2, "sts": read_sts,
           "hashing": read_hashing, "classes": read_classes, "clips": read_clips, "detection": read_detection}
SHAPES = {"pairs": "pairs_{}.jsonl", "vqa": "vqa_{}_questions.json,vqa_{}_annotations.json", "ve": "ve_{}.jsonl",
          "nlvr2": "nlvr2_{}.jsonl", "sts": "sts_{}.csv", "hashing": "hashing/{}.txt", "classes": "classes",
          "clips": "clips/videodatainfo.json", "detection": "instances_{}.json"}     # the built-in world's files


def open_source(source, spec, split, image_root=None, limit=None, seed=0, need=(), missing="drop"):
    """Reads `spec` ("shapes", or files/folders separated by commas) as `source` -> Records.

    split: "train", "val", "test" (hashing: "database" too), or None for everything.
    Files without splits give all they have.
    image_root: a folder, or one per item of spec separated by commas.
    limit: that many records, chosen by `seed`, in file order.
    need: record keys the views require (see `needs`).
    missing: records of absent files are left out ("drop") or kept ("keep").
    Errors: DataError naming file, line and key."""
    if source not in SOURCES:
        fail(f"no source '{source}' (there are: {', '.join(SOURCES)})")
    if spec == "shapes":
        from tools import shapes                            # only here: real data needs no drawing code
        world = str(shapes.ensure())
        image_root = os.path.join(world, "clips", "features") if source == "clips" else world
        names = [f.format(s) for s in ([split] if split else ("train", "val", "database", "test")) for f in
                 SHAPES[source].split(",")]
        spec = ",".join(dict.fromkeys(p for p in (os.path.join(world, f) for f in names) if os.path.exists(p)))
        if not spec:
            fail(f"shapes has no split '{split}' for {source}")
    paths = expand(spec)
    roots = ([r.strip() for r in image_root.split(",")]
             if image_root and not os.path.exists(image_root) else [image_root])
    for root in filter(None, roots):
        if not os.path.isdir(root):
            fail(f"--image_root {root}: no such directory")
    if len(roots) not in (1, len(paths)):
        fail(f"--image_root names {len(roots)} folders for {len(paths)} items of --data: give one, or one for each")
    records = Records(source, split, roots[0] or os.path.dirname(paths[0]))
    ctx, notes = Reading(records), records.notes
    ids, seen, first_gone = ImageIds(), set(), None
    for n, where, record in SOURCES[source](list(zip(paths, roots * len(paths) if len(roots) == 1 else roots)),
                                            split, ctx):
        if not ctx.wants(record.pop("split", None)):
            continue
        for key in need:
            if record.get(key) is None:                     # an empty list is an answer: a photo without any tag
                fail(f"{where}: no key '{key}' (it has: {', '.join(k for k in record if record[k] is not None)})")
        gone = [record[k] for k in ("image", "image2", "feature") if isinstance(record.get(k), str)
                and record[k] not in ctx.here]
        if gone:
            ctx.count("missing")
            first_gone = first_gone or (where, gone[0])
            if missing == "drop":
                continue
        record["image_id"] = ids(n, where, record, len(records))
        if source == "pairs":
            fresh = {hash((record["image"], c)) for c in record.get("caption", ())}
            ctx.count("duplicates", len(record.get("caption", ())) - len(fresh - seen))
            seen |= fresh
            ctx.count("with_paraphrase", int(bool(record.get("paraphrase"))))
            ctx.count("with_tags", int(bool(record.get("tags"))))
            ctx.count("without_caption", int("caption" not in record))
        records.append(record)
    records.splits = sorted(ctx.splits, key=lambda s: (s != "train", s == "test", s))
    if source == "pairs":
        notes["repeated_images"] = ids.repeats
    for key in [k for k, v in notes.items() if not v]:
        del notes[key]
    if first_gone and missing == "drop":
        if not len(records):
            fail(f"{first_gone[0]}: none of the {notes['missing']} image files is there, first {first_gone[1]} "
                 "(is --image_root right?)")
        if os.environ.get("RANK", "0") == "0":              # every rank reads the same files: said once
            say(f"{spec}: {notes['missing']} of {notes['missing'] + len(records)} records left out, "
                f"their files are missing (first: {first_gone[1]}, {first_gone[0]})")
    if not len(records):
        if ctx.splits:
            fail(f"{spec}: no split '{split}' (it has: {', '.join(sorted(ctx.splits))})")
        fail(f"{spec}: no records in it" + (f" ({notes})" if notes else ""))
    if limit and limit < len(records):
        records = records.subset(sorted(random.Random(seed).sample(range(len(records)), limit)))
    return records


class ImageIds:
    """image_id of each record: the file's own int, offset so that files never collide; else a dense int per distinct
    picture. A picture met before (same path) keeps its id, whatever the record says: an image is never its own
    negative."""

    def __init__(self):
        self.by_path, self.by_name, self.repeats = {}, {}, 0
        self.file, self.own, self.offset, self.next = None, None, 0, 0

    def __call__(self, n, where, record, index):
        path, own = record.get("image") or record.get("feature") or index, record.get("image_id")
        if n != self.file:
            self.file, self.own, self.offset, self.by_name = n, isinstance(own, int), self.next, {}
        if isinstance(own, int) != self.own or (self.own and own < 0):
            fail(f"{where}: key 'image_id' is {own!r}: a number >= 0 in every record of a file, or in none")
        if path in self.by_path:
            self.repeats += 1
            return self.by_path[path]
        if self.own:
            number = self.offset + own
        elif own is not None:                                                   # names instead of numbers
            number = self.by_name.setdefault(own, self.next)
        else:
            number = self.next
        self.next = max(self.next, number + 1)
        self.by_path[path] = number
        return number


def answer_list(records, n=3192):
    """The n most frequent normalised answers of VQA records (each annotator counts once; ties by alphabet) -> list
    of str. The paper's list has 3,192 answers and no published rule."""
    counts = Counter(normalize_answer(a) for r in records for a in r["answers"] or ())
    return sorted((a for a in counts if a), key=lambda a: (-counts[a], a))[:n]


def caption_tags(records, path):
    """Records whose tags are the words of their captions that stand in a word list (a text file, one word a line),
    in place of their own. A word counts as it stands, lower-cased: list plurals too. Errors: DataError where the file
    or its words are missing."""
    words = {line.strip().lower() for line in text_lines(path)} - {""}
    if not words:
        fail(f"{path}: no word in it")
    out = records.subset(())
    for record in records:
        spoken = re.findall(r"[^\W\d_]+", " ".join(record.get("caption") or ()).lower())
        out.append(record | {"tags": sorted(words.intersection(spoken))})
    out.notes["with_tags"] = sum(bool(record["tags"]) for record in out)
    out.notes["nouns_listed"] = len(words)
    return out


def tag_list(records, n=None):
    """The n most frequent tags (ties by alphabet) -> list of str: the vocabulary of the "tags" view."""
    counts = Counter(t for r in records for t in r.get("tags") or ())
    return sorted(counts, key=lambda t: (-counts[t], t))[:n]


def stats(records, answers=3192, views=None, tags=None):
    """What a model must know of the training records -> dict: answers (vqa); num_labels, label_names (where there is
    a label or are boxes); where `views` ask for tags: tags, the `tags` most frequent, num_labels of them, tag_width,
    the most a record has; region_dim, region_classes, global_dim, regions (what made them)."""
    if records.regions:
        r = records.regions
        return {"region_dim": r.dim, "region_classes": r.classes, "global_dim": r.global_dim, "regions": r.about}
    if {"tags", "any_tags"} & set(view_keys(views or {}).values()):
        names = tag_list(records, tags)
        width = max([1] + [len(r.get("tags") or ()) for r in records])
        return {"tags": names, "num_labels": len(names), "tag_width": width}
    if records.name == "detection":
        return {"num_labels": len(records.label_names), "label_names": records.label_names}
    if records.name == "vqa":
        return {"answers": answer_list(records, answers)}
    if records.name == "hashing":
        return {"num_labels": len(records[0]["labels"])}
    if records.name == "clips":
        return {"frame_width": read_frames(records[0]["feature"]).shape[1]}
    if "label" in records[0]:
        labels = Counter(r["label"] for r in records)
        return {"num_labels": max(len(records.label_names or ()), max(labels) + 1), "label_names": records.label_names}
    return {}


# ------------------------------------------------------------------------------------------------- VQA's answer wording

def contraction_table():
    """What people type without its apostrophe -> the word: every form with one apostrophe left out
    (dont, couldn'tve)."""
    def words(stems, *endings):
        return [stem + e for stem in stems.split() for e in endings]
    full = words("ai are ca could did does do had has have is might must need ought sha should was were wo would",
                 "n't")
    full += words("could had might should would", "n't've")
    full += words("he it she somebody someone something there they we who you", "'d've")
    full += words("could might must not should we what where who would they you", "'ve")
    full += words("he how it someone something there they where who you", "'d")
    full += words("how it somebody someone something they what who why you y'all", "'ll")
    full += words("there they what why you", "'re")
    full += words("he how somebody someone that there what when where who why", "'s")
    full += ["ma'am", "o'clock", "'ow's'at", "'twas", "y'all", "y'all'd've"]
    table = {w[:i] + w[i + 1:]: w for w in full for i, c in enumerate(w) if c == "'"}
    return table | {"somebody'd": "somebodyd"}              # the official table has this one the wrong way round


NUMBER_WORDS = {"none": "0"} | {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine "
                                                                "ten".split())}
CONTRACTIONS = contraction_table()


def normalize_answer(text):
    """The official VQA v2 wording of an answer, str -> str: punctuation, lower case, number words, articles,
    contractions. (Evaluation code of visualqa.org. Its period rule lacks the intended look-behind: only a period before
    a digit stays.)"""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out, comma_in_number = text, re.search(r"\d,\d", text)
    for p in ";/[]\"{}()=+\\_-><@`,?!":
        glued = not (p + " " in text or " " + p in text or comma_in_number)  # "t-shirt" -> "t shirt", "yes !" -> "yes"
        out = out.replace(p, " " if glued else "")
    words = [NUMBER_WORDS.get(w, w) for w in re.sub(r"\.(?!\d)", "", out).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


# ------------------------------------------------------------------------------------------------------------ tokenizer

class Tokenizer:
    """BERT WordPiece, lower-casing, on a vocab.txt of one token a line.
    Words like "[MASK]" in a caption are plain text here.

    Attributes: vocab_size, pad_id, unk_id, cls_id, sep_id, mask_id, first_word (ids >= first_word are
    ordinary tokens)."""

    def __init__(self, path):
        self.words, ids = list(text_lines(path)), {}
        for n, word in enumerate(self.words):
            if word in ids:
                fail(f"{path} line {n + 1}: '{word}' stands in line {ids[word] + 1} already")
            ids[word] = n
        specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        absent = [s for s in specials if s not in ids]
        if absent:
            fail(f"{path}: not a BERT vocabulary, it lacks {', '.join(absent)}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[s] for s in specials)
        self.vocab_size = len(self.words)
        self.first_word = 1 + max(n for n, w in enumerate(self.words) if w in specials
                                  or re.fullmatch(r"\[unused\d+\]", w))
        if self.first_word >= self.vocab_size:
            fail(f"{path}: words must stand after the special and [unusedN] tokens")
        self.rust = RustTokenizer(tokenizer_models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self.rust.normalizer = normalizers.BertNormalizer(lowercase=True)
        self.rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    def encode(self, text, max_text):
        """str -> list of at most max_text ids, [CLS] and [SEP] included (max_text >= 2)."""
        return [self.cls_id] + self.rust.encode(text).ids[:max_text - 2] + [self.sep_id]

    def batch(self, texts, max_text):
        """Strings -> ids, mask (N, max_text) int64 each; mask: 1 = a token, 0 = padding."""
        rows = [self.encode(text, max_text) for text in texts]
        ids = torch.full((len(rows), max_text), self.pad_id)
        for n, row in enumerate(rows):
            ids[n, :len(row)] = torch.tensor(row)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(max_text) < lengths[:, None]).long()

    def tokens(self, ids):
        return [self.words[int(i)] for i in ids]

    def decode(self, ids):
        """ids -> str: up to the first [SEP], without [CLS] and [PAD], word pieces joined."""
        words = self.tokens(itertools.takewhile(lambda i: int(i) != self.sep_id, ids))
        return " ".join(w for w in words if w not in ("[CLS]", "[PAD]")).replace(" ##", "")


def get_tokenizer(vocab_path):
    """vocab.txt path (or "shapes" for the built-in world's) -> Tokenizer."""
    if vocab_path == "shapes":
        from tools import shapes
        vocab_path = shapes.ensure() / "vocab.txt"
    if not os.path.isfile(vocab_path):
        fail(f"--vocab {vocab_path}: no such file")
    return Tokenizer(vocab_path)


# --------------------------------------------------------------------------------------------------------------- images

class BadImage(Exception):
    """An image file that is absent, truncated, no image, or a decompression bomb."""


def load_image(where):
    """A path, or (tar, offset, size) in bytes -> PIL image, RGB, upright by its EXIF orientation. Raises BadImage.
    Transparency is dropped, not blended; 16-bit grey is scaled to 8 bits; more than PIL's 89 M pixels are refused."""
    try:
        if not isinstance(where, str):
            with open(where[0], "rb") as f:
                f.seek(where[1])
                where = io.BytesIO(f.read(where[2]))
        with Image.open(where) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise BadImage(f"{image.width}x{image.height} pixels are too many")
            image.load()
            if "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as e:
        known = "no image format PIL knows" if isinstance(e, UnidentifiedImageError) else getattr(e, "strerror", None)
        raise BadImage(known or str(e) or type(e).__name__) from None


def open_picture(where):
    """load_image(), or one line for the user: DataError."""
    try:
        return load_image(where)
    except BadImage as e:
        fail(f"{where}: {e}")


# Image views: fn(PIL RGB image, size, rng, crop_scale) -> PIL RGB image of size x size pixels.

def resize(image, size, rng=None, crop_scale=None):
    """The whole picture squeezed to a square (bicubic)."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def center(image, size, rng=None, crop_scale=None):
    """Short side to `size`, then the middle square."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def crop(image, size, rng, crop_scale):
    """RandomResizedCrop: a share of the area in crop_scale, aspect 3/4 to 4/3,
    resized to a square (bicubic, Inception's)."""
    width, height = image.size
    for _ in range(10):
        area, aspect = (width * height * rng.uniform(*crop_scale),
                        math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    return center(image, size)


def mirror(image, rng):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def affine(image, a, b, c, d, e, f):
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), fillcolor=(128, 128, 128))


# RandAugment without the operations that change colours (ALBEF's list): fn(image, strength 0..1, sign +-1).
# Shifts are 10/256 of the side at full strength, so that they mean the same at any resolution.
RANDAUGMENT = (
    lambda im, m, s: im,
    lambda im, m, s: ImageOps.autocontrast(im),
    lambda im, m, s: ImageOps.equalize(im),
    lambda im, m, s: ImageEnhance.Brightness(im).enhance(0.1 + 1.8 * m),
    lambda im, m, s: ImageEnhance.Sharpness(im).enhance(0.1 + 1.8 * m),
    lambda im, m, s: affine(im, 1, 0.3 * m * s, 0, 0, 1, 0),
    lambda im, m, s: affine(im, 1, 0, 0, 0.3 * m * s, 1, 0),
    lambda im, m, s: affine(im, 1, 0, 10 / 256 * im.width * m * s, 0, 1, 0),
    lambda im, m, s: affine(im, 1, 0, 0, 0, 1, 10 / 256 * im.height * m * s),
    lambda im, m, s: im.rotate(30 * m * s, fillcolor=(128, 128, 128)),
)


def randaug(image, size, rng, crop_scale):
    """RandomResizedCrop, then RandAugment(2 operations, magnitude 7 of 10). No flip: left and right are words."""
    image = crop(image, size, rng, crop_scale)
    for _ in range(2):
        image = rng.choice(RANDAUGMENT)(image, 0.7, rng.choice((-1, 1)))
    return image


def flip(image, size, rng, crop_scale):
    return mirror(crop(image, size, rng, crop_scale), rng)


def jitter(image, rng, brightness, contrast, saturation, hue):
    """Colour jitter in random order; factors 1 +- the strength, hue +- of the circle (torchvision's ColorJitter)."""
    steps = [("Brightness", brightness), ("Contrast", contrast), ("Color", saturation), ("hue", hue)]
    rng.shuffle(steps)
    for name, strength in steps:
        if name != "hue":
            image = getattr(ImageEnhance, name)(image).enhance(rng.uniform(1 - strength, 1 + strength))
        else:
            h, s, v = image.convert("HSV").split()
            shift = round(255 * rng.uniform(-strength, strength))
            image = Image.merge("HSV", (h.point([(i + shift) % 256 for i in range(256)]), s, v)).convert("RGB")
    return image


def grey(image):
    return image.convert("L").convert("RGB")


def blur(image, rng):
    """Gaussian blur, sigma 0.1-2 pixels at 224 (scaled with the side)."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * image.width / 224))


def moco(image, size, rng, crop_scale):
    """MoCo v2's order: crop, colour jitter (.4 .4 .4 .1) p .8, grey p .2, blur p .5, flip."""
    image = crop(image, size, rng, crop_scale)
    image = jitter(image, rng, 0.4, 0.4, 0.4, 0.1) if rng.random() < 0.8 else image
    image = grey(image) if rng.random() < 0.2 else image
    image = blur(image, rng) if rng.random() < 0.5 else image
    return mirror(image, rng)


def simclr(image, size, rng, crop_scale):
    """SimCLR's: crop, flip, colour jitter (.8 .8 .8 .2) p .8, colour drop p .2, blur p .5."""
    image = mirror(crop(image, size, rng, crop_scale), rng)
    image = jitter(image, rng, 0.8, 0.8, 0.8, 0.2) if rng.random() < 0.8 else image
    image = grey(image) if rng.random() < 0.2 else image
    return blur(image, rng) if rng.random() < 0.5 else image


IMAGE_VIEWS = {"plain": resize, "resize": resize, "center": center, "crop": crop, "randaug": randaug, "flip": flip,
               "moco": moco, "simclr": simclr}
NORMS = {"clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
         "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
         "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}         # 0 to 1


# ---------------------------------------------------------------------------------------------------------------- views
# Other views: fn(views, key, record, rng, c) -> dict of tensors for the batch. c is the caption drawn for this sample.

def view_caption(views, key, record, rng, c):
    return views.text(key, record["caption"][c] if isinstance(record["caption"], list) else record["caption"])


def view_paraphrase(views, key, record, rng, c):
    """The paraphrase of the caption drawn; the caption itself, and KEY_is_copy = 1, where there is none."""
    other = record["paraphrase"][c] if record.get("paraphrase") else ""
    return views.text(key, other or record["caption"][c]) | {key + "_is_copy": torch.tensor(int(not other))}


def view_question(views, key, record, rng, c):
    return views.text(key, record["question"])


def view_answer(views, key, record, rng, c):
    """One of the ten answers, so that each wording comes as often as annotators gave it.
    KEY_weight is 1; 0: no answer known."""
    answers = record["answers"]
    out = views.text(key, normalize_answer(rng.choice(answers)) if answers else "")
    return out | {key + "_weight": torch.tensor(float(bool(answers)))}


def view_tags(views, key, record, rng, c):
    """(L,) ids in views.tag_names, each once, padded with -1; L = most tags a record has.
    Tags outside the list are left out."""
    ids = [views.tag_ids[t] for t in dict.fromkeys(record.get("tags") or ()) if t in views.tag_ids]
    return {key: torch.tensor(ids + [-1] * (views.tag_width - len(ids)))}


def view_sentence(views, key, record, rng, c):
    """One sentence of a graded pair; the key is its name in the record, `s1` or `s2`."""
    return views.text(key, record[key])


def view_frames(views, key, record, rng, c):
    """(FRAMES, D) float32 features of a clip, zero padded, and KEY_mask (1 = frame).
    Of a longer clip FRAMES evenly spread ones."""
    x = read_frames(record["feature"])
    if len(x) > FRAMES:
        x = x[np.linspace(0, len(x) - 1, FRAMES).round().astype(int)]
    out, mask = torch.zeros(FRAMES, x.shape[1]), torch.zeros(FRAMES, dtype=torch.long)
    out[:len(x)], mask[:len(x)] = torch.from_numpy(x.astype(np.float32)), 1
    return {key: out, key + "_mask": mask}


def read_frames(path):
    """A clip's .npy -> (frames, D), memory-mapped. DataError if it is damaged or of another shape."""
    try:
        x = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as e:
        fail(f"{path}: not a readable .npy file ({e})")
    return x if x.ndim == 2 and len(x) else fail(f"{path}: shape {x.shape}, not (frames, D)")


def view_regions(views, key, record, rng, c):
    """The max_regions surest regions, padded with zeros: KEY (R, F), KEY_box (R, 4) xyxy pixels,
    KEY_label (R,), -1 = none, KEY_mask (R,), 1 = a region, KEY_size (2,) width and height of the picture,
    KEY_global (G,) where the file has it."""
    regions = views.records.regions
    found, most = regions[record["regions"]], views.max_regions or regions.most
    n = min(most, len(found["labels"]))
    out = {key: torch.zeros(most, regions.dim, dtype=torch.float16), key + "_box": torch.zeros(most, 4),
           key + "_label": torch.full((most,), -1), key + "_mask": torch.zeros(most, dtype=torch.long)}
    for name, source in ((key, "features"), (key + "_box", "boxes"), (key + "_label", "labels")):
        out[name][:n] = torch.from_numpy(np.array(found[source][:n]))
    out[key + "_mask"][:n] = 1
    out[key + "_size"] = torch.tensor(found["sizes"].tolist(), dtype=torch.float32)
    return out | ({key + "_global": torch.from_numpy(np.array(found["globals"]))} if regions.global_dim else {})


def view_label(views, key, record, rng, c):
    return {key: torch.tensor(record["label"])}


def view_labels(views, key, record, rng, c):
    return {key: torch.tensor(record["labels"], dtype=torch.float32)}


def view_any_caption(views, key, record, rng, c):
    """A caption, or an empty text where the record has none; KEY_valid (1 = there is one)."""
    there = bool(record.get("caption"))
    return ((view_caption(views, key, record, rng, c) if there else views.text(key, ""))
            | {key + "_valid": torch.tensor(int(there))})


def view_any_paraphrase(views, key, record, rng, c):
    """As "paraphrase", but an empty text where the record has no caption."""
    if record.get("caption"):
        return view_paraphrase(views, key, record, rng, c)
    return views.text(key, "") | {key + "_is_copy": torch.tensor(0)}


def view_features(views, key, record, rng, c):
    """What a frozen model made of the picture: a row of views.features (see store_features).
    c: here the record's place."""
    return {key: torch.from_numpy(np.array(views.features[c]))}


def view_objects(views, key, record, rng, c, masks=False):
    """The whole picture at its own size with its objects, mirrored in half of the training samples. KEY (3, H, W),
    boxes (n, 4) xyxy in pixels, labels (n,): lists of tensors in a batch, for sizes differ. Crowds are no targets.
    Raises BadImage."""
    image = load_image(record["image"])
    if image.size != (record["width"], record["height"]):
        raise BadImage(f"{image.width}x{image.height} pixels, its annotation says {record['width']}x{record['height']}")
    keep = [i for i, crowd in enumerate(record["crowd"]) if not crowd]
    boxes = torch.tensor([record["boxes"][i] for i in keep], dtype=torch.float32).reshape(-1, 4)
    out = {key: views.pixels(image), "labels": torch.tensor([record["labels"][i] for i in keep], dtype=torch.long)}
    if masks:
        shapes = [decode_mask(record["segmentation"][i], image.height, image.width, record["image"]) for i in keep]
        shapes = np.stack(shapes) if shapes else np.zeros((0, image.height, image.width))
        out["masks"] = torch.from_numpy(shapes.astype(np.uint8))
    if views.train and rng.random() < 0.5:
        out |= {k: out[k].flip(-1) for k in (key, "masks") if k in out}
        boxes = torch.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], 1)
    return {k: [v] for k, v in (out | {"boxes": boxes}).items()}


def view_masks(views, key, record, rng, c):
    """As "objects", with masks (n, H, W) uint8."""
    return view_objects(views, key, record, rng, c, masks=True)


FRAMES = 32                                                 # most frames of a clip
TEXT_VIEWS = {"caption": view_caption, "paraphrase": view_paraphrase, "question": view_question, "answer": view_answer,
              "sentence": view_sentence, "any_caption": view_any_caption, "any_paraphrase": view_any_paraphrase}
OTHER_VIEWS = {"tags": view_tags, "any_tags": view_tags, "label": view_label, "labels": view_labels,
               "frames": view_frames, "features": view_features, "objects": view_objects, "masks": view_masks,
               "regions": view_regions}
VIEW_FNS = IMAGE_VIEWS | TEXT_VIEWS | OTHER_VIEWS
NEEDS = {"caption": "caption", "paraphrase": "caption", "question": "question", "answer": "answers", "tags": "tags",
         "label": "label", "labels": "labels", "objects": "boxes", "masks": "segmentation"}


def view_keys(views):
    """A model's VIEWS[task] -> {batch key: view name}: all but source, norm and the KEY_eval entries."""
    return {k: v for k, v in views.items() if k not in ("source", "norm") and not k.endswith("_eval")}


def needs(views):
    """The record keys that VIEWS[task] cannot do without, for open_source(need=)."""
    return tuple(sorted({NEEDS[v] for v in view_keys(views).values() if v in NEEDS}))


def absent(views):
    """open_source(missing=) for VIEWS[task]: who looks at regions alone needs no pictures, and often has none (TSV)."""
    seen = set(view_keys(views).values())
    return "keep" if "regions" in seen and not seen & set(IMAGE_VIEWS) else "drop"


class Views(Dataset):
    """Records + VIEWS[task] -> samples, dicts of tensors: image keys (3, S, S) float32; text keys K (max_text,) int64
    ids and K_mask (1 = token); image_id, index (place in records), bad (1 = stands in for an unreadable image),
    all int64 0-d.

    `ds[i, draw]`: every random choice is a function of (seed, i, draw). `ds[i]` = draw 0. train=False: KEY_eval views
    ("resize" if there is none; None: the key is not made), caption 0. image_view replaces the training view of every
    key "image*". A key with view "features" gives rows of the attribute `features`; in evaluation the picture, as
    `image`, by KEY_eval. A value that is a list of one tensor (objects, whose sizes differ) stays a list
    of tensors in a batch.
    tag_names: vocabulary of the "tags" view (default: all tags of these records); give the training one to evaluation.
    max_regions: width of the "regions" view (default: the most regions that a picture has)."""

    def __init__(self, records, views, tokenizer, image_size, max_text, train=True, seed=0, crop_scale=(0.2, 1.0),
                 image_view=None, max_bad=0.1, tag_names=None, max_regions=None):
        self.records, self.tokenizer, self.size, self.max_text = records, tokenizer, image_size, max_text
        self.train, self.seed, self.crop_scale, self.max_bad = train, seed, tuple(crop_scale), max_bad
        if views.get("source", records.name) != records.name:
            fail(f"these views are of '{views['source']}', the records are '{records.name}'")
        self.keys, self.features = view_keys(views), None
        if not train:
            self.keys = {"image" if v == "features" else k: views.get(k + "_eval", "resize") if v == "features" else v
                         for k, v in self.keys.items() if views.get(k + "_eval", v) is not None}
        for key, name in self.keys.items():
            image = name in IMAGE_VIEWS
            if image and train and image_view and key.startswith("image"):
                name = image_view
            if not train:
                name = views.get(key + "_eval", "resize" if image else name)
            if name not in VIEW_FNS or (image and name not in IMAGE_VIEWS):
                fail(f"no view '{name}' for '{key}' (there are: {', '.join(IMAGE_VIEWS if image else VIEW_FNS)})")
            self.keys[key] = name
        if views.get("norm", "clip") not in NORMS:
            fail(f"no norm '{views['norm']}' (there are: {', '.join(NORMS)})")
        if max_text is not None and max_text < 3:
            fail(f"--max_text {max_text}: [CLS], one token and [SEP] need 3")
        mean, std = torch.tensor(NORMS[views.get("norm", "clip")]).view(2, 3, 1, 1)
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.max_regions = max_regions
        self.tag_names = tag_names
        if {"tags", "any_tags"} & set(self.keys.values()):
            self.tag_names = tag_list(records) if tag_names is None else list(tag_names)
            self.tag_ids = {t: n for n, t in enumerate(self.tag_names)}
            self.tag_width = max([1] + [len(r.get("tags") or ()) for r in records])
        self.seen = self.bad = 0                                    # samples yielded so far, and stand-ins among them
        self.named = set()                                                  # unreadable files already reported

    def __len__(self):
        return len(self.records)

    def __getitem__(self, at):
        sample, trouble = self.sample(*(at if isinstance(at, tuple) else (at,)))
        self.report(trouble)
        return sample

    def text(self, key, string):
        ids = self.tokenizer.encode(string, self.max_text)
        pad = self.max_text - len(ids)
        return {key: torch.tensor(ids + [self.tokenizer.pad_id] * pad),
                key + "_mask": torch.tensor([1] * len(ids) + [0] * pad)}

    def pixels(self, image):
        """PIL RGB -> (3, H, W) float32, normalised."""
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().mul_(self.scale).add_(self.shift)

    def sample(self, i, draw=0, caption=None, keys=None):
        """-> (sample, list of "file: reason" for the unreadable images met). caption: which one (default: drawn
        in training, 0 in evaluation). keys: batch keys to make (default: all)."""
        i, trouble = int(i), []
        for attempt in range(100):
            rng = random.Random((attempt << 160) ^ (self.seed << 96) ^ (int(draw) << 40) ^ i)
            where = i if attempt == 0 else rng.randrange(len(self.records))
            sample = self.build(where, rng, caption, keys, trouble)
            if sample is not None:
                sample["bad"] = torch.tensor(int(bool(trouble)))
                return sample, trouble
        fail(f"100 unreadable images in a row, the last is {trouble[-1]}")

    def build(self, i, rng, caption, keys, trouble):
        record, opened = self.records[i], {}
        c = caption
        if c is None:
            c = rng.randrange(len(record["caption"])) if self.train and isinstance(record.get("caption"), list) else 0
        out = {"image_id": torch.tensor(record["image_id"]), "index": torch.tensor(i)}
        for key, name in self.keys.items():
            if keys is not None and key not in keys:
                continue
            if name in ("objects", "masks"):
                try:
                    out.update(VIEW_FNS[name](self, key, record, rng, c))
                except BadImage as e:
                    trouble.append(f"{record['image']}: {e}")
                    if self.train:
                        return None
                    size = record["height"], record["width"]    # no objects: every sample of a batch has the same keys
                    out |= {key: [torch.full((3, *size), 0.5)], "boxes": [torch.zeros(0, 4)],
                            "labels": [torch.zeros(0, dtype=torch.long)]}
                    out |= {"masks": [torch.zeros(0, *size, dtype=torch.uint8)]} if name == "masks" else {}
                continue
            if name not in IMAGE_VIEWS:
                out.update(VIEW_FNS[name](self, key, record, rng, i if name == "features" else c))
                continue
            file = record["image2" if key == "image2" and "image2" in record else "image"]
            if file not in opened:
                try:
                    opened[file] = load_image(file)
                except BadImage as e:
                    trouble.append(f"{file if isinstance(file, str) else '%s at byte %d (%d bytes)' % tuple(file)}"
                                   f": {e}")
                    if self.train:
                        return None
                    opened[file] = None
            if opened[file] is None:                            # evaluation: the mean colour, never another's picture
                out[key] = torch.zeros(3, self.size, self.size)
            else:
                out[key] = self.pixels(IMAGE_VIEWS[name](opened[file], self.size, rng, self.crop_scale))
        return out

    def tag_rows(self):
        """(N, L) int64: the "tags" view of every record, without opening a picture."""
        return torch.stack([view_tags(self, "tags", record, None, 0)["tags"] for record in self.records])

    def report(self, trouble, samples=1, bad=None):
        """Counts samples and stand-ins, names each unreadable file once, stops when more than max_bad of 100 or
        more are bad."""
        self.seen += samples
        self.bad += bool(trouble) if bad is None else bad
        for line in trouble:
            if line not in self.named:
                self.named.add(line)
                say(f"unreadable image {line}; "
                    f"{'another record stands in' if self.train else 'evaluated as a grey image'}")
        if self.train and self.seen >= 100 and self.bad > self.max_bad * self.seen:
            fail(f"{self.bad} of {self.seen} images were unreadable, more than --max_bad {self.max_bad}")


# -------------------------------------------------------------------------------------------------------------- batches

def collate(samples):
    """List of sample dicts -> dict of stacked tensors (B, ...); of values that are lists, dict of lists of tensors."""
    return {key: (sum((s[key] for s in samples), []) if isinstance(value, list)
                  else torch.stack([s[key] for s in samples]))
            for key, value in samples[0].items()}


def move(batch, device):
    """A batch on a device."""
    def to(x):
        return [to(part) for part in x] if isinstance(x, list) else x.to(device, non_blocking=True)
    return {key: to(value) for key, value in batch.items()}


class Plan(Dataset):
    """plan[t] = the whole batch t, made in one worker: (batch, troubles), or a DataError's message
    (workers cannot raise it)."""

    def __init__(self, dataset, arguments):
        self.dataset, self.arguments = dataset, arguments           # arguments(t) -> list of arguments of Views.sample

    def __getitem__(self, t):
        try:
            made = [(self.dataset.sample(*a[:4]), a[4:]) for a in self.arguments(t)]
        except DataError as e:
            return str(e)
        for (sample, _), index in made:
            if index:
                sample["index"] = torch.tensor(index[0])
        return collate([s for (s, _), _ in made]), [line for (_, trouble), _ in made for line in trouble]

    def run(self, steps, workers):
        """Batches for the numbers in `steps`, in their order, made by `workers` processes (0: by this one)."""
        if workers:
            loader = DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, worker_init_fn=one_thread,
                                generator=torch.Generator())            # its own generator: the global state stays put
        for got in loader if workers else map(self.__getitem__, steps):
            if isinstance(got, str):
                raise DataError(got)
            self.dataset.report(got[1], len(got[0]["bad"]), int(got[0]["bad"].sum()))
            yield got[0]


def one_thread(worker):
    torch.set_num_threads(1)


class Stream:
    """stream(t) -> this rank's (record, draw) pairs of global step t: a new permutation per pass, the last short batch
    dropped. The global batch of step t depends on (seed, batch_size * world) alone, so resuming is arithmetic."""

    def __init__(self, length, batch_size, seed, rank, world):
        self.length, self.batch, self.total, self.rank, self.seed = length, batch_size, batch_size * world, rank, seed
        self.steps, self.now, self.order = length // self.total, None, None

    def __call__(self, t):
        epoch, step = divmod(t, self.steps)
        if epoch != self.now:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.now, self.order = epoch, torch.randperm(self.length, generator=generator)
        first = self.rank * self.batch
        places = self.order[step * self.total + first:][:self.batch].tolist()
        return [(i, t * self.total + first + k) for k, i in enumerate(places)]


def batches(dataset, batch_size, seed, rank=0, world=1, start=0, workers=0):
    """Infinite iterator of collated batches of `batch_size` samples of this rank, beginning with global step `start`.
    The same batches for any number of workers. Errors: a data set smaller than batch_size * world."""
    if batch_size * world > len(dataset):
        fail(f"{len(dataset)} records are fewer than one global batch ({batch_size} x {world} ranks): "
             "use a smaller --batch_size")
    return Plan(dataset, Stream(len(dataset), batch_size, seed, rank, world)).run(itertools.count(start), workers)


class Chunks:
    def __init__(self, items, size):
        self.items, self.size = items, size

    def __call__(self, t):
        return self.items[t * self.size:(t + 1) * self.size]


def unique_images(records):
    """-> (first: list of the first record of each picture, in order; place: {image_id: its number in that list})."""
    first, place = [], {}
    for i, record in enumerate(records):
        if place.setdefault(record["image_id"], len(first)) == len(first):
            first.append(i)
    return first, place


def flat_captions(records):
    """All captions in order -> (list of str, owner (N,) int64: the number of its picture among the unique images)."""
    _, place = unique_images(records)
    texts, owner = [], []
    for record in records:
        captions = record.get("caption") or []
        captions = [captions] if isinstance(captions, str) else captions
        texts += captions
        owner += [place[record["image_id"]]] * len(captions)
    return texts, torch.tensor(owner, dtype=torch.long)


def iter_eval(records, views, tokenizer, image_size, max_text, what="sample", batch_size=64, rank=0, world=1, workers=0,
              **options):
    """Every item of a split once: this rank's share, nothing padded, nothing twice (the last batch may be short).

    what="image": each picture once, `index` = its number among the unique images; "text": each caption, `index` = its
    number in flat_captions; "sample": each record, `index` = its number. options: more of Views' arguments."""
    dataset = Views(records, views, tokenizer, image_size, max_text, train=False, **options)
    texts = [k for k, v in dataset.keys.items() if v in ("caption", "paraphrase", "any_caption", "any_paraphrase")]
    if what == "image":
        images = [k for k, v in dataset.keys.items() if v in IMAGE_VIEWS or v in ("frames", "regions")]
        items = [(i, 0, 0, images, n) for n, i in enumerate(unique_images(records)[0])]
    elif what == "text":
        counts = ((i, 1 if isinstance(r.get("caption"), str) else len(r.get("caption") or ()))
                  for i, r in enumerate(records))
        items = [(i, 0, c, texts, n) for n, (i, c) in enumerate((i, c) for i, k in counts for c in range(k))]
    elif what == "sample":
        items = [(i, 0, 0, None) for i in range(len(records))]
    else:
        raise ValueError(f"what={what!r}: image, text or sample")
    items = items[rank::world]
    return Plan(dataset, Chunks(items, batch_size)).run(range(math.ceil(len(items) / batch_size)), workers)


def store_features(path, key, fn, records, views, tokenizer, image_size, max_text, device,
                   batch_size=64, rank=0, world=1, workers=0):
    """What the frozen function fn(batch) -> (B, D) makes of every record's picture, under the evaluation views, once
    -> (N, D) float32, memory-mapped from `path`. A file there is used again when `key` (of model and data) is the one
    it was made with.

    Every rank does its share and writes its rows into rank 0's file: the folder must be shared."""
    shape, note = None, path.with_suffix(".json")
    if not (path.is_file() and note.is_file() and json.loads(note.read_text()) == key):
        views = {k: v for k, v in views.items() if v == "features" or k in ("source", "norm") or k.endswith("_eval")}
        made = iter_eval(records, views, tokenizer, image_size, max_text, "sample", batch_size, rank, world, workers)
        store = None
        barrier = torch.distributed.barrier if world > 1 else lambda: None
        for batch in tqdm(made, "features", math.ceil(len(records) / world / batch_size), leave=False,
                          delay=2, disable=rank > 0):
            rows = fn(move(batch, device)).float().cpu().numpy()
            if store is None:
                shape = (len(records), rows.shape[1])
                if rank == 0:
                    note.unlink(missing_ok=True)
                    np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
                barrier()
                store = np.load(path, mmap_mode="r+")
            store[batch["index"].numpy()] = rows
        store.flush()
        barrier()
        if rank == 0:
            note.write_text(json.dumps(key))
        barrier()
    return np.load(path, mmap_mode="r")


# ------------------------------------------------------------------------------------------------------ region features
# What a detector found in N pictures, T regions in all: one safetensors file, memory-mapped, so that its size is not
# that of RAM.
#   features (T, F) float16   boxes (T, 4) float32, xyxy in pixels   labels (T,) int64, -1 = none   scores (T,) float32
#   offsets (N+1,) int64: picture n has rows offsets[n]:offsets[n+1], the surest first
#   sizes (N, 2) int64: width, height
#   names (bytes,) uint8, name_ends (N,) int64: the pictures' file names, as bytes   globals (N, G) float16: optional
# Metadata: detector (text), label_names (JSON list), root (folder that names start from; empty: names are image ids).

ROW_ARRAYS = {"labels": np.int64, "boxes": np.float32, "scores": np.float32, "features": np.float16}
SAFE_TYPES = {np.dtype(t): name
              for name, t in (("I64", np.int64), ("F32", np.float32), ("F16", np.float16), ("U8", np.uint8))}


def map_safetensors(path):
    """-> ({name: read-only memory-mapped array}, metadata). Nothing is read but the header."""
    try:
        blob = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(blob[:8].tobytes(), "little")
        header = (json.loads(blob[8:start].tobytes()) if start <= len(blob)
                  else fail(f"{path}: not a whole safetensors file"))
        metadata, types = header.pop("__metadata__", {}), {name: t for t, name in SAFE_TYPES.items()}
        arrays = {}
        for name, t in header.items():
            a, b = t["data_offsets"]
            arrays[name] = blob[start + a:start + b].view(types[t["dtype"]]).reshape(t["shape"])
        return arrays, metadata
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except (ValueError, KeyError) as e:
        fail(f"{path}: not a whole safetensors file of regions ({e})")


def write_safetensors(path, tensors, metadata):
    """tensors: {name: list of arrays, to be joined along axis 0}: written one after the other, whole or not at all."""
    header, at = {"__metadata__": metadata}, 0
    order = sorted(tensors, key=lambda name: -tensors[name][0].dtype.itemsize)          # so that each begins aligned
    for name in order:
        parts = tensors[name]
        size = sum(p.nbytes for p in parts)
        shape = [sum(map(len, parts)), *parts[0].shape[1:]]
        header[name] = {"dtype": SAFE_TYPES[parts[0].dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(f"{path}.tmp", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for part in tensors[name]:
                f.write(np.ascontiguousarray(part).data)
    os.replace(f"{path}.tmp", path)


def picture_name(where, root):
    """What a picture is called in a regions file: its path from `root`, or TAR@BYTE for a member of a tar."""
    return os.path.relpath(where, root) if isinstance(where, str) else f"{os.path.basename(where[0])}@{where[1]}"


class Regions:
    """The files of `python data.py regions`, as one. Attributes: dim F, classes K (0: no labels), global_dim G
    (0: none), most (regions of a picture), label_names, about (what made them). regions[n] -> dict of the arrays
    of picture n."""

    def __init__(self, paths):
        self.paths = list(paths)
        self.files = [map_safetensors(path) for path in self.paths]
        kinds = {}
        for path, (arrays, metadata) in zip(self.paths, self.files):
            absent = [k for k in (*ROW_ARRAYS, "offsets", "sizes", "names", "name_ends") if k not in arrays]
            if absent:
                fail(f"{path}: not a regions file, it lacks {', '.join(absent)}")
            shape = [int(arrays[k].shape[1]) if k in arrays else 0 for k in ("features", "globals")]
            kinds.setdefault((*shape, metadata.get("label_names", "[]")), path)
        if len(kinds) > 1:
            fail(f"{' and '.join(kinds.values())} differ in feature size, global feature or label names")
        (self.dim, self.global_dim, names), = kinds
        self.label_names = json.loads(names)
        self.classes = len(self.label_names)
        self.about = "; ".join(dict.fromkeys(metadata["detector"] for _, metadata in self.files))
        self.ends = np.cumsum([len(arrays["sizes"]) for arrays, _ in self.files])
        self.most = max(int(np.diff(arrays["offsets"]).max(initial=0)) for arrays, _ in self.files)

    def __reduce__(self):
        return Regions, (self.paths,)                               # to another process goes the path, not the content

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, n):
        file = int(np.searchsorted(self.ends, n, "right"))
        arrays, row = self.files[file][0], n - (int(self.ends[file - 1]) if file else 0)
        rows = slice(*map(int, arrays["offsets"][row:row + 2]))
        return ({k: arrays[k][rows] for k in ROW_ARRAYS}
                | {k: arrays[k][row] for k in ("sizes", "globals") if k in arrays})

    def tables(self):
        """For each file: {name of a picture: its number}."""
        for k, (arrays, _) in enumerate(self.files):
            first, text, ends = (int(self.ends[k]) - len(arrays["sizes"]), arrays["names"].tobytes(),
                                 arrays["name_ends"].tolist())
            yield {os.fsdecode(text[a:b]): first + n for n, (a, b) in enumerate(zip([0] + ends, ends))}

    def attach(self, records):
        """Records with `regions` = the picture's number here. Those without are left out and counted. A path is looked
        up from the files' roots, then by ever shorter ends of it; in a file of image ids by the number that ends
        the file's name."""
        tables, roots, taken = list(self.tables()), [metadata.get("root", "") for _, metadata in self.files], {}
        out = records.subset([])
        out.regions = self
        for record in records:
            where, hits = record["image"], []
            if isinstance(where, str):
                path = os.path.abspath(where)
                hits = [t.get(path[len(r) + 1:]) for t, r in zip(tables, roots) if r and path.startswith(r + os.sep)]
                parts, stem = path.split(os.sep), os.path.splitext(os.path.basename(path))[0]
                names = ["/".join(parts[k:]) for k in range(1, len(parts))]
                ids = [stem] + [str(int(n)) for n in re.findall(r"\d+$", stem)]
            else:
                names, ids = [picture_name(where, None)], []
            for name in names if all(h is None for h in hits) else ():
                hits = [t[name] for t, r in zip(tables, roots) if r and name in t]
                if hits:
                    break
            if all(h is None for h in hits):
                hits = [t[i] for t, r in zip(tables, roots) if not r for i in ids if i in t]
            hits = {h for h in hits if h is not None}
            if len(hits) > 1:
                fail(f"{where}: {len(hits)} pictures of {', '.join(self.paths)} could be this one")
            for hit in hits:
                if taken.setdefault(hit, record["image_id"]) != record["image_id"]:
                    fail(f"{where}: another picture of these records has the same name in {', '.join(self.paths)}: "
                         "make its --root fit")
                out.append({**record, "regions": hit})
        out.notes.pop("missing", None)                                  # picture files: their regions stand for them
        if len(out) < len(records):
            out.notes["without_regions"] = len(records) - len(out)
            if not len(out):
                fail(f"{', '.join(self.paths)}: none of the {len(records)} records' pictures is in it, for example "
                     f"{records[0]['image']} is not; "
                     f"it holds for example {next((n for t in tables for n in t), 'nothing')}")
            say(f"{len(records) - len(out)} of {len(records)} records left out: "
                f"their pictures are not in {', '.join(self.paths)}")
        return out


def with_regions(records, views, files=""):
    """The records with the regions that VIEWS[task] asks for, from `files` (separated by commas); records as they are
    where it asks for none. The built-in world needs no file: its stand-in is made beside its pictures, once."""
    if "regions" not in view_keys(views).values():
        return records
    if not files and os.path.exists(os.path.join(records.root, "version.json")) and records.split:
        files = shapes_regions(records.root, records.split)
    if not files:
        fail("this model looks at regions: name their files, --regions FILE (python data.py regions makes them)")
    return Regions(expand(files, "--regions")).attach(records)


def collect_regions(out, items, total, look, metadata, shard=1000, quiet=False, source=""):
    """Writes the file `out` from look(item) for each item: a dict of name, size (w, h) and ROW_ARRAYS, [globals]; or
    None for a picture that cannot be read. Goes by parts of `shard` items in the folder out.parts, so that the same
    command goes on after a stop, kill -9 included, in the memory of one part. `source` tells which items these are.
    -> number of unreadable pictures. DataError if the parts there are of another command or of other items."""
    plan = json.dumps({**metadata, "items": total, "shard": shard, "source": source}, indent=1)
    parts, note = f"{out}.parts", os.path.join(f"{out}.parts", "plan.json")
    os.makedirs(parts, exist_ok=True)
    if os.path.exists(note):
        with open(note, encoding="utf-8") as f:
            if f.read() != plan:
                fail(f"{parts}: begun with other settings or other pictures (see {note}): "
                     "go on with those, or delete the folder")
    else:
        with open(f"{note}.tmp", "w", encoding="utf-8") as f:
            f.write(plan)
        os.replace(f"{note}.tmp", note)                                     # whole or not there, as the parts
    items, files, bad = iter(items), [], 0
    with tqdm(total=total, desc="regions", unit="picture", disable=quiet) as bar:
        for n in itertools.count():
            file, found, seen = os.path.join(parts, f"{n:06d}.safetensors"), [], 0
            done = os.path.exists(file)
            for item in itertools.islice(items, shard):
                seen += 1
                bar.update()
                found += [] if done else [look(item)]
            if not seen:
                break
            if not done:
                write_safetensors(file, pack([f for f in found if f], metadata), {"unreadable": str(found.count(None))})
            files.append(file)
    mapped = [map_safetensors(file) for file in files]
    bad = sum(int(m["unreadable"]) for _, m in mapped)
    if not sum(len(a["sizes"]) for a, _ in mapped):
        fail(f"{out}: no picture could be read")
    dims = {a["features"].shape[1]: file for file, (a, _) in zip(files, mapped) if len(a["sizes"])}
    if len(dims) > 1:
        fail(" and ".join(f"{file} has features of {dim} numbers" for dim, file in dims.items()) + ": of one detector?")
    tensors = {k: [a[k] for a, _ in mapped if len(a["sizes"])] for k in mapped[0][0]}
    for key, first in (("offsets", 1), ("name_ends", 0)):                   # they count on from part to part
        sums = np.cumsum([0] + [int(a[-1]) for a in tensors[key]])
        tensors[key] = [a[(first if n else 0):] + s for n, (a, s) in enumerate(zip(tensors[key], sums))]
    write_safetensors(out, tensors, metadata)
    for file in files + [note]:                                             # the note last: no part is ever without it
        os.remove(file)
    os.rmdir(parts)
    return bad


def pack(found, metadata):
    """What look() gave for some pictures -> {tensor name: [array]}. float16 holds up to 65,504: a larger feature is
    an error."""
    dims = {f["features"].shape[1]: f["name"] for f in found}
    if len(dims) > 1:
        fail(" and ".join(f"picture {name} has features of {dim} numbers" for dim, name in dims.items())
             + ": of one detector?")
    with np.errstate(over="ignore"):                                        # said below, in words
        out = {k: [np.concatenate([f[k] for f in found]).astype(t)] if found else [np.zeros(0, t)]
               for k, t in ROW_ARRAYS.items()}
        wrong = [] if np.isfinite(out["features"][0]).all() else [
            f["name"] for f in found if not np.isfinite(f["features"].astype(np.float16)).all()]
    if wrong:
        fail(f"picture {wrong[0]}: a region's feature is not finite in float16: are these a detector's weights?")
    names = [os.fsencode(f["name"]) for f in found]                         # a file's name need not be UTF-8
    out |= {"offsets": [np.cumsum([0] + [len(f["labels"]) for f in found], dtype=np.int64)],
            "names": [np.frombuffer(b"".join(names), np.uint8)],
            "name_ends": [np.cumsum([len(n) for n in names], dtype=np.int64)],
            "sizes": [np.array([f["size"] for f in found], np.int64).reshape(-1, 2)]}
    if "global_feature" in metadata:
        out["globals"] = [np.array([f["globals"] for f in found], np.float16)]
    return out


CROP, CROP_DIM = 8, 128
STAND_IN = ("a stand-in for a detector: the boxes and labels of the data itself, each crop at "
            f"{CROP}x{CROP} pixels times a fixed random matrix")


def box_regions(record, name):
    """The stand-in's regions of a record with boxes and labels: no detector has seen the picture."""
    matrix = (np.random.default_rng(0).standard_normal((3 * CROP * CROP, CROP_DIM)).astype(np.float32)
              / math.sqrt(3 * CROP * CROP))
    image = load_image(record["image"])
    boxes = np.array(record["boxes"], np.float32).reshape(-1, 4)
    crops = [np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=tuple(b))) for b in boxes.tolist()]
    crops = np.array(crops, np.float32).reshape(-1, 3 * CROP * CROP) / 127.5 - 1
    return {"name": name, "size": image.size, "boxes": boxes, "labels": np.array(record["labels"], np.int64),
            "scores": np.ones(len(boxes)), "features": crops @ matrix}


def shapes_regions(world, split):
    """The regions file of the built-in world's split, made if it is not there -> its path."""
    out = os.path.join(world, f"regions_{split}.safetensors")
    if os.path.exists(out) and map_safetensors(out)[1].get("detector") == STAND_IN:
        return out
    records = open_source("pairs", "shapes", split)
    names = dict(pair for r in records for pair in zip(r["labels"], r["label_names"]))
    metadata = {"detector": STAND_IN, "root": world,
                "label_names": json.dumps([names.get(n, str(n)) for n in range(max(names) + 1)])}
    mine = f"{out}.{os.getpid()}"                           # each process of a run may come here: the last one stays
    collect_regions(mine, records, len(records), lambda r: box_regions(r, picture_name(r["image"], world)), metadata)
    os.replace(mine, out)
    return out


# Torchvision is imported where a detector runs: reading needs none of it.

def checkpoint(path, what):
    """A state dict of tensors from .safetensors or torch.save."""
    if not os.path.isfile(path):
        fail(f"{what} {path}: no such file")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError) as e:
        fail(f"{what} {path}: not a state dict ({str(e).splitlines()[0]})")


def published(weights, what):
    """The state dict behind a torchvision weights entry: from its cache, else downloaded."""
    from urllib.error import URLError
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (URLError, OSError) as e:
        fail(f"cannot download {weights.url} ({getattr(e, 'reason', e)}): "
             f"fetch it on a machine with network and name the file: {what} PATH")


def fill(model, state, what):
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        fail(f"{what}: these are not the weights of {type(model).__name__} ({' '.join(str(e).split())[:200]})")


def load_detector(weights, top, min_score, random=False):
    """Faster R-CNN R50-FPN -> (model in eval mode, label_names, text that says what it is). weights: a file, or
    "COCO_V1" = torchvision's own. `top` regions an image at most, over min_score, are what its forward gives."""
    from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d
    entry = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    state = (None if random else published(entry, "--weights") if weights == entry.name
             else checkpoint(weights, "--weights"))
    key = "roi_heads.box_predictor.cls_score.weight"
    if state is not None and key not in state:
        fail(f"--weights {weights}: no Faster R-CNN of torchvision (no key {key})")
    names = entry.meta["categories"]
    classes = len(names) if random else len(state[key])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)                                                # random weights are the same ones each time
        model = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d,
                                               trainable_layers=5),
                           classes, box_detections_per_img=top, box_score_thresh=min_score)
    if state is not None:
        fill(model, state, f"--weights {weights}")
        for m in model.modules():
            if isinstance(m, FrozenBatchNorm2d):
                m.eps = 0.0                                         # as torchvision sets it for its published detector
    names = names if classes == len(names) else [str(n) for n in range(classes)]
    kind = "COCO ids" if classes == 91 else "numbered"
    about = (f"torchvision Faster R-CNN R50-FPN, {classes} labels ({kind}; not the 1,600 of Visual Genome), "
             f"up to {top} regions over score {min_score}, "
             f"weights {'RANDOM: it detects nothing' if random else weights}")
    return model.eval(), names, about


@torch.no_grad()
def detect(model, image):
    """image: (3, H, W) float32 in 0..1 -> dict of arrays: features (n, 1024) = the box head's for the final boxes,
    boxes (n, 4) xyxy pixels, labels (n,), scores (n,), the surest first."""
    images, _ = model.transform([image])
    maps = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, maps)
    found, _ = model.roi_heads(maps, proposals, images.image_sizes)         # boxes in the resized image
    pooled = model.roi_heads.box_roi_pool(maps, [found[0]["boxes"]], images.image_sizes)
    features = model.roi_heads.box_head(pooled)                             # (n, 1024)
    found = model.transform.postprocess(found, images.image_sizes, [tuple(image.shape[-2:])])[0]
    order = found["scores"].argsort(descending=True)
    return ({"features": features[order].cpu().numpy()}
            | {k: found[k][order].cpu().numpy() for k in ("boxes", "labels", "scores")})


GLOBAL_MODELS = {"resnet50": "fc", "densenet121": "classifier", "googlenet": "fc"}  # name -> its last layer, which goes


def load_global(name, weights, random=False):
    """A CNN whose pooled output is the image's global feature -> (model in eval mode, text that says what it is)."""
    from torchvision.models import get_model, get_model_weights
    entry = get_model_weights(name)["IMAGENET1K_V1"]
    options = dict(aux_logits=False, transform_input=True, init_weights=True) if name == "googlenet" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_model(name, weights=None, **options)
    if not random:
        state = (published(entry, "--global_weights") if weights == entry.name
                 else checkpoint(weights, "--global_weights"))
        # torchvision's densenet files still say norm.1
        old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
        fill(model, {old.sub(r"\1\2", k): v for k, v in state.items() if not k.startswith("aux")},
             f"--global_weights {weights}")
    setattr(model, GLOBAL_MODELS[name], torch.nn.Identity())
    return model.eval(), f"global feature: pooled {name}, weights {'RANDOM' if random else weights}"


def extract_regions(args):
    """`data.py regions --images`: runs the detector over pictures -> number of unreadable ones."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if os.path.isdir(args.images) and not any(f.endswith(".tar") for f in os.listdir(args.images)):
        pictures = [os.path.join(folder, f) for folder, _, files in sorted(os.walk(args.images)) for f in sorted(files)
                    if f.lower().endswith(IMAGE_TYPES)]
        root = os.path.abspath(args.images)
    else:
        records = open_source("pairs", args.images, None, args.image_root)
        pictures, root = list({r["image"]: None for r in records}), os.path.abspath(records.root)
    if not pictures:
        fail(f"--images {args.images}: no image files in it")
    model, names, about = load_detector(args.weights, args.top, args.min_score, args.random_weights)
    metadata, cnn = {"detector": about, "root": root, "label_names": json.dumps(names)}, None
    model.to(device)
    if args.global_feature:
        cnn, metadata["global_feature"] = load_global(args.global_feature, args.global_weights, args.random_weights)
        cnn.to(device)
        mean, std = torch.tensor(NORMS["imagenet"], device=device).view(2, 3, 1, 1)
    print("\n".join(metadata[k] for k in ("detector", "global_feature") if k in metadata), flush=True)

    def look(where):
        try:
            picture = load_image(where)
            short, long = sorted(picture.size)
            if short * min(model.transform.min_size[-1] / short, model.transform.max_size / long) < 1:
                raise BadImage(f"{picture.width}x{picture.height} pixels, too narrow for the detector")
        except BadImage as e:
            say(f"unreadable image {where}: {e}; left out")
            return None
        def pixels(p):
            return torch.from_numpy(np.array(p)).permute(2, 0, 1).to(device).float() / 255
        found = {"name": picture_name(os.path.abspath(where) if isinstance(where, str) else where, root),
                 "size": picture.size, **detect(model, pixels(picture))}
        if cnn:
            with torch.no_grad():
                found["globals"] = cnn(((pixels(resize(picture, 224)) - mean) / std)[None])[0].cpu().numpy()
        return found

    listing = hashlib.sha256("\n".join(map(str, pictures)).encode(errors="surrogateescape")).hexdigest()
    return collect_regions(args.out, pictures, len(pictures), look, metadata, args.shard, source=listing)


TSV_FIELDS = {6: "image_id image_w image_h num_boxes boxes features",
              10: "image_id image_h image_w labels scores attributes attribute_scores num_boxes boxes features"}


def tsv_lines(paths):
    for path in paths:
        with open(path, encoding="ascii", errors="replace") as f:   # a foreign byte is no base64: said with its line
            for n, line in enumerate(f, 1):
                yield f"{path} line {n}", line.rstrip("\r\n")


def tsv_regions(item, classes):
    """A row of bottom-up-attention's TSV: 6 columns (its authors', without labels) or 10 (LXMERT's),
    arrays in base64."""
    where, cells = item[0], item[1].split("\t")
    if len(cells) not in TSV_FIELDS:
        fail(f"{where}: {' or '.join(map(str, TSV_FIELDS))} columns separated by TAB expected, found {len(cells)}")
    row = dict(zip(TSV_FIELDS[len(cells)].split(), cells))

    def number(key):                                                        # a count or a length in pixels
        return (int(row[key]) if row[key].isdigit() and int(row[key])
                else fail(f"{where}: {key} is '{row[key][:20]}', not a number above 0"))
    n = number("num_boxes")

    def decode(key, dtype, width=None):
        try:
            array = np.frombuffer(base64.b64decode(row[key], validate=True), dtype)
        except ValueError as e:
            fail(f"{where}: {key} is not base64 of {np.dtype(dtype).name} ({e})")
        if len(array) % n or width and len(array) != n * width:
            fail(f"{where}: {key} holds {len(array)} numbers for {n} boxes")
        return array.reshape(n, -1)
    labels, scores = np.full(n, -1), np.ones(n)
    if "labels" in row:
        labels, scores = decode("labels", np.int64, 1)[:, 0], decode("scores", np.float32, 1)[:, 0]
    if labels.max() >= classes:
        fail(f"{where}: label {labels.max()}, but there are {classes} label names")
    order = np.argsort(-scores, kind="stable")                      # the surest first; without scores the file's order
    return {"name": row["image_id"], "size": (number("image_w"), number("image_h")),
            "labels": labels[order], "scores": scores[order],
            "boxes": decode("boxes", np.float32, 4)[order], "features": decode("features", np.float32)[order]}


def convert_regions(args):
    """`data.py regions --tsv`: bottom-up-attention files -> a regions file."""
    if args.global_feature:
        fail("--global_feature looks at pictures: use --images; --tsv has none")
    paths = expand(args.tsv, "--tsv")
    with open(paths[0], encoding="ascii", errors="replace") as f:
        labeled = f.readline().count("\t") == 9
    names = [str(n) for n in range(1600)] if labeled else []                # the Visual Genome detector's, by number
    if args.label_names and labeled:
        names = [name for _, name in lines_of(args.label_names)]
    files = ", ".join(os.path.basename(p) for p in paths)
    metadata = {"detector": f"bottom-up-attention ({files})", "root": "", "label_names": json.dumps(names)}
    return collect_regions(args.out, tsv_lines(paths), None, lambda item: tsv_regions(item, len(names)),
                           metadata, args.shard, source=", ".join(f"{p}, {os.path.getsize(p)} bytes" for p in paths))


def split_noisy(spec, out, clean=2000, share=0.5, seed=0, image_root=None):
    """Cuts image-text pairs into two files for a study of stages: OUT/clean.jsonl, `clean` records as they are,
    and OUT/noisy.jsonl, the others, of which `share` get the captions of another one (a web crawl's mismatches).
    -> (records noisy, of these mismatched)."""
    records = open_source("pairs", spec, "train", image_root, need=("caption",))
    if not 0 < clean < len(records):
        fail(f"--clean {clean}: between 1 and {len(records) - 1} of the {len(records)} records")
    order = random.Random(seed).sample(range(len(records)), len(records))
    noisy = order[clean:]
    wrong = noisy[:round(share * len(noisy))]                       # already in random order: each takes the next one's
    source = dict(zip(wrong, wrong[1:] + wrong[:1]))
    os.makedirs(out, exist_ok=True)
    for name, indices in (("clean", order[:clean]), ("noisy", noisy)):
        with open(os.path.join(out, f"{name}.jsonl"), "w", encoding="utf-8") as f:
            for i in sorted(indices):
                record = {"image": os.path.abspath(records[i]["image"]), "image_id": records[i]["image_id"],
                          "caption": records[source.get(i, i)]["caption"]}
                f.write(json.dumps(record) + "\n")
    return len(noisy), len(wrong)


def regions_main(args):
    """`data.py regions` -> exit status 0; prints what is in the file it made."""
    if bool(args.images) == bool(args.tsv):
        fail("regions: name the pictures (--images) or bottom-up-attention files (--tsv)")
    bad = (extract_regions if args.images else convert_regions)(args)
    regions = Regions([args.out])
    counts = np.diff(regions.files[0][0]["offsets"])
    rows = {"pictures": len(regions), "unreadable, left out": bad, "regions": int(counts.sum()),
            "regions a picture": f"{counts.min()} to {counts.max()}, mean {counts.mean():.1f}",
            "feature size": regions.dim, "labels": regions.classes or "none",
            "global feature": regions.global_dim or "none",
            "file": f"{args.out}, {os.path.getsize(args.out) / 1e6:.1f} MB"}
    print("\n".join(f"  {k:<22}{v}" for k, v in rows.items()))
    return 0


# ---------------------------------------------------------------------------------------------------------------- check

def guess_source(spec):
    """The source of a file or folder, from its name and first record."""
    if spec == "shapes":
        return "pairs"
    path = expand(spec)[0]
    if os.path.isdir(path):
        names = os.listdir(path)
        if any(re.match(r"STS|stsb|sts-", n) for n in names):
            return "sts"
        if any(n.endswith(".txt") for n in names):
            return "hashing"
        return "pairs" if any(n.endswith(".tar") for n in names) else "classes"
    if path.endswith((".txt", ".csv")):
        return "hashing" if path.endswith(".txt") else "sts"
    if not path.endswith((".json", ".jsonl")):
        return "pairs"
    data = read_json(path)
    head = (data if isinstance(data, dict) else next(iter(data), None) if isinstance(data, list)
            else next(data, (None, None))[1])
    keys = {"questions": "vqa", "videos": "clips", "gold_label": "ve", "identifier": "nlvr2"}
    return next((source for key, source in keys.items() if isinstance(head, dict) and key in head), "pairs")


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


def check(spec, image_root=None, split=None, source=None):
    """Prints what is in the files of `spec` and opens every image -> number of missing and corrupt ones."""
    source = source or guess_source(spec)
    first = open_source(source, spec, split, image_root, missing="keep")
    parts, table, listed = [split] if split else first.splits or [None], {}, []
    for part in parts:
        records = open_source(source, spec, part, image_root, missing="keep")
        files = list({r[k]: None for r in records for k in ("image", "image2", "feature") if k in r})
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:       # PIL decodes outside the interpreter's lock
            bar = tqdm(pool.map(trouble_with, files), f"opening {part or ''}", len(files), leave=False, disable=None)
            troubles = [(f, t) for f, t in zip(files, bar) if t]
        texts = [len(r["caption"]) for r in records if isinstance(r.get("caption"), list)]
        rows = {"records": len(records), "images": len(files)}
        if texts:
            rows |= {"captions": sum(texts),
                     "captions an image": f"{min(texts)} to {max(texts)}, mean {np.mean(texts):.2f}"}
        missing = sum(t == "missing" for _, t in troubles)
        rows |= {"missing files": missing, "corrupt files": len(troubles) - missing}
        rows |= {"duplicate captions": records.notes.get("duplicates", 0)} if source == "pairs" else {}
        rows |= {k.replace("_", " "): v for k, v in records.notes.items() if k not in ("missing", "duplicates")}
        table[part or "all"] = rows
        listed += troubles
    print(f"{source}: {spec}" + (f" ({first.protocol})" if first.protocol else ""))
    if first.label_names:
        print(f"labels: {len(first.label_names)} "
              f"({', '.join(first.label_names[:6] + ['...'] * (len(first.label_names) > 6))})")
    keys = list(dict.fromkeys(k for rows in table.values() for k in rows))
    widths = {part: max([len(part)] + [len(str(v)) for v in rows.values()]) for part, rows in table.items()}
    for key, cells in ([("", {p: p for p in table})]
                       + [(k, {p: str(rows.get(k, 0)) for p, rows in table.items()}) for k in keys]):
        print(f"  {key:<24}" + "  ".join(cells[p].rjust(widths[p]) for p in table))
    for file, reason in listed[:10]:
        print(f"  {file if isinstance(file, str) else f'{file[0]} at byte {file[1]}'}: {reason}")
    if len(listed) > 10:
        print(f"  ... and {len(listed) - 10} more")
    return len(listed)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    one = tasks.add_parser("check", help="count records, open every image; exit status 1 if one is missing or corrupt")
    one.add_argument("path", help='files or folders separated by commas, or "shapes"')
    one.add_argument("--image_root", help="the folder the images lie in")
    one.add_argument("--split", help="only this split (default: each)")
    one.add_argument("--source", choices=SOURCES, help="what the records are (default: guessed from the files)")
    two = tasks.add_parser("regions", help="make a file of region features: of pictures, by a detector, "
                                           "or from bottom-up-attention files")
    two.add_argument("--images", help="a folder of pictures, a folder of tar shards, or image-text data")
    two.add_argument("--image_root", help="the folder that the data's images lie in")
    two.add_argument("--tsv", help="bottom-up-attention files instead, separated by commas")
    two.add_argument("--out", required=True, help="the file to make; --regions of train.py")
    two.add_argument("--weights", default="COCO_V1",
                     help="the detector's, a file or COCO_V1 = torchvision's, downloaded (default)")
    two.add_argument("--random_weights", action="store_true",
                     help="a detector that knows nothing, to try the pipeline; the file says so")
    two.add_argument("--top", type=int, default=100, help="regions a picture at most (default: 100)")
    two.add_argument("--min_score", type=float, default=0.05,
                     help="least score of a region (default: 0.05, torchvision's)")
    two.add_argument("--global_feature", choices=GLOBAL_MODELS,
                     help="also store a CNN's pooled feature of each picture")
    two.add_argument("--global_weights", default="IMAGENET1K_V1",
                     help="its weights, a file or IMAGENET1K_V1 = torchvision's (default)")
    two.add_argument("--label_names", help="names of the labels in --tsv, one a line (default: 1,600 numbers)")
    two.add_argument("--shard", type=int, default=1000, help="pictures between two savings (default: 1000)")
    two.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    three = tasks.add_parser("noisy", help="cut pairs into a small clean and a large noisy file, "
                                           "to study pre-training in stages")
    three.add_argument("data", help='image-text pairs, or "shapes"')
    three.add_argument("--out", required=True, help="the folder that gets clean.jsonl and noisy.jsonl")
    three.add_argument("--image_root", help="the folder the images lie in")
    three.add_argument("--clean", type=int, default=2000, help="records of the clean file (default: 2000)")
    three.add_argument("--share", type=float, default=0.5,
                       help="share of the noisy file with another record's captions (default: 0.5)")
    three.add_argument("--seed", type=int, default=0, help="of the choice")
    args = parser.parse_args(argv)
    if args.task == "regions":
        return regions_main(args)
    if args.task == "noisy":
        noisy, wrong = split_noisy(args.data, args.out, args.clean, args.share, args.seed, args.image_root)
        print(f"{args.out}: clean.jsonl {args.clean:,} records; noisy.jsonl {noisy:,} records, "
              f"{wrong:,} with captions of another")
        return 0
    return int(check(args.path, args.image_root, args.split, args.source) > 0)


if __name__ == "__main__":
    sys.exit(main())
