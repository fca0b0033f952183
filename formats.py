"""formats.py: every official file format -> Records. Needs neither torch nor a model.

    files --open_source()--> Records (list-like, of plain dicts)

A record is one picture, or one question, statement, sentence pair or clip, with what its source
says of it. `image` (also `image2`, `feature`) is a location: a path or a member of a tar.

A *source* says what a record means: `pairs`, `vqa`, `ve`, `nlvr2`, `sts`, `hashing`, `classes`,
`clips`, `detection`. The file format is recognised from the files. Data are named as "shapes" (the
built-in world, which tools/shapes.py writes in these same formats) or as files and folders
separated by commas; `{00000..00012}` in a name counts up. Formats read, as their publishers wrote
them:

  pairs      records .json/.jsonl: image, caption (string or list) [image_id, split, tags,
             paraphrase, boxes, labels, label_names]; Karpathy's dataset_*.json; COCO's
             captions_*.json (instances_*.json in the same list adds tags and boxes by image id);
             .tsv "caption TAB path-or-url" beside a folder of images (CC, SBU); Flickr's token
             files (with Flickr_8k.trainImages.txt and its like beside them: splits), Kaggle's
             captions.txt and Flickr30k's results.csv; img2dataset's .tar shards, or a folder of
             them, or its folders of files; a folder of pictures (without captions); VQA v2's and
             GQA's questions as captions
  vqa        VQA v2's questions.json [+ annotations.json, or these beside it]
  ve         SNLI-VE's .jsonl
  nlvr2      NLVR2's .json/.jsonl
  sts        SentEval's folders STS1X-en-test, stsbenchmark/, sts-*.csv
  hashing    CSQ's lists "path 0 1 0 ..."
  classes    ImageFolder
  clips      MSR-VTT's videodatainfo.json [+ the 1k-A csv] + a folder of .npy
  detection  COCO's instances_*.json; a VOCdevkit folder with VOC2007, VOC2012 or both

Something wrong in a file is a DataError: one line that names file, line and key. Something merely
absent (an image that was never downloaded, an empty caption) is left out, counted in
`Records.notes` and reported once on stderr.

Records of large files are kept in the system's temporary directory (see stored_records), what is in
a tar shard beside it (see index_paths): both are made anew when their files change.
"""

import array
import csv
import errno
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import reprlib
import shutil
import stat
import sys
import tarfile
import tempfile
import zlib
from bisect import bisect_left
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm import tqdm

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")

# What publishers call a split -> our name of it.
SPLIT_NAMES = {"restval": "train", "validate": "val", "validation": "val", "valid": "val",
               "dev": "val"}


class DataError(SystemExit):
    """Something the user can put right: printed as one line, exit status 1."""


# Messages name data.py, the file that users call: python data.py check.
def fail(message):
    raise DataError(one_line(f"data.py: {message}"))


def say(message):
    print(one_line(f"data.py: {message}"), file=sys.stderr, flush=True)


def one_line(text):
    """Names of files and keys may hold line breaks or be endless; a message may not."""
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return text if len(text) < 1000 else f"{text[:500]} ... {text[-400:]}"


def ranks():
    """-> (rank of this process, number of processes, rank on this machine), as torchrun says."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return rank, world, local_rank


# --------------------------------------------------------------------------------------------------
# Records

class TarMember(NamedTuple):
    """A picture inside a tar file: its member, `size` bytes from byte `offset` on.

    The location of a picture is a path (str) or a TarMember. A further kind of location, in a zip
    file for example, is one more class like this one and in LOCATION_KINDS: read(), path(), size
    and str() are all that the code asks of a location that is not a path.
    """

    tar: str
    offset: int
    size: int
    member: str

    def __str__(self):
        return f"{self.tar} member {self.member} (byte {self.offset}, {self.size} bytes)"

    def read(self):
        """The bytes of the picture's file. Raises OSError."""
        with open(self.tar, "rb") as f:
            f.seek(self.offset)
            content = f.read(self.size)
        if len(content) < self.size:
            raise OSError("the tar file ends before the picture does")
        return content

    def path(self):
        """As if the tar file were a folder."""
        return os.path.join(self.tar, self.member)


LOCATIONS = ("image", "image2", "feature")      # the keys under which a record names its files
LOCATION_KINDS = {"TarMember": TarMember}       # locations that are no paths, by their class

# One number for each record, in arrays: where its text ends (and 0 for the first one's start), its
# image_id (-1: none), how many captions it has, a checksum of its words, the name_code of its
# picture (0: not known).
COLUMNS = {"ends": "q", "image_ids": "q", "captions": "i", "words": "I", "names": "Q"}
CHUNK = 1 << 22                                 # bytes that are written to a file at once

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Records:
    """A list of dicts, kept as lines of JSON in one byte string.

    Millions of records stay small this way, and forked workers copy no memory pages. Of large files
    the lines are not even in this process's memory, but in a file that is mapped (see
    stored_records): all workers and all processes of a machine then share its pages.

    `image` (and `image2`, `feature`) is a location: a path that opens as it is, or a TarMember.
    `image_id` is an int, the same for two records of one picture.

    Attributes: name (the source), split, root (folder of the images), notes ({what was counted:
    count}), label_names (what the ints in `labels` and `label` mean, or None), protocol (str or
    None), splits (those found in the files), regions (a Regions or None, see with_regions),
    own_ids (the files give an image_id to every record; where they give one it is `own_id`),
    unsplit (neither records nor the files' names tell splits), held_out (these are a part of such
    files, see hold_out_part).
    """

    def __init__(self, name, split, root=None, folder=None):
        """folder: where the lines are written while they come, if not into memory."""
        self.name = name
        self.split = split
        self.root = root
        self.notes = {}
        self.label_names = None
        self.protocol = None
        self.splits = []
        self.regions = None
        self.own_ids = True
        self.held_out = False
        self.unsplit = True
        self.first_gone = None      # (where, path) of the first record left out for its file

        # record i is _lines[ends[i]:ends[i + 1]]; of a part of other records, i is _rows[i]
        self._lines = bytearray()
        self._columns = {name: array.array(kind) for name, kind in COLUMNS.items()}
        self._columns["ends"].append(0)
        self._rows = None
        self._folder = folder

    def append(self, record, name=0):
        """name: the name_code() of its picture."""
        assert self._rows is None, "a part of other records does not grow"
        # what is asked of all records at once stands in columns
        record, columns = dict(record), self._columns
        captions = captions_of(record)
        columns["image_ids"].append(record.pop("image_id", -1))
        columns["captions"].append(len(captions))
        columns["names"].append(name)

        # a location that is no path says of which class it is
        for key in LOCATIONS:
            where = record.get(key)
            if where is not None and not isinstance(where, str):
                record[key] = [type(where).__name__, *where]

        # file names need not be Unicode: what is not passes through
        line = to_json(record).encode("utf-8", "surrogatepass") + b"\n"
        words = line
        if captions:
            words = "\n".join(captions).encode("utf-8", "surrogatepass")
        columns["words"].append(zlib.crc32(words))
        columns["ends"].append(columns["ends"][-1] + len(line))
        self._lines += line
        if self._folder and len(self._lines) > CHUNK:
            self._write_lines()

    def subset(self, indices):
        """The records at `indices`, in that order, as new Records with the same attributes. They
        share the lines of these; a subset of nothing can grow."""
        indices, out = np.array(list(indices), np.int64), Records(self.name, self.split)
        for key, value in vars(self).items():
            if len(indices) or key[0] != "_":
                setattr(out, key, value)
        if len(indices):
            rows = np.arange(len(self)) if self._rows is None else self._rows
            out._rows = rows[indices]
        out.notes = dict(self.notes)
        return out

    def __len__(self):
        return len(self._columns["ends"]) - 1 if self._rows is None else len(self._rows)

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        row = int(i) % len(self)
        if self._rows is not None:
            row = int(self._rows[row])

        # its line of JSON, and what stands in a column
        start, end = int(self._columns["ends"][row]), int(self._columns["ends"][row + 1])
        line = memoryview(self._lines)[start:end]
        record = json.loads(str(line, "utf-8", "surrogatepass"))
        image_id = int(self._columns["image_ids"][row])
        if image_id >= 0:
            record["image_id"] = image_id
        for key in LOCATIONS:
            if isinstance(record.get(key), list):
                kind, *parts = record[key]
                record[key] = LOCATION_KINDS[kind](*parts)
        return record

    def column(self, name):
        """A column for these records -> (N,) array: "image_ids", "captions" or "words"."""
        values = np.array(self._columns[name])
        return values if self._rows is None else values[self._rows]

    def fingerprint(self):
        """Of the records' number, order and captions (without captions: of all that they hold) ->
        str. Folders do not matter to it, nor do other records of the files.

        A record whose captions changed goes unnoticed once in 2^32 times.
        """
        digest = hashlib.blake2b(digest_size=16)
        for name in ("captions", "words"):
            digest.update(self.column(name).tobytes())
        return digest.hexdigest()

    # In a folder: the lines are records.jsonl, a column COLUMN.npy, the attributes about.json.

    def finish(self):
        """No more are to come: those in a file can be read from now on."""
        if self._folder and len(self):
            self._write_lines()
            self._map_lines()

    def set_image_ids(self, ids):
        self._columns["image_ids"] = array.array("q", ids.tobytes())

    def _write_lines(self):
        with open(os.path.join(self._folder, "records.jsonl"), "ab") as f:
            f.write(self._lines)
        self._lines.clear()

    def _map_lines(self):
        lines = np.memmap(os.path.join(self._folder, "records.jsonl"), np.uint8, "r")
        self._lines = memoryview(lines)

    def save(self, stamps):
        """Writes columns and attributes beside the lines. stamps: {path: stamp(path)} of all that
        was looked at."""
        for name, values in self._columns.items():
            np.save(os.path.join(self._folder, name), np.frombuffer(values, COLUMNS[name]))
        about = {key: value for key, value in vars(self).items() if key[0] != "_"}
        with open(os.path.join(self._folder, "about.json"), "w") as f:
            json.dump({"attributes": about, "stamps": list(stamps.items())}, f)

    @classmethod
    def load(cls, folder):
        """What save() wrote, if all that was looked at is as it was -> Records or None."""
        about = os.path.join(folder, "about.json")
        if not os.path.exists(about):
            return None
        with open(about) as f:
            about = json.load(f)
        if any(stamp(path) != then for path, then in about["stamps"]):
            return None
        out = cls(None, None)
        vars(out).update(about["attributes"])
        out.map(folder)
        return out

    def map(self, folder):
        """Lines and columns from files, in place of those in memory."""
        self._folder = folder
        self._map_lines()
        for name in COLUMNS:
            path = os.path.join(self._folder, name + ".npy")
            self._columns[name] = np.load(path, mmap_mode="r").view(np.ndarray)

    def __getstate__(self):
        # another process gets the name of the folder, not its content
        state = dict(vars(self))
        if self._folder:
            state["_lines"], state["_columns"] = None, {}
        return state

    def __setstate__(self, state):
        vars(self).update(state)
        if self._folder:
            self.map(self._folder)


def captions_of(record):
    """A record's captions as a list."""
    captions = record.get("caption") or []
    return [captions] if isinstance(captions, str) else captions


def stamp(path):
    """[size, time of the last change] of a file or folder; None if there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return [info.st_size, info.st_mtime_ns]


class Listing:
    """`path in listing`: does the file exist? Each folder is listed once.

    Asking the disk for each image is slow on network disks. Of each name 64 bits are kept: of three
    million missing files one is taken for there in about two million runs.

    stamps: {folder: its stamp before it was listed}.
    """

    def __init__(self):
        self.folders, self.stamps = {}, {}

    def __contains__(self, path):
        folder, slash, name = path.rpartition("/")
        return self.has(folder + slash, name)

    def has(self, folder, name):
        """Is there such a name in a folder? folder ends with a slash, or is "" (here)."""
        names = self.folders.get(folder)
        if names is None:
            names = self.folders[folder] = self.names_in(folder or ".")
        if names is False:
            return os.path.exists(folder + name)
        code = hash(name)
        at = bisect_left(names, code)
        return at < len(names) and names[at] == code

    def names_in(self, folder):
        """Sorted hashes of the names in a folder, none if it is not there; False if it may not be
        listed."""
        self.stamps[folder] = stamp(folder)
        try:
            with os.scandir(folder) as entries:
                names = array.array("q", (hash(entry.name) for entry in entries))
        except (FileNotFoundError, NotADirectoryError):
            return array.array("q")
        except OSError:
            return False
        if names:
            np.frombuffer(names, np.int64).sort()       # in place
        return names


class Reading:
    """What a reader needs beside its files: the Records, whose notes and names it fills in, the
    split that is wanted, the keys that are needed, the splits met so far, and which files exist.

    name, found: what the file calls the picture that was looked for last (hold-out goes by it), and
    whether it is there.
    split_by_name: files or folders are chosen by the split, their records do not name it.
    """

    def __init__(self, records, need=()):
        self.records = records
        self.split = records.split
        self.need = need
        self.here = Listing()
        self.splits = set()
        self.split_by_name = False
        self.name, self.found = None, False
        self.joined = {}                    # {(base, subfolder): the folder}

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
        self.name, self.found = names[0], True
        for name in names:
            # joined once for all names of a folder
            subfolder, slash, last = name.rpartition("/")
            for base in bases:
                folder = self.joined.get((base, subfolder))
                if folder is None:
                    folder = os.path.join(base, subfolder + slash)
                    self.joined[base, subfolder] = folder
                if self.here.has(folder, last):
                    return folder + last
        self.found = False
        return os.path.join(bases[0], names[0])

    def missing_file(self, record):
        """The first file of a record that does not exist, or None. Members of tars do exist."""
        for key in LOCATIONS:
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
            paths.append(there(item, flag))
            continue
        first, last = span.groups()
        if int(first) > int(last):
            fail(f"{flag} {item}: {{{first}..{last}}} counts down")
        for number in range(int(first), int(last) + 1):
            digits = str(number).zfill(len(first))
            paths.append(there(item[:span.start()] + digits + item[span.end():], flag))
    if not paths:
        fail(f"{flag} is empty")

    # nothing twice, under whatever name
    known = {}
    for path in paths:
        other = known.setdefault(os.path.realpath(path), path)
        if other is not path:
            fail(f"{flag} names one file twice: {other} and {path}")
    return paths


def there(path, flag):
    """The path of a file or a folder. Errors: it is neither."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            fail(f"{flag} {path}: a link to {os.readlink(path)}, which does not exist")
        fail(f"{flag} {path}: no such file")
    except (OSError, ValueError) as e:
        fail(f"{flag} {path}: {getattr(e, 'strerror', e)}")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        fail(f"{flag} {path}: neither a file nor a folder")
    return path


def text_lines(path):
    """Yields the lines of a UTF-8 file without their ends.

    Splits at newlines only: captions and vocabularies hold other separators, U+2028 for example.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            for n, line in enumerate(f, 1):
                # UTF-16 without its mark, or no text at all
                if "\0" in line:
                    fail(f"{path} line {n}: not UTF-8 text (it holds a NUL character)")
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
    """The JSON object or list in a file; of jsonl (under any extension) an iterator of
    (where, dict).

    jsonl is read line by line. Any other JSON is in memory as a whole.
    """
    if path.endswith(".jsonl") or is_json_lines(path):
        return json_lines(path)
    value = parse_json("\n".join(text_lines(path)), path)
    if not isinstance(value, (dict, list)):
        fail(f"{path}: an object or a list expected, found {type(value).__name__}")
    return value


def is_json_lines(path):
    """Is the first line of a file a whole object, and something behind it? NLVR2 publishes jsonl
    under the name .json."""
    first = list(itertools.islice(lines_of(path), 2))
    try:
        return len(first) == 2 and isinstance(json.loads(first[0][1]), dict)
    except (ValueError, RecursionError):
        return False


def json_lines(path):
    for where, line in lines_of(path):
        yield where, as_dict(parse_json(line, where), where)


def parse_json(text, where):
    """The JSON value in a str or bytes. Errors: a DataError that begins with `where`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        line = f" line {e.lineno}" if " line " not in where else ""
        fail(f"{where}{line}: not JSON ({e.msg})")
    except RecursionError:
        fail(f"{where}: not JSON that can be read (brackets are nested too deep)")
    except ValueError as e:                 # a number of thousands of digits, bytes of no text
        fail(f"{where}: not JSON that can be read ({e})")


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


def entries(path, data, key):
    """Yields (where, dict) of the list of objects under a key of a file's JSON object."""
    for n, entry in enumerate(get(path, as_dict(data, path), key, list)):
        where = f"{path} {key}[{n}]"
        yield where, as_dict(entry, where)


def get(where, record, key, kind=None):
    """record[key], or an error that names the place and the key. kind: see fits()."""
    value = record.get(key)
    if value is None:
        there = some(name for name in record if record[name] is not None)
        fail(f"{where}: no key '{key}' (it has: {there})")
    if kind is not None and not fits(value, kind):
        fail(f"{where}: key '{key}' is {type(value).__name__} {reprlib.repr(value)}, "
             f"wanted: {kind_name(kind)}")
    return value


def optional(where, record, key, kind):
    """get(), but None where the key is absent or null."""
    return None if record.get(key) is None else get(where, record, key, kind)


def some(names):
    """The first of some names, for a message."""
    names = list(map(str, itertools.islice(names, 9)))
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"


# Halves of a UTF-16 pair are no characters. In names of files Python writes bytes that are no UTF-8
# as some of them.
FILE_NAME = os.PathLike
NOT_IN = {str: re.compile("[\ud800-\udfff]"), FILE_NAME: re.compile("[\ud800-\udc7f\udd00-\udfff]")}


def fits(value, kind):
    """Is a JSON value of a kind?

    Kinds: str (a text that can be written, without NUL), FILE_NAME, int (of 64 bits), float (a
    finite number), bool, list, dict, [kind] for a list of it, and a tuple of kinds for any of them.
    """
    if isinstance(kind, tuple):
        return any(fits(value, one) for one in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(x, kind[0]) for x in value)

    # True is no number, and nan is smaller than nothing
    if kind in NOT_IN:
        text = isinstance(value, str) and "\0" not in value
        return text and (value.isascii() or not NOT_IN[kind].search(value))
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and abs(value) < 2 ** 63
    return isinstance(value, kind)


KIND_NAMES = {str: "string", int: "whole number", float: "finite number", bool: "truth value",
              list: "list", dict: "object", FILE_NAME: "name of a file"}


def kind_name(kind, plural=""):
    if isinstance(kind, tuple):
        return " or ".join(kind_name(one, plural) for one in kind)
    if isinstance(kind, list):
        return f"list{plural} of {kind_name(kind[0], 's')}"
    return KIND_NAMES[kind] + plural


def visible(names):
    """Names of files or folders, sorted, without those that systems hide or leave behind."""
    return sorted(name for name in names if name[0] != "." and name != "__MACOSX")


def folder_names(path):
    return visible(entry.name for entry in os.scandir(path) if entry.is_dir())


def files_in(path):
    """Yields the paths of all files under a folder, in order."""
    for folder, inside, names in os.walk(path):
        inside[:] = visible(inside)
        for name in visible(names):
            yield os.path.join(folder, name)


def pictures_in(path):
    """Yields the paths of all image files under a folder, in order."""
    for file in files_in(path):
        if file.lower().endswith(IMAGE_TYPES):
            yield file


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

    # of all tars at once, so that all cores have work
    tars = [tar_shards(file.path) for file in opened if file.kind == "tar"]
    index_tars(list(itertools.chain(*tars)))

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
    """-> (format, JSON value or None) of a file or folder of image-text pairs; a format is a key of
    PAIR_FORMATS."""
    if os.path.isdir(path):
        shards = any(name.endswith(".tar") for name in visible(os.listdir(path)))
        return "tar" if shards else "folder", None
    if path.endswith(".tar"):
        return "tar", None
    if not path.endswith((".json", ".jsonl")):
        return sniff_text(path), None
    data = read_json(path)
    return sniff_json(path, data), data


def sniff_json(path, data):
    """The format of a JSON file of pairs, by its keys: Karpathy's and COCO's have images, VQA's and
    GQA's questions."""
    if not isinstance(data, dict) or "image" in data:
        return "records"
    notes = data.get("annotations")
    if isinstance(data.get("images"), list):
        where, image = next(entries(path, data, "images"), (None, {"sentences": ()}))
        if "sentences" in image:
            return "karpathy"
        if isinstance(notes, list):
            where, note = next(entries(path, data, "annotations"), (None, {}))
            return "coco" if "caption" in note else "instances"

    first = next(iter(data.values()), None)
    gqa = isinstance(first, dict) and "imageId" in first
    if gqa or isinstance(data.get("questions"), list):
        return "questions"
    fail(f"{path}: neither records, Karpathy's, COCO's, VQA's nor GQA's json "
         f"(its keys: {some(data)})")


def sniff_text(path):
    """The format of a text file of pairs, by its first line."""
    where, line = next(lines_of(path), (path, ""))
    if FLICKR_ROW.match(line):
        return "token"
    if table_columns(line):
        return "table"
    if "\t" in line or path.endswith((".tsv", ".txt")):
        return "tsv"
    fail(f"{path}: unknown format (pairs are read from .json, .jsonl, .tsv, .tar, Flickr's .token, "
         "tables with columns image and caption, and folders of pictures or of .tar)")


# What a record in the documented form may hold beside its picture and captions.
RECORD_KEYS = {"image_id": (int, str), "split": str, "tags": [str], "boxes": [[float]],
               "labels": [int], "label_names": [str]}


def pair(where, raw, image, reading):
    """One raw record in the documented form -> our record, or None if it is left out.

    `caption` may be absent (a task that needs it says so); with empty captions alone the record is
    left out and counted.
    """
    # what is documented; other keys of the file are left out
    record = {"image": image}
    for key, kind in RECORD_KEYS.items():
        if raw.get(key) is not None:
            record[key] = get(where, raw, key, kind)
    if not reading.wants(record.get("split")):
        return None

    if raw.get("caption") is not None:
        record["caption"], record["paraphrase"] = clean_captions(where, raw, reading)
        if not record["caption"]:
            reading.count("no_caption_left")
            return None

    # boxes have two corners, and a label each
    boxes = record.get("boxes", ())
    for box in boxes:
        if len(box) != 4 or box[0] > box[2] or box[1] > box[3]:
            fail(f"{where}: key 'boxes' holds {reprlib.repr(box)}, which is not [x1, y1, x2, y2] "
                 "in pixels with x1 <= x2 and y1 <= y2")
    for key in ("labels", "label_names"):
        if key in record and len(record[key]) != len(boxes):
            fail(f"{where}: {len(record[key])} {key} for {len(boxes)} boxes")
    if min(record.get("labels", ()), default=0) < 0:
        fail(f"{where}: key 'labels' holds {min(record['labels'])}, which is no number of a class")
    return record


def clean_captions(where, raw, reading):
    """-> (captions, paraphrases): lists of equal length; paraphrases may be None.

    A paraphrase is a string, or a list of strings where a caption has several wordings. Empty
    captions are left out, with their paraphrase, and counted.
    """
    # one caption or several, and of paraphrases none or one of each caption
    captions = get(where, raw, "caption", (str, [str]))
    paraphrases = optional(where, raw, "paraphrase", (str, [(str, [str])]))
    captions = [captions] if isinstance(captions, str) else captions
    paraphrases = [paraphrases] if isinstance(paraphrases, str) else paraphrases
    if paraphrases is not None and len(paraphrases) != len(captions):
        fail(f"{where}: key 'paraphrase' must hold one string per caption ({len(captions)}), "
             "in the captions' order; several wordings of a caption are a list in its place")

    # empty captions go, and their paraphrases with them
    keep = [i for i, caption in enumerate(captions) if caption.strip()]
    reading.count("empty_captions", len(captions) - len(keep))
    if paraphrases is not None:
        paraphrases = [paraphrases[i] for i in keep]
    return [captions[i].strip() for i in keep], paraphrases


def coco_labels(path, data, reading):
    """COCO's categories -> {category id: label}, and sets the names of the labels.

    A label is the position of its category by id: COCO's ids have gaps. Errors: an id twice.
    """
    names = {}
    for where, category in entries(path, data, "categories"):
        category_id = get(where, category, "id", int)
        if category_id in names:
            fail(f"{where}: id {category_id} occurs twice")
        names[category_id] = get(where, category, "name", str)
    reading.set_label_names(path, [names[category_id] for category_id in sorted(names)])
    return {category_id: label for label, category_id in enumerate(sorted(names))}


def coco_images(path, data):
    """COCO's images -> {image id: (where, image)}, in the file's order. Errors: an id twice."""
    images = {}
    for where, image in entries(path, data, "images"):
        image_id = get(where, image, "id", int)
        if image_id in images:
            fail(f"{where}: id {image_id} occurs twice, first in {images[image_id][0]}")
        images[image_id] = where, image
    return images


def coco_objects(path, data, images, reading):
    """Yields (where, annotation, label, box as xyxy in pixels) of COCO's instances.

    Annotations of images that the file does not have are left out and counted.
    """
    label_of = coco_labels(path, data, reading)
    for where, note in entries(path, data, "annotations"):
        category_id = get(where, note, "category_id", int)
        if category_id not in label_of:
            fail(f"{where}: category_id {category_id} is not in the file")
        if note.get("iscrowd") not in (None, 0, 1):
            fail(f"{where}: key 'iscrowd' is {reprlib.repr(note['iscrowd'])}, neither 0 nor 1")
        box = get(where, note, "bbox", [float])
        if len(box) != 4 or box[2] < 0 or box[3] < 0:
            fail(f"{where}: key 'bbox' is {reprlib.repr(box)}, not [x, y, width, height] in pixels")

        if get(where, note, "image_id", int) in images:
            x, y, w, h = box
            yield where, note, label_of[category_id], [x, y, x + w, y + h]
        else:
            reading.count("annotations_without_image")


def read_instances(file, reading):
    """COCO's instances -> {image id: {tags, boxes, labels}}, boxes as xyxy in pixels.

    Crowd regions give tags, but no boxes.
    """
    # the annotations of each image
    joined = {}
    images = coco_images(file.path, file.data)
    for image_id in images:
        joined[image_id] = {"tags": set(), "boxes": [], "labels": []}
    for where, note, label, box in coco_objects(file.path, file.data, images, reading):
        image = joined[note["image_id"]]
        image["tags"].add(label)
        if not note.get("iscrowd"):
            image["boxes"].append(box)
            image["labels"].append(label)

    # tags are the objects' names, each once, in the order of the categories
    names = reading.records.label_names
    for image in joined.values():
        image["tags"] = [names[label] for label in sorted(image["tags"])]
    return joined


def pairs_records(file, reading, joined):
    """Records in the documented form."""
    bases = folders(file.path, file.root)
    for where, raw in json_records(file.path, file.data):
        image = reading.find(bases, get(where, raw, "image", FILE_NAME))
        yield where, pair(where, raw, image, reading)


def pairs_karpathy(file, reading, joined):
    """Karpathy's splits of COCO, Flickr8k and Flickr30k."""
    bases = folders(file.path, file.root)
    for where, image in entries(file.path, file.data, "images"):
        # COCO's images lie in a folder of their year
        names = [get(where, image, "filename", str)]
        if optional(where, image, "filepath", str):
            names.insert(0, os.path.join(image["filepath"], names[0]))

        captions = []
        for n, sentence in enumerate(get(where, image, "sentences", [dict])):
            captions.append(get(f"{where} sentences[{n}]", sentence, "raw", str))

        # of a COCO image that instances were read of: tags, boxes and labels too
        own = "imgid" if image.get("cocoid") is None else "cocoid"
        image_id = optional(where, image, own, int)
        raw = dict(joined.get(image_id, {}) if own == "cocoid" else {},
                   split=get(where, image, "split", str), image_id=image_id, caption=captions)
        yield where, pair(where, raw, reading.find(bases, *names), reading)


def pairs_coco(file, reading, joined):
    """COCO's captions, or its instances alone (then without captions)."""
    # image id -> its captions
    images, captions = coco_images(file.path, file.data), {}
    if file.kind == "coco":
        for where, note in entries(file.path, file.data, "annotations"):
            caption = get(where, note, "caption", str)
            captions.setdefault(get(where, note, "image_id", int), []).append(caption)
        lost = [captions[image_id] for image_id in captions.keys() - images.keys()]
        reading.count("annotations_without_image", sum(map(len, lost)))

    # the images of captions_val2017.json may lie in a folder val2017
    year = os.path.splitext(os.path.basename(file.path))[0].split("_")[-1]
    bases = folders(file.path, file.root, year)
    for image_id, (where, image) in images.items():
        raw = dict(joined.get(image_id, {}), image_id=image_id, caption=captions.get(image_id))
        image = reading.find(bases, get(where, image, "file_name", str))
        yield where, pair(where, raw, image, reading)


# A row of Flickr8k.token.txt and of Flickr30k's results_20130124.token.
FLICKR_ROW = re.compile(r"(?P<name>[^\t]+\.\w+)#\d+\t(?P<caption>.*)")

# Flickr8k's lists of the pictures of a split, which lie beside its captions.
FLICKR_LIST = re.compile(r"Flickr_?\d+k\.(train|dev|test)Images\.txt")


def pairs_rows(file, reading, joined):
    """A row for each caption: Flickr's token files, Kaggle's captions.txt and results.csv.

    Where lists of splits lie beside the file, a picture that none of them names is left out and
    counted.
    """
    # the rows of a picture together
    captions, read = {}, token_rows if file.kind == "token" else table_rows
    for where, name, caption in read(file.path, reading):
        captions.setdefault(name, (where, []))[1].append(caption)

    # as published: the pictures' folder beside the text file or beside its folder
    splits = flickr_splits(os.path.dirname(file.path) or ".", reading)
    bases = folders(file.path, file.root, "Flicker8k_Dataset", "Flickr8k_Dataset", "Images",
                    "flickr30k-images", "flickr30k_images")
    for name, (where, texts) in captions.items():
        if splits and name not in splits:
            reading.count("in_no_split")
            continue
        raw = {"caption": texts, "split": splits.get(name)}
        yield where, pair(where, raw, reading.find(bases, name), reading)


def flickr_splits(folder, reading):
    """-> {name of a picture: its split} of the lists in a folder. Errors: a picture in two."""
    splits = {}
    for file in sorted(os.listdir(folder)):
        path, part = os.path.join(folder, file), FLICKR_LIST.fullmatch(file)
        if part:
            reading.here.stamps[path] = stamp(path)
        for where, line in lines_of(path) if part else ():
            if splits.setdefault(line.strip(), part[1]) != part[1]:
                fail(f"{where}: {line.strip()} is in the list of {splits[line.strip()]} too")
    return splits


def token_rows(path, reading):
    """Yields (where, name of the picture, caption) of rows "NAME.jpg#0 TAB caption"."""
    for where, line in lines_of(path):
        row = FLICKR_ROW.fullmatch(line)
        if not row:
            fail(f"{where}: 'NAME.jpg#0 TAB caption' expected")
        yield where, row["name"], row["caption"]


def table_columns(line):
    """A table's first line -> (delimiter, column of the picture, column of the caption); None if
    it names no such columns."""
    for mark in ",|":
        names = [name.strip().lower() for name in line.split(mark)]
        picture = [n for n, name in enumerate(names) if name in ("image", "image_name")]
        caption = [n for n, name in enumerate(names) if name in ("caption", "comment")]
        if picture and caption:
            return mark, picture[0], caption[0]


def table_rows(path, reading):
    """Yields (where, name of the picture, caption) of a table that names its columns.

    Rows with too few cells, of which Flickr30k's results.csv has one, are left out and counted.
    """
    _, first = next(lines_of(path))
    mark, picture, caption = table_columns(first)
    width = first.count(mark) + 1
    for where, row in itertools.islice(csv_rows(path, mark), 1, None):
        if len(row) < width:
            reading.count("damaged_rows")
            continue
        # the text of a last column may hold the mark itself
        text = mark.join(row[caption:]) if caption == width - 1 else row[caption]
        yield where, row[picture].strip(), text


def csv_rows(path, mark):
    """Yields (where, cells) of the rows of a table that are not empty. Between commas and between
    semicolons a cell may stand in quotes."""
    quoting = csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL
    lines = (line + "\n" for line in text_lines(path))
    rows = csv.reader(lines, delimiter=mark, quoting=quoting, strict=True)
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                yield f"{path} line {rows.line_num}", row
    except csv.Error as e:
        fail(f"{path} line {rows.line_num}: not a table ({e})")


# What the columns of a TSV are called, the better name first.
TSV_CAPTIONS = ("caption", "text", "title", "sentence")
TSV_PICTURES = ("image_path", "path", "filename", "image", "url")


def pairs_tsv(file, reading, joined):
    """Rows of a caption and the path or URL of its picture, with a header line or without one
    (Conceptual Captions, SBU). Only the columns of tsv_columns() are read.

    The file of a URL is row N with 9 digits, as img2dataset names it (alone or in the folder of its
    10,000 rows), N_crc32(url), as the common CC downloader names it, or the last part of the URL if
    no other row ends in the same. Rows count from 0; neither a header nor a blank line is one.
    """
    caption_at, picture_at, header = tsv_columns(file.path)
    bases, repeated = folders(file.path, file.root), None
    for n, (where, cells) in enumerate(tsv_rows(file.path, header)):
        if len(cells) <= max(caption_at, picture_at):
            fail(f"{where}: {len(cells)} columns, the header names more")
        place = cells[picture_at].strip()
        names = [place]
        if "://" in place:
            names = [f"{n:09d}.jpg", f"{n // 10000:05d}/{n:09d}.jpg",
                     f"{n}_{zlib.crc32(place.encode())}"]
        image = reading.find(bases, *names)

        # by the end of its URL; whether that is its own shows once all rows have been seen
        end = "" if reading.found else url_end(place)
        if end:
            found = reading.find(bases, end)
            if reading.found:
                if repeated is None:
                    repeated = repeated_ends(file.path, picture_at, header)
                image = image if hash(end) in repeated else found
        reading.name = place
        yield where, pair(where, {"caption": cells[caption_at]}, image, reading)


def tsv_rows(path, header):
    """Yields (where, list of cells) of each row behind the first `header` lines."""
    for where, line in itertools.islice(lines_of(path), header, None):
        cells = line.split("\t")
        if len(cells) < 2:
            fail(f"{where}: 'caption TAB path-or-url' expected, found no TAB")
        yield where, cells


def tsv_columns(path):
    """-> (column of the captions, column of the pictures, number of header lines: 0 or 1).

    By a header that names both. Without one the pictures are in that one of the first two columns
    whose first hundred cells are addresses or names of image files, all of them (CC3M has it
    second, CC12M first); of cells that are neither, in the second if they are single words.
    """
    rows = list(itertools.islice(tsv_rows(path, 0), 100))
    if not rows:
        fail(f"{path}: no row in it")
    names = [cell.strip().lower() for cell in rows[0][1]]
    captions = [names.index(name) for name in TSV_CAPTIONS if name in names]
    pictures = [names.index(name) for name in TSV_PICTURES if name in names]
    if captions and pictures:
        return captions[0], pictures[0], 1

    # by what the cells look like
    look = [[is_place(cells[column]) for _, cells in rows] for column in (0, 1)]
    for column in (1, 0):
        if all(look[column]):
            return 1 - column, column, 0
    if not any(look[0] + look[1]):
        if all(len(cells[1].split()) == 1 for _, cells in rows):
            return 0, 1, 0
        fail(f"{path}: neither column holds addresses or names of pictures: a header line "
             "'caption TAB url' (or path) says which one is which")

    # one row is not as the others are
    column = int(sum(look[1]) >= sum(look[0]))
    where, cells = rows[look[column].index(False)]
    fail(f"{where}: '{cells[column][:80]}' is neither an address nor the name of a picture, as "
         f"column {column + 1} holds in other rows")


def is_place(cell):
    cell = cell.strip().lower()
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", cell)) or cell.endswith(IMAGE_TYPES)


def url_end(place):
    """The last part of a URL's path; of a path nothing."""
    return place.split("?")[0].rstrip("/").rpartition("/")[2] if "://" in place else ""


def repeated_ends(path, column, header):
    """The hashes of the last parts that more than one URL of a TSV has -> set of int."""
    ends = array.array("q")
    for _, cells in tsv_rows(path, header):
        ends.append(hash(url_end(cells[column].strip())))
    values, counts = np.unique(np.array(ends), return_counts=True)
    return set(values[counts > 1].tolist())


def pairs_tar(file, reading, joined):
    """img2dataset's shards: KEY.jpg with KEY.txt, or with the caption in KEY.json."""
    shards = tar_shards(file.path)
    reading.here.stamps[file.path] = stamp(file.path)
    for shard in shards:
        reading.here.stamps[shard] = stamp(shard)
        found = read_index(shard)
        if found is None:
            fail(f"{shard} changes while it is read")
        head, samples = found
        if not head["whole"]:
            reading.count("tars_that_end_early")
            if ranks()[0] == 0:
                say(f"{shard} ends early: what is whole of it is read")
        reading.count("unreadable_captions", head["unreadable_captions"])
        for key, caption, member in samples:
            # a failed download has a caption and no picture
            if member is None:
                reading.count("missing")
                continue
            if caption is None and "caption" in reading.need:
                reading.count("no_caption_left")
                continue
            where, reading.name = f"{shard} member {key}", key
            image = TarMember(shard, *member)
            yield where, pair(where, {"caption": caption}, image, reading)


def tar_shards(path):
    """One shard, or those of a folder in order -> list of paths."""
    if not os.path.isdir(path):
        return [path]
    names = [name for name in visible(os.listdir(path)) if name.endswith(".tar")]
    return [os.path.join(path, name) for name in names]


# What is in a shard is written down once, beside it as SHARD.idx, or, where that cannot be, in
# store_folder(). The first line is {"tar_index": 1, "shard": stamp of the tar, "whole": does it end
# as a tar should, "unreadable_captions": count}; then a line for each sample: [key, caption or
# null, [offset, size, name] of its picture or null].

def index_paths(shard):
    """The two places of a shard's index, the better one first."""
    code = hashlib.blake2b(os.fsencode(os.path.realpath(shard)), digest_size=12).hexdigest()
    return [shard + ".idx", os.path.join(store_folder(), code + ".idx")]


def index_head(path):
    """The first line of an index -> dict; {} if the file is none of ours, None if there is none."""
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8", errors="surrogatepass") as f:
            head = json.loads(f.readline(1000))
    except (OSError, ValueError):
        return {}
    return head if isinstance(head, dict) and head.get("tar_index") == 1 else {}


def read_index(shard):
    """-> (the first line of a shard's index, iterator of its samples); None if there is no index of
    the shard as it is now."""
    for path in index_paths(shard):
        head = index_head(path)
        if head and head["shard"] == stamp(shard):
            return head, index_samples(path)
    return None


def index_samples(path):
    with open(path, encoding="utf-8", errors="surrogatepass") as f:
        for line in itertools.islice(f, 1, None):
            yield json.loads(line)


def index_tars(shards):
    """Makes the indexes that are missing or of an older shard, on all cores."""
    todo = [shard for shard in shards if read_index(shard) is None]
    # a bar from 8 shards on, on a terminal
    show = dict(desc="indexing tars", total=len(todo), disable=True if len(todo) < 8 else None)
    cores = min(usable_cores(), len(todo))
    if cores < 2:
        for _ in tqdm(map(index_tar, todo), **show):
            pass
        return
    with ProcessPoolExecutor(cores) as pool:
        for _ in tqdm(pool.map(index_tar, todo), **show):
            pass


def usable_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def index_tar(shard):
    """Writes the index of a shard. Pictures are read later, by seeking: resuming in the middle of a
    corpus is arithmetic.

    Of a tar that ends early all whole members are taken. Errors: there is none.
    """
    head = {"tar_index": 1, "shard": stamp(shard), "whole": True, "unreadable_captions": 0}
    samples, trouble = {}, None
    try:
        # "r:", because in a compressed tar nothing can be sought
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, kind = name.partition(".")
                kind = kind.lower()
                if not member.isfile() or member.offset_data + member.size > head["shard"][0]:
                    continue

                # captions are small and read now, pictures are not
                parts = samples.setdefault(os.path.join(folder, stem), {})
                if kind in ("txt", "json"):
                    parts[kind] = tar.extractfile(member).read()
                elif "." + kind in IMAGE_TYPES:
                    parts.setdefault("image", [member.offset_data, member.size, member.name])

            # tarfile takes any rubbish for the end, which should be a block of zeros
            tar.fileobj.seek(tar.offset)
            head["whole"] = tar.fileobj.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError, OSError) as e:
        head["whole"], trouble = False, e
    if trouble and not samples:
        fail(f"{shard}: not a readable tar ({trouble})")

    # a line for each sample
    lines = []
    for key, parts in samples.items():
        try:
            lines.append(to_json([key, tar_caption(parts), parts.get("image")]))
        except ValueError:
            head["unreadable_captions"] += 1
    text = "\n".join([to_json(head), *lines, ""])
    write_index(shard, text.encode("utf-8", "surrogatepass"))


def tar_caption(parts):
    """The caption of a sample, from KEY.txt or KEY.json -> str, or None. ValueError: unreadable."""
    if "txt" in parts:
        return parts["txt"].decode()
    found = json.loads(parts.get("json", b"{}"))
    caption = found.get("caption") if isinstance(found, dict) else 0
    if caption is not None and not isinstance(caption, str):
        raise ValueError
    return caption


def write_index(shard, content):
    """Writes an index whole or not at all, to the first of index_paths() that can be written."""
    beside, kept = index_paths(shard)
    paths = [beside, kept]
    if index_head(beside) == {}:                        # somebody else's file
        paths = [kept]

    for path in paths:
        draft = f"{path}.{os.getpid()}"
        try:
            with open(draft, "wb") as f:
                f.write(content)
            os.replace(draft, path)
            return
        except OSError as e:
            trouble = e
            if os.path.exists(draft):
                os.remove(draft)
    fail(f"{shard}: its index can be written neither beside it nor to {path} "
         f"({trouble.strerror})")


def pairs_folder(file, reading, joined):
    """A folder of img2dataset's files, KEY.jpg with its caption in KEY.txt or KEY.json, at any
    depth. Where no picture has a caption it is a plain folder of pictures.

    Pictures without a caption, and captions without a picture, are then left out and counted.
    """
    # {path without its extension: {extension: path}}
    samples = {}
    for path in files_in(file.path):
        stem, kind = os.path.splitext(path)
        samples.setdefault(stem, {})[kind.lower()] = path

    # is there any caption beside a picture?
    texts, captioned = {".txt", ".json"}, False
    for parts in samples.values():
        captioned |= bool(texts & parts.keys() and parts.keys() & set(IMAGE_TYPES))

    for parts in samples.values():
        image = next((parts[kind] for kind in IMAGE_TYPES if kind in parts), None)
        if image is None:
            reading.count("missing", captioned and ".txt" in parts)
            continue
        caption = None
        if ".txt" in parts:
            caption = "\n".join(text_lines(parts[".txt"]))
        elif ".json" in parts:
            where, raw = next(json_records(parts[".json"]), (None, {}))
            caption = optional(where, raw, "caption", (str, [str]))
        if captioned and caption is None:
            reading.count("no_caption_left")
            continue
        reading.name = os.path.relpath(image, file.path)
        yield image, pair(image, {"caption": caption}, image, reading)
    if not samples:
        fail(f"{file.path}: no pictures and no .tar shards in this folder")


def pairs_questions(file, reading, joined):
    """Questions as the captions of their picture, one record a picture.

    VQA v2: {questions: [{image_id, question}], data_subtype}. GQA: {id: {imageId, question}}.
    """
    # (image id, file name) -> (where its first question stands, its questions)
    path, data, asked = file.path, file.data, {}
    subtype = vqa_subtype(path, data)
    if isinstance(data.get("questions"), list):
        for where, raw in entries(path, data, "questions"):
            image_id = get(where, raw, "image_id", int)
            name = vqa_image(where, raw, image_id, subtype)
            _, questions = asked.setdefault((image_id, name), (where, []))
            questions.append(get(where, raw, "question", str))
    else:
        for key, raw in data.items():
            where = f"{path} question {key}"
            image_id = str(get(where, as_dict(raw, where), "imageId", (int, str)))
            _, questions = asked.setdefault((image_id, f"{image_id}.jpg"), (where, []))
            questions.append(get(where, raw, "question", str))

    bases = folders(path, file.root, subtype)
    for (image_id, name), (where, questions) in asked.items():
        raw = {"image_id": image_id, "caption": questions}
        yield where, pair(where, raw, reading.find(bases, name), reading)


def vqa_subtype(path, data):
    """COCO's subset that a file of questions is about; those of test-dev are about test2015."""
    return (optional(path, data, "data_subtype", str) or "").replace("test-dev", "test")


def vqa_image(where, raw, image_id, subtype):
    """The file name of a question's picture: its own, or COCO's of that id and subset."""
    if not raw.get("image") and not subtype:
        fail(f"{where}: no key 'image', and the file has no 'data_subtype' to name COCO's image by")
    return optional(where, raw, "image", str) or f"COCO_{subtype}_{image_id:012d}.jpg"


PAIR_FORMATS = {"records": pairs_records, "karpathy": pairs_karpathy, "coco": pairs_coco,
                "instances": pairs_coco, "questions": pairs_questions, "tsv": pairs_tsv,
                "token": pairs_rows, "table": pairs_rows, "tar": pairs_tar, "folder": pairs_folder}


# --------------------------------------------------------------------------------------------------
# Questions, statements and sentences

def read_vqa(files, reading):
    """VQA v2: questions and their annotations, joined by question_id.

    `answers` is the list of the annotators' answers, None where there are none (test);
    `answer_type` and `question_type` are there where the annotations have them. Annotations that
    are not named are looked for beside their questions, under the publisher's name.
    """
    # the files in any order, told apart by their keys
    question_files, answers = [], {}
    for number, (path, root) in enumerate(files):
        data = as_dict(read_json(path), path)
        if "questions" in data:
            question_files.append((number, path, root, data))
        elif "annotations" in data:
            vqa_answers(path, data, answers)
        else:
            fail(f"{path}: neither 'questions' nor 'annotations' (its keys: {some(data)})")
    if not question_files:
        fail(f"{files[0][0]}: VQA needs the questions file too "
             "(--data questions.json,annotations.json)")

    # one record a question
    seen = set()
    for number, path, root, data in question_files:
        asked = vqa_questions(path, data)
        if not asked.keys() & answers.keys():
            vqa_annotations_beside(path, answers, reading)

        subtype = vqa_subtype(path, data)
        bases = folders(path, root, subtype)
        for question_id, (where, raw) in asked.items():
            if question_id in seen:
                fail(f"{where}: question_id {question_id} occurs twice")
            seen.add(question_id)
            image_id = get(where, raw, "image_id", int)
            image = reading.find(bases, vqa_image(where, raw, image_id, subtype))
            yield number, where, {"image": image, "image_id": image_id, "question_id": question_id,
                                  "question": get(where, raw, "question", str),
                                  **answers.get(question_id, {"answers": None})}

    # what the two kinds of files have without each other
    reading.count("without_answers", len(seen - answers.keys()))
    reading.count("answers_without_question", len(answers.keys() - seen))


def vqa_questions(path, data):
    """A questions file -> {question_id: (where, question)}. Errors: an id twice."""
    asked = {}
    for where, raw in entries(path, data, "questions"):
        question_id = get(where, raw, "question_id", int)
        if question_id in asked:
            fail(f"{where}: question_id {question_id} occurs twice")
        asked[question_id] = where, raw
    return asked


def vqa_answers(path, data, answers):
    """Adds an annotations file's {question_id: part of a record} to `answers`. Errors: an id
    twice."""
    for where, note in entries(path, data, "annotations"):
        question_id = get(where, note, "question_id", int)
        if question_id in answers:
            fail(f"{where}: question_id {question_id} occurs twice")
        given = []
        for n, answer in enumerate(get(where, note, "answers", [dict])):
            given.append(get(f"{where} answers[{n}]", answer, "answer", str))

        # test has questions without answers
        answers[question_id] = {"answers": given or None}
        for key in ("answer_type", "question_type"):
            if note.get(key) is not None:
                answers[question_id][key] = get(where, note, key, str)


def vqa_annotations_beside(path, answers, reading):
    """Reads the annotations that belong to a questions file by its name: those of
    v2_OpenEnded_X_questions.json are v2_X_annotations.json.

    Errors: they are not there and the answers are needed.
    """
    folder, name = os.path.split(path)
    if "_questions" not in name:
        return
    name = re.sub("(OpenEnded|MultipleChoice)_", "", name).replace("_questions", "_annotations")
    beside = os.path.join(folder, name)
    reading.here.stamps[beside] = stamp(beside)
    if os.path.exists(beside):
        vqa_answers(beside, read_json(beside), answers)
    elif "answers" in reading.need:
        fail(f"{path}: its annotations are needed; they are neither named in --data nor beside it "
             f"as {beside}")


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
            name = optional(where, raw, "image", str)
            for key in ("Flickr30K_ID", "Flikr30kID"):
                if not name and raw.get(key):
                    name = f"{get(where, raw, key, (str, int))}.jpg"
            caption = sentence(where, raw, "sentence2", reading)
            if caption:
                image = reading.find(bases, name or get(where, raw, "image", str))
                yield number, where, {"image": image, "caption": caption,
                                      "label": VE_LABELS.index(label),
                                      "pair_id": optional(where, raw, "pairID", (str, int))}


def sentence(where, raw, key, reading):
    """The sentence under a key; None, and counted, if it is empty."""
    text = get(where, raw, key, str).strip()
    reading.count("empty_captions", not text)
    return text or None


def read_nlvr2(files, reading):
    """NLVR2: is a sentence true of two pictures? label 1 = True.

    Identifier dev-A-B-C is sentence C about dev-A-B-img0.png (left) and dev-A-B-img1.png (right).
    """
    reading.set_label_names(files[0][0], ["False", "True"])
    for number, (path, root) in enumerate(files):
        for where, raw in json_records(path):
            identifier = get(where, raw, "identifier", str)
            label = str(get(where, raw, "label", (str, bool)))
            if label not in ("True", "False"):
                fail(f"{where}: label '{label}' is neither True nor False")

            # train, dev, test1 are also the names of folders; those of train are numbered inside
            kind = identifier.split("-")[0]
            subfolders = [kind, os.path.join("images", kind), "images"]
            inside = optional(where, raw, "directory", (int, str))
            if inside is not None:
                subfolders += [os.path.join(sub, str(inside)) for sub in subfolders[:2]]
            bases = folders(path, root, *subfolders)

            # the left picture, the right picture, and whether the sentence is true of them
            stem = identifier.rpartition("-")[0]
            left = optional(where, raw, "left_image", str) or stem + "-img0.png"
            right = optional(where, raw, "right_image", str) or stem + "-img1.png"
            caption = sentence(where, raw, "sentence", reading)
            if caption:
                yield number, where, {"image": reading.find(bases, left),
                                      "image2": reading.find(bases, right), "caption": caption,
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
                if s1.strip() and s2.strip():
                    yield number, where, {"s1": s1, "s2": s2, "score": value, "dataset": dataset,
                                          "subset": subset, "split": part}
                else:
                    reading.count("empty_captions")


def sts_parts(path):
    """Yields (csv file or SentEval folder, its split or None) for all that lies under a path."""
    if not os.path.isdir(path):
        yield path, None
        return

    # a folder of SentEval: training data only by its name
    names = visible(os.listdir(path))
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
    if not os.path.isdir(home):
        if os.path.basename(home).startswith("STS."):
            fail(f"{home}: name the folder that it lies in: its .input. and .gs. files go together")
        for where, line in lines_of(home):
            cells = line.split("\t")
            if len(cells) < 7:
                fail(f"{where}: 7 columns between TABs expected (genre, file, year, index, score, "
                     f"s1, s2), found {len(cells)}")
            yield where, "STSB", cells[0], cells[4], cells[5], cells[6]
        return

    # a folder's subsets, in the order of their names
    dataset = os.path.basename(os.path.normpath(home)).split("-")[0]
    for name in visible(os.listdir(home)):
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
        reading.split_by_name |= os.path.isdir(path)
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
    there = [name[:-4] for name in visible(os.listdir(path)) if name.endswith(".txt")]
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
        reading.split_by_name |= path not in homes
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
        elif not os.path.isdir(path):
            fail(f"{path}: clips are read of a videodatainfo.json, the 1k-A .csv and a folder")
    reading.records.protocol = "1k-A" if table else "full"
    tested = {video_id for _, video_id, _ in table[2]} if table else set()

    def clip(path, video_id, captions, part):
        folder = home or os.path.join(os.path.dirname(path), "features")
        return {"video_id": video_id, "feature": os.path.join(folder, f"{video_id}.npy"),
                "caption": captions, "split": part}

    # the videos of the json; those of the csv come after them
    for number, path, data in jsons:
        captions, seen = clip_captions(path, data), set()
        for where, video in entries(path, data, "videos"):
            video_id = get(where, video, "video_id", str)
            part = get(where, video, "split", str)
            if video_id in seen:
                fail(f"{where}: video_id {video_id} occurs twice")
            seen.add(video_id)
            if video_id in tested:
                continue
            if video_id not in captions:
                reading.count("no_caption_left")
                continue
            # beside the csv all of train, val and test is for training
            part = "train" if table else SPLIT_NAMES.get(part, part)
            yield number, where, clip(path, video_id, captions[video_id], part)
        reading.count("captions_without_video", len(captions.keys() - seen))

    # the test of 1k-A
    if table:
        number, path, rows = table
        for where, video_id, caption in rows:
            yield number, where, clip(path, video_id, [caption], "test")


def clip_captions(path, data):
    """The sentences of a videodatainfo.json -> {video id: its captions that are not empty}."""
    captions = {}
    for where, note in entries(path, data, "sentences"):
        video_id = get(where, note, "video_id", str)
        caption = get(where, note, "caption", str).strip()
        if caption:
            captions.setdefault(video_id, []).append(caption)
    return captions


def clip_table(path):
    """The rows of the 1k-A csv, with commas or semicolons -> list of (where, video_id,
    sentence)."""
    _, first = next(lines_of(path), (path, ""))
    table, rows = csv_rows(path, ";" if ";" in first else ","), []
    where, header = next(table, (path, []))
    if not {"video_id", "sentence"} <= set(header):
        fail(f"{where}: columns video_id and sentence expected")
    for where, cells in table:
        row = dict(zip(header, cells))
        if not row.get("video_id") or not row.get("sentence", "").strip():
            fail(f"{where}: video_id and sentence expected, found {reprlib.repr(cells)}")
        rows.append((where, row["video_id"], row["sentence"].strip()))
    return rows


# --------------------------------------------------------------------------------------------------
# Detection

VOC_CLASSES = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()


def read_detection(files, reading):
    """The objects of each picture, from COCO's instances json or from VOC.

    boxes: xyxy in pixels; labels: positions in label_names; crowd, difficult: 0 or 1 each; height
    and width of the picture; of COCO also area and segmentation (polygons or run lengths, as
    published). Boxes without area and boxes outside the picture are left out and counted; those
    that reach over its edge are as published, for that is what results are measured by.
    """
    for number, (path, root) in enumerate(files):
        if os.path.isdir(path):
            found, reading.split_by_name = detection_voc(path, reading), True
        else:
            found = detection_coco(path, root, reading)
        for where, record in found:
            width, height = record["width"], record["height"]
            if min(width, height) < 1 or width * height > Image.MAX_IMAGE_PIXELS:
                fail(f"{where}: a picture of {width}x{height} pixels")

            # all lists of a record have an entry for each object
            valid = []
            for x0, y0, x1, y1 in record["boxes"]:
                area = x0 < x1 and y0 < y1
                inside = x0 < width and y0 < height and x1 > 0 and y1 > 0
                reading.count("boxes_without_area", not area)
                reading.count("boxes_outside", area and not inside)
                valid.append(area and inside)
            for key, value in record.items():
                if isinstance(value, list):
                    record[key] = list(itertools.compress(value, valid))
            yield number, where, record


def detection_coco(path, root, reading):
    """Yields (where, record) of COCO's instances, by image id. An image without annotations is a
    record without objects."""
    kind, data = sniff(path) if path.endswith(".json") else ("", None)
    if kind != "instances":
        fail(f"{path}: detection reads COCO's instances json or a VOCdevkit folder")

    # the annotations of each image, in the file's order
    of_image, images = {}, coco_images(path, data)
    for found in coco_objects(path, data, images, reading):
        of_image.setdefault(found[1]["image_id"], []).append(found)

    bases = folders(path, root, os.path.splitext(os.path.basename(path))[0].split("_")[-1])
    for image_id in sorted(images):
        where, image = images[image_id]
        name = get(where, image, "file_name", str)
        record = {"image": reading.find(bases, name), "image_id": image_id,
                  "height": get(where, image, "height", int),
                  "width": get(where, image, "width", int),
                  "boxes": [], "labels": [], "crowd": [], "difficult": [], "area": [],
                  "segmentation": []}
        for where_note, note, label, box in of_image.get(image_id, ()):
            record["boxes"].append(box)
            record["labels"].append(label)
            record["crowd"].append(int(note.get("iscrowd") or 0))
            record["difficult"].append(0)
            record["area"].append(optional(where_note, note, "area", float))
            outline = optional(where_note, note, "segmentation", ([[float]], dict))
            record["segmentation"].append(outline)
        yield where, record


# Our name of a split -> VOC's.
VOC_SPLITS = {"train": "trainval", "val": "val", "test": "test"}


def detection_voc(path, reading):
    """Yields (where, record) of VOC as published.

    train is the trainval of 2007 and 2012 (those that are there), val their val, test 2007's test;
    without a split each picture once.
    """
    # the lists that are there
    home = path
    if os.path.isdir(os.path.join(path, "VOCdevkit")):
        home = os.path.join(path, "VOCdevkit")
    lists = []
    for part, name in VOC_SPLITS.items():
        for year in ("2007",) if part == "test" else ("2007", "2012"):
            year = os.path.join(home, f"VOC{year}")
            file = os.path.join(year, "ImageSets", "Main", f"{name}.txt")
            if os.path.isfile(file) and reading.wants(part):
                lists.append((part, year, file))
    if not lists and not reading.splits:
        fail(f"{path}: no VOC2007/ImageSets/Main/trainval.txt or the like in it")

    # one record an annotation file
    reading.split_by_name = True
    reading.set_label_names(path, VOC_CLASSES)
    seen = set()
    for part, year, file in lists:
        for _, line in lines_of(file):
            name = line.split()[0]
            notes = os.path.join(year, "Annotations", name + ".xml")
            if notes not in seen:
                seen.add(notes)
                image = os.path.join(year, "JPEGImages", name + ".jpg")
                yield notes, {"image": image, "split": part, **voc_objects(notes)}


def voc_objects(file):
    """A picture's VOC annotation -> a record's size and objects.

    VOC counts pixels from 1, corners included: the box is [xmin - 1, ymin - 1, xmax, ymax].
    """
    record = {"boxes": [], "labels": [], "crowd": [], "difficult": []}
    try:
        notes = ElementTree.parse(file).getroot()
        record["height"] = int(notes.findtext("size/height"))
        record["width"] = int(notes.findtext("size/width"))

        # a missing element is None, which no number is made of
        for thing in notes.findall("object"):
            names = ("xmin", "ymin", "xmax", "ymax")
            x0, y0, x1, y1 = [float(thing.findtext("bndbox/" + name)) for name in names]
            if not fits([x0, y0, x1, y1], [float]) or x0 > x1 or y0 > y1:
                raise ValueError(f"no box: {x0} {y0} {x1} {y1}")
            record["boxes"].append([x0 - 1, y0 - 1, x1, y1])
            record["labels"].append(VOC_CLASSES.index(thing.findtext("name")))
            record["crowd"].append(0)
            record["difficult"].append(("0", "1").index(thing.findtext("difficult") or "0"))
    except OSError as e:
        fail(f"{file}: {e.strerror}")
    except (ElementTree.ParseError, TypeError, ValueError, LookupError) as e:
        fail(f"{file}: not a VOC annotation ({type(e).__name__}: {e})")
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
    # the outline, side by side, on the fine grid; the walk must end
    points = np.asarray(polygon, float).reshape(-1, 2)
    if not (np.abs(points) <= 10 * max(height, width)).all():
        raise ValueError("a corner far outside")
    points = (5 * points + 0.5).astype(int)
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
        if not fits(counts, [int]) or sum(counts) != height * width:
            raise ValueError("its runs do not add up")
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
                missing="drop", hold_out=0.0, image_id="file"):
    """Reads `spec` ("shapes", or files and folders separated by commas) as `source` -> Records.

    split: "train", "val", "test" (hashing: "database" too), or None for everything. Files without
    splits give all they have, or the split's part of it, see hold_out.
    image_root: a folder, or one per item of spec separated by commas.
    limit: at most so many records, chosen by `seed`, in file order.
    need: the record keys that the views require (see `needs`).
    missing: "drop" leaves out records whose files do not exist, "keep" keeps them.
    hold_out: of files without splits the share of pictures that is val, and as much test (see
    hold_out_part); the rest is train.
    image_id: "file" takes the files' ids of pictures where they have them; to "path" a picture is
    known by its location alone.
    Errors: DataError that names file, line and key.
    """
    # the files, and the folder of each one's images
    if source not in SOURCES:
        fail(f"no source '{source}' (there are: {', '.join(SOURCES)})")
    if image_id not in ("file", "path"):
        fail(f"--image_id {image_id}: file or path")
    if not 0 <= hold_out < 0.5:
        fail(f"--hold_out {hold_out}: a share of 0 to 0.5, twice of which is held out")
    world = spec == "shapes"
    if world:
        spec, image_root = world_files(source, split)
    paths = expand(spec)
    roots = image_roots(image_root, paths)

    # read them: here, or once for all processes of this machine
    options = source, paths, roots, split, list(need), missing, image_id
    if size_of(paths) < STORE_FROM:
        records, _ = read_files(*options)
    else:
        records = stored_records(*options)
    report_missing(records, spec)

    # val and test of files that have no such thing
    if hold_out and split and records.unsplit and not world:
        records = hold_out_part(records, split, hold_out, spec)

    # a random choice, in the files' order
    if limit and limit < len(records):
        chosen = random.Random(seed).sample(range(len(records)), limit)
        records = records.subset(sorted(chosen))
    return records


def read_files(source, paths, roots, split, need, missing, image_id, folder=None):
    """Reads files as a source -> (Records, {path: stamp} of all that was looked at). The arguments
    are those of open_source(); folder: where the records are written, if not into memory."""
    records = Records(source, split, roots[0] or os.path.dirname(paths[0]), folder)
    reading, ids = Reading(records, need), ImageIds(image_id == "path")
    stamps = {path: stamp(path) for path in paths}
    captions_seen = array.array("q")

    # records of other splits and of missing files are left out
    for number, where, record in SOURCES[source](list(zip(paths, roots)), reading):
        name, reading.name = reading.name, None
        if not reading.wants(record.pop("split", None)):
            continue
        check_keys(where, record, need)

        gone = reading.missing_file(record)
        if gone:
            reading.count("missing")
            if missing == "drop":
                records.first_gone = records.first_gone or (where, gone)
                continue

        # the id that the file gives: region files of image ids go by it
        own_id = record.pop("image_id", None)
        ids.add(number, where, record, own_id)
        if own_id is not None:
            record["own_id"] = own_id
        records.own_ids &= own_id is not None
        if source == "pairs":
            count_pair(record, captions_seen, reading)
        records.append(record, name_code(name or own_name(record, paths[number])))

    # what shows at the end
    records.finish()
    records.set_image_ids(ids.numbers(records, paths))
    records.unsplit = not (reading.splits or reading.split_by_name)
    if source == "pairs":
        reading.count("duplicates", len(captions_seen) - len(np.unique(captions_seen)))
        reading.count("repeated_images", ids.repeats)

    # splits in the order train, val, test, and counts that are not 0
    records.splits = sorted(reading.splits, key=lambda s: (s != "train", s == "test", s))
    records.notes = {note: count for note, count in records.notes.items() if count}
    return records, stamps | reading.here.stamps


# Files of so many bytes and more are read once for all processes of a machine, and kept.
STORE_FROM = 32 << 20


def size_of(paths):
    """Bytes of files and of the shards in folders. Any other folder is read by each process for
    itself: 0, whatever else there is."""
    total = 0
    for path in paths:
        shards = [path]
        if os.path.isdir(path):
            shards = [entry.path for entry in os.scandir(path) if entry.name.endswith(".tar")]
            if not shards:
                return 0
        total += sum(os.path.getsize(shard) for shard in shards)
    return total


def store_folder():
    """The folder of this user's in the system's temporary directory (TMPDIR) where records are
    kept."""
    folder = os.path.join(tempfile.gettempdir(), f"nanovlp-{os.getuid()}")
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
    except OSError as e:
        fail(f"{folder}: {e.strerror} (TMPDIR names another directory for it)")
    if os.lstat(folder).st_uid != os.getuid() or os.path.islink(folder):
        fail(f"{folder} is not this user's (TMPDIR names another directory for it)")
    return folder


def stored_records(source, paths, roots, split, *options):
    """The records of read_files(), read by the first process that asks and mapped by all others and
    in later runs.

    They are read again if a file or a listed folder has changed, or this file has. A lock, which
    dies with its process, makes the others wait. A store is written under another name: what a
    killed process leaves is written anew.
    """
    # of this working directory, for paths may be relative
    with open(__file__, "rb") as f:
        code = zlib.crc32(f.read())
    asked = json.dumps([code, os.getcwd(), source, paths, roots, *options])
    key = hashlib.blake2b(asked.encode(), digest_size=12).hexdigest()
    home = os.path.join(store_folder(), key)

    with open(home + ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # of files without splits one store serves all
        for folder in (home, f"{home}-{split}"):
            records = Records.load(folder)
            if records is not None:
                records.split = split
                return records

        more = ", ..." if len(paths) > 3 else ""
        say(f"reading {', '.join(paths[:3])}{more} once; what was read is kept in {home}")
        draft = home + ".draft"
        shutil.rmtree(draft, ignore_errors=True)
        os.mkdir(draft)
        try:
            records, stamps = read_files(source, paths, roots, split, *options, draft)
            if len(records):
                records.save(stamps)
                folder = home if records.unsplit else f"{home}-{split}"
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(draft, folder)
                records.map(folder)
            return records
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            fail(f"{home}: {e.strerror} (TMPDIR names another directory for it)")
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def plain_path(where):
    """A path without "./" and "//"; what is no path, as it is."""
    if type(where) is str and ("./" in where or "//" in where) and "://" not in where:
        return os.path.normpath(where)
    return where


def name_code(name):
    """A picture's name -> 64 bits, the same everywhere and always."""
    name = plain_path(name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def own_name(record, path):
    """The name of a record's picture as seen from its file or folder of --data; of text alone the
    text."""
    where = record.get("image") or record.get("feature")
    if where is None:
        return to_json(record)
    return os.path.relpath(where, path if os.path.isdir(path) else os.path.dirname(path) or ".")


MOST_HELD_OUT = 1000            # pictures that are evaluated on, where files have no splits


def hold_out_part(records, split, share, spec):
    """Of records without splits those that are the split's.

    A hash of a picture's name, as its file writes it, is a number of 0 to 1: below `share` the
    picture is val, below 2 * share it is test, all others are train. So a picture stays where it is
    when files grow, move or are shuffled. Of val and test the MOST_HELD_OUT with the smallest
    numbers are taken. Errors: there are none.
    """
    # each picture's number is that of its first record
    first, picture = unique_images(records)
    number = records.column("names")[first] / 2.0 ** 64
    part = np.where(number < share, 1, np.where(number < 2 * share, 2, 0))
    wanted = {"val": 1, "test": 2}.get(split, 0)

    # the smallest first
    chosen = np.flatnonzero(part == wanted)
    if wanted:
        chosen = chosen[np.argsort(number[chosen], kind="stable")][:MOST_HELD_OUT]
    if not len(chosen):
        fail(f"{spec}: no split '{split}' in it, and of its {len(first)} pictures hold_out {share} "
             "takes none (a larger --hold_out, or --eval_data of other files)")
    taken = np.zeros(len(first), bool)
    taken[chosen] = True

    # what went elsewhere
    out = records.subset(np.flatnonzero(taken[picture]))
    out.held_out = True
    counts = np.bincount(part[picture], minlength=3).tolist()
    for name, count, n in zip(("train", "val", "test"), counts, range(3)):
        if n != wanted and count:
            out.notes[f"held_for_{name}"] = count
    beyond = counts[wanted] - len(out)
    if beyond:
        out.notes["beyond_the_first_1000"] = beyond
    if ranks()[0] == 0:
        say(f"{spec} has no splits: {len(out):,} of {len(records):,} records are {split} by a hash "
            f"of their pictures' names (train {counts[0]:,}, val {counts[1]:,}, test {counts[2]:,};"
            f" --hold_out {share})")
    return out


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
    """Notes what a record of pairs has. seen: array of hashes of (image, caption), which grows."""
    image, captions = record["image"], record.get("caption", ())
    for caption in captions:
        seen.append(hash((image, caption)))
    if record.get("paraphrase"):
        reading.count("with_paraphrase")
    if record.get("tags"):
        reading.count("with_tags")
    if "caption" not in record:
        reading.count("without_caption")


def report_missing(records, spec):
    """Says how many records were left out. Errors: there are none left."""
    # some files were missing, or all of them
    missing = records.notes.get("missing", 0)
    if records.first_gone:
        where, path = records.first_gone
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
    """Gives each record its image_id, at the end, when all are known.

    That is the file's own number, offset so that the ids of two files never collide, or else the
    next number for each new picture. A picture met before (the same location) keeps its id,
    whatever the record says: an image is never its own negative.

    Locations are kept as 64 bits of each: two of n are taken for one with a chance of n^2 / 2^65,
    for 12 million once in 250,000 runs.

    by_path: the files' own ids do not count.
    """

    def __init__(self, by_path=False):
        self.by_path = by_path
        self.locations = array.array("q")   # of each record, the hash of its picture's location
        self.own = array.array("q")         # the file's number of it, or the hash of its name
        self.files = []                     # (its number in --data, its first record, kind of ids)
        self.repeats = 0                    # records whose picture was met before

    def add(self, file, where, record, own):
        """One more record, of file number `file`, to which the file gives the id `own`."""
        numbered = type(own) is int
        fits = 0 <= own < 1 << 62 if numbered else own is None or type(own) is str
        if not fits:
            fail(f"{where}: key 'image_id' is {own!r}: a number >= 0 or a name expected")

        # all ids of a file are of one kind: numbers, or names and none
        if not self.files or file != self.files[-1][0]:
            self.files.append((file, len(self.own), numbered))
        if numbered != self.files[-1][2]:
            fail(f"{where}: key 'image_id' is {own!r}: a number >= 0 in every record of a file, "
                 "or in none")

        # text alone (sts) has no location: its place is its own
        location = record.get("image") or record.get("feature") or (len(self.own),)
        self.locations.append(hash(plain_path(location)))
        self.own.append(own if numbered else -1 if own is None else hash(own) & (1 << 62) - 1)

    def numbers(self, records, paths):
        """The ids of the records -> (N,) int64. Errors: one id of a file is two pictures."""
        own, ids = np.array(self.own), np.zeros(len(self.own), np.int64)
        first = first_of_each(np.array(self.locations))
        is_new = first == np.arange(len(first))
        self.repeats = int((~is_new).sum())

        # each file's ids begin behind all those of the files before it
        offset, ends = 0, [start for _, start, _ in self.files[1:]] + [len(own)]
        for (file, start, numbered), end in zip(self.files, ends):
            new = start + np.flatnonzero(is_new[start:end])
            if not self.by_path:
                self.one_picture_each(new, own[new], records, paths[file])
            by_number = numbered and not self.by_path
            ids[new] = offset + (own[new] if by_number else np.arange(len(new)))
            offset = int(ids[new].max(initial=offset - 1)) + 1
        return ids[first]

    def one_picture_each(self, new, own, records, path):
        """Errors: two of the records `new` of a file, which are different pictures, have the same
        id of the file."""
        ids, counts = np.unique(own[own >= 0], return_counts=True)
        if (counts > 1).any():
            one, other = (records[i] for i in new[own == ids[counts > 1][0]][:2])
            fail(f"{path}: image_id {one['own_id']!r} is two pictures, {one['image']} and "
                 f"{other['image']} (--image_id path: a picture is known by its path alone)")


def first_of_each(values):
    """(N,) -> (N,) int64: where the same value stands first."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return first[which]


def unique_images(records):
    """-> (positions of the first record of each picture, (M,) int64; the position of each record's
    picture among those, (N,) int64)."""
    first = first_of_each(records.column("image_ids"))
    is_new = first == np.arange(len(first))
    return np.flatnonzero(is_new), (np.cumsum(is_new) - 1)[first]


# --------------------------------------------------------------------------------------------------
# Which source files are of

# A key of a source's records, and the first line of its tables, as they stand in the publisher's
# files.
TELLING_KEYS = {"questions": "vqa", "annotations": "vqa", "videos": "clips", "gold_label": "ve",
                "identifier": "nlvr2"}
TELLING_LINES = {r"([^\t]*\t){4}\d(\.\d+)?\t[^\t]+\t.*": "sts", r"\S+( [01])+\s*": "hashing",
                 r".*\bvideo_id[,;].*": "clips"}


def guess_source(spec):
    """The source of files or folders, from what is in them."""
    if spec == "shapes":
        return "pairs"
    guesses = []
    for path in expand(spec):
        guesses.append(guess_folder(path) if os.path.isdir(path) else guess_file(path))

    # instances complete captions; folders and tables go with the file before them
    return "pairs" if {"pairs", "detection"} <= set(guesses) else guesses[0]


def guess_file(path):
    # text by its first line
    name = os.path.basename(path)
    if name.endswith(".tar"):
        return "pairs"
    if not name.endswith((".json", ".jsonl")):
        _, line = next(lines_of(path), (path, ""))
        found = [source for row, source in TELLING_LINES.items() if re.fullmatch(row, line)]
        return "sts" if name.startswith("STS.") else next(iter(found), "pairs")

    # JSON by its keys, a list of records by the first one's
    data = read_json(path)
    first = data if isinstance(data, dict) else next(json_records(path, data), (None, {}))[1]
    if "images" in first:
        return "detection" if sniff_json(path, first) == "instances" else "pairs"
    return next((source for key, source in TELLING_KEYS.items() if key in first), "pairs")


def guess_folder(path):
    # published folders; files of several data sets may lie in one folder, and must be named
    names = visible(os.listdir(path))
    if {"VOCdevkit", "VOC2007", "VOC2012"} & set(names):
        return "detection"
    if any(re.match(r"STS\d|STS\.|stsb|sts-", name) for name in names):
        return "sts"
    if any(name.endswith(".tar") for name in names):
        return "pairs"
    for name in names:
        file = os.path.join(path, name)
        if name.endswith(".txt") and guess_file(file) == "hashing":
            return "hashing"
        if re.search(r"(?<!_stats)\.json$|\.(jsonl|tsv|csv|token)$", name):
            fail(f"{path}: name the file to check in this folder, for example {file}")

    # pictures here or beside their captions are pairs, pictures in folders classes
    first = next(pictures_in(path), None)
    if first is None:
        fail(f"{path}: neither pictures nor a data set in this folder")
    stem = os.path.splitext(first)[0]
    captioned = os.path.exists(stem + ".txt") or os.path.exists(stem + ".json")
    return "pairs" if captioned or os.path.samefile(os.path.dirname(first), path) else "classes"


# --------------------------------------------------------------------------------------------------
# Files beside the records: answers, tags, paraphrases

def read_answers(path):
    """An answer list, a JSON list of strings or one answer a line -> list of str, each once."""
    text = "\n".join(text_lines(path))
    answers = text.split("\n")
    if text.lstrip().startswith("["):
        answers = read_json(path)
        if not fits(answers, [str]):
            fail(f"{path}: a list of strings expected")
    answers = list(dict.fromkeys(answer.strip() for answer in answers))
    answers = [answer for answer in answers if answer]
    if not answers:
        fail(f"{path}: no answer in it")
    return answers


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


class Paraphrases:
    """A file of paraphrases: wordings_of(caption) -> list, each once, in the file's order.

    path: .jsonl or .json of {"caption": string, "paraphrase": string or list of strings}, or .tsv
    "caption TAB wording [TAB wording ...]". A caption may stand on several lines, and counts by
    same_words(). Of a caption 64 bits are kept.
    """

    def __init__(self, path):
        # the wordings of each line as a record, found by the hash of its caption
        self.lines, codes = Records("paraphrases", None), array.array("q")
        for where, caption, found in paraphrase_rows(path):
            found = [wording.strip() for wording in wordings(found)]
            if not found:
                fail(f"{where}: a caption and at least one paraphrase of it expected")
            self.lines.append({"caption": found})
            codes.append(hash(same_words(caption)))

        # sorted, those of one caption in the file's order
        self.order = np.argsort(np.array(codes), kind="stable")
        self.codes = array.array("q", np.array(codes)[self.order].tobytes())

    def __len__(self):
        return len(set(self.codes))

    def wordings_of(self, caption):
        code, found = hash(same_words(caption)), []
        at = bisect_left(self.codes, code)
        while at < len(self.codes) and self.codes[at] == code:
            found += self.lines[self.order[at]]["caption"]
            at += 1
        return list(dict.fromkeys(found))


def paraphrase_rows(path):
    """Yields (where, caption, its wordings) of each line of a file of paraphrases."""
    if path.endswith(".tsv"):
        for where, line in lines_of(path):
            caption, *found = line.split("\t")
            yield where, caption, found
        return
    for where, raw in json_records(path):
        found = get(where, raw, "paraphrase", (str, [str]))
        yield where, get(where, raw, "caption", str), found


def join_paraphrases(records, path):
    """Records whose captions have the paraphrases of a file (see Paraphrases) beside those
    that they came with; joined by the words of the caption.

    Errors: DataError if the file has none of the captions.
    """
    if not os.path.exists(path):
        fail(f"--paraphrase {path}: no such file")
    known, out = Paraphrases(path), records.subset(())
    captions = joined = with_paraphrase = 0
    for record in records:
        # each caption's own wordings, then those of the file
        own = record.get("paraphrase") or [None] * len(captions_of(record))
        both = []
        for caption, paraphrase in zip(captions_of(record), own):
            found = known.wordings_of(caption)
            both.append(wordings(paraphrase) + found)
            captions, joined = captions + 1, joined + bool(found)
        with_paraphrase += any(both)
        out.append(record | {"paraphrase": both if any(both) else None})

    if not joined:
        fail(f"--paraphrase {path}: none of its {len(known)} captions is one of the {captions} "
             "captions of these records")
    out.notes |= {"with_paraphrase": with_paraphrase, "paraphrased_captions": joined}
    return out


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
# The type and shape of each array: T regions in N pictures, features of F and G numbers.
REGION_ARRAYS = {"features": (np.float16, "T", "F"), "boxes": (np.float32, "T", "4"),
                 "labels": (np.int64, "T"), "scores": (np.float32, "T"),
                 "name_ends": (np.int64, "N"), "offsets": (np.int64, "N1"),
                 "sizes": (np.int64, "N", "2"), "names": (np.uint8, "bytes of names"),
                 "globals": (np.float16, "N", "G"), "bytes": (np.int64, "N")}
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
        header = as_dict(parse_json(blob[8:start].tobytes(), path), path)
        metadata = as_dict(header.pop("__metadata__", {}), path)

        # each array is a view of the file
        arrays = {}
        for name, entry in header.items():
            where = f"{path} array {name}"
            entry = as_dict(entry, where)
            begin, end = get(where, entry, "data_offsets", [int])
            shape = get(where, entry, "shape", [int])
            if not 0 <= begin <= end <= len(blob) - start or min(shape, default=0) < 0:
                fail(f"{where}: bytes {begin} to {end} of a shape {shape} are not in the file")
            content = blob[start + begin:start + end].view(types[get(where, entry, "dtype", str)])
            arrays[name] = content.reshape(shape)
        return arrays, metadata
    except OSError as e:
        fail(f"{path}: {e.strerror.lower()}")
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


def check_regions(path, arrays, metadata):
    """The names of a region file's labels, as a tuple. Errors: an array is absent, of another type
    or shape, or does not go with the others."""
    # letters stand for lengths, which must be the same everywhere: N1 is N + 1
    lacking = [name for name in REGION_ARRAYS if name not in arrays]
    lacking = [name for name in lacking if name not in ("globals", "bytes")]
    if lacking:
        fail(f"{path}: not a regions file, it lacks {', '.join(lacking)}")
    lengths = {"4": 4, "2": 2, "N1": len(arrays["name_ends"]) + 1}
    for name, (dtype, *letters) in REGION_ARRAYS.items():
        x = arrays.get(name)
        if x is None:
            continue
        wanted = [lengths.setdefault(k, n) for k, n in zip(letters, x.shape)]
        if x.dtype != dtype or list(x.shape) != wanted or x.ndim != len(letters):
            fail(f"{path}: array {name} is {x.dtype} {x.shape}, not {np.dtype(dtype)} "
                 f"({', '.join(letters)})")

    # the rows of the pictures and the ends of their names follow each other
    for name, last in (("offsets", lengths["T"]), ("name_ends", lengths["bytes of names"])):
        ends = np.concatenate([[0], arrays[name]])
        if (np.diff(ends) < 0).any() or ends[-1] != last or arrays["offsets"][0]:
            fail(f"{path}: array {name} does not rise from 0 to {last}")

    names = parse_json(optional(path, metadata, "label_names", str) or "[]", path)
    if not fits(names, [str]):
        fail(f"{path}: label_names is no list of names")
    return tuple(names)


class Regions:
    """Region files as one. regions[n] -> {name: array} of picture n.

    Attributes: dim F, classes K (0: no labels), global_dim G (0: none), most (regions of a
    picture), label_names, about (what made them), paths.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.files = [map_safetensors(path) for path in self.paths]

        # all files must be of one kind
        kinds, detectors = {}, {}
        for path, (arrays, metadata) in zip(self.paths, self.files):
            names = check_regions(path, arrays, metadata)
            global_dim = arrays["globals"].shape[1] if "globals" in arrays else 0
            kinds.setdefault((arrays["features"].shape[1], global_dim, names), path)
            detectors[get(path, metadata, "detector", str)] = None
        if len(kinds) > 1:
            fail(f"{' and '.join(kinds.values())} differ in feature size, global feature or label "
                 "names")

        # what they have in common
        self.dim, self.global_dim, names = next(iter(kinds))
        self.label_names = list(names)
        self.classes = len(names)
        self.about = "; ".join(detectors)

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
