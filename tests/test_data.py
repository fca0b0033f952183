"""formats.py and data.py: every official format on small files written here, every bad input,
streams, views, and the cuts in ../shared/data."""

import importlib
import io
import json
import pickle
import random
import tarfile
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import formats
from models import cookie, mct

read = data.open_source

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
WORDS = ("[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a red blue circle square yes no what is it two "
         "##s , ? left of".split())
PAIRS = dict(source="pairs", image="randaug", image_eval="resize", norm="half", text="caption")


def picture(path, size=(24, 16), color=None, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = random.Random(path.name)
    Image.new("RGB", size, color or tuple(seed.randrange(256) for _ in range(3))).save(path, **save)
    return path


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def lines(path, rows):
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def tok(tmp_path):
    return data.get_tokenizer(write(tmp_path / "vocab.txt", "\n".join(WORDS) + "\n"))


@pytest.fixture
def world(tmp_path):
    """40 pictures, each with its own colour, two captions and two paraphrases: a records file."""
    rows = []
    for n in range(40):
        image = Image.new("RGB", (24, 16), (n * 6, 255 - n * 6, 7))
        image.paste((255, 255, 255), (18, 4, 22, 10))
        (tmp_path / "im").mkdir(exist_ok=True)
        image.save(tmp_path / "im" / f"{n}.png")
        rows.append({"image": f"im/{n}.png", "image_id": 100 + n,
                     "caption": ["a red circle", "a blue square"],
                     "paraphrase": ["red circle", "blue square"],
                     "tags": ["red"] if n % 2 else ["circle", "red"]})
    return lines(tmp_path / "pairs.jsonl", rows)


@contextmanager
def refused(*parts):
    """The block must end in one clear DataError line that holds all parts."""
    with pytest.raises(data.DataError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith("data.py: "), message
    assert "\n" not in message, message
    assert all(part in message for part in parts), message


# --------------------------------------------------------------------------------------------------
# Pairs, formats

def test_records_jsonl_json_and_single(tmp_path, world):
    r = read("pairs", world, "train", need=("caption", "tags"))
    assert len(r) == 40
    assert r.name == "pairs"
    assert r.split == "train"
    assert r.notes["with_paraphrase"] == 40
    assert r[3]["image"] == str(tmp_path / "im/3.png")
    assert r[3]["image_id"] == 103
    assert r[-1]["image_id"] == 139
    assert r[0]["caption"] == ["a red circle", "a blue square"]
    assert r[0]["paraphrase"] == ["red circle", "blue square"]

    # a list in one file, a single record
    rows = [{"image": "im/0.png", "caption": "one"},
            {"image": "im/1.png", "caption": ["two"], "split": "val"}]
    r = read("pairs", write(tmp_path / "l.json", rows), None)
    assert [x["image_id"] for x in r] == [0, 1]
    assert r[0]["caption"] == ["one"]
    assert r.splits == ["val"]
    assert len(read("pairs", write(tmp_path / "one.json", rows[0]), "train")) == 1

    # no split: belongs to all
    assert len(read("pairs", lines(tmp_path / "really_jsonl.json", rows), "val")) == 2

    # a limit draws by its seed
    assert [len(read("pairs", world, "train", limit=n)) for n in (7, 400)] == [7, 40]
    picked = []
    for seed in (1, 1, 2):
        picked.append([x["image_id"] for x in read("pairs", world, "train", limit=7, seed=seed)])
    assert picked[0] == picked[1] != picked[2] and picked[0] == sorted(picked[0])


def test_karpathy(tmp_path):
    images = [{"filename": f"{n}.jpg", "filepath": "val2014", "imgid": n, "split": s,
               "sentences": [{"raw": f"caption {n} {k} ."} for k in range(5 + n)]}
              for n, s in enumerate(["train", "restval", "val", "test"])]
    for n in range(4):
        picture(tmp_path / "root" / "val2014" / f"{n}.jpg")
    spec = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    got = {s: read("pairs", spec, s, image_root=str(tmp_path / "root"))
           for s in ("train", "val", "test", None)}
    assert [len(got[s]) for s in got] == [2, 1, 1, 4]
    assert got["train"][1]["image_id"] == 1 and got["train"].splits == ["train", "val", "test"]
    assert got["test"][0]["caption"] == [f"caption 3 {k} ." for k in range(8)]
    spec = write(tmp_path / "d2.json", {"images": images[:1], "dataset": "x"})

    with refused("no split 'test'", "it has: train"):
        read("pairs", spec, "test", image_root=str(tmp_path / "root"))
    del images[0]["sentences"][1]["raw"]

    with refused("images[0]", "no key 'raw'"):
        read("pairs", write(tmp_path / "d3.json", {"images": images}), "train",
                         image_root=str(tmp_path / "root"))


def coco(tmp_path):
    for n in (9, 5):
        picture(tmp_path / "val2017" / f"{n:012d}.jpg")
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 24, "height": 16} for n in (9, 5)]
    captions = [{"image_id": 5, "id": 1, "caption": "five"},
                {"image_id": 9, "id": 2, "caption": "nine\n"},
                {"image_id": 5, "id": 3, "caption": "cinq"}]
    boxes = [{"image_id": 5, "category_id": 18, "bbox": [1, 2, 3, 4], "iscrowd": 0, "area": 12},
             {"image_id": 5, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1, "area": 81},
             {"image_id": 5, "category_id": 18, "bbox": [5, 5, 1, 1], "iscrowd": 0, "area": 1}]
    boxes = [{**box, "id": n} for n, box in enumerate(boxes, 1)]

    categories = [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}]
    home = tmp_path / "annotations"
    return (write(home / "captions_val2017.json", {"images": images, "annotations": captions}),
            write(home / "instances_val2017.json",
                  {"images": images, "annotations": boxes, "categories": categories}))


def test_coco_captions_and_instances(tmp_path):
    captions, instances = coco(tmp_path)

    # images found in ../val2017, as published
    r = read("pairs", captions, "test")
    assert [x["image_id"] for x in r] == [9, 5]
    assert r[1]["caption"] == ["five", "cinq"]
    assert r[0]["caption"] == ["nine"]
    r = read("pairs", f"{captions},{instances}", "train", image_root=str(tmp_path / "val2017"),
                         need=("caption", "tags"))
    assert len(r) == 2 and r.label_names == ["person", "dog"] and r.notes["with_tags"] == 1

    # the crowd gives its tag, but no box
    assert r[1]["tags"] == ["person", "dog"]
    assert r[1]["boxes"] == [[1, 2, 4, 6], [5, 5, 6, 6]] and r[1]["labels"] == [1, 1]
    assert r[0]["tags"] == [] and data.tag_list(r) == ["dog", "person"]
    r = read("detection", instances, "train")
    assert len(r) == 2
    assert [label for label, crowd in zip(r[0]["labels"], r[0]["crowd"]) if not crowd] == [1, 1]
    assert "caption" not in r[0]

    with refused("no key 'caption'"):
        read("pairs", instances, "train", need=("caption",))
    bad = json.loads(Path(instances).read_text())
    bad["annotations"][0]["category_id"] = 77

    with refused("annotations[0]", "category_id 77"):
        read("pairs", write(tmp_path / "instances_bad.json", bad), "train",
                         image_root=str(tmp_path / "val2017"))
    with refused("detection reads COCO's instances"):
        read("detection", captions, "train")


def test_tsv(tmp_path, capsys):
    root = tmp_path / "images"
    urls = ["sub/0.jpg", "http://x.org/a/own.jpg?w=3", "http://x.org/same.jpg",
            "http://y.org/same.jpg", "http://z.org/gone.jpg", "http://z.org/crc"]
    for name in ("sub/0.jpg", "own.jpg", "same.jpg", "000000003.jpg"):
        picture(root / name)
    (root / f"5_{zlib.crc32(urls[5].encode())}").write_bytes((root / "own.jpg").read_bytes())
    spec = write(tmp_path / "cc.tsv", "".join(f"caption {n}\t{u}\n" for n, u in enumerate(urls)))
    r = read("pairs", spec, "train", image_root=str(root))

    # two rows end in same.jpg: neither may take that file, row 3 has its numbered one
    assert [x["caption"][0][-1] for x in r] == ["0", "1", "3", "5"] and r.notes["missing"] == 2
    assert r[1]["image"].endswith("own.jpg") and r[2]["image"].endswith("000000003.jpg")
    assert "2 of 6 records left out" in capsys.readouterr().err

    with refused("cc2.tsv line 2", "no TAB"):
        read("pairs", write(tmp_path / "cc2.tsv", "a\tb\nc d\n"), "train", image_root=str(root))


def shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_tar_shards(tmp_path, tok):
    jpg = [picture(tmp_path / f"{n}.jpg", color=(80 * n, 0, 0)).read_bytes() for n in range(4)]
    shard(tmp_path / "cc" / "00000.tar",
          [("000000000.jpg", jpg[0]), ("000000000.txt", b"a red circle"), ("000000000.json", b"{}"),
           ("000000001.json", b'{"caption": "failed download"}'), ("000000001.txt", b"gone")])
    shard(tmp_path / "cc" / "00001.tar",
          [("000010000.jpg", jpg[1]), ("000010000.json", b'{"caption": "two"}'),
           ("000010001.jpg", jpg[2]), ("000010001.txt", b"  ")])
    shard(tmp_path / "cc" / "00002.tar", [("a/x.jpg", jpg[3]), ("a/x.txt", "caf\u00e9".encode())])

    # a range of shards, or their folder; what has no picture or no words is left out
    for spec in (f"{tmp_path}/cc/{{00000..00002}}.tar", str(tmp_path / "cc")):
        r = read("pairs", spec, "train", need=("caption",))
        assert [x["caption"] for x in r] == [["a red circle"], ["two"], ["caf\u00e9"]]
        assert r.notes == {"missing": 1, "empty_captions": 1, "no_caption_left": 1}
        assert len({x["image_id"] for x in r}) == 3
        assert [data.load_image(x["image"]).getpixel((2, 2))[0] // 50 for x in r] == [0, 1, 4]
    assert len(read("pairs", f"{tmp_path}/cc/00001.tar", "val")) == 1
    ds = data.Views(r, PAIRS, tok, 16, 6)
    assert ds[0, 1]["image"].shape == (3, 16, 16)
    broken = Path(shard(tmp_path / "b" / "0.tar", [("1.jpg", jpg[0] * 40)]))
    broken.write_bytes(broken.read_bytes()[:700])

    with refused("0.tar", "not a readable tar"):
        read("pairs", str(broken), "train")
    with refused("00000.tar", "no such file"):
        read("pairs", f"{tmp_path}/nope/{{00000..00001}}.tar", "train")
    with refused("no .tar shards"):
        (tmp_path / "empty").mkdir()
        read("pairs", str(tmp_path / "empty"), "train")


def test_a_picture_in_a_tar_has_a_name(tmp_path, tok, capsys):
    """Wherever a message names a picture: in the warnings of training and in the table of check."""
    tar = shard(tmp_path / "0.tar", [("1.jpg", b"no picture"), ("1.txt", b"a red circle")])
    r = read("pairs", tar, "train")
    where = r[0]["image"]
    assert where == formats.TarMember(tar, 512, 10, "1.jpg")
    assert str(where) == f"{tar} member 1.jpg (byte 512, 10 bytes)"
    assert data.picture_path(where) == f"{tar}/1.jpg" and data.picture_bytes(where) == 10
    assert pickle.loads(pickle.dumps(where)) == where

    capsys.readouterr()
    assert data.Views(r, PAIRS, tok, 16, 8, train=False)[0]["bad"] == 1
    named = f"{where}: no image format PIL knows"
    assert f"unreadable image {named}; evaluated as a grey image" in capsys.readouterr().err
    assert data.main(["check", tar]) == 1
    assert named in capsys.readouterr().out

    with refused(named):
        data.open_picture(where)


def test_several_files_and_ids(tmp_path):
    for name in "abcd":
        picture(tmp_path / "r1" / f"{name}.jpg")
        picture(tmp_path / "r2" / f"{name}.jpg")
    one = lines(tmp_path / "1.jsonl", [{"image": "a.jpg", "caption": "x", "image_id": 7},
                                       {"image": "b.jpg", "caption": "x", "image_id": 0}])
    two = lines(tmp_path / "2.jsonl", [{"image": "a.jpg", "caption": "x", "image_id": 6},
                                       {"image": "b.jpg", "caption": "x", "image_id": 0}])
    both = f"{tmp_path}/r1,{tmp_path}/r2"
    r = read("pairs", f"{one},{two}", "train", image_root=both)
    assert [x["image_id"] for x in r][:2] == [7, 0] and len({x["image_id"] for x in r}) == 4
    assert r[2]["image"] == str(tmp_path / "r2" / "a.jpg")

    # the same pictures: the same ids
    r = read("pairs", f"{one},{two}", "train", image_root=str(tmp_path / "r1"))
    assert [x["image_id"] for x in r] == [7, 0, 7, 0]
    assert r.notes == {"duplicates": 2, "repeated_images": 2}
    rows = [{"image": f"{c}.jpg", "caption": "x"} for c in "abca"]
    r = read("pairs", lines(tmp_path / "3.jsonl", rows), "train", image_root=str(tmp_path / "r1"))
    assert [x["image_id"] for x in r] == [0, 1, 2, 0]

    # names instead of numbers
    names = [dict(row, image_id=i) for row, i in zip(rows, ("p", "q", "r", "p"))]
    r = read("pairs", lines(tmp_path / "4.jsonl", names), "train", image_root=str(tmp_path / "r1"))
    assert [x["image_id"] for x in r] == [0, 1, 2, 0]
    names[1]["image_id"] = 3

    with refused("5.jsonl line 2", "image_id"):
        read("pairs", lines(tmp_path / "5.jsonl", names), "train", image_root=str(tmp_path / "r1"))
    with refused("line 1", "'image_id' is -1"):
        read("pairs", lines(tmp_path / "6.jsonl", [dict(rows[0], image_id=-1)]), "train",
                image_root=str(tmp_path / "r1"))
    with refused("--image_root names 2 folders for 1"):
        read("pairs", one, "train", image_root=both)


def test_questions_as_captions(tmp_path):
    """VQA's and GQA's questions are texts of their pictures, where a task reads pairs."""
    for name in ("COCO_train2014_000000000009.jpg", "2354786.jpg"):
        picture(tmp_path / name)
    vqa = {"data_subtype": "train2014",
           "questions": [{"image_id": 9, "question": "what?", "question_id": 1},
                         {"image_id": 9, "question": "who?", "question_id": 2}]}
    gqa = {"05515938": {"imageId": "2354786", "question": "is it a dog?", "answer": "no"},
           "05515939": {"imageId": "2354786", "question": "where?", "answer": "here"}}
    files = f"{write(tmp_path / 'v.json', vqa)},{write(tmp_path / 'g.json', gqa)}"
    r = read("pairs", files, "train", str(tmp_path))
    assert [x["caption"] for x in r] == [["what?", "who?"], ["is it a dog?", "where?"]]
    assert len({x["image_id"] for x in r}) == 2

    del gqa["05515939"]["question"]

    with refused("question 05515939: no key 'question'"):
        read("pairs", write(tmp_path / "g.json", gqa), "train", str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Other sources

def vqa_files(tmp_path, **extra):
    picture(tmp_path / "images" / "COCO_val2014_000000000042.jpg")
    picture(tmp_path / "images" / "own.png")
    questions = [{"image_id": 42, "question": "What is it?", "question_id": 420},
                 {"image_id": 42, "question": "red?", "question_id": 421},
                 {"image_id": 7, "question": "blue?", "question_id": 70, "image": "own.png"}]
    given = {420: ["Yes."] * 7 + ["two"] * 3, 421: ["no"] * 10, 70: ["2"] * 10}
    answers = []
    for question_id, words in given.items():
        rows = [{"answer": word, "answer_id": n} for n, word in enumerate(words)]
        answers.append({"question_id": question_id, "image_id": 42, "answers": rows})
    asked = {"data_subtype": "val2014", "questions": questions, **extra}
    return (write(tmp_path / "q.json", asked),
            write(tmp_path / "a.json", {"data_subtype": "val2014", "annotations": answers}))


def test_vqa(tmp_path, tok):
    questions, answers = vqa_files(tmp_path)

    # images/ beside the files is found
    r = read("vqa", f"{questions},{answers}", "train")
    assert [x["question_id"] for x in r] == [420, 421, 70]
    assert [x["image_id"] for x in r] == [42, 42, 7]
    assert r[0]["image"].endswith("COCO_val2014_000000000042.jpg")
    assert r[0]["answers"] == ["Yes."] * 7 + ["two"] * 3
    assert data.answer_list(r) == ["2", "no", "yes"] and data.answer_list(r, 2) == ["2", "no"]
    assert data.stats(r)["answers"] == ["2", "no", "yes"]
    views = dict(source="vqa", image="plain", text="question", answer="answer")
    ds = data.Views(r, views, tok, 16, 8)
    seen = Counter(tok.decode(ds[0, d]["answer"]) for d in range(400))

    # "two" -> "2", not in this vocabulary
    assert set(seen) == {"yes", "[UNK]"} and 0.62 < seen["yes"] / 400 < 0.78
    s = ds[0, 1]
    assert s["answer_mask"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert s["answer_weight"] == 1.0
    assert tok.decode(s["text"]) == "what is it ?"
    r = read("vqa", questions, "test", image_root=str(tmp_path / "images"))
    assert r[0]["answers"] is None and r.notes["without_answers"] == 3
    ds = data.Views(r, views, tok, 16, 8, train=False)
    assert ds[0]["answer_weight"] == 0.0
    del views["answer"]
    batch = next(data.iter_eval(r, views, tok, 16, 8, "sample"))
    assert len(batch["index"]) == 3

    with refused("needs the questions file"):
        read("vqa", answers, "train")
    with refused("no key 'answers'"):
        read("vqa", questions, "train", image_root=str(tmp_path / "images"), need=("answers",))
    whole = json.loads(Path(questions).read_text())

    with refused("questions[3]", "420 occurs twice"):
        twice = dict(whole, questions=whole["questions"] + whole["questions"][:1])
        read("vqa", write(tmp_path / "q2.json", twice), "test",
                         image_root=str(tmp_path / "images"))
    del whole["data_subtype"], whole["questions"][1:]

    with refused("questions[0]", "no key 'image'", "data_subtype"):
        read("vqa", write(tmp_path / "q3.json", whole), "test")
    with refused("neither 'questions' nor 'annotations'"):
        read("vqa", write(tmp_path / "q4.json", {"images": []}), "test")


def test_ve(tmp_path, tok):
    picture(tmp_path / "1.jpg")
    picture(tmp_path / "x.png")
    rows = [{"image": "x.png", "gold_label": "neutral", "sentence2": "blue"}]
    for k, label in enumerate(["contradiction", "-", "entailment"]):
        rows.insert(0, {"Flickr30K_ID": "1", "gold_label": label, "sentence2": "it is red",
                        "pairID": f"1#{k}"})
    r = read("ve", lines(tmp_path / "ve.jsonl", rows), "val", need=("caption", "label"))
    assert [x["label"] for x in r] == [0, 2, 1]
    assert r.notes == {"without_majority_label": 1}
    assert r[0]["image_id"] == r[1]["image_id"]
    assert r.label_names == ["entailment", "neutral", "contradiction"]
    assert data.stats(r)["num_labels"] == 3

    # samples, and one text a row in evaluation
    views = dict(source="ve", image="plain", text="caption", label="label")
    ds = data.Views(r, views, tok, 16, 8)
    assert ds[1, 0]["label"] == 2 and tok.decode(ds[2, 0]["text"]) == "blue"
    assert data.flat_captions(r)[0] == ["it is red", "it is red", "blue"]
    assert data.flat_captions(r)[1].tolist() == [0, 0, 1]
    assert sum(len(b["index"]) for b in data.iter_eval(r, views, tok, 16, 8, "text")) == 3

    with refused("b.jsonl line 1", "gold_label 'maybe'"):
        read("ve", lines(tmp_path / "b.jsonl", [dict(rows[0], gold_label="maybe")]), "val")
    with refused("c.jsonl line 1", "no key 'sentence2'", "it has: Flickr30K_ID, gold_label"):
        row = {"Flickr30K_ID": "1", "gold_label": "neutral"}
        read("ve", lines(tmp_path / "c.jsonl", [row]), "val")


def test_nlvr2(tmp_path, tok):
    for name in ("dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png",
                 "images/train/63/train-9-1-img0.png", "images/train/63/train-9-1-img1.png",
                 "l.png", "r.png"):
        picture(tmp_path / name, color=(255, 255, 255) if "img1" in name else (0, 0, 0))
    rows = [{"identifier": "dev-850-0-3", "sentence": "left is red", "label": "True"},
            {"identifier": "train-9-1-0", "directory": 63, "sentence": "red", "label": "False"},
            {"identifier": "x-1-1-1", "sentence": "blue", "label": "True", "left_image": "l.png",
             "right_image": "r.png"}]
    r = read("nlvr2", lines(tmp_path / "dev.json", rows), "val")
    assert [x["label"] for x in r] == [1, 0, 1] and r.notes == {}
    views = dict(source="nlvr2", image="plain", image2="plain", norm="half", text="caption",
                 label="label")
    ds = data.Views(r, views, tok, 16, 8)
    s = ds[0, 0]

    # left is image 0, right is image 1
    assert s["image"].max() == -1 and s["image2"].min() == 1

    with refused("line 1", "label 'yes'"):
        read("nlvr2", lines(tmp_path / "e.jsonl", [dict(rows[0], label="yes")]), "val")


def test_sts(tmp_path):
    home = tmp_path / "STS12-en-test"
    write(home / "STS.input.MSRvid.txt", "a\tb\nc\td\ne\tf\n")
    write(home / "STS.gs.MSRvid.txt", "4.4\n\n0\n")
    write(home / "STS.input.OnWN.txt", "g\th\ni\tj\n")
    write(home / "STS.gs.OnWN.txt", "1.0\n\n")
    write(tmp_path / "STS12-en-train" / "STS.input.X.txt", "a\tb\n")
    write(tmp_path / "STS12-en-train" / "STS.gs.X.txt", "1\n")
    row = "main-captions\tMSRvid\t2012test\t0000\t{}\t\"A man, with\tA man.\n"
    for part, scores in (("dev", "5.000"), ("test", "2.5"), ("train", "0")):
        write(tmp_path / "stsbenchmark" / f"sts-{part}.csv", row.format(scores))

    # a year's folder
    r = read("sts", str(home), "test")
    rows = [(x["s1"], x["score"], x["dataset"], x["subset"]) for x in r]
    assert rows == [("a", 4.4, "STS12", "MSRvid"), ("e", 0.0, "STS12", "MSRvid"),
                    ("g", 1.0, "STS12", "OnWN")]
    assert r.notes == {"unscored": 2}

    # the train folders of STS12 are not test data
    r = read("sts", str(tmp_path), "test")
    assert [x["dataset"] for x in r] == ["STS12"] * 3 + ["STSB"] and r[3]["s1"] == '"A man, with'
    assert [x["score"] for x in read("sts", str(tmp_path), "val")] == [5.0]

    # a file named: whatever split
    assert len(read("sts", str(tmp_path / "stsbenchmark" / "sts-dev.csv"), "test")) == 1

    with refused("no split 'val'", "it has: test"):
        read("sts", str(home), "val")
    with refused("s.csv line 2", "7 columns", "found 2"):
        read("sts", write(tmp_path / "s.csv", row.format("1") + "a\tb\n"), "test")
    with refused("t.csv line 1", "score 'x' is not a number"):
        read("sts", write(tmp_path / "t.csv", row.format("x")), "test")
    with refused("score 7.0 is not in 0 to 5"):
        read("sts", write(tmp_path / "u.csv", row.format("7")), "test")
    with refused("no STS data"):
        (tmp_path / "void").mkdir()
        read("sts", str(tmp_path / "void"), "test")
    write(home / "STS.gs.OnWN.txt", "1\n")

    with refused("STS.input.OnWN.txt: 2 sentence pairs, but 1 scores"):
        read("sts", str(home), "test")


def test_hashing(tmp_path, tok):
    picture(tmp_path / "coco" / "val2014" / "a.jpg")
    picture(tmp_path / "coco" / "b.jpg")
    test = write(tmp_path / "lists" / "test.txt", "data/coco/val2014/a.jpg 0 1 1\nb.jpg 0 0 0 \n")
    write(tmp_path / "lists" / "database.txt", "b.jpg 1 0 0\n")
    root = str(tmp_path / "coco")

    # the authors' "data/coco/" is left off
    r = read("hashing", test, "test", image_root=root)
    assert r[0]["labels"] == [0, 1, 1]
    assert r[0]["image"].endswith("coco/val2014/a.jpg")
    assert r.notes == {"without_label": 1}
    ds = data.Views(r, dict(source="hashing", image="center", labels="labels"), None, 16, None)
    assert ds[0, 0]["labels"].tolist() == [0.0, 1.0, 1.0]
    assert len(read("hashing", str(tmp_path / "lists"), "database", image_root=root)) == 1

    with refused("no split 'train'", "database, test"):
        read("hashing", str(tmp_path / "lists"), "train", image_root=root)
    with refused("line 2", "3 labels expected, found 2"):
        uneven = write(tmp_path / "w.txt", "b.jpg 1 0 0\nb.jpg 1 0\n")
        read("hashing", uneven, "test", image_root=root)


def test_classes(tmp_path, tok):
    for name in ("train/cat/1.jpg", "train/ant/2.PNG", "train/ant/deep/0.jpg", "val/cat/3.jpg"):
        picture(tmp_path / "in" / name)
    write(tmp_path / "in" / "train" / "cat" / "notes.txt", "no picture")
    train, val, test = (read("classes", str(tmp_path / "in"), s) for s in ("train", "val", "test"))
    assert [(x["class_name"], x["label"]) for x in train] == [("ant", 0), ("ant", 0), ("cat", 1)]
    # not 0, though val has no ant
    assert val[0]["label"] == 1 and len(test) == 1 and val.label_names == ["ant", "cat"]
    flat = read("classes", str(tmp_path / "in" / "train"), "test")
    assert len(flat) == 3 and data.stats(flat) == {"num_labels": 2, "label_names": ["ant", "cat"]}
    with refused("no class folders"):
        read("classes", str(tmp_path / "in" / "val" / "cat"), "train")


def test_clips(tmp_path):
    videos, sentences = [], []
    for n, split in enumerate(["train", "validate", "test", "test"]):
        videos.append({"video_id": f"video{n}", "split": split})
        for k in range(3):
            sentences.append({"caption": f"c{n}{k}", "video_id": f"video{n}", "sen_id": k})
    spec = write(tmp_path / "videodatainfo.json",
                 {"info": {}, "videos": videos, "sentences": sentences})
    for n in range(4):
        (tmp_path / "features").mkdir(exist_ok=True)
        np.save(tmp_path / "features" / f"video{n}.npy", np.zeros((5, 8), np.float32))

    # splits as the file has them
    r = read("clips", spec, "test", need=("caption",))
    assert [x["video_id"] for x in r] == ["video2", "video3"]
    assert r[0]["caption"] == ["c20", "c21", "c22"]
    assert r.protocol == "full"
    assert len(read("clips", spec, "val", image_root=str(tmp_path / "features"))) == 1
    assert np.load(r[0]["feature"]).shape == (5, 8) and len({x["image_id"] for x in r}) == 2

    # the table of split 1k-A, with either separator
    for mark in ",;":
        rows = "key,vid_key,video_id,sentence\nret0,msr3,video3,a cat\n".replace(",", mark)
        table = write(tmp_path / "1ka.csv", rows)
        spec2 = f"{spec},{table},{tmp_path / 'features'}"
        test, train = read("clips", spec2, "test"), read("clips", spec2, "train")
        assert [(x["video_id"], x["caption"]) for x in test] == [("video3", ["a cat"])]
        assert test.protocol == "1k-A"
        assert [x["video_id"] for x in train] == ["video0", "video1", "video2"]

    # check opens the features
    assert data.main(["check", spec]) == 0
    (tmp_path / "features" / "video0.npy").write_bytes(b"xx")
    assert data.main(["check", spec]) == 1

    with refused("line 1", "video_id and sentence"):
        read("clips", f"{spec},{write(tmp_path / 'x.csv', 'a,b')}", "test")


XML = ("<annotation><filename>{0}.jpg</filename>"
       "<size><width>40</width><height>32</height><depth>3</depth></size>{1}</annotation>")
OBJECT = ("<object><name>{}</name><difficult>{}</difficult>"
          "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")


def test_voc(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    objects = OBJECT.format("dog", 0, 1, 1, 10, 20) + OBJECT.format("car", 1, 5, 5, 5, 9)
    for year, part, names in (("2007", "trainval", "1 2"), ("2012", "trainval", "3"),
                              ("2007", "test", "4")):
        home = devkit / f"VOC{year}"
        write(home / "ImageSets" / "Main" / f"{part}.txt", "\n".join(names.split()) + "\n")
        for n in names.split():
            write(home / "Annotations" / f"{n}.xml", XML.format(n, objects))
            picture(home / "JPEGImages" / f"{n}.jpg", size=(40, 32))

    # both years' trainval; pixels count from 0 here, from 1 in the file
    r = read("detection", str(devkit), "train")
    assert len(r) == 3 and len(read("detection", str(tmp_path), "test")) == 1
    assert r[0]["boxes"] == [[0, 0, 10, 20], [4, 4, 5, 9]] and r[0]["difficult"] == [0, 1]
    assert len(r.label_names) == 20
    assert [r.label_names[n] for n in r[0]["labels"]] == ["dog", "car"]

    unicorn = XML.format(4, OBJECT.format("unicorn", 0, 1, 1, 3, 3))
    write(devkit / "VOC2007" / "Annotations" / "4.xml", unicorn)

    with refused("4.xml"):
        read("detection", str(tmp_path), "test")


def test_detection_of_instances(tmp_path, rectangles):
    file, _ = rectangles(tmp_path)
    r = read("detection", str(file), "train", str(tmp_path), need=("boxes", "segmentation"))
    assert r.label_names == ["blue", "red"] and data.stats(r)["num_labels"] == 2
    assert r[0]["crowd"] == [0, 1]
    assert r[1]["boxes"] == [[5, 4, 19, 16]] and r[1]["labels"] == [1]


# --------------------------------------------------------------------------------------------------
# Bad input

def test_bad_records(tmp_path, world, capsys):
    good = {"image": "im/0.png", "caption": "a"}
    bad = tmp_path / "bad.jsonl"

    with refused("--data missing.json: no such file"):
        read("pairs", "missing.json", "train")
    with refused("--data is empty"):
        read("pairs", ",", "train")
    with refused("no source 'nope'", "pairs, vqa"):
        read("nope", world, "train")
    with refused("--image_root /nowhere: no such directory"):
        read("pairs", world, "train", image_root="/nowhere")

    # a record, key by key
    for row, *parts in (
            ({"image": "im/0.png", "text": "a"}, "no key 'caption'", "it has: image"),
            ({"file": "im/0.png", "caption": "a"}, "no key 'image'", "it has: file, caption"),
            ({"image": 3, "caption": "a"}, "'image' is int"),
            ({"image": "im/0.png", "caption": 5}, "'caption' is int"),
            ({"image": "im/0.png", "caption": ["a", 5]}, "'caption' is list ['a', 5]"),
            (dict(good, paraphrase=["a", "b"]), "'paraphrase'", "(1)"),
            (dict(good, tags="red"), "'tags'"),
            (dict(good, boxes=[[1, 2, 3]]), "'boxes'"),
            (dict(good, boxes=[[1, 2, 3, 4]], labels=[1, 2]), "2 labels for 1 boxes"),
            (["im/0.png", "a"], "object", "list")):
        with refused("bad.jsonl line 2", *parts):
            read("pairs", lines(bad, [good, row]), "train", need=("caption",))


    # a whole file
    with refused("record 1", "no key 'image'"):
        read("pairs", write(tmp_path / "bad.json", [good, {}]), "train")
    with refused("bad.jsonl line 2: not JSON"):
        # a half-written file
        read("pairs", write(bad, json.dumps(good) + '\n{"image": "im'), "train")
    with refused("b2.json line 1: not JSON"):
        read("pairs", write(tmp_path / "b2.json", '[{"image": }]'), "train")
    with refused("neither records, Karpathy's, COCO's", "foo"):
        read("pairs", write(tmp_path / "b3.json", {"foo": 1}), "train")
    with refused("unknown format"):
        read("pairs", write(tmp_path / "b.xml", "<a/>"), "train")
    with refused("no records"):
        read("pairs", write(bad, ""), "train")
    with refused("no split 'test'", "it has: train, val"):
        read("pairs", lines(bad, [dict(good, split="train"), dict(good, split="val")]), "test")
    bad.write_bytes(b'{"image": "\xff\xfe"}\n')

    with refused("not UTF-8"):
        read("pairs", str(bad), "train")
    with refused("none of the 2 image files is there", "no/0.png", "--image_root right?"):
        gone = [dict(good, image="no/0.png"), dict(good, image="no/1.png")]
        read("pairs", lines(bad, gone), "train")
    capsys.readouterr()
    r = read("pairs", lines(bad, [good, dict(good, image="no/1.png")]), "train")
    err = capsys.readouterr().err
    assert len(r) == 1
    assert r.notes["missing"] == 1
    assert "1 of 2 records left out" in err
    assert "bad.jsonl line 2" in err


def test_empty_captions_are_counted(tmp_path, world):
    rows = [{"image": "im/0.png", "caption": ["a", " ", "b"], "paraphrase": ["A", "x", "B"]},
            {"image": "im/1.png", "caption": ["", "\n"]},
            {"image": "im/2.png", "caption": "", "split": "test"}, {"image": "im/3.png"}]
    r = read("pairs", lines(tmp_path / "e.jsonl", rows), "train")
    assert r.notes == {"empty_captions": 3, "no_caption_left": 1, "with_paraphrase": 1,
                       "without_caption": 1}
    assert r[0]["caption"] == ["a", "b"]
    assert r[0]["paraphrase"] == ["A", "B"]
    assert "caption" not in r[1]


def test_vocabulary(tmp_path, tok):
    assert (tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id) == (0, 2, 3, 4, 5)
    assert (tok.first_word, tok.vocab_size) == (6, len(WORDS))
    ids = tok.encode("A Red circles, [MASK] zebra?", 20)

    # [MASK] is plain text
    assert tok.tokens(ids) == "[CLS] a red circle ##s , [UNK] [UNK] [UNK] [UNK] ? [SEP]".split()
    assert tok.decode(ids) == "a red circles , [UNK] [UNK] [UNK] [UNK] ?" and tok.mask_id not in ids
    assert tok.encode("a red circle", 4) == [3, 6, 7, 4] and tok.encode("", 9) == [3, 4]

    with refused("vocab2.txt", "lacks [SEP], [MASK]"):
        data.get_tokenizer(write(tmp_path / "vocab2.txt", "[PAD]\n[UNK]\n[CLS]\na\n"))
    with refused("line 23", "'red' stands in line 8 already"):
        data.get_tokenizer(write(tmp_path / "vocab3.txt", "\n".join(WORDS + ["red"])))
    with refused("words must stand after"):
        data.get_tokenizer(write(tmp_path / "vocab4.txt", "\n".join(WORDS[6:] + WORDS[:6])))
    with refused("--vocab nope.txt: no such file"):
        data.get_tokenizer("nope.txt")


def test_normalize_answer():
    answers = {
        "Two": "2", "a dog": "dog", "The  dog": "dog", "none": "0", "dont": "don't",
        "couldn'tve": "couldn't've", "t-shirt": "t shirt", "yes!": "yes", "yes !": "yes",
        "1,000": "1000", "1,000 - 2": "1000 2", "3.5": "3.5", "St. John": "st john",
        "it's": "it's", "black/white": "black white", "black / white": "black white",
        "yall'll": "y'all'll", "twas": "'twas", "hes": "he's", "shell": "shell", "ten\n": "10",
        "an": "", "": "", "man (left)": "man left", "p.m.": "pm", "somebody'd": "somebodyd",
        "its": "its"}
    for text, wanted in answers.items():
        assert data.normalize_answer(text) == wanted, text
    assert len(data.CONTRACTIONS) == 114


# --------------------------------------------------------------------------------------------------
# Images

def test_image_modes(tmp_path):
    base = Image.new("RGB", (8, 6), (200, 100, 50))
    for mode, name in (("RGBA", "a.png"), ("P", "b.png"), ("L", "c.png"), ("CMYK", "d.jpg"),
                       ("1", "e.png"), ("LA", "f.png")):
        base.convert(mode).save(tmp_path / name)
        image = data.load_image(str(tmp_path / name))
        assert image.mode == "RGB" and image.size == (8, 6)
        if mode in ("RGBA", "P", "CMYK"):
            assert max(abs(a - b) for a, b in zip(image.getpixel((3, 3)), (200, 100, 50))) < 40

    # 16 bit: scaled, not clipped to white
    Image.fromarray(np.full((6, 8), 40000, np.uint16)).save(tmp_path / "g.png")
    assert data.load_image(str(tmp_path / "g.png")).getpixel((0, 0)) == (156, 156, 156)
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(tmp_path / "h.jpg", exif=exif)
    assert data.load_image(str(tmp_path / "h.jpg")).size == (6, 8)


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-800])
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(tmp_path, monkeypatch):
    write(tmp_path / "text.jpg", "no picture")
    write(tmp_path / "void.jpg", "")
    Image.new("RGB", (40, 40)).save(tmp_path / "p.png")
    (tmp_path / "q.png").write_bytes((tmp_path / "p.png").read_bytes()[:60])
    truncated(tmp_path / "t.jpg")
    for name, reason in (("text.jpg", "no image format"), ("void.jpg", "no image format"),
                         ("none.jpg", "No such file"), ("q.png", "."), ("t.jpg", "truncated")):
        with pytest.raises(data.BadImage, match=reason):
            data.load_image(str(tmp_path / name))

    # PIL warns of the first, refuses the second
    for limit in (1500, 700):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(data.BadImage, match="too many|decompression bomb"):
            data.load_image(str(tmp_path / "p.png"))


def test_image_views():
    wide = Image.new("RGB", (60, 30))

    # left half red, right half black
    wide.paste((255, 0, 0), (0, 0, 30, 30))
    for name, view in data.IMAGE_VIEWS.items():
        for d in range(12):
            out = view(wide, 20, random.Random(d), (0.2, 1.0))
            assert out.size == (20, 20) and out.mode == "RGB", name
        assert (view(wide, 20, random.Random(3), (0.2, 1.0)).tobytes()
                == view(wide, 20, random.Random(3), (0.2, 1.0)).tobytes())
    left = [data.randaug(wide, 20, random.Random(d), (0.9, 1.0)) for d in range(200)]

    # randaug never mirrors
    assert all(im.getpixel((4, 10))[0] >= im.getpixel((15, 10))[0] for im in left)
    flips = [data.flip(wide, 20, random.Random(d), (0.9, 1.0)) for d in range(200)]
    flips = [image.getpixel((2, 10))[0] > 128 for image in flips]
    assert 70 < sum(flips) < 130
    assert data.center(wide, 20).getpixel((2, 2))[0] > 200
    assert data.center(wide, 20).getpixel((17, 2))[0] < 50
    side = [range_shown(data.crop, d) for d in range(300)]
    assert min(side) > 0.15 and max(side) <= 1.0 and np.mean(side) < 0.8


def range_shown(view, d):
    """Share of a gradient picture's range that a crop shows."""
    ramp = np.arange(250, dtype=np.uint8)[None, :, None]
    ramp = Image.fromarray(ramp.repeat(250, 0).repeat(3, 2))
    pixels = np.asarray(view(ramp, 32, random.Random(d), (0.2, 1.0)))[..., 0]
    return (float(pixels.max()) - float(pixels.min())) / 249


# --------------------------------------------------------------------------------------------------
# Views

def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_samples(world, tok):
    r = read("pairs", world, "train")
    ds = data.Views(r, PAIRS, tok, 16, 8)
    s = ds[4, 9]
    assert s["image"].shape == (3, 16, 16)
    assert s["image"].dtype == torch.float32
    assert s["image"].is_contiguous()
    assert s["text"].shape == s["text_mask"].shape == (8,)
    assert s["text"].dtype == s["text_mask"].dtype == torch.int64
    assert (s["image_id"], s["index"], s["bad"]) == (104, 4, 0)
    assert s["image_id"].dtype == s["bad"].dtype == torch.int64
    assert s["text_mask"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert s["text"][5:].tolist() == [0, 0, 0]

    # pixels
    plain = data.Views(r, dict(PAIRS, image="plain"), tok, 16, 8)[4, 9]["image"]

    # norm "half": x / 127.5 - 1
    assert torch.allclose(plain[:, 3, 3], torch.tensor([24, 231, 7]) / 127.5 - 1, atol=1e-5)
    clip = data.Views(r, dict(PAIRS, image="plain", norm="clip"), tok, 16, 8)[4, 9]["image"]
    assert abs(clip[0, 0, 0] - (24 / 255 - 0.48145466) / 0.26862954) < 1e-5

    # texts
    ds = data.Views(r, dict(PAIRS, image2="flip", text2="paraphrase", tags="tags"), tok, 16, 8)
    both = Counter()
    for d in range(60):
        s = ds[0, d]
        both[tok.decode(s["text"]), tok.decode(s["text2"]), int(s["text2_is_copy"])] += 1

    # always that caption's paraphrase
    assert set(both) == {("a red circle", "red circle", 0), ("a blue square", "blue square", 0)}

    # tags
    assert ds.tag_names == ["red", "circle"]
    assert ds[0]["tags"].tolist() == [1, 0]
    assert ds[1]["tags"].tolist() == [0, -1]
    given = data.Views(r, dict(tags="tags"), tok, 16, 8, tag_names=["circle"])
    assert given[0]["tags"].tolist() == [0, -1] and given[1]["tags"].tolist() == [-1, -1]

    # another view of the picture; --image_view in place of the task's own
    assert not torch.equal(s["image"], s["image2"])
    forced = data.Views(r, dict(PAIRS, image="randaug"), tok, 16, 8, image_view="plain")
    assert torch.equal(forced[4, 1]["image"], plain)

    # evaluation draws nothing
    evaluation = data.Views(r, dict(PAIRS, text2="paraphrase"), tok, 16, 8, train=False)
    assert same(evaluation[4], evaluation[4, 77])
    assert tok.decode(evaluation[4]["text"]) == "a red circle"
    assert torch.equal(evaluation[4]["image"], plain)
    assert data.needs(dict(PAIRS, tags="tags")) == ("caption", "tags")
    for wrong in (dict(PAIRS, image="nope"), dict(PAIRS, norm="nope"), dict(PAIRS, source="vqa"),
                  dict(PAIRS, text="nope")):
        with refused("nope" if wrong["source"] == "pairs" else "'vqa'"):
            data.Views(r, wrong, tok, 16, 8)

    with refused("no view 'tags' for 'image'"):
        data.Views(r, dict(PAIRS, image_eval="tags"), tok, 16, 8, train=False)
    with refused("--max_text 2"):
        data.Views(r, PAIRS, tok, 16, 2)


@pytest.mark.parametrize("change, words", [
    (dict(image="nope"), "no view 'nope' for 'image'"),
    (dict(nrom="clip"), "no view 'clip' for 'nrom'"),
    (dict(text_eval="nope"), "no view 'nope' for 'text'"),
    (dict(image_eval="tags"), "no view 'tags' for 'image'"),
    (dict(imge_eval="center"), "VIEWS has 'imge_eval', but no key 'imge'"),
    (dict(norm_eval="clip"), "VIEWS has 'norm_eval', but no key 'norm'"),
    (dict(norm="clipp"), "no norm 'clipp'"),
    (dict(source="pair"), "no source 'pair'"),
])
def test_an_unknown_word_in_views_is_refused(world, tok, change, words):
    """By whatever reads VIEWS first, in training too, also where evaluation alone would use it."""
    with refused(words):
        data.needs({**PAIRS, **change})
    with refused(words):
        data.Views(read("pairs", world, "train"), {**PAIRS, **change}, tok, 16, 8)


def test_an_unknown_image_view_is_refused(world, tok):
    with refused("--image_view", "no view 'caption'"):
        data.Views(read("pairs", world, "train"), PAIRS, tok, 16, 8, image_view="caption")


def test_every_view_of_the_models_is_known():
    for name in ("codis", "conlip", "cookie", "mct", "imagebert"):
        for views in importlib.import_module(f"models.{name}").VIEWS.values():
            data.check_views(views)


def test_stored_features(world, tok):
    """In training a row of the stored array; in evaluation the picture in its own view."""
    r = read("pairs", world, "train")
    views = dict(source="pairs", features="features", features_eval="center", norm="half",
                 text="caption")
    ds = data.Views(r, views, tok, 16, 8)
    ds.features = np.arange(80.0).reshape(40, 2)
    assert ds[7, 3]["features"].tolist() == [14, 15] and "image" not in ds[7, 3]

    evaluation = data.Views(r, views, tok, 16, 8, train=False)
    assert evaluation.keys == {"image": "center", "text": "caption"}
    del views["features_eval"]
    assert data.Views(r, views, tok, 16, 8, train=False).keys["image"] == "resize"


@pytest.mark.parametrize("asked, wanted", [
    (dict(text="caption"), {}),
    (dict(tags="tags"), {"tags": ["red", "circle"], "num_labels": 2, "tag_width": 2}),
    (dict(tags="any_tags"), {"tags": ["red", "circle"], "num_labels": 2, "tag_width": 2}),
])
def test_stats_of_pairs(world, asked, wanted):
    assert data.stats(read("pairs", world, "train"), views=asked) == wanted


def test_tags_from_captions(tmp_path, rectangles):
    """A word list makes tags of captions, whatever tags the records had."""
    _, pairs = rectangles(tmp_path)
    r = read("pairs", str(pairs), "train", str(tmp_path))
    nouns = write(tmp_path / "nouns.txt", "Square\n\nred\ncircle\n")
    made = data.caption_tags(r, nouns)
    assert made[0]["tags"] == ["red", "square"] and made[1]["tags"] == ["square"]
    assert data.tag_list(made) == ["square", "red"]

    # picture 0 has no caption and is left out; the records themselves stay as they were
    assert (len(made), made.notes["with_tags"], r[0]["tags"]) == (11, 11, ["red"])
    for bad in ("missing.txt", write(tmp_path / "empty.txt", "\n")):
        with refused(Path(bad).name):
            data.caption_tags(r, tmp_path / bad)


def test_optional_keys_of_a_record(tmp_path, rectangles, tok):
    """Records without caption, tags or paraphrase are samples as all others."""
    _, pairs = rectangles(tmp_path)
    need = data.needs(mct.VIEWS["pretrain"])
    r = read("pairs", str(pairs), "train", str(tmp_path), need=need)
    assert r.notes["no_caption_left"] == 1

    # record 0 has no caption, 1 has a paraphrase and a tag twice, 5 has no tags
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    del rows[0]["caption"], rows[5]["tags"]
    rows[1] |= {"paraphrase": ["red square left"], "tags": ["red", "red", "a"]}
    r = read("pairs", lines(pairs, rows), "train", str(tmp_path), need=need)
    stats = data.stats(r, views=mct.VIEWS["pretrain"], tags=2)
    assert stats["num_labels"] == 2 and stats["tag_width"] == 3 and "red" in stats["tags"]

    # what is not there is marked so
    views = data.Views(r, mct.VIEWS["pretrain"], tok, 32, 6, tag_names=stats["tags"])
    first, second, sixth = views[0], views[1], views[5]
    assert (first["text_valid"], second["text_valid"]) == (0, 1)
    assert (second["text_key_is_copy"], sixth["text_key_is_copy"]) == (0, 1)
    assert first["text_mask"].sum() == 2
    assert not torch.equal(second["text"], second["text_key"])
    assert torch.equal(sixth["text"], sixth["text_key"]) and (sixth["tags"] == -1).all()

    # a tag counts once
    tags = second["tags"].tolist()
    known = sorted(t for t in tags if t >= 0)
    assert known == [stats["tags"].index("red")] or len(set(tags)) == 3
    assert torch.equal(views.tag_rows()[1], second["tags"])

    # the key views and the tags are training's alone
    shown = data.Views(r, mct.VIEWS["pretrain"], tok, 32, 6, train=False)
    assert set(shown.keys) == {"image", "text"}


def test_frames(tmp_path, tok):
    """Of a clip longer than FRAMES, first and last frame stay; a shorter one is padded."""
    clips = {"videos": [], "sentences": []}
    for n, count in enumerate((3, 47)):
        frames = np.random.default_rng(n).normal(size=(count, 18)).astype(np.float32)
        (tmp_path / "features").mkdir(exist_ok=True)
        np.save(tmp_path / "features" / f"v{n}.npy", frames)
        clips["videos"].append({"video_id": f"v{n}", "split": "train"})
        clips["sentences"].append({"video_id": f"v{n}", "caption": "a red circle"})
    r = read("clips", write(tmp_path / "clips.json", clips), None)
    views = data.Views(r, cookie.VIEWS["vtm"], tok, 32, 11, train=False)

    short, long = views[0], views[1]
    assert short["frames"].shape == long["frames"].shape == (data.FRAMES, 18)
    assert short["frames_mask"].tolist() == [1] * 3 + [0] * (data.FRAMES - 3)
    assert long["frames_mask"].sum() == data.FRAMES
    assert torch.equal(long["frames"][0], torch.from_numpy(frames[0]))
    assert torch.equal(long["frames"][-1], torch.from_numpy(frames[-1]))


def test_missing_paraphrase_says_so(tmp_path, world, tok):
    row = {"image": "im/0.png", "caption": ["a red circle"]}
    r = read("pairs", lines(tmp_path / "n.jsonl", [row]), "train")
    s = data.Views(r, dict(text="caption", star="paraphrase"), tok, 16, 8)[0, 1]
    assert s["star_is_copy"] == 1 and torch.equal(s["text"], s["star"])


def test_several_paraphrases_of_a_caption(tmp_path, world, tok):
    """A list in a caption's place: one is drawn; evaluation takes the first. One string among them
    stays as it is, and no random number is drawn for it."""
    row = {"image": "im/0.png", "caption": ["a red circle", "a blue square", "red"],
           "paraphrase": [["red circle", "", "circle"], "blue square", ""]}
    r = read("pairs", lines(tmp_path / "n.jsonl", [row]), "train")
    assert r[0]["paraphrase"] == row["paraphrase"] and r.notes["with_paraphrase"] == 1
    views, seen = dict(text="caption", star="paraphrase"), Counter()
    ds = data.Views(r, views, tok, 16, 8)
    for d in range(90):
        s = ds[0, d]
        seen[tok.decode(s["text"]), tok.decode(s["star"]), int(s["star_is_copy"])] += 1
    assert set(seen) == {("a red circle", "red circle", 0), ("a red circle", "circle", 0),
                         ("a blue square", "blue square", 0), ("red", "red", 1)}
    assert min(seen.values()) > 5
    evaluation = data.Views(r, views, tok, 16, 8, train=False)
    assert tok.decode(evaluation[0, 5]["star"]) == "red circle"
    for wrong in (["a", 5, "b"], [["a", 5], "b", "c"], [None, "a", "b"]):
        with refused("n.jsonl line 1", "'paraphrase' is list", "strings or lists of strings"):
            read("pairs", lines(tmp_path / "n.jsonl", [dict(row, paraphrase=wrong)]), "train")


@pytest.mark.parametrize("name, text", [
    ("p.jsonl", '{"caption": "A  red circle", "paraphrase": ["circle", "red red"]}\n'
                '{"caption": "a red circle", "paraphrase": "red red"}\n'
                '{"caption": "nowhere", "paraphrase": "circle"}\n'),
    ("p.tsv", "A  red circle\tcircle\tred red\na red circle\tred red\nnowhere\tcircle\n")])
def test_paraphrases_of_a_file_are_joined_by_the_caption(tmp_path, world, tok, name, text):
    """Of any format of pairs; they stand beside those of the records."""
    rows = [{"image": "im/0.png", "caption": "a red circle"}, {"image": "im/1.png"},
            {"image": "im/2.png", "caption": ["red", " a red circle"],
             "paraphrase": ["", "square"]},
            {"image": "im/3.png", "caption": "a blue square"}]
    r = read("pairs", lines(tmp_path / "n.jsonl", rows), "train")
    r = data.join_paraphrases(r, write(tmp_path / name, text))
    assert [record["paraphrase"] for record in r] == [
        [["circle", "red red"]], None, [[], ["square", "circle", "red red"]], None]
    assert (r.notes["with_paraphrase"], r.notes["paraphrased_captions"]) == (2, 2)
    views = data.Views(r, dict(text="any_caption", star="any_paraphrase"), tok, 16, 8)
    assert {tok.decode(views[0, d]["star"]) for d in range(20)} == {"circle", "red red"}
    assert views[3, 0]["star_is_copy"] == 1 and views[1, 0]["text_valid"] == 0
    with refused("none of its 2 captions", "of the 1 captions"):
        data.join_paraphrases(r.subset([3]), str(tmp_path / name))


def test_bad_files_of_paraphrases(tmp_path, world):
    r = read("pairs", world, "train")
    with refused("--paraphrase nowhere.tsv: no such file"):
        data.join_paraphrases(r, "nowhere.tsv")
    for name, text, words in (
            ("p.tsv", "a red circle\n", "line 1: a caption and at least one paraphrase"),
            ("p.tsv", "a\tb\na\t \n", "line 2: a caption and at least one paraphrase"),
            ("p.jsonl", '{"caption": "a"}\n', "line 1: no key 'paraphrase'"),
            ("p.jsonl", '{"caption": "a", "paraphrase": ["b", 5]}\n', "string or list of strings"),
            ("p.json", "[1]", "record 0: an object")):
        with refused(words):
            data.join_paraphrases(r, write(tmp_path / name, text))


def test_a_run_without_paraphrases_says_so(tmp_path, world):
    """Only where a view asks for them."""
    wanted = dict(PAIRS, star="any_paraphrase")
    assert data.twice_the_same(read("pairs", world, "train"), wanted) is None
    r = read("pairs", lines(tmp_path / "n.jsonl", [{"image": "im/0.png", "caption": "a"}]), "train")
    assert "NO CAPTION HAS A PARAPHRASE. `star` is" in data.twice_the_same(r, wanted)
    assert data.twice_the_same(r, PAIRS) is None


def test_randomness_is_local(world, tok):
    r = read("pairs", world, "train", limit=30)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    # a sample does not hang on the global generators
    for name in data.IMAGE_VIEWS:
        ds = data.Views(r, dict(PAIRS, image=name), tok, 16, 8, seed=5)
        a = ds[3, 12]
        random.random()
        torch.rand(3)
        assert same(a, ds[3, 12])
        random.setstate(before[0])
        torch.set_rng_state(before[2])

    # and leaves them as they were
    for workers in (0, 1):
        next(data.batches(ds, 4, seed=0, workers=workers))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])

    # but on the draw, and on the seed
    ds = data.Views(r, PAIRS, tok, 16, 8, seed=5)
    assert not same(ds[3, 12], ds[3, 13])
    assert not same(ds[3, 12], data.Views(r, PAIRS, tok, 16, 8, seed=6)[3, 12])


# --------------------------------------------------------------------------------------------------
# Streams

def take(it, n):
    return [next(it) for _ in range(n)]


def test_stream(world, tok):
    r = read("pairs", world, "train", limit=39)
    ds = data.Views(r, PAIRS, tok, 16, 8)
    whole = take(data.batches(ds, 6, seed=3), 15)
    assert all(b["image"].shape == (6, 3, 16, 16) and b["text"].shape == (6, 8) for b in whole)
    passes = [torch.cat([b["index"] for b in whole[k:k + 6]]).tolist() for k in (0, 6)]

    # a permutation each, 3 left over dropped
    assert all(len(set(p)) == 36 for p in passes) and passes[0] != passes[1]

    # resuming is arithmetic, workers or none
    for workers in (0, 1, 2):
        for t, b in enumerate(take(data.batches(ds, 6, seed=3, start=4, workers=workers), 5)):
            assert same(b, whole[4 + t])
    ranks = [take(data.batches(ds, 3, seed=3, rank=k, world=2), 15) for k in range(2)]

    # the ranks' shares make up the same batch
    for t in range(15):
        for key, value in whole[t].items():
            assert torch.equal(torch.cat([ranks[0][t][key], ranks[1][t][key]]), value)
    assert not same(next(data.batches(ds, 6, seed=4)), whole[0])

    with refused("39 records are fewer than one global batch (20 x 2 ranks)", "--batch_size"):
        data.batches(ds, 20, seed=0, world=2)


def test_an_epoch_of_captions_goes_over_each_caption_once(tmp_path, tok):
    """5, 1 and 2 captions: 8 samples a pass, each caption with its own picture; resuming and ranks
    are arithmetic as for images."""
    records = data.Records("pairs", "train")
    for i, count in enumerate((5, 1, 2)):
        picture(tmp_path / f"{i}.png")
        captions = [" ".join(["red"] * (n + 1)) for n in range(count)]
        records.append({"image": str(tmp_path / f"{i}.png"), "image_id": i, "caption": captions})
    units = data.caption_units(records)
    assert units.tolist() == [[0, n] for n in range(5)] + [[1, 0], [2, 0], [2, 1]]

    views = data.Views(records, PAIRS, tok, 16, 8)

    def passes(start, steps, **ranks):
        stream = data.batches(views, 2, 3, start=start, units=units, **ranks)
        batches = [next(stream) for _ in range(steps)]
        return [(int(i), int(m.sum()) - 2) for b in batches
                for i, m in zip(b["image_id"], b["text_mask"])]

    wanted = sorted((i, n + 1) for i, n in units.tolist())
    first, second = passes(0, 4), passes(4, 4)
    assert sorted(first) == sorted(second) == wanted and first != second
    assert passes(2, 6) == (first + second)[4:]
    ranks = [passes(0, 2, rank=rank, world=2) for rank in (0, 1)]
    assert ranks[0][:2] + ranks[1][:2] + ranks[0][2:] + ranks[1][2:] == first


def test_unreadable_images_are_replaced(tmp_path, world, tok, capsys):
    for n in (3, 17):
        truncated(tmp_path / "bad.jpg").rename(tmp_path / "im" / f"{n}.png")
    r = read("pairs", world, "train")
    streams = []
    for workers in (0, 2):
        capsys.readouterr()
        ds = data.Views(r, PAIRS, tok, 16, 8)
        streams.append(take(data.batches(ds, 8, seed=1, workers=workers), 10))
        err = capsys.readouterr().err
        assert ds.seen == 80
        assert ds.bad == 4
        assert err.count("im/3.png") == err.count("im/17.png") == 1
        assert "stands in" in err

    # the same stand-ins
    assert all(same(a, b) for a, b in zip(*streams))
    stand_ins = [(i.item(), x.item()) for b in streams[0]
                 for i, x, bad in zip(b["index"], b["image_id"], b["bad"]) if bad]

    # a whole other record
    assert len(stand_ins) == 4 and all(i not in (3, 17) and x == 100 + i for i, x in stand_ins)
    capsys.readouterr()

    # evaluation keeps its place, as grey
    for b in data.iter_eval(r, PAIRS, tok, 16, 8, "image", batch_size=40):
        assert b["index"].tolist() == list(range(40))
        assert b["bad"].nonzero().flatten().tolist() == [3, 17]
        assert b["image"][3].abs().max() == 0
    assert "evaluated as a grey image" in capsys.readouterr().err
    for workers in (0, 1):
        with refused("of 104 images were unreadable", "--max_bad 0.01"):
            ds = data.Views(r, PAIRS, tok, 16, 8, max_bad=0.01)
            take(data.batches(ds, 8, seed=1, workers=workers), 15)
    for n in range(39):
        write(tmp_path / "im" / f"{n}.png", "no picture")
    ds = data.Views(r, PAIRS, tok, 16, 8, seed=6)

    # it searches on until it finds a good one
    assert [int(ds[0, d]["index"]) for d in range(3)] == [39, 39, 39]
    write(tmp_path / "im" / "39.png", "no picture")

    # a worker's error is one line too
    for workers in (0, 1):
        with refused("unreadable images in a row"):
            next(data.batches(data.Views(r, PAIRS, tok, 16, 8), 8, seed=1, workers=workers))


def test_iter_eval(tmp_path, world, tok):
    rows = [{"image": f"im/{n}.png", "caption": [f"a red circle {k}" for k in range(c)]}
            for n, c in enumerate([5, 1, 7, 6, 5])]

    # a picture met before: one image, its caption too
    rows.append({"image": "im/1.png", "caption": "a blue square"})
    r = read("pairs", lines(tmp_path / "ragged.jsonl", rows), "test")
    texts, owner = data.flat_captions(r)
    assert len(texts) == 25 and owner.tolist() == [0] * 5 + [1] + [2] * 7 + [3] * 6 + [4] * 5 + [1]

    # every place once, however many processes and workers there are
    for what, n in (("image", 5), ("text", 25), ("sample", 6)):
        for world_size, workers in ((1, 0), (3, 0), (1, 2), (7, 0)):
            got = {}
            for rank in range(world_size):
                for b in data.iter_eval(r, PAIRS, tok, 16, 8, what, batch_size=2, rank=rank,
                                        world=world_size, workers=workers):
                    assert 1 <= len(b["index"]) <= 2
                    for k, i in enumerate(b["index"].tolist()):
                        # nothing twice
                        assert i not in got
                        got[i] = {key: v[k] for key, v in b.items()}
            # and nothing missing
            assert sorted(got) == list(range(n))

        # what is asked for, and no more
        assert ("image" in got[0]) == (what != "text") and ("text" in got[0]) == (what != "image")
        if what == "text":
            for i, text in enumerate(texts):
                assert got[i]["text"].tolist()[:5] == tok.encode(text, 8)[:5]
            assert tok.decode(got[24]["text"]) == "a blue square"
    with pytest.raises(ValueError):
        next(data.iter_eval(r, PAIRS, tok, 16, 8, "nothing"))


def test_records_and_plans_are_picklable(world, tok):
    """Workers are spawned, not forked, on macOS."""
    r = read("pairs", world, "train")
    again = pickle.loads(pickle.dumps(r))
    assert list(again) == list(r) and again.notes == r.notes
    plan = data.Plan(data.Views(r, PAIRS, tok, 16, 8), data.Stream(len(r), 4, 0, 0, 1))
    assert same(plan[3][0], pickle.loads(pickle.dumps(plan))[3][0])
    with pytest.raises(IndexError):
        r[40]


def test_masks_by_hand():
    # x 2-5, y 1-4 of 7 wide, 6 high
    square = [[2, 1, 5, 1, 5, 4, 2, 4]]
    wanted = np.zeros((6, 7), bool)
    wanted[1:4, 2:5] = True
    assert (data.decode_mask(square, 6, 7) == wanted).all()

    # down the columns, outside first
    runs = {"size": [6, 7], "counts": [13, 3, 3, 3, 3, 3, 14]}
    assert data.encode_mask(wanted) == runs and (data.decode_mask(runs, 6, 7) == wanted).all()

    # as the reference packs them
    assert (data.decode_mask(runs | {"counts": "=33000;"}, 6, 7) == wanted).all()
    assert data.encode_mask(np.ones((2, 3), bool)) == {"size": [2, 3], "counts": [0, 6]}
    assert data.encode_mask(np.zeros((2, 3), bool)) == {"size": [2, 3], "counts": [6]}
    for bad in ({"counts": [3, 4]}, {"size": [6, 7]}, [[1, 2, 3]], "no mask"):
        with refused("a.jpg", "7x6 picture"):
            data.decode_mask(bad, 6, 7, "a.jpg")


@pytest.mark.needs("pycocotools")
def test_masks_are_those_of_pycocotools():
    """Polygons of every kind (outside the picture, crossing themselves, thin), and all three ways
    of run lengths."""
    from pycocotools import mask
    rng = np.random.default_rng(0)
    for trial in range(300):
        height, width = rng.integers(3, 50, 2)
        polygons = []
        for _ in range(1 + trial % 2):
            points = (rng.random(2 * rng.integers(3, 9)) * 1.6 - 0.3) * max(height, width)
            polygons.append(points.round(0 if trial % 3 else 2).tolist())

        # polygons to pixels
        packed = mask.merge(mask.frPyObjects(polygons, int(height), int(width)))
        wanted = mask.decode(packed).astype(bool)
        found = data.decode_mask(polygons, height, width)
        assert (found == wanted).all(), (polygons, height, width)

        # run lengths to pixels, and back
        runs = data.encode_mask(wanted)
        for counts in (packed["counts"], packed["counts"].decode(), runs["counts"]):
            assert (data.decode_mask({"counts": counts}, height, width) == wanted).all()
        height, width = int(height), int(width)
        own = mask.frPyObjects(runs | {"size": [height, width]}, height, width)
        assert own["counts"] == packed["counts"]


def test_boxes_without_area_are_no_targets(tmp_path, tok):
    """COCO has a few of width 0, of which a detector's loss is not a number."""
    picture(tmp_path / "a.png", size=(40, 30))
    notes = []
    for n, box in enumerate(([5, 5, 0, 3], [1, 2, 8, 9], [3, 3, 4, 0])):
        notes.append({"id": n, "image_id": 5, "category_id": 1 + n, "bbox": box, "area": 1,
                      "iscrowd": 0, "segmentation": []})
    images = [{"id": 5, "file_name": "a.png", "width": 40, "height": 30}]
    categories = [{"id": n, "name": str(n)} for n in (1, 2, 3)]
    r = read("detection", write(tmp_path / "instances.json", {
        "images": images, "annotations": notes, "categories": categories}), "train")
    views = data.Views(r, dict(source="detection", image="objects"), tok, None, 8, train=False)
    sample = views[0]
    assert sample["boxes"][0].tolist() == [[1, 2, 9, 11]] and sample["labels"][0].tolist() == [1]


@pytest.mark.parametrize("view", ["objects", "masks"])
def test_a_picture_without_pixels_in_a_batch_of_detection(tmp_path, tok, view):
    """Whichever place in the batch it has, it is evaluated: grey, at its own size, without
    objects."""
    instances = json.loads(Path(coco(tmp_path)[1]).read_text())
    for a in instances["annotations"]:
        x, y, w, h = a["bbox"]
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        a.update(image_id=9 if a["id"] == 3 else 5, iscrowd=0, segmentation=[outline])
    path = write(tmp_path / "annotations/instances_val2017.json", instances)

    # first the one, then the other
    for n in (9, 5):
        picture(tmp_path / "val2017/000000000005.jpg")
        picture(tmp_path / "val2017/000000000009.jpg")
        truncated(tmp_path / "val2017" / f"{n:012d}.jpg")
        r = read("detection", path, "val")
        bad = [x["image_id"] for x in r].index(n)

        views = {"source": "detection", "image": view, "norm": "none"}
        batch, = data.iter_eval(r, views, tok, 16, 8)
        keys = ["boxes", "labels"] + ["masks"] * (view == "masks")
        assert batch["image"][bad].shape == (3, 16, 24)
        assert batch["image"][bad].unique().tolist() == [0.5]
        for key in keys:
            assert len(batch[key]) == 2 and len(batch[key][bad]) == 0 < len(batch[key][1 - bad])


def objects_of(root, rectangles, view, **more):
    """Samples of detection or segmentation from the pictures of one rectangle."""
    file, _ = rectangles(root)
    r = read("detection", str(file), "train", str(root), need=("boxes", "segmentation"))
    return data.Views(r, mct.VIEWS[view], None, None, None, **more)


def test_boxes_and_masks_are_flipped_with_the_picture(tmp_path, rectangles):
    views, flips = objects_of(tmp_path, rectangles, "segmentation", seed=3), set()
    for draw in range(8):
        s = views[0, draw]
        (image,), (boxes,), (labels,) = s["image"], s["boxes"], s["labels"]
        masks = s["masks"][0]
        assert image.shape == (3, 32, 40) and 0 <= image.min() and image.max() <= 1
        assert labels.tolist() == [0], "crowds are no targets"

        # the mask fills the box, and the bright pixels are in it
        x0, y0, x1, y1 = boxes[0].int().tolist()
        assert masks.shape == (1, 32, 40) and masks[0, y0:y1, x0:x1].all()
        assert masks.sum() == 14 * 12
        darker = image[2].flatten().sort().values[-14 * 12 - 1]
        assert image[2, y0:y1, x0:x1].min() > 0.9 > darker
        flips.add(x0)
    assert flips == {4, 22}


def test_batches_of_objects_are_lists(tmp_path, rectangles):
    """As sizes differ."""
    views = objects_of(tmp_path, rectangles, "segmentation", seed=3)
    batch = next(data.batches(views, 4, seed=0))
    assert isinstance(batch["image"], list) and len(batch["masks"]) == 4
    assert batch["image_id"].shape == (4,)
    assert data.move(batch, "cpu")["boxes"][3].shape == (1, 4)


def test_unreadable_pictures_with_objects(tmp_path, rectangles):
    """Grey in evaluation, replaced in training."""
    training = objects_of(tmp_path, rectangles, "segmentation", seed=3)
    (tmp_path / "im" / "3.png").write_bytes(b"no picture")
    assert training[3, 0]["bad"] == 1 and training[3, 0]["index"] != 3
    evaluation = data.Views(training.records, mct.VIEWS["detection"], None, None, None, train=False)
    sample = evaluation[3]
    assert sample["bad"] == 1 and (sample["image"][0] == 0.5).all()
    assert sample["image"][0].shape == (3, 32, 40)


# --------------------------------------------------------------------------------------------------
# Check

def test_check(tmp_path, world, capsys):
    assert data.main(["check", world]) == 0
    out = capsys.readouterr().out
    for row in ("records 40", "images 40", "captions 80", "captions an image 2 to 2, mean 2.00",
                "missing files 0", "corrupt files 0", "duplicate captions 0", "with paraphrase 40"):
        assert row in " ".join(out.split()), row
    truncated(tmp_path / "im" / "3.jpg").rename(tmp_path / "im" / "3.png")
    (tmp_path / "im" / "9.png").unlink()
    assert data.main(["check", world]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "missing files 1" in out
    assert "corrupt files 1" in out
    assert "im/3.png: " in out
    assert "im/9.png: missing" in out

    with refused("no such file"):
        data.main(["check", "nope.json"])
    with refused("it has: train"):
        row = {"image": "im/0.png", "caption": "a", "split": "train"}
        data.main(["check", lines(tmp_path / "s.jsonl", [row]), "--split", "val"])


def test_the_command_line_makes_no_region_file(capsys):
    with pytest.raises(SystemExit, match="invalid choice: 'regions'"):
        data.main(["regions", "--images", ".", "--out", "x"])
    with pytest.raises(SystemExit):
        data.main(["--help"])
    assert "--tsv" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The cuts of real data sets

real = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


@real
def test_real_flickr8k():
    spec, root = str(SHARED / "flickr8k/dataset_flickr8k.json"), str(SHARED / "flickr8k/images")
    tok = data.get_tokenizer(str(SHARED / "bert-base-uncased-vocab.txt"))
    assert (tok.pad_id, tok.unk_id, tok.cls_id, tok.sep_id, tok.mask_id) == (0, 100, 101, 102, 103)
    assert (tok.vocab_size, tok.first_word) == (30522, 999)
    ids = tok.encode("Unaffable cats\u2019 caf\u00e9!", 20)
    assert ids == [101, 14477, 20961, 3468, 8870, 1521, 7668, 999, 102]
    train = read("pairs", spec, "train", image_root=root, need=("caption",))
    val = read("pairs", spec, "val", image_root=root, need=("caption",))
    assert (len(train), len(val), len(data.flat_captions(val)[0])) == (4500, 500, 2500)

    with refused("no split 'test'", "it has: train, val"):
        read("pairs", spec, "test")
    b = next(data.batches(data.Views(train, dict(PAIRS, norm="clip"), tok, 64, 30), 16, seed=0))
    assert b["image"].shape == (16, 3, 64, 64)
    assert b["bad"].sum() == 0
    assert (b["text_mask"].sum(1) > 4).all()


@real
def test_real_coco_vqa_ve_nlvr2():
    home = SHARED / "coco/annotations"
    r = read("pairs", f"{home}/captions_val2017.json,{home}/instances_val2017.json", "val")
    assert len(r) == 80
    assert len(data.flat_captions(r)[0]) == 400
    assert r.notes == {"with_tags": 78}
    assert len(r.label_names) == 80
    assert all(data.trouble_with(x["image"]) is None for x in r.subset(range(5)))
    r = read("detection", f"{home}/instances_val2017.json", "val")
    x1, y1, x2, y2 = np.array([b for x in r for b in x["boxes"]]).T
    assert (x2 > x1).all() and (y2 > y1).all()

    home = SHARED / "vqa"
    spec = (f"{home}/v2_OpenEnded_mscoco_train2014_questions.json,"
            f"{home}/v2_mscoco_train2014_annotations.json")
    r = read("vqa", spec, "train", need=("answers",))
    assert len(r) == 82
    assert len({x["image_id"] for x in r}) == 50
    assert all(len(x["answers"]) == 10 for x in r)
    assert r.notes == {}

    root = str(SHARED / "flickr8k/images")
    sizes = [len(read("ve", str(SHARED / f"snli_ve/snli_ve_{s}.jsonl"), s, image_root=root))
             for s in ("dev", "test")]
    assert sizes == [2178, 2650]

    r = read("nlvr2", str(SHARED / "nlvr2/dev.json"), "val")
    assert len(r) == 8
    assert r.notes == {}
    assert all(x["image"].endswith("img0.png") and x["image2"].endswith("img1.png") for x in r)


@real
def test_real_detection_data():
    voc = read("detection", str(SHARED / "voc" / "VOCdevkit"), "train")
    views = data.Views(voc, mct.VIEWS["detection"], None, None, None, train=False)
    assert len(voc) == 10
    assert sum(int(views[i]["bad"]) for i in range(10)) == 2        # truncated at the source

    # crowds are no targets
    instances = SHARED / "coco" / "annotations" / "instances_val2017.json"
    coco = read("detection", str(instances), "val")
    assert len(coco) == 80 and len(coco.label_names) == 80 and any(sum(r["crowd"]) for r in coco)
    crowded = next(i for i, r in enumerate(coco) if sum(r["crowd"]))
    views = data.Views(coco, mct.VIEWS["segmentation"], None, None, None, seed=1)
    sample, record = views[crowded, 0], coco[crowded]
    targets = len(record["boxes"]) - sum(record["crowd"])
    assert len(sample["masks"][0]) == len(sample["boxes"][0]) == targets


@real
def test_real_text_lists_and_clips():
    sizes = {s: len(read("sts", str(SHARED / f"sts/{s}-en-test"), "test"))
             for s in ("STS12", "STS13", "STS14", "STS15")}

    # the published counts
    assert sizes == {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000}
    assert len(read("sts", str(SHARED / "sts"), "val")) == 1500
    for name, labels in (("coco", 80), ("nus_wide", 21)):
        r = read("hashing", str(SHARED / f"hashing/{name}_test.txt"), "test", missing="keep")
        assert len(r) == 300 and len(r[0]["labels"]) == labels and r.notes["missing"] == 300
    clips = str(SHARED / "msrvtt/test_videodatainfo.json")
    r = read("clips", clips, "test", missing="keep")
    assert len(r) == 60 and all(len(x["caption"]) == 20 for x in r)
    r = read("clips", f"{clips},{SHARED}/msrvtt/MSRVTT_JSFUSION_test.csv", "test", missing="keep")
    assert len(r) == 1000 and r.protocol == "1k-A"
    spec = str(SHARED / "cc/Validation_GCC-1.1.0-Validation.tsv")
    r = read("pairs", spec, "train", missing="keep")
    assert len(r) == 500 and r.notes["missing"] == 500


@real
def test_real_truncated_jpegs():
    bad = [p.name for p in sorted((SHARED / "voc").rglob("*.jpg")) if data.trouble_with(str(p))]
    assert bad == ["000001.jpg", "2007_000027.jpg"]
