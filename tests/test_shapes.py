"""The built-in world: official formats that their own readers read, a perfect reader's ceiling,
balance, and all-or-nothing writing."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tools import shapes

HOME = Path(__file__).resolve().parent.parent
SCALE = 0.06                                                # 600 / 60 / 60 pictures, 36 clips


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return shapes.ensure(tmp_path_factory.mktemp("world") / "shapes", quiet=True, scale=SCALE)


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def words(text):
    """As BERT's basic tokenizer splits."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def content(root):
    """{name: bytes} of a world, the name of its folder in the region files replaced."""
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            here = str(root).encode()
            files[str(path.relative_to(root))] = path.read_bytes().replace(here, b"HERE")
    return files


def regions(path):
    """-> ({name: array}, metadata) as the safetensors package reads them."""
    with safe_open(path, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.fixture(scope="session")
def real_test_split(tmp_path_factory):
    """pairs_test.jsonl of the whole world, without its pictures: scenes, captions and paraphrases
    are the real ones."""
    root = tmp_path_factory.mktemp("real")
    records = []
    for i, scene in enumerate(shapes.all_scenes()["test"]):
        rng = Random(f"captions 0 {shapes.FIRST_ID['test'] + i}")
        captions, paraphrases = shapes.captions_of(scene, rng)
        records.append({"caption": captions, "paraphrase": paraphrases, "scene": scene})
    shapes.write_jsonl(root / "pairs_test.jsonl", records)
    return root


def test_oracle_reaches_95_percent(real_test_split):
    oracle = shapes.oracle_recall(real_test_split)
    assert 0.95 <= oracle["i2t_r1"] <= 1 and 0.95 <= oracle["t2i_r1"] <= 1, oracle


def test_oracle_by_brute_force(world):
    records = jsonl(world / "pairs_test.jsonl")
    scenes = [tuple(shapes.Obj(*o) for o in r["scene"]) for r in records]
    true = np.array([[[shapes.holds(shapes.parse(c), s) for c in r["caption"]] for r in records]
                     for s in scenes])                      # (N, N, 5)
    n = len(scenes)
    own = true[np.arange(n), np.arange(n)]                  # (N, 5)
    assert own.all()
    expected = {"t2i_r1": (true.sum(0) == 1).mean(), "i2t_r1": (true.sum((1, 2)) == 5).mean()}
    assert shapes.oracle_recall(world) == pytest.approx(expected)


def test_no_two_test_pictures_share_a_caption_set_and_paraphrases_mean_the_same(real_test_split):
    seen = set()
    for r in jsonl(real_test_split / "pairs_test.jsonl"):
        assert len(set(r["caption"])) == 5 and len(r["paraphrase"]) == 5
        seen.add(frozenset(shapes.parse(c) for c in r["caption"]))
        for caption, paraphrase in zip(r["caption"], r["paraphrase"]):
            assert caption != paraphrase and shapes.parse(caption) == shapes.parse(paraphrase)
    assert len(seen) == 1000


def test_parse_inverts_say():
    rng = Random(1)
    for _ in range(3000):
        scene = shapes.draw_objects(rng, rng.choice((1, 2, 3)))
        plan = shapes.draw_plan(scene, rng, brief=rng.random() < 0.3)
        text = shapes.say(plan, rng, rng.random())
        assert shapes.parse(text) == plan, text
        assert shapes.holds(plan, scene), text
    with pytest.raises(ValueError, match="banana"):
        shapes.parse("a red banana")


def test_holds_on_hand_cases():
    scene = (shapes.Obj(0, 0, "large", "red", "circle"), shapes.Obj(1, 2, "small", "blue", "star"))
    cases = {
        "a red circle": True, "a scarlet disk in the upper left": True,
        "a small red circle": False, "a red circle in the center": False, "a red star": False,
        "two shapes, a blue star": True, "only a blue star": False,
        "three things, a red circle": False,
        "a blue star below and to the right of a red dot": True,
        "above a blue star is a red circle": True, "a red circle under a blue star": False,
        "a blue star in the middle right left of a red circle": False,
    }
    for text, truth in cases.items():
        assert shapes.holds(shapes.parse(text), scene) == truth, text


def test_splits_share_no_scene():
    splits = shapes.all_scenes()
    assert {s: len(v) for s, v in splits.items()} == {"train": 10000, "val": 1000, "test": 1000}
    every = [scene for scenes in splits.values() for scene in scenes]
    assert len(set(every)) == len(every)
    for scene in every:
        cells, names = {(o.row, o.col) for o in scene}, {(o.color, o.shape) for o in scene}
        assert len(cells) == len(names) == len(scene) <= 3


def test_records(world):
    vocabulary = (world / "vocab.txt").read_text().splitlines()
    assert (vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
            and len(set(vocabulary)) == len(vocabulary) < 320)
    ids = set()
    for split in shapes.COUNTS:
        records = jsonl(world / f"pairs_{split}.jsonl")
        assert len(records) == shapes.COUNTS[split] * SCALE
        for r in records:
            assert r["split"] == split and r["image_id"] not in ids
            ids.add(r["image_id"])
            n = len(r["scene"])
            assert n in (1, 2, 3)
            assert len(r["boxes"]) == len(r["labels"]) == len(r["label_names"]) == n
            assert [shapes.SHAPES[k] for k in r["labels"]] == r["label_names"]
            assert set(r["label_names"]) <= set(r["tags"])
            for text in r["caption"] + r["paraphrase"]:
                assert len(words(text)) <= 20 and set(words(text)) <= set(vocabulary), text
            with Image.open(world / r["image"]) as picture:
                assert picture.size == (64, 64) and picture.mode == "RGB"


def test_pictures_show_what_the_records_say(world):
    """In each box the color of its object is there, beside it the muted ground;
    of each shape, every large one is larger than every small one."""
    sides = defaultdict(list)
    for r in jsonl(world / "pairs_test.jsonl"):
        pixels = np.asarray(Image.open(world / r["image"]), np.float32)
        outside = np.ones((64, 64), bool)
        for (x0, y0, x1, y1), (row, col, size, color, shape) in zip(r["boxes"], r["scene"]):
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            assert row == int((y0 + y1) / 2 / 64 * 3) and col == int((x0 + x1) / 2 / 64 * 3)
            sides[shape, size].append(max(x1 - x0, y1 - y0))
            near = np.abs(pixels[y0:y1, x0:x1] - shapes.COLORS[color]).max(-1) < 45
            assert near.mean() > 0.2, (r["image"], color, shape)
            outside[max(0, y0 - 1):y1 + 1, max(0, x0 - 1):x1 + 1] = False
        for color in shapes.COLORS.values():
            assert (np.abs(pixels[outside] - color).max(-1) < 30).mean() < 0.01
    for shape in shapes.SHAPES:
        assert min(sides[shape, "large"]) > max(sides[shape, "small"]), sides


@pytest.mark.needs("pycocotools")
def test_instances_by_pycocotools(world):
    from pycocotools.coco import COCO
    from torchvision.datasets import CocoDetection
    records = {r["image_id"]: r for r in jsonl(world / "pairs_val.jsonl")}
    coco = COCO(str(world / "instances_val.json"))
    assert sorted(coco.getImgIds()) == sorted(records)
    for image_id, r in records.items():
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert len(annotations) == len(r["boxes"])
        for a, box, label in zip(annotations, r["boxes"], r["label_names"]):
            mask = coco.annToMask(a)
            ys, xs = np.nonzero(mask)
            assert mask.shape == (64, 64) and mask.sum() == a["area"]
            assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box
            assert a["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            assert coco.cats[a["category_id"]]["name"] == label
    picture, target = CocoDetection(str(world), str(world / "instances_val.json"))[0]
    assert picture.size == (64, 64) and target[0]["bbox"]


def test_vqa(world):
    vocabulary = set((world / "vocab.txt").read_text().split())
    for split in shapes.COUNTS:
        questions = json.loads((world / f"vqa_{split}_questions.json").read_text())["questions"]
        annotations = json.loads((world / f"vqa_{split}_annotations.json").read_text())
        annotations = annotations["annotations"]
        assert [q["question_id"] for q in questions] == [a["question_id"] for a in annotations]
        assert (len({q["question_id"] for q in questions}) == len(questions)
                == shapes.COUNTS[split] * SCALE * (1.5 if split == "train" else 2))
        counts = Counter(a["multiple_choice_answer"] for a in annotations)
        assert counts.most_common(1)[0][1] / len(annotations) < 0.3
        for q, a in zip(questions, annotations):
            assert q["image_id"] == a["image_id"] and (world / q["image"]).is_file()
            said = Counter(x["answer"] for x in a["answers"])
            assert sum(said.values()) == 10 and said[a["multiple_choice_answer"]] >= 8
            assert set(words(q["question"])) | {w for s in said for w in s.split()} <= vocabulary


def test_vqa_answers_are_true():
    rng = Random(2)
    for _ in range(2000):
        scene = shapes.draw_objects(rng, rng.choice((1, 2, 3)))
        kind = rng.choice(list(shapes.QUESTIONS))
        if kind == "at":
            continue
        question, answer, others, _ = shapes.ask(scene, rng, kind)
        asked = [shapes.CANON.get(w, w) for w in words(question)]
        assert answer in others, (question, answer)
        if kind in ("color", "shape") and not set(asked) & {"in", "at"}:
            assert [answer] == [o[3 if kind == "color" else 4] for o in scene
                                if o.shape in asked or o.color in asked], (question, scene)
        if kind == "where":
            found = [o for o in scene if o.shape in asked and o.color in asked]
            assert [answer] == [shapes.place(o) for o in found]
        if asked[:2] == ["is", "there"] or kind == "exist":
            assert (answer == "yes") == any(o.shape in asked and o.color in asked for o in scene)


def test_visual_entailment(world):
    for split in shapes.COUNTS:
        records = jsonl(world / f"ve_{split}.jsonl")
        scenes = {r["image"]: tuple(shapes.Obj(*o) for o in r["scene"])
                  for r in jsonl(world / f"pairs_{split}.jsonl")}
        assert (len(set(Counter(r["gold_label"] for r in records).values())) == 1
                and len({r["pairID"] for r in records}) == len(records))
        for r in records:
            if r["gold_label"] == "neutral":
                with pytest.raises(ValueError):
                    shapes.parse(r["sentence2"])
            else:
                assert (shapes.holds(shapes.parse(r["sentence2"]), scenes[r["image"]])
                        == (r["gold_label"] == "entailment")), r


def test_words_alone_do_not_tell_entailment_from_contradiction(tmp_path):
    """Naive Bayes over words and pairs of neighbours, trained on one split's sentences and tried
    on the others: near 50 %."""
    def sentences(split):
        shapes.write_ve(tmp_path, 0, 0.3, split)
        records = jsonl(tmp_path / f"ve_{split}.jsonl")
        return [(words(r["sentence2"]), r["gold_label"] == "entailment") for r in records
                if r["gold_label"] != "neutral"]

    def grams(text):
        return text + list(zip(text, text[1:])) + [len(text)]

    counts = defaultdict(lambda: [1, 1])
    for text, label in sentences("train"):
        for g in grams(text):
            counts[g][label] += 1
    tried = sentences("val") + sentences("test")
    right = []
    for text, label in tried:
        odds = sum(np.log(counts[g][1] / counts[g][0]) for g in grams(text))
        right.append((odds > 0) == label)
    assert np.mean(right) < 0.6, np.mean(right)


def test_nlvr2(world):
    for split in shapes.COUNTS:
        records = jsonl(world / f"nlvr2_{split}.jsonl")
        scenes = {r["image"]: r["scene"] for r in jsonl(world / f"pairs_{split}.jsonl")}
        labels = defaultdict(list)
        for r in records:
            assert re.fullmatch(rf"{split}-\d+-[01]-0", r["identifier"])
            labels[r["sentence"]].append(r["label"])
            left, right = scenes[r["left_image"]], scenes[r["right_image"]]
            if " more " in r["sentence"]:
                assert (len(left) > len(right)) == (r["label"] == "True")
            if r["sentence"].startswith("both images") and "number" not in r["sentence"]:
                asked = {shapes.CANON.get(w) for w in words(r["sentence"])} - {None}
                assert (all(any(asked <= set(o[2:]) for o in side) for side in (left, right))
                        == (r["label"] == "True")), r
        assert len({r["identifier"] for r in records}) == len(records)
        assert all(found.count("True") == found.count("False") for found in labels.values())


def test_sts(world):
    rows = [line.split("\t") for line in (world / "sts_train.csv").read_text().splitlines()]
    assert len(rows) == 180 and all(len(r) == 7 for r in rows)
    scores = np.array([float(r[4]) for r in rows])
    assert scores.min() >= 0 and scores.max() <= 5 and len({round(s) for s in scores}) == 6
    pairs = [(set(words(r[5])), set(words(r[6]))) for r in rows]
    overlap = np.array([len(a & b) / len(a | b) for a, b in pairs])
    same = [shapes.parse(r[5]) == shapes.parse(r[6]) for r in rows]
    middle = (scores > 2.4) & (scores < 3.6)
    assert scores[same].min() > 4
    assert overlap[middle].mean() > overlap[same].mean()    # words alone mislead


def test_hashing_and_classes(world):
    from torchvision.datasets import ImageFolder
    lists = {f: [line.split() for line in (world / "hashing" / f"{f}.txt").read_text().splitlines()]
             for f in ("train", "database", "test")}
    tags = {r["image"]: set(r["tags"]) for split in ("train", "test")
            for r in jsonl(world / f"pairs_{split}.jsonl")}
    for file, rows in lists.items():
        for path, *labels in rows:
            assert ({w for w, x in zip((*shapes.SHAPES, *shapes.COLORS), labels) if x == "1"}
                    == {t for t in tags[path] if " " not in t})
    assert ({r[0] for r in lists["train"]} < {r[0] for r in lists["database"]}
            and not {r[0] for r in lists["test"]} & {r[0] for r in lists["database"]})
    for split, n in (("train", 120), ("val", 30)):
        folder = ImageFolder(world / "classes" / split)
        assert folder.classes == shapes.CLASSES and len(folder) == n
        assert folder[0][0].size == (64, 64)


def test_clips(world):
    info = json.loads((world / "clips" / "videodatainfo.json").read_text())
    assert Counter(v["split"] for v in info["videos"]) == {"train": 24, "validate": 6, "test": 6}
    said = Counter(s["video_id"] for s in info["sentences"])
    vocabulary = set((world / "vocab.txt").read_text().split())
    assert {w for s in info["sentences"] for w in words(s["caption"])} <= vocabulary
    for v in info["videos"]:
        features = np.load(world / "clips" / "features" / f"{v['video_id']}.npy")
        assert said[v["video_id"]] == 5
        assert features.dtype == np.float32 and 8 <= len(features) <= 12
        assert features.shape[1] == 240
        assert np.isfinite(features).all() and not features[0, 192:].any()


@pytest.mark.parametrize("dx, dy", [(2, 0), (-2, 0), (0, 2), (0, -2)])
def test_frame_features_know_the_direction(dx, dy):
    rng = np.random.default_rng(0)
    ground = np.full((64, 64, 3), 120, np.float32)
    frames = []
    for t in range(-3, 4):
        disk = (32 + dx * t, 32 + dy * t, 9.0, 0.0, "red", "circle")
        frames.append(shapes.paint(ground, [disk], rng)[0])
    flow = shapes.frame_features(np.stack(frames))[1:, 208:].reshape(6, 16, 2).sum((0, 1))
    along, across = flow if dx else flow[::-1]
    assert np.sign(along) == np.sign(dx or dy) and abs(along) > 5 * abs(across)


@pytest.mark.parametrize("split", shapes.COUNTS)
def test_regions(world, split):
    """Each box of each picture, as a reader sees it: shrunk to 8x8 pixels in -1..1, times the
    matrix of seed 0."""
    records = jsonl(world / f"pairs_{split}.jsonl")
    arrays, metadata = regions(world / f"regions_{split}.safetensors")
    assert metadata["root"] == str(world)
    assert json.loads(metadata["label_names"]) == list(shapes.SHAPES)
    assert metadata["detector"] == ("a stand-in for a detector: the boxes and labels of the data "
                                    "itself, each crop at 8x8 pixels times a fixed random matrix")

    kinds = {key: array.dtype.name for key, array in arrays.items()}
    assert kinds == {"features": "float16", "boxes": "float32", "labels": "int64",
                     "scores": "float32", "offsets": "int64", "sizes": "int64",
                     "names": "uint8", "name_ends": "int64"}
    assert len(arrays["offsets"]) == len(records) + 1 and len(arrays["name_ends"]) == len(records)
    assert arrays["sizes"].tolist() == [[64, 64]] * len(records) and (arrays["scores"] == 1).all()

    matrix = np.random.default_rng(0).standard_normal((192, 128)) / 192 ** 0.5
    name_ends = [0, *arrays["name_ends"].tolist()]
    for n, r in enumerate(records):
        assert arrays["names"][name_ends[n]:name_ends[n + 1]].tobytes().decode() == r["image"]
        rows = slice(*arrays["offsets"][n:n + 2])
        assert arrays["boxes"][rows].tolist() == r["boxes"]
        assert arrays["labels"][rows].tolist() == r["labels"]
        with Image.open(world / r["image"]) as picture:
            for feature, box in zip(arrays["features"][rows], r["boxes"], strict=True):
                crop = picture.resize((8, 8), Image.Resampling.BILINEAR, box=box)
                want = (np.asarray(crop, float).reshape(192) / 127.5 - 1) @ matrix
                np.testing.assert_allclose(feature, want, rtol=1e-3, atol=1e-4)
    assert rows.stop == len(arrays["features"]) == len(arrays["labels"])


def test_clean_and_noisy_pairs(world):
    records = {r["image_id"]: r for r in jsonl(world / "pairs_train.jsonl")}
    clean, noisy = jsonl(world / "clean.jsonl"), jsonl(world / "noisy.jsonl")
    assert len(clean) == 2000 * SCALE and len(noisy) == len(records) - len(clean)
    assert {r["image_id"] for r in clean + noisy} == set(records)
    for part in (clean, noisy):
        ids = [r["image_id"] for r in part]
        assert ids == sorted(ids)
        for r in part:
            assert set(r) == {"image", "image_id", "caption"}
            assert r["image"] == records[r["image_id"]]["image"] and (world / r["image"]).is_file()

    # half of the noisy ones have the captions of another of them, each given once
    assert all(r["caption"] == records[r["image_id"]]["caption"] for r in clean)
    wrong = [r for r in noisy if r["caption"] != records[r["image_id"]]["caption"]]
    assert len(wrong) == len(noisy) / 2
    given = sorted(r["caption"] for r in wrong)
    assert given == sorted(records[r["image_id"]]["caption"] for r in wrong)


@pytest.mark.parametrize("names, expected", [
    (["vocab.txt"], "60377d98fee4"),
    (["vqa_*.json"], "df9b85079089"),
    (["ve_*.jsonl"], "bf4f9a336ced"),
    (["nlvr2_*.jsonl"], "2a182c5dca76"),
    (["sts_*.csv"], "22e0296182e9"),
    (["clips/videodatainfo.json"], "8dbfed82d365"),
    (["hashing/*.txt"], "b6bba18c463a"),
    (["clean.jsonl", "noisy.jsonl"], "6b78f3b5826e"),
])
def test_the_world_of_a_seed_stays_the_same(world, names, expected):
    """Published results are of this world. Whoever changes it on purpose measures them again."""
    digest = hashlib.sha256()
    for name in names:
        for path in sorted(world.glob(name)):
            digest.update(path.read_bytes())
    assert digest.hexdigest()[:12] == expected


def test_same_seed_same_bytes_other_seed_other_world(tmp_path):
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    for root, seed in ((one, 0), (other, 1)):
        shapes.ensure(root, quiet=True, seed=seed, scale=0.02)
    code = f"from tools import shapes; shapes.ensure({str(two)!r}, quiet=True, scale=0.02)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HOME,
                   env={**os.environ, "PYTHONHASHSEED": "7"})
    assert content(one) == content(two)
    assert (one / "pairs_test.jsonl").read_bytes() != (other / "pairs_test.jsonl").read_bytes()


def _ensure(root, queue):
    queue.put((shapes.ensure(root, quiet=True, scale=0.02) / "version.json").stat().st_ino)


def test_made_once_reused_and_made_anew(tmp_path, monkeypatch):
    root = tmp_path / "shapes"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    both = [context.Process(target=_ensure, args=(root, queue)) for _ in range(2)]
    for p in both:
        p.start()
    made = {queue.get(timeout=60) for _ in both}
    for p in both:
        p.join()
    assert len(made) == 1                                   # one wrote, the other waited for it
    monkeypatch.setattr(shapes, "write_world", lambda *a: pytest.fail("written again"))
    shapes.ensure(root, quiet=True, scale=0.02)
    shapes.ensure(root, quiet=True)                         # no scale named: the one that is there
    monkeypatch.undo()
    version = json.loads((root / "version.json").read_text())
    (root / "version.json").write_text(json.dumps({**version, "generator": "another"}))
    shapes.ensure(root, quiet=True, scale=0.02)
    assert json.loads((root / "version.json").read_text()) == version
    assert [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name] == []


def test_killed_writer_leaves_nothing_that_counts(tmp_path):
    root = tmp_path / "shapes"
    writer = subprocess.Popen([sys.executable, "-m", "tools.shapes", "--root", str(root)],
                              cwd=Path(shapes.__file__).parent.parent,
                              stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".shapes.tmp-*/images/train/000000.jpg")):
        assert writer.poll() is None
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not root.exists()
    shapes.ensure(root, quiet=True, scale=0.02)
    shapes.ensure(root, quiet=True)                         # and it stays small
    assert len(jsonl(root / "pairs_train.jsonl")) == 200
    assert not list(tmp_path.glob(".shapes.tmp-*"))


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="no shapes world"):
        shapes.ensure(tmp_path, quiet=True, scale=0.02)
    assert (tmp_path / "thesis.tex").exists()


def test_command_line(tmp_path, capsys):
    shapes.main(["--root", str(tmp_path / "w"), "--scale", "0.02",
                 "--sheet", str(tmp_path / "sheet.png")])
    said = capsys.readouterr().out
    assert "200 pictures" in said and "perfect reader" in said and str(tmp_path / "w") in said
    assert Image.open(tmp_path / "sheet.png").size[0] > 1000


@pytest.mark.parametrize("scale", ["0", "-1", "0.001", "2"])
def test_a_scale_that_makes_no_world_is_refused(tmp_path, scale):
    with pytest.raises(SystemExit, match="between 0.01 and 1"):
        shapes.main(["--root", str(tmp_path / "w"), "--scale", scale])


def test_it_imports_nothing_of_the_project_but_what_tools_share(tmp_path):
    """data.py calls it, so it could not."""
    (tmp_path / "alone.py").write_text(Path(shapes.__file__).read_text())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text(Path(shapes.tools.__file__).read_text())
    subprocess.run([sys.executable, "-c", "import alone"], check=True, cwd=tmp_path,
                   env={**os.environ, "PYTHONPATH": ""})
