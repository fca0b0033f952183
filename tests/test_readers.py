"""Readers under damage: a seeded mutator over every source, every format of pairs, and every other
file that formats.py reads.

Small files that are right are written, then one of them is damaged: cut, flipped, emptied, in
another encoding, a key removed, a value of a wrong type. What then happens is one of two things: a
DataError of one line that names the file, or records whose values mean something. By hand, more of
them: `READERS_TIMES=10 pytest tests/test_readers.py`."""

import io
import json
import os
import random
import re
import signal
import socket
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import formats
from tools.regions import collect_regions

TIMES = int(os.environ.get("READERS_TIMES", 1))
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
SECONDS = 10                    # a reader of files this small that takes longer hangs
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square is it two yes no".split()
SIZE = (24, 16)


# --------------------------------------------------------------------------------------------------
# Small files that are right: each function writes one data set into a folder -> what to damage, and
# --data

def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def refused(*parts):
    return pytest.raises(data.DataError, match=".*".join(map(re.escape, parts)))


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        Image.new("RGB", SIZE, (60 * n, 90, 200)).save(folder / name)


RECORDS = [{"image": "0.png", "image_id": 3, "split": "train", "caption": ["a red circle", "red"],
            "paraphrase": ["circle", ["a circle", "it is red"]], "tags": ["red", "circle"],
            "boxes": [[1, 2, 10.5, 12], [0, 0, 4, 4]], "labels": [0, 4],
            "label_names": ["circle", "square"]},
           {"image": "1.png", "image_id": 4, "caption": "it is blue", "other": [1, {"a": None}]}]


def records_lines(home):
    pictures(home, "0.png", "1.png")
    return [lines(home / "pairs.jsonl", RECORDS)]


def records_json(home):
    pictures(home, "0.png", "1.png")
    return [write(home / "pairs.json", RECORDS)]


def karpathy(home):
    images = []
    for n, part in enumerate(("train", "restval", "test")):
        images.append({"filename": f"{n}.png", "filepath": "val2014", "cocoid": 7 + n, "imgid": n,
                       "split": part, "sentences": [{"raw": "a red circle"}, {"raw": "it is red"}]})
    pictures(home / "val2014", "0.png", "1.png", "2.png")
    return [write(home / "dataset_coco.json", {"images": images, "dataset": "coco"})]


def coco(home):
    pictures(home / "val2017", "0.png", "1.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 24, "height": 16} for n in (0, 1)]
    captions = [{"image_id": n % 2, "id": n, "caption": f"a {n}"} for n in range(3)]
    run = {"size": [16, 24], "counts": [10, 20, 354]}
    notes = [{"id": 1, "image_id": 0, "category_id": 18, "bbox": [1, 2, 9, 9], "iscrowd": 0,
              "area": 40.5, "segmentation": [[1, 2, 10, 2, 10, 11]]},
             {"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0.5, 9, 9], "iscrowd": 1,
              "area": 20, "segmentation": run}]
    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    return [write(home / "captions_val2017.json", {"images": images, "annotations": captions}),
            write(home / "instances_val2017.json",
                  {"images": images, "annotations": notes, "categories": categories})]


def instances(home):
    return coco(home)[1:]


def tsv(home):
    pictures(home, "0.png", "1.png")
    return [write(home / "cc.tsv", "a red circle\t0.png\nit is blue\thttp://x.org/a/1.png?w=3\n")]


def token(home):
    pictures(home / "Flicker8k_Dataset", "0.jpg", "1.jpg")
    rows = "".join(f"{n % 2}.jpg#{n // 2}\ta red circle {n}\n" for n in range(4))
    return [write(home / "Flickr8k.token.txt", rows),
            write(home / "Flickr_8k.trainImages.txt", "0.jpg\n"),
            write(home / "Flickr_8k.testImages.txt", "1.jpg\n")][:1]


def captions_txt(home):
    pictures(home / "Images", "0.jpg", "1.jpg")
    return [write(home / "captions.txt", 'image,caption\n0.jpg,a red circle\n'
                                         '1.jpg,"it is ""red"" , blue"\n1.jpg,blue\n')]


def results_csv(home):
    pictures(home / "flickr30k_images", "0.jpg", "1.jpg")
    return [write(home / "results.csv", "image_name| comment_number| comment\n"
                                        "0.jpg| 0| a red circle\n1.jpg| 0| it is blue\n")]


def folder(home):
    pictures(home / "files" / "00000", "0.jpg", "1.jpg")
    write(home / "files" / "00000_stats.json", {"count": 2})
    return [write(home / "files" / "00000" / "0.txt", "a red circle"),
            write(home / "files" / "00000" / "1.json", {"caption": "it is blue", "key": "1"})]


def tar(home):
    picture = io.BytesIO()
    Image.new("RGB", SIZE, (1, 2, 3)).save(picture, "PNG")
    path = home / "00000.tar"
    home.mkdir(parents=True)
    parts = [("0.png", picture.getvalue()), ("0.txt", b"a red circle"),
             ("1.png", picture.getvalue()), ("1.json", b'{"caption": "it is blue"}')]
    with tarfile.open(path, "w") as out:
        for name, content in parts:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return [path]


def vqa(home):
    pictures(home / "images", "COCO_train2014_000000000042.jpg", "own.png")
    questions = [{"image_id": 42, "question": "is it red", "question_id": 1},
                 {"image_id": 7, "question": "is it two", "question_id": 2, "image": "own.png"}]
    notes = []
    for n in (1, 2):
        answers = [{"answer": word, "answer_id": k} for k, word in enumerate(("yes", "no"))]
        notes.append({"question_id": n, "image_id": 42, "answers": answers,
                      "answer_type": "yes/no", "question_type": "is it"})
    return [write(home / "v2_OpenEnded_mscoco_train2014_questions.json",
                  {"data_subtype": "train2014", "questions": questions}),
            write(home / "v2_mscoco_train2014_annotations.json", {"annotations": notes})]


def vqa_as_pairs(home):
    return vqa(home)[:1]


def gqa(home):
    pictures(home, "235.jpg")
    return [write(home / "gqa.json", {"05": {"imageId": "235", "question": "is it red?"},
                                      "06": {"imageId": "235", "question": "is it blue?"}})]


def ve(home):
    pictures(home, "1.jpg", "2.jpg")
    return [lines(home / "ve.jsonl", [
        {"Flickr30K_ID": "1", "gold_label": "neutral", "sentence2": "it is red", "pairID": "1#0"},
        {"image": "2.jpg", "gold_label": "-", "sentence2": "red"},
        {"image": "2.jpg", "gold_label": "entailment", "sentence2": "it is blue"}])]


def nlvr2(home):
    pictures(home / "dev", "dev-8-0-img0.png", "dev-8-0-img1.png")
    pictures(home / "train" / "63", "l.png", "r.png")
    return [lines(home / "dev.json", [
        {"identifier": "dev-8-0-3", "sentence": "left is red", "label": "True"},
        {"identifier": "train-9-1-0", "directory": 63, "sentence": "red", "label": False,
         "left_image": "l.png", "right_image": "r.png"}])]


def sts_folder(home):
    home = home / "STS12-en-test"
    return [write(home / "STS.input.MSRvid.txt", "a red\tit is red\nno\tyes\nis\tit\n"),
            write(home / "STS.gs.MSRvid.txt", "4.4\n\n0\n")]


def sts_table(home):
    row = "main-captions\tMSRvid\t2012test\t0000\t{}\tit is red\tit is {}\n"
    return [write(home / "sts-dev.csv", row.format("5.000", "red") + row.format(2, "blue"))]


def hashing(home):
    pictures(home / "coco", "0.jpg", "1.jpg")
    return [write(home / "test.txt", "data/coco/0.jpg 0 1 1\ncoco/1.jpg 0 0 1\n")]


def clips(home):
    videos, sentences = [], []
    (home / "features").mkdir(parents=True)
    for n, part in enumerate(("train", "validate", "test")):
        videos.append({"video_id": f"v{n}", "split": part})
        sentences.append({"video_id": f"v{n}", "caption": "a red circle"})
        np.save(home / "features" / f"v{n}.npy", np.ones((3, 4), np.float32))
    return [write(home / "videodatainfo.json", {"videos": videos, "sentences": sentences}),
            write(home / "1ka.csv", "key;vid_key;video_id;sentence\nret0;m;v2;it is red\n")]


def voc(home):
    things = ""
    for name in ("dog", "car"):
        box = "<xmin>1</xmin><ymin>2</ymin><xmax>9.5</xmax><ymax>12</ymax>"
        things += (f"<object><name>{name}</name><difficult>1</difficult><bndbox>{box}</bndbox>"
                   "</object>")
    year = home / "VOCdevkit" / "VOC2007"
    pictures(year / "JPEGImages", "1.jpg")
    size = "<size><width>24</width><height>16</height><depth>3</depth></size>"
    return [write(year / "Annotations" / "1.xml", f"<annotation>{size}{things}</annotation>"),
            write(year / "ImageSets" / "Main" / "trainval.txt", "1\n")]


# What a source reads, and how --data names it where that is not the damaged files themselves.
READERS = {
    "records_lines": (records_lines, "pairs", None), "records_json": (records_json, "pairs", None),
    "karpathy": (karpathy, "pairs", None), "coco": (coco, "pairs", None),
    "instances_as_pairs": (instances, "pairs", None), "tsv": (tsv, "pairs", None),
    "token": (token, "pairs", None), "captions_txt": (captions_txt, "pairs", None),
    "results_csv": (results_csv, "pairs", None), "folder": (folder, "pairs", "files"),
    "tar": (tar, "pairs", None), "vqa_as_pairs": (vqa_as_pairs, "pairs", None),
    "gqa": (gqa, "pairs", None), "vqa": (vqa, "vqa", None), "ve": (ve, "ve", None),
    "nlvr2": (nlvr2, "nlvr2", None), "sts_folder": (sts_folder, "sts", "STS12-en-test"),
    "sts_table": (sts_table, "sts", None), "hashing": (hashing, "hashing", None),
    "clips": (clips, "clips", None), "voc": (voc, "detection", "VOCdevkit"),
    "instances": (instances, "detection", None)}


# --------------------------------------------------------------------------------------------------
# What a record must be

def is_text(x):
    return isinstance(x, str) and x.strip() and x.encode("utf-8")


def is_number(x):
    return type(x) in (int, float) and abs(x) < 2 ** 63


def check_boxes(record):
    boxes = record.get("boxes", [])
    for x0, y0, x1, y1 in boxes:
        assert all(map(is_number, (x0, y0, x1, y1))) and x0 <= x1 and y0 <= y1
    for label in record.get("labels", []):
        assert type(label) is int and label >= 0
    for key in ("labels", "label_names", "crowd", "difficult", "area", "segmentation"):
        assert key not in record or len(record[key]) == len(boxes), key


def check_pairs(record):
    captions, paraphrases = record.get("caption"), record.get("paraphrase")
    if captions is not None:
        assert captions and isinstance(captions, list) and all(map(is_text, captions))
    if paraphrases is not None:
        assert len(paraphrases) == len(captions)
        for paraphrase in paraphrases:
            several = [paraphrase] if isinstance(paraphrase, str) else paraphrase
            assert all(isinstance(wording, str) for wording in several)
    assert all(isinstance(tag, str) for tag in record.get("tags", []))
    assert all(isinstance(name, str) for name in record.get("label_names", []))
    check_boxes(record)


def check_vqa(record):
    assert isinstance(record["question"], str) and type(record["question_id"]) is int
    answers = record["answers"]
    assert answers is None or answers and all(isinstance(answer, str) for answer in answers)
    for key in ("answer_type", "question_type"):
        assert isinstance(record.get(key, ""), str)


def check_sentence(record):
    assert is_text(record["caption"]) and record["label"] in (0, 1, 2)
    assert isinstance(record.get("pair_id"), (str, int, type(None)))


def check_sts(record):
    assert is_text(record["s1"]) and is_text(record["s2"])
    assert is_number(record["score"]) and 0 <= record["score"] <= 5


def check_hashing(record):
    assert set(record["labels"]) <= {0, 1} and record["labels"]


def check_clips(record):
    assert is_text(record["video_id"]) and all(map(is_text, record["caption"]))


def check_detection(record):
    check_boxes(record)
    width, height = record["width"], record["height"]
    assert width > 0 and height > 0
    for x0, y0, x1, y1 in record["boxes"]:
        assert x0 < x1 and y0 < y1 and x0 < width and y0 < height and x1 > 0 and y1 > 0
    assert all(area is None or is_number(area) for area in record.get("area", []))
    assert set(record["crowd"] + record["difficult"]) <= {0, 1}
    for outline in record.get("segmentation", []):
        if outline is not None:
            try:
                data.decode_mask(outline, height, width, record["image"])
            except data.DataError:
                pass                            # one line, when the mask is asked for


CHECKS = {"pairs": check_pairs, "vqa": check_vqa, "ve": check_sentence, "nlvr2": check_sentence,
          "sts": check_sts, "hashing": check_hashing, "clips": check_clips,
          "detection": check_detection}
VIEWS = {"pairs": dict(text="any_caption", text2="any_paraphrase"), "vqa": dict(text="question"),
         "ve": dict(text="caption", label="label"), "nlvr2": dict(text="caption", label="label"),
         "sts": dict(s1="sentence", s2="sentence"), "hashing": dict(labels="labels"),
         "clips": dict(text="caption"), "detection": dict(image="objects")}


def use(records, tokenizer):
    """Every record is well-formed, and samples can be made of it."""
    views = data.Views(records, VIEWS[records.name], tokenizer, 16, 8, train=False)
    data.tag_list(records)
    for i, record in enumerate(records):
        assert type(record["image_id"]) is int and 0 <= record["image_id"] < 2 ** 62
        for key in ("image", "image2", "feature"):
            assert isinstance(record.get(key, ""), (str, formats.TarMember))
        CHECKS[records.name](record)
        for tensor in views[i].values():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            assert tensor.isfinite().all()


# --------------------------------------------------------------------------------------------------
# Damage

DEEP = "[" * 10_000
WRONG = [None, [], {}, "", "x", " ", "a\nb", "\ud800", 0, 3, -1, 1.5, 2 ** 70, True, False,
         float("nan"), float("inf"), [None], ["a", 5], [[1, 2]], [[]], {"a": 1}, [{}], "\0",
         [-1.0, 2, 3, 4], 1e30, "../" * 30, "true", "True"]


def places(value, path=()):
    """Yields the path of keys to every value inside a JSON value, itself included."""
    yield path
    inside = enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        inside = value.items()
    for key, part in inside:
        yield from places(part, (*path, key))


def change(value, path, rng):
    """One value inside a JSON value is replaced, removed, or there twice -> the new value."""
    wrong = rng.choice(WRONG)
    if not path:
        return wrong
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    how = rng.choice(("replace", "replace", "replace", "remove", "twice"))
    if how == "replace":
        inside[path[-1]] = wrong
    elif how == "remove":
        del inside[path[-1]]
    elif isinstance(inside, list):
        inside.append(inside[path[-1]])
    else:
        inside["renamed"] = inside.pop(path[-1])
    return value


def damage_json(text, rng):
    """A wrong value somewhere in a file of JSON, or in a line of JSON lines."""
    rows = text.splitlines()
    several = len(rows) > 1
    at = rng.randrange(len(rows)) if several else 0
    value = json.loads(rows[at])
    path = rng.choice(list(places(value)))

    # what json.dumps does not write: depth, digits, a key twice
    mark = "@mark@"
    special = rng.randrange(12)
    if special < 3 and path:
        inside = value
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = mark
    else:
        value = change(value, path, rng)
    row = json.dumps(value)
    raw = (DEEP + "]" * 10_000, "9" * 5000, '1, "twice": 2, "twice": 3')[min(special, 2)]
    rows[at] = row.replace(f'"{mark}"', raw)
    return "\n".join(rows) + "\n"


def cut(b, rng):
    return b[:rng.randrange(len(b))]


def flip(b, rng):
    b = bytearray(b)
    for _ in range(rng.choice((1, 1, 2, 8))):
        b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    return bytes(b)


def splice(b, rng):
    """A piece of the file again, somewhere else."""
    start, at = rng.randrange(len(b)), rng.randrange(len(b))
    return b[:at] + b[start:start + rng.randrange(1, 40)] + b[at:]


def insert(b, rng):
    at = rng.randrange(len(b) + 1)
    piece = rng.choice((b"\0", b"\n", b"\t", b",", b'"', b"\r", b"\xff\xfe", b"nan", b"-1", b"|",
                        b"9" * 5000, b"[" * 10_000, b"x" * 200_000, b"<a>" * 5000,
                        "\u2028".encode()))
    return b[:at] + piece + b[at:]


def replace_number(b, rng):
    """A number in the text becomes one that means nothing."""
    starts = [i for i, char in enumerate(b) if 48 <= char < 58]
    at = rng.choice(starts) if starts else 0
    word = rng.choice((b"nan", b"-7", b"1e999", b"inf", b"", b"x", b"99999999999999999999", b"0.5"))
    return b[:at] + word + b[at + 1:]


def encode(b, rng):
    text = b.decode("utf-8", "replace")
    how = rng.choice(("utf-16", "utf-16-le", "utf-8-sig", "crlf", "latin-1", "empty", "blank"))
    if how in ("empty", "blank"):
        return b"" if how == "empty" else b"\n \n"
    if how == "crlf":
        return text.replace("\n", "\r\n").encode()
    return (text + "\u00e9\n").encode(how, "replace")


BYTES = (cut, flip, flip, splice, insert, insert, replace_number, replace_number, encode)


def damaged(path, content, rng):
    """The bytes of a file -> damaged ones."""
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        return damage_json(content.decode(), rng).encode("utf-8")
    return rng.choice(BYTES)(content, rng)


class TooSlow(Exception):
    pass


def alarm(signum, frame):
    raise TooSlow


def trial(names, do, counts, about):
    """do() either works or ends in one line that names one of the files."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        do()
        counts["read"] += 1
    except data.DataError as e:
        message = str(e)
        assert message.startswith("data.py: ") and "\n" not in message, (about, message)
        assert len(message) < 2000, (about, message[:300])
        assert any(name in message for name in names), (about, message)
        counts["refused"] += 1
    except AssertionError as e:
        raise AssertionError(about) from e
    except TooSlow:
        raise AssertionError(f"{about}: longer than {SECONDS} s") from None
    except Exception as e:
        raise AssertionError(f"{about}: {type(e).__name__}: {e}") from e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def hurt(files, names, do, times, seed):
    """Damages one of the files, `times` times, each time from its whole state."""
    signal.signal(signal.SIGALRM, alarm)
    whole = {path: path.read_bytes() for path in files}
    counts = {"read": 0, "refused": 0}
    for n in range(times * TIMES):
        rng = random.Random(f"{seed} {n}")
        path = rng.choice(files)
        path.write_bytes(damaged(path, whole[path], rng))
        trial(names, do, counts, f"{path.name}, {seed} {n}")
        path.write_bytes(whole[path])
    return counts


@pytest.fixture
def home(tmp_path):
    """A folder in memory where there is one: thousands of files are written."""
    root = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() else tmp_path) as folder:
        yield Path(folder) / "data"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("vocab") / "vocab.txt", "\n".join(WORDS) + "\n")
    return data.get_tokenizer(str(path))


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_or_read_with_meaning(home, tokenizer, name):
    make, source, named = READERS[name]
    files = make(home)
    spec = str(home / named) if named else ",".join(map(str, files))
    names = [path.name for path in files] + [named] * bool(named)

    def do():
        use(data.open_source(source, spec, None), tokenizer)

    # whole, it is read
    do()
    counts = hurt(files, names, do, 200, name)
    assert min(counts.values()) > 10 * TIMES, counts


# --------------------------------------------------------------------------------------------------
# The other files that are read

def vocabulary(home):
    path = write(home / "vocab.txt", "\n".join(WORDS) + "\n")

    def do():
        tokenizer = data.get_tokenizer(str(path))
        ids = tokenizer.encode("a red circle", 8)
        assert max(ids) < tokenizer.vocab_size == len(tokenizer.words) and all(tokenizer.words)
    return path, do


def answers(home):
    path = write(home / "answers.json", ["yes", "no", "2"])

    def do():
        assert all(map(is_text, data.read_answers(str(path))))
    return path, do


def answer_lines(home):
    path = write(home / "answers.txt", "yes\nno\n2\n")

    def do():
        assert all(map(is_text, data.read_answers(str(path))))
    return path, do


def paraphrases(home):
    path = lines(home / "p.jsonl", [{"caption": "a red circle", "paraphrase": ["circle", "red"]},
                                    {"caption": "it is blue", "paraphrase": "blue"}])
    return path, lambda: check_paraphrases(path)


def paraphrase_table(home):
    path = write(home / "p.tsv", "a red circle\tcircle\tred\nit is blue\tblue\n")
    return path, lambda: check_paraphrases(path)


def check_paraphrases(path):
    records = data.Records("pairs", None)
    records.append({"image": "a", "image_id": 0, "caption": ["a red circle", "it is blue"]})
    for wordings in data.join_paraphrases(records, str(path))[0]["paraphrase"]:
        assert all(map(is_text, wordings))


def tag_words(home):
    path, records = write(home / "nouns.txt", "circle\nred\n"), data.Records("pairs", None)
    records.append({"image": "a", "image_id": 0, "caption": ["a red circle"]})

    def do():
        made = data.caption_tags(records, str(path))
        assert set(made[0]["tags"]) <= {"a", "red", "circle"}
    return path, do


def clip_features(home):
    path = home / "v0.npy"
    home.mkdir()
    np.save(path, np.ones((3, 4), np.float32))

    def do():
        frames = data.read_frames(str(path))
        assert frames.ndim == 2 and frames.size
    return path, do


def regions(home):
    pictures(home, "0.png", "1.png")
    path, records = home / "r.safetensors", data.Records("pairs", None)
    for n in (0, 1):
        records.append({"image": str(home / f"{n}.png"), "image_id": n})

    def look(record):
        return {"name": Path(record["image"]).name, "size": SIZE, "scores": np.ones(2),
                "boxes": np.ones((2, 4)), "labels": np.arange(2), "features": np.ones((2, 3))}

    about = {"detector": "a test", "root": str(home), "label_names": '["a", "b"]'}
    collect_regions(str(path), records, 2, look, about, quiet=True)

    def do():
        found = data.Regions([str(path)])
        assert all(isinstance(name, str) for name in found.label_names)
        for table in found.tables():
            for n in table.values():
                assert len(found[n]["boxes"]) <= found.most and len(found[n]["sizes"]) == 2
                found[n]["boxes"] + 1                   # the bytes are there
    return path, do


OTHERS = (vocabulary, answers, answer_lines, paraphrases, paraphrase_table, tag_words,
          clip_features, regions)


@pytest.mark.parametrize("make", OTHERS, ids=lambda make: make.__name__)
def test_other_damaged_files(home, make):
    path, do = make(home)
    do()
    counts = hurt([path], [path.name], do, 100, make.__name__)
    assert counts["refused"] > 5 * TIMES, counts


def test_a_damaged_header_of_a_region_file(home):
    """Of its JSON, with the length before it put right: names, types, shapes, places."""
    path, do = regions(home)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    signal.signal(signal.SIGALRM, alarm)
    counts = {"read": 0, "refused": 0}
    for n in range(150 * TIMES):
        rng = random.Random(f"header {n}")
        header = damage_json(whole[8:8 + size].decode(), rng).encode("utf-8")
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size:])
        trial([path.name], do, counts, f"header {n}")
    assert counts["refused"] > 100 * TIMES, counts


@pytest.mark.parametrize("change_it, words", [
    (lambda h: h["boxes"].update(shape=[-1, 4]), "array boxes: bytes"),
    (lambda h: h["boxes"].update(data_offsets=[0, 10 ** 9]), "are not in the file"),
    (lambda h: h["boxes"].update(shape=[2, 8]), "array boxes is float32 (2, 8)"),
    (lambda h: h["__metadata__"].update(label_names="[1, 2]"), "label_names is no list of names"),
    (lambda h: h["__metadata__"].pop("detector"), "no key 'detector'"),
    (lambda h: h["offsets"].update(data_offsets=h["name_ends"]["data_offsets"], shape=[2]),
     "array offsets is int64 (2,)"),
    (lambda h: h["sizes"].update(shape=[4]), "array sizes is int64 (4,)"),
])
def test_region_files_whose_header_does_not_go_with_them(home, change_it, words):
    path, do = regions(home)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + size])
    change_it(header)
    header = json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size:])
    with refused("r.safetensors", words):
        do()


def test_rows_of_a_region_file_follow_each_other(home):
    path, do = regions(home)
    whole = path.read_bytes()
    good = np.array([0, 2, 4], np.int64).tobytes()
    assert whole.count(good) == 1
    for bad in ([0, 3, 2], [1, 2, 4], [0, 2, 5], [0, -1, 4]):
        path.write_bytes(whole.replace(good, np.array(bad, np.int64).tobytes()))
        with refused("r.safetensors: array offsets does not rise from 0 to 4"):
            do()


def test_text_in_another_encoding_is_not_read(tmp_path):
    """UTF-16 with its mark and without it; as UTF-8 the latter has a NUL behind each letter."""
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path = tmp_path / "p.tsv"
        path.write_bytes("a red circle\tcircle\n".encode(encoding))
        with refused("p.tsv", "not UTF-8 text"):
            list(data.lines_of(str(path)))


# --------------------------------------------------------------------------------------------------
# Pictures

FORMATS = {"a.jpg": {}, "a.png": {}, "p.png": {"mode": "P"}, "a.gif": {"mode": "P"},
           "a.webp": {}, "a.bmp": {}, "a.tif": {}, "l.tif": {"compression": "tiff_lzw"},
           "a.ppm": {}, "i.png": {"mode": "I;16"}, "f.tif": {"mode": "F"}, "e.jpg": {"exif": True}}


def a_picture(path, mode="RGB", exif=False, **options):
    noise = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if mode == "I;16":
        image = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    elif mode == "F":
        image = Image.fromarray(noise[..., 0].astype(np.float32) / 255)
    elif mode != "RGB":
        image = image.convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_picture_is_bad_or_a_picture(home, name):
    path = a_picture(home / name, **FORMATS[name])
    whole, bad = path.read_bytes(), 0
    signal.signal(signal.SIGALRM, alarm)
    assert data.load_image(str(path)).mode == "RGB"
    for n in range(120 * TIMES):
        rng = random.Random(f"{name} {n}")
        path.write_bytes(rng.choice((cut, flip, flip, splice, insert))(whole, rng))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            image = data.load_image(str(path))
            assert image.mode == "RGB" and min(image.size) > 0
        except data.BadImage as e:
            bad += 1
            assert str(e), n
        except Exception as e:
            raise AssertionError(f"{name} {n}: {type(e).__name__}: {e}") from e
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert bad > 5 * TIMES


def test_kinds_of_pictures(tmp_path):
    """Each is scaled by a stated rule, and none comes out black."""
    grey = np.full((6, 8), 0.5)
    made = {"float 0 to 1": (grey.astype(np.float32), 127), "12 bits": (grey * 4000, 125),
            "float 0 to 255": ((grey * 201).astype(np.float32), 100),
            "16 bits": (grey * 60000, 117),
            "8 in 16 bits": (grey * 200, 100), "32 bits": ((grey * 60000).astype(np.int32), 117)}
    for name, (values, wanted) in made.items():
        values = values if values.dtype != np.float64 else values.astype(np.uint16)
        path = tmp_path / f"{name}.tif"
        Image.fromarray(values).save(path)
        found = data.load_image(str(path))
        assert found.mode == "RGB" and found.getpixel((0, 0)) == (wanted,) * 3, name

    # no rule says what is white
    for name, value in (("nan", np.nan), ("below", -3), ("above", 1e6)):
        Image.fromarray(np.full((6, 8), value, np.float32)).save(tmp_path / f"{name}.tif")
        with pytest.raises(data.BadImage, match="what is white"):
            data.load_image(str(tmp_path / f"{name}.tif"))

    # transparency is dropped: the colours stay
    base = Image.new("RGBA", (8, 6), (200, 100, 50, 0))
    base.save(tmp_path / "a.png")
    base.convert("LA").save(tmp_path / "la.png")
    palette = Image.new("P", (8, 6))
    palette.putpalette([200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=0)
    Image.new("CMYK", (8, 6), (0, 128, 200, 40)).save(tmp_path / "c.jpg")
    for name in ("a.png", "la.png", "p.png", "c.jpg"):
        assert max(data.load_image(str(tmp_path / name)).getpixel((1, 1))) > 90, name


def test_pictures_that_move_and_pictures_of_odd_sizes(tmp_path, tokenizer):
    frames = [Image.new("RGB", (8, 6), color) for color in ((250, 0, 0), (0, 0, 250))]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        found = data.load_image(str(tmp_path / name)).getpixel((1, 1))
        assert found[0] > 200 > 50 > found[2], "the first frame"

    # one pixel, and one row of them: every view makes a square of it
    for size in ((1, 1), (1, 30_000), (30_000, 1)):
        Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "odd.png")
        found = data.load_image(str(tmp_path / "odd.png"))
        for name, view in data.IMAGE_VIEWS.items():
            assert view(found, 16, random.Random(0), (0.2, 1.0)).size == (16, 16), (name, size)

    # a header that says 20,000 x 20,000: refused before a byte is decoded
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(data.BadImage, match="too many|decompression bomb"):
        data.load_image(str(tmp_path / "bomb.png"))


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder", "empty", "absent"])
def test_what_is_no_file_is_no_picture(tmp_path, monkeypatch, kind):
    """And is not waited for."""
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)             # a socket's path may have 100 characters
        socket.socket(socket.AF_UNIX).bind("a.jpg")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with pytest.raises(data.BadImage):
            data.load_image(str(path))
        if kind != "empty" and kind != "absent":
            # features of a clip neither
            with refused(path.name, "not a"):
                data.read_frames(str(path))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_bad_picture_is_named_whatever_the_source(home, tokenizer, capsys):
    """Its path, as Views report it; the second picture of NLVR2 as the first one."""
    cases = ((nlvr2, "nlvr2", dict(image="plain", image2="plain"), "dev/dev-8-0-img1.png"),
             (voc, "detection", dict(image="objects"), "VOCdevkit/VOC2007/JPEGImages/1.jpg"),
             (ve, "ve", dict(image="plain"), "2.jpg"),
             (vqa, "vqa", dict(image="plain"), "images/own.png"),
             (hashing, "hashing", dict(image="plain"), "coco/1.jpg"),
             (folder, "pairs", dict(image="plain"), "files/00000/1.jpg"))
    for make, source, views, bad in cases:
        here = home / make.__name__
        named = {"voc": "VOCdevkit", "folder": "files"}.get(make.__name__)
        files = make(here)
        (here / bad).write_bytes(b"no picture")
        spec = str(here / named) if named else ",".join(map(str, files))
        records = data.open_source(source, spec, None)
        shown = data.Views(records, views, tokenizer, 16, 8, train=False)
        assert sum(int(shown[i]["bad"]) for i in range(len(records))) == 1, source
        assert f"unreadable image {here / bad}: no image format" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Formats as they are published

def captions_of(records):
    return {Path(record["image"]).name: record["caption"] for record in records}


def test_flickr_token_files(tmp_path):
    """Flickr8k: with its lists of splits, its odd name, and its pictures in no list."""
    pictures(tmp_path / "Flicker8k_Dataset", "1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg")
    rows = [f"{name}.jpg#{k}\tA {name} , {k} .\n" for name in ("1_a", "2_b", "3_c", "4_d")
            for k in range(5)] + ["2258277193_586949ec62.jpg.1#0\tSome people\n"]
    home = tmp_path / "Flickr8k_text"
    token = str(write(home / "Flickr8k.token.txt", "".join(rows)))
    for part, names in (("train", "1_a.jpg\n2_b.jpg\n"), ("dev", "3_c.jpg\n"), ("test", "")):
        write(home / f"Flickr_8k.{part}Images.txt", names)
    train, val = (data.open_source("pairs", token, part) for part in ("train", "val"))
    assert list(captions_of(train)) == ["1_a.jpg", "2_b.jpg"]
    assert list(captions_of(val)) == ["3_c.jpg"]
    assert captions_of(train)["2_b.jpg"] == [f"A 2_b , {k} ." for k in range(5)]
    assert train.notes["in_no_split"] == 2 and train.splits == ["train", "val"]

    # a picture in two lists
    write(home / "Flickr_8k.testImages.txt", "3_c.jpg\n")
    with refused("Flickr_8k.testImages.txt line 1", "3_c.jpg is in the list of dev too"):
        data.open_source("pairs", token, "train")

    # Flickr30k: no lists
    pictures(tmp_path / "f30k" / "flickr30k-images", "1000092795.jpg")
    token = write(tmp_path / "f30k" / "results_20130124.token", "1000092795.jpg#0\tTwo guys .\n")
    records = data.open_source("pairs", str(token), "train")
    assert captions_of(records) == {"1000092795.jpg": ["Two guys ."]} and records.splits == []
    with refused("results_20130124.token line 2", "'NAME.jpg#0 TAB caption' expected"):
        write(token, token.read_text() + "1000092795.jpg Two guys .\n")
        data.open_source("pairs", str(token), "train")


def test_tables_with_a_header(tmp_path):
    """Kaggle's captions.txt has quotes; results.csv has none, and one row without its bar."""
    pictures(tmp_path / "Images", "0.jpg", "1.jpg")
    table = write(tmp_path / "captions.txt", 'image,caption\r\n0.jpg,A red circle .\r\n'
                                             '0.jpg,"A dog , a ""cat"" ."\r\n1.jpg,one, two\r\n')
    found = captions_of(data.open_source("pairs", str(table), None))
    assert found == {"0.jpg": ["A red circle .", 'A dog , a "cat" .'], "1.jpg": ["one, two"]}
    with refused("captions.txt line 3", "not a table"):
        write(table, 'image,caption\n0.jpg,a\n0.jpg,"A dog\n')
        data.open_source("pairs", str(table), None)

    pictures(tmp_path / "flickr30k_images", "3.jpg", "4.jpg")
    table = write(tmp_path / "results.csv",
                  "image_name| comment_number| comment\n3.jpg| 0| Two \"guys\" , here .\n"
                  "3.jpg| 1| A guy | a boy .\n4.jpg| 4   A dog runs .\n4.jpg| 0| A dog .\n")
    records = data.open_source("pairs", str(table), None)
    assert captions_of(records) == {"3.jpg": ['Two "guys" , here .', "A guy | a boy ."],
                                    "4.jpg": ["A dog ."]}
    assert records.notes["damaged_rows"] == 1


def test_folders_of_files_and_plain_folders(tmp_path):
    home = tmp_path / "cc"
    pictures(home / "00000", "000000000.jpg", "000000001.jpg", "000000002.jpg")
    pictures(home / "00001", "000010000.jpg", ".hidden.jpg")
    pictures(home / ".git", "0.jpg")
    pictures(home / "__MACOSX", "1.jpg")
    write(home / "00000" / "000000000.txt", "a red circle\n")
    write(home / "00000" / "000000001.json", {"caption": "json's", "url": "http://x"})
    write(home / "00000" / "000000003.txt", "its picture is lost")
    write(home / "00001" / "000010000.json", {"caption": None})
    write(home / "00000_stats.json", {"count": 4})
    records = data.open_source("pairs", str(home), "train", need=("caption",))
    assert captions_of(records) == {"000000000.jpg": ["a red circle"], "000000001.jpg": ["json's"]}
    assert records.notes == {"no_caption_left": 2, "missing": 1}

    # no caption anywhere: pictures alone, at any depth
    plain = tmp_path / "plain"
    pictures(plain / "b" / "c", "1.jpg")
    pictures(plain, "2.jpg", "0.PNG", ".x.jpg")
    pictures(plain / "__MACOSX", "2.jpg")
    write(plain / "notes.txt", "no picture")
    records = data.open_source("pairs", str(plain), None)
    names = [os.path.relpath(record["image"], plain) for record in records]
    assert names == ["0.PNG", "2.jpg", "b/c/1.jpg"] and records.notes == {"without_caption": 3}
    with refused("0.PNG: no key 'caption'"):
        data.open_source("pairs", str(plain), "train", need=("caption",))
    (tmp_path / "void").mkdir()
    with refused("void: no pictures and no .tar shards"):
        data.open_source("pairs", str(tmp_path / "void"), "train")


def test_annotations_of_vqa_are_found_beside_the_questions(tmp_path):
    questions, annotations = vqa(tmp_path / "train")
    more, others = vqa(tmp_path / "val")
    for path in (more, others):
        text = path.read_text().replace('"question_id": ', '"question_id": 1')
        path.unlink()
        path = path.with_name(path.name.replace("train", "val"))
        write(path, text.replace("train2014", "val2014"))
    picture = tmp_path / "val" / "images" / "COCO_train2014_000000000042.jpg"
    picture.rename(picture.with_name("COCO_val2014_000000000042.jpg"))

    # several files, each with its own
    spec = f"{questions},{tmp_path}/val/v2_OpenEnded_mscoco_val2014_questions.json"
    records = data.open_source("vqa", spec, "train", need=("answers",))
    assert [record["question_id"] for record in records] == [1, 2, 11, 12]
    for record in records:
        assert record["answers"] == ["yes", "no"]
        assert (record["answer_type"], record["question_type"]) == ("yes/no", "is it")

    # named all the same, and not there
    assert len(data.open_source("vqa", f"{questions},{annotations}", "train")) == 2
    annotations.unlink()
    beside = "train/v2_mscoco_train2014_annotations.json"
    with refused("train2014_questions.json: its annotations", beside):
        data.open_source("vqa", spec, "train", need=("answers",))
    records = data.open_source("vqa", str(questions), "test")
    assert records[0]["answers"] is None and records.notes == {"without_answers": 2}


# --------------------------------------------------------------------------------------------------
# Values without a meaning: one line that names file, record and key, or a count

@pytest.mark.parametrize("key, value, words", [
    ("labels", [0, "dog"], "key 'labels' is list [0, 'dog'], wanted: list of whole numbers"),
    ("labels", [0, True], "key 'labels' is list [0, True]"),
    ("labels", [0, -1], "key 'labels' holds -1"),
    ("labels", [0], "1 labels for 2 boxes"), ("label_names", ["a"], "1 label_names for 2 boxes"),
    ("boxes", [[0, 0, 1, float("nan")], [0, 0, 1, 1]], "key 'boxes' is list"),
    ("boxes", [[0, 0, 1, float("inf")], [0, 0, 1, 1]], "wanted: list of lists of finite numbers"),
    ("boxes", [[0, 0, 1, 1], [5, 0, 1, 1]], "key 'boxes' holds [5, 0, 1, 1]"),
    ("boxes", [[0, 0, 1, 1], [0, 5, 1, 1]], "x1 <= x2 and y1 <= y2"),
    ("boxes", 3, "key 'boxes' is int 3"), ("tags", ["a", 5], "key 'tags' is list ['a', 5]"),
    ("image_id", 3.0, "key 'image_id' is float 3.0, wanted: whole number or string"),
    ("image_id", True, "key 'image_id' is bool True"),
    ("image_id", 2 ** 64, "key 'image_id' is int 18446744073709551616"),
    ("image_id", [1], "key 'image_id' is list [1]"),
    ("split", 1, "key 'split' is int 1, wanted: string"),
    ("caption", 5, "key 'caption' is int 5"), ("caption", "\ud800", "key 'caption' is str"),
    ("image", "\0.png", "key 'image' is str"), ("caption", "a\0", "key 'caption' is str"),
    ("image", None, "no key 'image' (it has: image_id, split"),
])
def test_a_record_with_such_a_value(tmp_path, key, value, words):
    pictures(tmp_path, "0.png", "1.png")
    path = lines(tmp_path / "a.jsonl", [RECORDS[1], {**RECORDS[0], key: value}])
    with refused("a.jsonl line 2: ", words):
        data.open_source("pairs", str(path), None)


def test_an_image_id_of_null_is_none(tmp_path):
    pictures(tmp_path, "0.png", "1.png")
    rows = [{**row, "image_id": None} for row in RECORDS]
    records = data.open_source("pairs", str(lines(tmp_path / "a.jsonl", rows)), None)
    assert [record["image_id"] for record in records] == [0, 1] and not records.own_ids


@pytest.mark.parametrize("change_it, words", [
    (lambda i: i["annotations"][0].update(bbox=[1, 2, -3, 4]), "[0]: key 'bbox' is [1, 2, -3"),
    (lambda i: i["annotations"][0].update(bbox=[1, 2, 3]), "[x, y, width, height]"),
    (lambda i: i["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "[0]: key 'bbox'"),
    (lambda i: i["annotations"][1].update(category_id="dog"), "annotations[1]: key 'category_id'"),
    (lambda i: i["annotations"][1].update(iscrowd=3), "annotations[1]: key 'iscrowd' is 3"),
    (lambda i: i["categories"][1].update(id=18), "categories[1]: id 18 occurs twice"),
    (lambda i: i["images"][1].update(id=0), "images[1]: id 0 occurs twice, first in"),
    (lambda i: i["images"].append(None), "images[2]: an object {...} expected"),
    (lambda i: i["images"][1].pop("file_name"), "images[1]: no key 'file_name'"),
])
def test_instances_with_such_a_value(tmp_path, change_it, words):
    path, = instances(tmp_path)
    value = json.loads(path.read_text())
    change_it(value)
    write(path, value)
    for source in ("pairs", "detection"):
        with refused("instances_val2017.json", words):
            data.open_source(source, str(path), None)


def test_coco_annotations_without_their_image_are_counted(tmp_path):
    captions, things = coco(tmp_path)
    for path in (captions, things):
        value = json.loads(path.read_text())
        value["annotations"][1]["image_id"] = 77
        write(path, value)
    both = f"{captions},{things}"
    for source, spec, lost in (("pairs", both, 2), ("detection", str(things), 1)):
        records = data.open_source(source, spec, None)
        assert len(records) == 2 and records.notes["annotations_without_image"] == lost

    # picture 1 has no object and no caption left: a record all the same, which tasks may refuse
    assert records[1]["boxes"] == []
    records = data.open_source("pairs", both, None)
    assert "caption" not in records[1] and records.notes["without_caption"] == 1
    with refused("images[1]: no key 'caption'"):
        data.open_source("pairs", both, "train", need=("caption",))

    # a number as a caption
    value["annotations"] = [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": 5}]
    with refused("annotations[1]: key 'caption' is int 5"):
        data.open_source("pairs", str(write(captions, value)), None)


def test_boxes_outside_the_picture(tmp_path, tokenizer):
    """Beside it: left out and counted. Over its edge: as published for what is measured, cut for
    what is learned."""
    path, = instances(tmp_path)
    value = json.loads(path.read_text())
    note = value["annotations"][0]
    value["annotations"] = [dict(note, id=n, bbox=box) for n, box in enumerate(
        ([30, 2, 5, 5], [-9, 2, 9, 5], [20.5, -3, 9, 30], [1, 1, 0, 4], [1, 2, 3, 4]))]
    records = data.open_source("detection", str(write(path, value)), None)
    assert records[0]["boxes"] == [[20.5, -3, 29.5, 27], [1, 2, 4, 6]]
    assert records.notes == {"boxes_outside": 2, "boxes_without_area": 1}
    shown = data.Views(records, dict(image="objects"), tokenizer, None, 8, train=False)[0]
    assert shown["boxes"][0].tolist() == [[20.5, 0, 24, 16], [1, 2, 4, 6]]


def test_masks_that_would_never_end():
    for outline in ([[0, 0, 1e12, 0, 1e12, 5]], [[0, 0, float("nan"), 1, 2, 2]],
                    {"counts": [2 ** 40, 5]}, {"counts": [-5, 389]}, {"counts": "P" * 50}):
        with refused("a.jpg: not COCO's polygons or run lengths of a 24x16 picture"):
            data.decode_mask(outline, 16, 24, "a.jpg")


@pytest.mark.parametrize("source, make, old, new, words", [
    ("clips", clips, '"video_id": "v1", "sp', '"video_id": "v0", "sp', "v0 occurs twice"),
    ("clips", clips, '"caption": "a', '"caption": 5, "b": "a', "[0]: key 'caption' is int"),
    ("vqa", vqa, '"question_id": 2, "image"', '"question_id": 1, "image"', "1 occurs twice"),
    ("vqa", vqa, '"image_id": 42', '"image_id": 42.0', "key 'image_id' is float"),
    ("nlvr2", nlvr2, '"label": "True"', '"label": 1', "wanted: string or truth value"),
    ("nlvr2", nlvr2, '"identifier": "dev', '"identifier": 3, "x": "dev', "'identifier' is int"),
    ("ve", ve, '"Flickr30K_ID": "1"', '"Flickr30K_ID": [1]', "line 1: key 'Flickr30K_ID' is list"),
    ("sts", sts_table, "5.000", "nan", "score nan is not in 0 to 5"),
    ("hashing", hashing, "0 1 1", "0 2 1", "test.txt line 1"),
])
def test_other_sources_with_such_a_value(tmp_path, source, make, old, new, words):
    files = make(tmp_path)
    assert old in files[0].read_text()
    write(files[0], files[0].read_text().replace(old, new, 1))
    with refused(words):
        data.open_source(source, ",".join(map(str, files)), None)


@pytest.mark.parametrize("old, new", [("<xmin>1<", "<xmin>nan<"), ("<xmin>1<", "<xmin>20<"),
                                      ("<width>24<", "<width>0<"), ("<name>dog<", "<name>cow boy<"),
                                      ("<difficult>1<", "<difficult>7<")])
def test_voc_with_such_a_value(tmp_path, old, new):
    path, _ = voc(tmp_path)
    write(path, path.read_text().replace(old, new, 1))
    with refused("1.xml"):
        data.open_source("detection", str(tmp_path / "VOCdevkit"), "train")


def test_a_message_is_one_line_and_not_endless(tmp_path):
    path = write(tmp_path / "a.json", {"a\nb": 1, **{f"key {n}" * 999: 1 for n in range(99)}})
    with pytest.raises(data.DataError) as caught:
        data.open_source("pairs", str(path), None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert "its keys: a b, key 0" in str(caught.value)


# --------------------------------------------------------------------------------------------------
# python data.py check

def test_every_source_is_guessed(tmp_path):
    """From the content, one file or folder of each."""
    for name, (make, source, named) in READERS.items():
        home = tmp_path / name
        files = make(home)
        spec = str(home / named) if named else ",".join(map(str, files))
        # instances alone are boxes, questions alone questions
        wanted = {"instances_as_pairs": "detection", "vqa_as_pairs": "vqa"}.get(name, source)
        assert data.guess_source(spec) == wanted, name
    assert data.guess_source(str(tmp_path / "voc")) == "detection"

    # pictures in folders are classes; a folder of files of several kinds is none of them
    pictures(tmp_path / "plain", "0.png")
    pictures(tmp_path / "classes" / "cat", "0.png")
    assert data.guess_source(str(tmp_path / "plain")) == "pairs"
    assert data.guess_source(str(tmp_path / "classes")) == "classes"
    with refused("nlvr2: name the file to check in this folder, for example", "dev.json"):
        data.guess_source(str(tmp_path / "nlvr2"))
    with refused("void: neither pictures nor a data set"):
        (tmp_path / "void").mkdir()
        data.guess_source(str(tmp_path / "void"))


REAL = {"flickr8k/dataset_flickr8k.json": "pairs", "flickr8k/images": "pairs",
        "coco/annotations/captions_val2017.json": "pairs",
        "coco/annotations/instances_val2017.json": "detection",
        "vqa/v2_OpenEnded_mscoco_train2014_questions.json": "vqa",
        "vqa/v2_mscoco_train2014_annotations.json": "vqa", "nlvr2/dev.json": "nlvr2",
        "snli_ve/snli_ve_dev.jsonl": "ve", "snli_ve/snli_ve_test.jsonl": "ve", "sts": "sts",
        "sts/STS12-en-test": "sts", "sts/stsbenchmark": "sts",
        "sts/stsbenchmark/sts-train.csv": "sts", "sts/STS12-en-test/STS.input.MSRpar.txt": "sts",
        "hashing": "hashing", "hashing/coco_test.txt": "hashing",
        "hashing/nus_wide_test.txt": "hashing", "cc/Validation_GCC-1.1.0-Validation.tsv": "pairs",
        "msrvtt/test_videodatainfo.json": "clips", "msrvtt/MSRVTT_JSFUSION_test.csv": "clips",
        "voc": "detection", "voc/VOCdevkit": "detection"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize("name", REAL)
def test_real_data_is_guessed(name):
    assert data.guess_source(str(SHARED / name)) == REAL[name]


def test_check_prints_five_records_and_json(tmp_path, capsys):
    pictures(tmp_path, *(f"{n}.png" for n in range(9)))
    path = str(lines(tmp_path / "a.jsonl", [{"image": f"{n}.png", "caption": [f"number {n}", "x"]}
                                            for n in range(9)]))
    shown = set()
    for _ in range(2):
        assert data.main(["check", path]) == 0
        _, samples = capsys.readouterr().out.split("for example:\n")
        shown.add(samples)
    assert len(shown) == 1, "the same five each time"
    for line in samples.splitlines():
        n = re.fullmatch(rf"  {tmp_path}/(\d).png: number (\d) \(and 1 more\)", line)
        assert n and n[1] == n[2], line
    assert len(samples.splitlines()) == 5

    # the same as JSON
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    assert data.main(["check", path, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == "pairs" and report["splits"]["all"]["captions"] == 18
    assert report["troubles"] == [[f"{tmp_path}/3.png", "no image format PIL knows"],
                                  [f"{tmp_path}/4.png", "missing"]]
    assert len(report["samples"]) == 5


def test_check_says_what_a_tar_lost(tmp_path, capsys):
    path, = tar(tmp_path / "t")
    assert data.main(["check", str(path)]) == 0
    assert "without a picture" not in capsys.readouterr().out
    with tarfile.open(path, "a") as out:
        out.addfile(tarfile.TarInfo("2.txt"))
    assert data.main(["check", str(path)]) == 1
    assert "samples without a picture 1" in " ".join(capsys.readouterr().out.split())


def test_check_of_voc_and_of_clips(home, capsys):
    voc(home)
    assert data.main(["check", str(home)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"detection: {home}\nlabels: 20 (aeroplane")
    assert "JPEGImages/1.jpg: labels dog car" in shown

    # features of no numbers
    clips(home / "clips")
    (home / "clips" / "features" / "v1.npy").write_bytes(b"\x93NUMPY")
    assert data.main(["check", str(home / "clips" / "videodatainfo.json")]) == 1
    assert "features/v1.npy: not a readable .npy file" in capsys.readouterr().out
