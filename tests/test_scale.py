"""formats.py: many records, in little memory and read once; tar shards and their indexes; the
columns of a TSV; what is held out of files without splits; one id for two pictures."""

import gzip
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import formats
import train
from tests.test_data import SHARED, lines, picture, refused, shard, write

read = data.open_source
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Stores and indexes go to a directory of the test's own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(formats.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.fixture
def stored(monkeypatch):
    """Files of any size are read once and kept."""
    monkeypatch.setattr(formats, "STORE_FROM", 0)


def rows_of(folder, n, **more):
    """n records, whose pictures are empty files that are there."""
    (folder / "im").mkdir(exist_ok=True, parents=True)
    rows = []
    for i in range(n):
        (folder / "im" / f"{i}.jpg").touch()
        rows.append({"image": f"im/{i}.jpg", "caption": [f"number {i}", f"a {i}"], **more})
    return rows


# --------------------------------------------------------------------------------------------------
# Many records

MEASURE = """
import json, sys, time
import data, formats
formats.STORE_FROM = 0
formats.tempfile.tempdir = sys.argv[1]

def memory(key):
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return int(status[key].split()[0]) * 1024

data.open_source("pairs", sys.argv[2], None, missing="keep")
for path in sys.argv[3:]:
    open("/proc/self/clear_refs", "w").write("5")           # the peak begins anew
    before, seconds = memory("VmRSS"), time.process_time()
    records = data.open_source("pairs", path, "train", missing="keep")
    seconds = time.process_time() - seconds
    print(json.dumps([len(records), seconds, (memory("VmHWM") - before) / len(records)]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux tells the peak")
def test_a_record_takes_less_than_250_bytes_and_20_microseconds(tmp_path):
    """100,000 of them: a thirtieth of the 3,000,000 that must open in a minute. (The peak holds
    what any reading takes, a few MB; the seconds are ten times what they should be.)"""
    n, words = 100_000, "a man in a red shirt rides a brown horse along the beach at sunset"
    with open(tmp_path / "a.jsonl", "w") as a, open(tmp_path / "b.tsv", "w") as b:
        for i in range(n):
            name = f"images/{i // 10000:05d}/{i:09d}.jpg"
            a.write(json.dumps({"image": name, "caption": f"{words} {i}"}) + "\n")
            b.write(f"{words} {i}\thttp://pictures.example.org/2015/04/{i}.jpg?width=800\n")
    small = lines(tmp_path / "small.jsonl", [{"image": "0.jpg", "caption": "a"}])
    command = [sys.executable, "-c", MEASURE, tmp_path / "tmp", small, tmp_path / "a.jsonl",
               tmp_path / "b.tsv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        count, seconds, size = json.loads(line)
        assert count == n and size < 250 and seconds < 20, line


def test_what_is_stored_is_what_is_read(tmp_path, monkeypatch, capsys):
    """Every kind of value, names that are no Unicode among them; and it is read only once."""
    rows = rows_of(tmp_path, 30, tags=["a", "\u00e9"], boxes=[[0.1, 0, 3, 1e-9]], labels=[2],
                   paraphrase=["x", ["y", "z"]])
    rows[7]["image"] = "im/\udcff.jpg"
    Path(os.fsdecode(tmp_path / "im" / "\udcff.jpg")).touch()
    rows[9]["image"] = "im/gone.jpg"
    spec = lines(tmp_path / "a.jsonl", rows)
    plain = read("pairs", spec, "train")
    monkeypatch.setattr(formats, "STORE_FROM", 0)
    first = read("pairs", spec, "train")

    monkeypatch.setattr(formats, "read_files", None)
    again = read("pairs", spec, "val")              # no splits: one store for all
    assert list(first) == list(again) == list(plain) and len(plain) == 29
    assert first.notes == again.notes == plain.notes and plain.notes["missing"] == 1
    assert (again.split, again.root, again.own_ids) == ("val", str(tmp_path), False)
    assert "1 of 30 records left out" in capsys.readouterr().err
    assert plain[7]["image"].endswith("\udcff.jpg") and again[-1] == again[28]
    with pytest.raises(IndexError):
        again[29]

    # another process gets names of files, not their content
    sent = pickle.dumps(first.subset([3, 5]))
    assert len(sent) < 3000 and list(pickle.loads(sent)) == [plain[3], plain[5]]


def test_a_store_is_as_old_as_what_was_read(tmp_path, stored, capsys):
    """It is made anew where a file, a folder of pictures or an option changed; of each split one is
    kept."""
    def fresh(spec, split="train", **options):
        capsys.readouterr()
        records = read("pairs", spec, split, **options)
        return len(records), "what was read is kept" in capsys.readouterr().err

    rows = rows_of(tmp_path, 5)
    (tmp_path / "im" / "4.jpg").unlink()
    spec = lines(tmp_path / "a.jsonl", rows)
    assert fresh(spec) == (4, True) and fresh(spec) == (4, False)
    (tmp_path / "im" / "4.jpg").touch()
    assert fresh(spec) == (5, True) and fresh(spec) == (5, False)
    lines(tmp_path / "a.jsonl", rows[:2])
    assert fresh(spec) == (2, True) and fresh(spec) == (2, False)
    assert fresh(spec, need=("caption",)) == (2, True)
    assert fresh(spec, limit=1) == (1, False)

    split = lines(tmp_path / "b.jsonl", [dict(rows[0], split="train"), dict(rows[1], split="val"),
                                         dict(rows[2], split="val")])
    for n, new in ((1, True), (1, False)):
        assert fresh(split) == (n, new) and fresh(split, "val") == (n + 1, new)


def test_processes_read_once_and_a_killed_one_does_no_harm(tmp_path, stored, temporary, capfd):
    rows = rows_of(tmp_path, 400)
    spec = lines(tmp_path / "a.jsonl", rows)

    # killed in the middle of its reading
    child = os.fork()
    if not child:
        formats.CHUNK = 100
        append = formats.Records.append

        def appending(self, *given):
            append(self, *given)
            if len(self) == 200:
                os.kill(os.getpid(), signal.SIGKILL)
        formats.Records.append = appending
        read("pairs", spec, "train")
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name for path in temporary.rglob("records.jsonl")]
    capfd.readouterr()

    # four at once
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            records = read("pairs", spec, "train")
            os._exit(int([record["caption"] for record in records] != [r["caption"] for r in rows]))
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert capfd.readouterr().err.count("what was read is kept") == 1
    assert not list(temporary.rglob("*.draft"))


def test_a_store_that_cannot_be_written(tmp_path, stored, temporary, monkeypatch):
    spec = lines(tmp_path / "a.jsonl", rows_of(tmp_path, 3))

    def full(*given):
        raise OSError(formats.errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch, refused("No space left on device", "TMPDIR"):
        patch.setattr(formats.np, "save", full)
        read("pairs", spec, "train")
    assert not list(temporary.rglob("*.draft"))

    # somebody else's folder under this name
    monkeypatch.setattr(formats.os, "getuid", lambda: 12345)
    with refused("nanovlp-12345 is not this user's", "TMPDIR"):
        read("pairs", spec, "train")


def test_parts_of_records(tmp_path):
    """They are records as all others, share the lines of the whole, and one of nothing grows."""
    whole = read("pairs", lines(tmp_path / "a.jsonl", rows_of(tmp_path, 9)), "train")
    part = whole.subset([8, 2, 2]).subset((2, 0))
    assert [r["image_id"] for r in part] == [2, 8] and part._lines is whole._lines
    assert part.column("image_ids").tolist() == [2, 8]
    assert data.flat_captions(part)[0] == ["number 2", "a 2", "number 8", "a 8"]
    assert data.caption_units(part).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    empty = part.subset([])
    empty.append({**part[1], "regions": 5})
    assert list(empty) == [{**whole[8], "regions": 5}] and len(part) == 2 and len(whole) == 9


def test_the_fingerprint_is_of_number_order_and_captions(tmp_path, monkeypatch):
    rows = rows_of(tmp_path / "a", 6)
    spec = lines(tmp_path / "a" / "x.jsonl", rows)
    records = read("pairs", spec, "train")
    mark = records.fingerprint()

    # not of the folder, of where the records are kept, or of other records
    rows_of(tmp_path / "b", 7)
    monkeypatch.setattr(formats, "STORE_FROM", 0)
    more = rows + [{"image": "im/6.jpg", "caption": "z"}]
    moved = read("pairs", lines(tmp_path / "b" / "y.jsonl", more), "train")
    assert moved.subset(range(6)).fingerprint() == mark == read("pairs", spec, "").fingerprint()

    other = [dict(rows[0], caption=["number 0", "A 0"]), *rows[1:]]
    joined = [dict(rows[0], caption="number 0\na 0"), *rows[1:]]
    marks = {mark, moved.fingerprint(), records.subset(range(5)).fingerprint(),
             records.subset([1, 0, 2, 3, 4, 5]).fingerprint()}
    for changed in (other, joined):
        marks.add(read("pairs", lines(tmp_path / "a" / "z.jsonl", changed), "").fingerprint())
    assert len(marks) == 6


def test_json_lines_are_known_by_their_first_line(tmp_path):
    rows = [dict(row, image=row["image"]) for row in rows_of(tmp_path, 3)]
    for name, text in (("a.json", json.dumps(rows)), ("b.json", json.dumps(rows, indent=1)),
                       ("c.json", "\n".join(map(json.dumps, rows))),
                       ("d.json", "\ufeff\n" + "\n\n".join(map(json.dumps, rows)))):
        assert len(read("pairs", write(tmp_path / name, text), "train")) == 3
    for name in ("deep.json", "deep.jsonl"):
        with refused(name, "not JSON that can be read"):
            read("pairs", write(tmp_path / name, "[" * 100_000), "train")
    with refused("n.jsonl line 1", "not JSON that can be read"):
        read("pairs", write(tmp_path / "n.jsonl", '{"image_id": ' + "9" * 5000 + "}"), "train")


# --------------------------------------------------------------------------------------------------
# Ids of pictures

def ids_by_hand(files):
    """What ImageIds promises, with a dict. files: list of lists of (location, number or None)."""
    known, next_free = {}, 0
    found = []
    for rows in files:
        offset = next_free
        for location, own in rows:
            if location not in known:
                known[location] = next_free if own is None else offset + own
                next_free = max(next_free, known[location] + 1)
            found.append(known[location])
    return found


@pytest.mark.parametrize("seed", range(8))
def test_ids_of_several_files(tmp_path, seed):
    rng = random.Random(seed)
    names = [f"im/{n}.jpg" for n in range(12)]
    rows_of(tmp_path, 12)
    specs, files = [], []
    for k in range(3):
        numbers = dict(zip(names, rng.sample(range(40), 12)))
        numbered, rows = rng.random() < 0.5, []
        for name in rng.choices(names, k=15):
            rows.append((name, numbers[name] if numbered else None))
        made = []
        for name, own in rows:
            record = {"image": rng.choice(["", "./"]) + name, "caption": "a"}
            made.append(record if own is None else record | {"image_id": own})
        specs.append(lines(tmp_path / f"{k}.jsonl", made))
        files.append(rows)
    records = read("pairs", ",".join(specs), "train")
    wanted = ids_by_hand(files)
    assert [record["image_id"] for record in records] == wanted
    assert records.notes["repeated_images"] == 45 - len(set(wanted))
    own = [number for rows in files for _, number in rows]
    assert [record.get("own_id") for record in records] == own


def test_one_id_for_two_pictures_is_refused(tmp_path):
    rows = rows_of(tmp_path, 4)
    for ids in ((5, 3, 4, 3), ("p", "q", "r", "q")):
        twice = [dict(row, image_id=own) for row, own in zip(rows, ids)]
        spec = lines(tmp_path / "t.jsonl", twice)
        with refused(f"t.jsonl: image_id {ids[1]!r} is two pictures", "im/1.jpg and ", "im/3.jpg",
                     "--image_id path"):
            read("pairs", spec, "train")
        found = read("pairs", spec, "train", image_id="path")
        assert [r["image_id"] for r in found] == [0, 1, 2, 3] and found[1]["own_id"] == ids[1]

        # the flag of a training
        views = {"source": "pairs", "image": "plain", "text": "caption"}
        loop = train.Loop(data=spec, image_id="path")
        assert list(train.open_records(loop, views, False)) == list(found)

    # the same picture under two ids is one; in two files one id is two pictures
    same = lines(tmp_path / "s.jsonl", [dict(rows[0], image_id=9), dict(rows[0], image_id=8)])
    other = lines(tmp_path / "o.jsonl", [dict(rows[1], image_id=9)])
    found = read("pairs", f"{same},{other}", "train")
    assert [r["image_id"] for r in found] == [9, 9, 19] and found.notes["repeated_images"] == 1
    for wrong in (7.5, True, -1, 2 ** 70, [1]):
        with refused("w.jsonl line 1: key 'image_id'"):
            read("pairs", lines(tmp_path / "w.jsonl", [dict(rows[0], image_id=wrong)]), "train")
    with refused("--image_id name"):
        read("pairs", same, "train", image_id="name")


# --------------------------------------------------------------------------------------------------
# Columns of a TSV

def numbered(folder, *rows, nested=False):
    """img2dataset's pictures of these rows: with their number as colour."""
    for n in rows:
        home = folder / f"{n // 10000:05d}" if nested else folder
        picture(home / f"{n:09d}.jpg", color=(n * 40, 0, 0))


def colours(records):
    return [round(data.load_image(r["image"]).getpixel((2, 2))[0] / 40) for r in records]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("text", [
    "caption\turl\n" + "".join(f"number {n}\thttp://x.org/{n}\n" for n in range(5)),
    "".join(f"number {n}\thttp://x.org/{n}\n" for n in range(5)),
    "".join(f"https://x.org/{n}.jpg?a=b\tnumber {n}\n" for n in range(5)),
    "URL\tid\tTEXT\n" + "".join(f"http://x.org/{n}\t7\tnumber {n}\n" for n in range(5)),
    "similarity\ttitle\turl\n\n" + "".join(f"0.3\tnumber {n}\thttp://x.org/{n}\n\n"
                                           for n in range(5))])
def test_rows_of_a_tsv_count_as_img2dataset_counts_them(tmp_path, text, nested):
    """Its recipe for CC3M adds a header, which is no row; CC12M has the URL first."""
    numbered(tmp_path / "im", 0, 1, 3, 4, nested=nested)
    records = read("pairs", write(tmp_path / "cc.tsv", text), "train", str(tmp_path / "im"))
    assert [r["caption"] for r in records] == [[f"number {n}"] for n in (0, 1, 3, 4)]
    assert colours(records) == [0, 1, 3, 4] and records.notes["missing"] == 1


@pytest.mark.parametrize("text", [
    "path\tsentence\nim/0.jpg\ta\nim/1.jpg\tb\n", "a\tim/0.jpg\nb\tim/1.jpg\n",
    "im/0.jpg\ta\nim/1.jpg\tb\n", "sentence\turl\timage_path\na\thttp://x/0\tim/0.jpg\n"
    "b\thttp://x/1\tim/1.jpg\n"])
def test_paths_in_a_tsv(tmp_path, text):
    rows_of(tmp_path, 2)
    records = read("pairs", write(tmp_path / "p.tsv", text), "train")
    assert [(Path(r["image"]).name, r["caption"]) for r in records] == [("0.jpg", ["a"]),
                                                                        ("1.jpg", ["b"])]


@pytest.mark.parametrize("text, words", [
    ("a dog\tein Hund\na cat\teine Katze\n", "neither column holds addresses"),
    ("a\thttp://x/0\nb\thttp://x/1\nhttp://x/2\tc\n", "line 3: 'c' is neither an address"),
    ("http://x/0\ta\nb\thttp://x/1\nhttp://x/2\tc\n", "line 2: 'b' is neither an address"),
    ("caption\tid\turl\na\t1\n", "line 2: 2 columns, the header names more"),
    ("caption\turl\na\n", "line 2: 'caption TAB path-or-url' expected"),
    ("", "no row in it")])
def test_a_tsv_without_pictures_is_refused(tmp_path, text, words):
    rows_of(tmp_path, 2)
    with refused("t.tsv", words):
        read("pairs", write(tmp_path / "t.tsv", text), "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_the_recipe_of_cc3m_on_its_real_rows(tmp_path):
    """53 rows, downloaded by the recipe of img2dataset: each picture has its own caption."""
    rows = (SHARED / "cc/Validation_GCC-1.1.0-Validation.tsv").read_text().splitlines()[:53]
    for n in range(0, 53, 2):
        picture(tmp_path / "00000" / f"{n:09d}.jpg", (8, 8), (4 * n, 0, 0))
    for header in (["caption\turl"], []):
        spec = write(tmp_path / "cc3m.tsv", "\n".join(header + rows))
        records = read("pairs", spec, "train")
        assert len(records) == 27
        for n, record in zip(range(0, 53, 2), records):
            assert record["caption"] == [rows[n].split("\t")[0].strip()]
            assert abs(data.load_image(record["image"]).getpixel((2, 2))[0] - 4 * n) < 4


# --------------------------------------------------------------------------------------------------
# Tar shards

def jpg(n=0):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (n, 0, 0)).save(out, "jpeg")
    return out.getvalue()


def samples(*numbers):
    """Members of a shard: each number's picture and caption."""
    made = []
    for n in numbers:
        made += [(f"{n:09d}.jpg", jpg(n)), (f"{n:09d}.txt", f"number {n}".encode())]
    return made


def opened(monkeypatch):
    """The tars that are walked from now on, a list that grows."""
    walked, walk = [], tarfile.open

    def opening(path, mode):
        if mode == "r:":
            walked.append(path)
        return walk(path, mode)
    monkeypatch.setattr(formats.tarfile, "open", opening)
    return walked


def test_a_shard_is_walked_once(tmp_path, monkeypatch):
    walked = opened(monkeypatch)
    monkeypatch.setattr(formats, "usable_cores", lambda: 1)
    shards = [shard(tmp_path / "cc" / f"{k}.tar", samples(2 * k, 2 * k + 1)) for k in range(3)]
    first = read("pairs", str(tmp_path / "cc"), "train", need=("caption",))
    assert walked == shards and [path + ".idx" for path in shards] == sorted(
        str(path) for path in (tmp_path / "cc").glob("*.idx*"))
    walked.clear()
    assert list(read("pairs", ",".join(shards), "train")) == list(first) and not walked
    assert [r["caption"] for r in first] == [[f"number {n}"] for n in range(6)]
    assert first[5]["image"].read() == jpg(5)

    # another content, and an index that somebody damaged
    shard(tmp_path / "cc" / "1.tar", samples(7, 8, 9))
    write(tmp_path / "cc" / "2.tar.idx", '{"tar_index": 1, "shard": [1')
    changed = read("pairs", str(tmp_path / "cc"), "train")
    assert walked == shards[1:] and [r["image"].read() for r in changed] == [
        jpg(n) for n in (0, 1, 7, 8, 9, 4, 5)]


def test_shards_are_indexed_in_parallel(tmp_path, monkeypatch):
    """By processes, whose errors are one line too."""
    monkeypatch.setattr(formats, "usable_cores", lambda: 2)
    for k in range(3):
        shard(tmp_path / f"{k}.tar", samples(k))
    assert len(read("pairs", str(tmp_path / "{0..2}.tar"), "train")) == 3
    write(tmp_path / "1.tar", "no tar")
    write(tmp_path / "3.tar", "no tar")
    with refused("not a readable tar"):
        read("pairs", str(tmp_path), "train")


def test_an_index_that_cannot_lie_beside_its_shard(tmp_path, monkeypatch, temporary):
    """The file of that name is somebody else's, or the folder is read-only."""
    walked = opened(monkeypatch)
    path = shard(tmp_path / "0.tar", samples(1))
    write(tmp_path / "0.tar.idx", "v1.2 1\n")
    for times in (1, 1):
        assert len(read("pairs", path, "train")) == 1 and len(walked) == times
    assert (tmp_path / "0.tar.idx").read_text() == "v1.2 1\n"

    # the kept one is ours alone, and damaged it is written anew
    kept, = temporary.rglob("*.idx")
    kept.write_bytes(b"\0")
    for times in (2, 2):
        assert len(read("pairs", path, "train")) == 1 and len(walked) == times

    replace = os.replace

    def read_only(old, new):
        if not str(new).startswith(str(temporary)):
            raise OSError(formats.errno.EROFS, "Read-only file system")
        replace(old, new)
    monkeypatch.setattr(formats.os, "replace", read_only)
    path = shard(tmp_path / "ro" / "0.tar", samples(1))
    for times in (3, 3):
        assert len(read("pairs", path, "train")) == 1 and len(walked) == times
    assert os.listdir(tmp_path / "ro") == ["0.tar"]


def test_what_a_tar_lost(tmp_path, capsys):
    """Samples without a caption, unreadable captions, a tar that ends early: counted."""
    members = [*samples(1), ("2.jpg", jpg(2)), ("3.jpg", jpg(3)), ("3.json", b"{"),
               ("4.jpg", jpg(4)), ("4.txt", b"\xff\xfe"), ("5.jpg", jpg(5)), ("5.json", b"[1]"),
               ("6.jpg", jpg(6)), ("6.json", b'{"caption": null}'), ("7.jpg", jpg(7)),
               ("7.json", b'{"caption": 7}'), *samples(8)]
    path = shard(tmp_path / "a.tar", members)
    records = read("pairs", path, "train", need=("caption",))
    assert [r["caption"] for r in records] == [["number 1"], ["number 8"]]
    assert records.notes == {"no_caption_left": 2, "unreadable_captions": 4}

    # where pictures alone are looked at, a caption need not be
    assert len(read("pairs", path, "train")) == 4
    pictures = shard(tmp_path / "p.tar", [("1.jpg", jpg(1)), ("2.jpg", jpg(2))])
    with refused("no records in it", "'no_caption_left': 2"):
        read("pairs", pictures, "train", need=("caption",))

    # cut anywhere behind the first sample
    whole = Path(shard(tmp_path / "w.tar", samples(1, 2, 3))).read_bytes()
    for end in (512 * 6 + 100, 512 * 7, 512 * 8 + 5):
        cut = tmp_path / "c.tar"
        cut.write_bytes(whole[:end])
        capsys.readouterr()
        records = read("pairs", str(cut), "train")
        assert 1 <= len(records) <= 2 and records.notes["tars_that_end_early"] == 1
        assert f"{cut} ends early" in capsys.readouterr().err
        assert all(data.trouble_with(r["image"]) is None for r in records)
    for content in (b"", b"no tar", gzip.compress(whole)):
        (tmp_path / "n.tar").write_bytes(content)
        with refused("n.tar: not a readable tar"):
            read("pairs", str(tmp_path / "n.tar"), "train")

    # cut after it was read: the picture is unreadable
    records = read("pairs", str(tmp_path / "w.tar"), "train")
    (tmp_path / "w.tar").write_bytes(whole[:records[2]["image"].offset + 20])
    assert "ends before the picture does" in data.trouble_with(records[2]["image"])
    assert str(records[2]["image"]).startswith(f"{tmp_path}/w.tar member 000000003.jpg")


def test_tars_are_stored_too(tmp_path, stored, monkeypatch):
    for k in range(2):
        shard(tmp_path / "cc" / f"{k}.tar", samples(k))
    first = read("pairs", str(tmp_path / "cc"), "train", need=("caption",))
    with monkeypatch.context() as patch:
        patch.setattr(formats, "read_files", None)
        again = read("pairs", str(tmp_path / "cc"), "train", need=("caption",))
    assert list(first) == list(again) and again[1]["image"].read() == jpg(1)
    assert isinstance(again[0]["image"], formats.TarMember)
    shard(tmp_path / "cc" / "2.tar", samples(2))
    assert len(read("pairs", str(tmp_path / "cc"), "train", need=("caption",))) == 3


# --------------------------------------------------------------------------------------------------
# Hold-out

def parts_of(spec, share=0.2, **options):
    """{name of a picture: its part}; every record is in exactly one."""
    found, total = {}, 0
    for part in ("train", "val", "test"):
        records = read("pairs", spec, part, hold_out=share, **options)
        assert records.held_out and records.split == part
        total += len(records)
        for record in records:
            where = record["image"]
            name = Path(where if isinstance(where, str) else where.member).stem
            assert found.setdefault(name, part) == part
    everything = read("pairs", spec, None, hold_out=share, **options)
    assert total == len(everything) and not everything.held_out
    return found


def test_a_picture_stays_in_its_part(tmp_path, stored):
    """When the file grows, moves or is shuffled; several records of a picture go together."""
    rows = rows_of(tmp_path / "a", 300)
    small = parts_of(lines(tmp_path / "a" / "x.jsonl", rows[:200]))
    counts = [list(small.values()).count(part) for part in ("train", "val", "test")]
    assert 90 < counts[0] < 150 and min(counts) > 20

    rows_of(tmp_path / "b" / "c", 300)
    more = rows + [dict(row, image="./" + row["image"], caption="again") for row in rows[::3]]
    random.Random(1).shuffle(more)
    large = parts_of(lines(tmp_path / "b" / "c" / "y.jsonl", more))
    assert len(large) == 300 and small.items() <= large.items()

    # the same picture under two names is where its first one is
    both = lines(tmp_path / "a" / "z.jsonl", rows[:50])
    again = lines(tmp_path / "a" / "im" / "z.jsonl",
                  [dict(row, image=Path(row["image"]).name) for row in rows[:50]])
    assert parts_of(f"{both},{again}").items() <= large.items()


def test_hold_out_of_tsv_and_tar(tmp_path):
    """By the URL, and by the member's key: whatever their rows and shards are."""
    urls = [f"http://x.org/{n}.jpg" for n in range(60)]
    for n in range(60):
        (tmp_path / f"{n}.jpg").touch()
    text = [f"a\t{url}\n" for url in urls]
    one = parts_of(write(tmp_path / "a.tsv", "".join(text)))
    assert one == parts_of(write(tmp_path / "b.tsv", "url\tcaption\n" + "".join(
        f"{url}\ta\n" for url in reversed(urls))))
    for n, url in enumerate(urls):
        code = formats.name_code(url) / 2 ** 64
        assert one[str(n)] == ("val" if code < 0.2 else "test" if code < 0.4 else "train")

    one = parts_of(shard(tmp_path / "0.tar", samples(*range(60))))
    two = [shard(tmp_path / "t" / f"{k}.tar", samples(*range(k, 60, 2))) for k in (0, 1)]
    assert one == parts_of(",".join(two))


def test_held_out_are_those_with_the_smallest_hash(tmp_path, monkeypatch, capsys):
    rows = rows_of(tmp_path, 200)
    spec = lines(tmp_path / "a.jsonl", rows + rows[:100])
    code = {row["image"]: formats.name_code(row["image"]) / 2 ** 64 for row in rows}
    val = read("pairs", spec, "val", hold_out=0.2)
    name = {r["image"]: str(Path(r["image"]).relative_to(tmp_path)) for r in val}
    wanted = sorted((n for n in code if code[n] < 0.2), key=code.get)
    assert set(name.values()) == set(wanted)
    err = capsys.readouterr().err
    assert err.count("has no splits") == 1 and "--hold_out 0.2" in err
    held = {key: n for key, n in val.notes.items() if key.startswith("held")}
    test = read("pairs", spec, "test", hold_out=0.2)
    assert held["held_for_test"] == len(test) and sum(held.values()) + len(val) == 300

    monkeypatch.setattr(formats, "MOST_HELD_OUT", 7)
    few = read("pairs", spec, "val", hold_out=0.2)
    assert {name[r["image"]] for r in few} == set(wanted[:7])
    assert few.notes["beyond_the_first_1000"] == len(val) - len(few)
    train = read("pairs", spec, "train", hold_out=0.2)
    assert len(train) + len(val) + len(test) == 300 and not any(r["image"] in name for r in train)


def test_what_is_held_out_by_nobody(tmp_path):
    """Where records, files or folders name splits, the built-in world, a share of 0."""
    rows = rows_of(tmp_path, 40)
    plain = lines(tmp_path / "a.jsonl", rows)
    named = lines(tmp_path / "b.jsonl", [dict(row, split="train") for row in rows])
    for n in range(40):
        (tmp_path / "classes" / "train" / str(n % 2)).mkdir(exist_ok=True, parents=True)
        (tmp_path / "classes" / "train" / str(n % 2) / f"{n}.jpg").touch()
    write(tmp_path / "lists" / "train.txt", "".join(f"im/{n}.jpg 0 1\n" for n in range(40)))
    for source, spec, options in (
            ("pairs", plain, {"hold_out": 0}), ("pairs", named, {}),
            ("classes", str(tmp_path / "classes"), {}),
            ("hashing", str(tmp_path / "lists"), {"image_root": str(tmp_path)})):
        records = read(source, spec, "train", **{"hold_out": 0.3} | options)
        assert len(records) == 40 and not records.held_out, spec
    world = read("pairs", "shapes", "test", hold_out=0.3)
    assert len(world) == 1000 and not world.held_out

    # but of a list or a folder of classes without one
    for source, spec, options in (
            ("hashing", str(tmp_path / "lists" / "train.txt"), {"image_root": str(tmp_path)}),
            ("classes", str(tmp_path / "classes" / "train"), {})):
        assert 5 < len(read(source, spec, "train", hold_out=0.3, **options)) < 30

    with refused("no split 'val'", "of its 2 pictures hold_out 0.01 takes none", "--hold_out"):
        read("pairs", lines(tmp_path / "c.jsonl", rows[:2]), "val", hold_out=0.01)
    for share in (-0.1, 0.5, float("nan")):
        with refused("--hold_out"):
            read("pairs", plain, "train", hold_out=share)


# --------------------------------------------------------------------------------------------------
# Names of files

def test_what_is_no_file_is_refused(tmp_path):
    rows = rows_of(tmp_path, 2)
    spec = lines(tmp_path / "a.json", rows)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing.json")
    (tmp_path / "same.json").symlink_to(spec)
    (tmp_path / "folder.json").mkdir()
    start = time.monotonic()
    for path, words in (
            ("pipe.jsonl", "neither a file nor a folder"), ("/dev/zero", "neither a file"),
            ("link.json", "nothing.json, which does not exist"), ("folder.json", "no .tar shards"),
            ("x{00..99999999999}.json", "x00.json: no such file"), ("{3..1}.json", "counts down"),
            ("a.json,a.json", "twice"), ("a.json,same.json", "twice"), ("a\0b.json", "null"),
            ("a" * 300, "too long")):
        spec = ",".join(str(tmp_path / item) for item in path.split(","))
        with refused("--data", words) if path != "folder.json" else refused(words):
            read("pairs", spec, "train")
    assert time.monotonic() - start < 5
    with refused("Is a directory"):
        read("ve", str(tmp_path / "folder.json"), "val")


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    """Its files are asked for one by one."""
    rows = rows_of(tmp_path, 3)
    rows[1]["image"] = "im/gone.jpg"

    def closed(folder):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(formats.os, "scandir", closed)
    monkeypatch.setattr(formats, "size_of", lambda paths: 0)
    records = read("pairs", lines(tmp_path / "a.jsonl", rows), "train")
    assert len(records) == 2 and records.notes["missing"] == 1


def test_paraphrases_of_many_captions(tmp_path):
    """As those of a few: joined by the caption's words, each wording once, in the file's order."""
    rows = rows_of(tmp_path, 50)
    text = "".join(f"Number  {n % 50}\tno. {n % 50}\tthe {n}\n" for n in range(150))
    records = read("pairs", lines(tmp_path / "a.jsonl", rows), "train")
    joined = data.join_paraphrases(records, write(tmp_path / "p.tsv", text))
    for n, record in enumerate(joined):
        assert record["paraphrase"] == [[f"no. {n}", f"the {n}", f"the {n + 50}", f"the {n + 100}"],
                                        []]
    assert joined.notes["paraphrased_captions"] == 50
    assert np.array_equal(joined.column("image_ids"), records.column("image_ids"))
