"""Tests of data.py and eval.py that stood in test_mct.py, to be distributed to theirs.

They stand here as they were, but for columns and names. `pytest tests/moved_from_mct.py` runs them.
"""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval as evaluation
from models import mct

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = ("--image_size 32 --vision_width 4 --width 24 --text_layers 1 --text_heads 3 "
        "--head_hidden 20 --queue_size 16 --max_text 6 --rois 8 --batch_size 4 --steps 2 "
        "--workers 0 --detect_max 48").split()


# --------------------------------------------------------------------------------------------------
# Shared by both

@pytest.fixture
def tok(tmp_path):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue circle square left of".split()
    return write(tmp_path / "vocab.txt", "\n".join(words) + "\n")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def close(a, b, tol=1e-5):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert torch.allclose(a, b, rtol=tol, atol=tol), (a, b)


def photos(root, n=12, size=(40, 32)):
    """Pictures with one bright rectangle each, COCO instances for them, records with tags and
    captions -> the files of instances and of pairs."""
    images, notes, rows = [], [], []
    for i in range(n):
        x, y, w, h = 4 + i % 5, 3 + i % 7, 14, 12
        color = "red" if i % 2 else "blue"
        picture = Image.new("RGB", size, (20, 20, 20))
        picture.paste((250, 30, 30) if i % 2 else (30, 30, 250), (x, y, x + w, y + h))
        (root / "im").mkdir(parents=True, exist_ok=True)
        picture.save(root / "im" / f"{i}.png")
        images.append({"id": i, "file_name": f"im/{i}.png", "height": size[1], "width": size[0]})
        notes.append({"id": i + 1, "image_id": i, "category_id": 3 + 4 * (i % 2), "iscrowd": 0,
                      "bbox": [x, y, w, h], "area": w * h,
                      "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        rows.append({"image": f"im/{i}.png", "image_id": i,
                     "caption": [f"a {color} square"] if i else [],
                     "tags": [color, "square", "a"][:i % 4]})
    crowd = {"size": [size[1], size[0]], "counts": [0, 32, size[0] * size[1] - 32]}
    notes.append({"id": 99, "image_id": 0, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 1, 32],
                  "area": 32, "segmentation": crowd})
    categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
    instances = {"images": images, "annotations": notes, "categories": categories}
    return (write(root / "instances.json", instances),
            write(root / "pairs.jsonl", "".join(json.dumps(r) + "\n" for r in rows)))


# --------------------------------------------------------------------------------------------------
# data.py: detection files (from test_mct_detection_source, _voc_source, _real_detection_data)

def test_detection_source(tmp_path):
    file, _ = photos(tmp_path)
    records = data.open_source("detection", str(file), "train", str(tmp_path),
                               need=("boxes", "segmentation"))
    assert records.label_names == ["blue", "red"] and data.stats(records)["num_labels"] == 2
    assert records[0]["crowd"] == [0, 1]
    assert records[1]["boxes"] == [[5, 4, 19, 16]] and records[1]["labels"] == [1]

    # boxes and masks are flipped with the picture; crowds are no targets
    views = data.Views(records, mct.VIEWS["segmentation"], None, None, None, seed=3)
    flips = set()
    for draw in range(8):
        s = views[0, draw]
        (image,), (boxes,), (labels,), (masks,) = (s[k] for k in ("image", "boxes", "labels",
                                                                  "masks"))
        assert image.shape == (3, 32, 40) and 0 <= image.min() and image.max() <= 1
        assert labels.tolist() == [0], "crowds are no targets"
        x0, y0, x1, y1 = boxes[0].int().tolist()
        assert masks.shape == (1, 32, 40) and masks[0, y0:y1, x0:x1].all()
        assert masks.sum() == 14 * 12
        darker = image[2].flatten().sort().values[-14 * 12 - 1]
        assert image[2, y0:y1, x0:x1].min() > 0.9 > darker
        flips.add(x0)
    assert flips == {4, 22}

    # batches are lists, as sizes differ
    batch = next(data.batches(views, 4, seed=0))
    assert isinstance(batch["image"], list) and len(batch["masks"]) == 4
    assert batch["image_id"].shape == (4,)
    assert data.move(batch, "cpu")["boxes"][3].shape == (1, 4)

    # what is no picture
    (tmp_path / "im" / "3.png").write_bytes(b"no picture")
    sample = data.Views(records, mct.VIEWS["detection"], None, None, None, train=False)[3]
    assert sample["bad"] == 1 and (sample["image"][0] == 0.5).all()
    assert sample["image"][0].shape == (3, 32, 40)
    assert views[3, 0]["bad"] == 1 and views[3, 0]["index"] != 3


XML = ("<annotation><filename>{0}.jpg</filename>"
       "<size><width>40</width><height>32</height><depth>3</depth></size>{1}</annotation>")
OBJECT = ("<object><name>{}</name><difficult>{}</difficult>"
          "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")


def test_voc_source(tmp_path):
    devkit = tmp_path / "VOCdevkit"
    objects = OBJECT.format("dog", 0, 1, 1, 10, 20) + OBJECT.format("car", 1, 5, 5, 5, 9)
    for year, part, names in (("2007", "trainval", "1 2"), ("2012", "trainval", "3"),
                              ("2007", "test", "4")):
        home = devkit / f"VOC{year}"
        write(home / "ImageSets" / "Main" / f"{part}.txt", "\n".join(names.split()) + "\n")
        for n in names.split():
            write(home / "Annotations" / f"{n}.xml", XML.format(n, objects))
            (home / "JPEGImages").mkdir(exist_ok=True)
            Image.new("RGB", (40, 32)).save(home / "JPEGImages" / f"{n}.jpg")
    records = data.open_source("detection", str(devkit), "train")
    assert len(records) == 3 and len(data.open_source("detection", str(tmp_path), "test")) == 1
    first = records[0]
    assert first["boxes"] == [[0, 0, 10, 20], [4, 4, 5, 9]] and first["difficult"] == [0, 1]
    assert len(records.label_names) == 20
    assert [records.label_names[n] for n in first["labels"]] == ["dog", "car"]

    write(devkit / "VOC2007" / "Annotations" / "4.xml",
          XML.format(4, OBJECT.format("unicorn", 0, 1, 1, 3, 3)))
    with pytest.raises(data.DataError, match="4.xml"):
        data.open_source("detection", str(tmp_path), "test")


@pytest.mark.skipif(not SHARED.exists(), reason="the cuts of public data are not here")
def test_real_detection_data():
    voc = data.open_source("detection", str(SHARED / "voc" / "VOCdevkit"), "train")
    views = data.Views(voc, mct.VIEWS["detection"], None, None, None, train=False)
    assert len(voc) == 10
    assert sum(int(views[i]["bad"]) for i in range(10)) == 2        # truncated at the source

    instances = SHARED / "coco" / "annotations" / "instances_val2017.json"
    coco = data.open_source("detection", str(instances), "val")
    assert len(coco) == 80 and len(coco.label_names) == 80 and any(sum(r["crowd"]) for r in coco)
    crowded = next(i for i, r in enumerate(coco) if sum(r["crowd"]))
    views = data.Views(coco, mct.VIEWS["segmentation"], None, None, None, seed=1)
    sample, record = views[crowded, 0], coco[crowded]
    targets = len(record["boxes"]) - sum(record["crowd"])
    assert len(sample["masks"][0]) == len(sample["boxes"][0]) == targets


@pytest.mark.skipif(not SHARED.exists(), reason="the cuts of public data are not here")
@pytest.mark.parametrize("task, flags", [
    ("detection", f"--data {SHARED}/voc/VOCdevkit"),
    ("segmentation", f"--data {SHARED}/coco/annotations/instances_val2017.json --split val")])
def test_detectors_train_on_real_data(task, flags, tmp_path, tok):
    """VOC's and COCO's files as they are published, crowds and truncated pictures among them: a
    step, and the table."""
    import train
    argv = ["--model", "mct", "--task", task, *flags.split(), "--vocab", str(tok),
            "--out", str(tmp_path / task), *TINY, "--steps", "1", "--eval_limit", "5"]
    rows = train.main(argv)[task]["rows"]
    by = 2 if importlib.util.find_spec("pycocotools") else 1        # VOC's rule, COCO's own tool
    assert len(rows) == by * (2 if task == "detection" else 3)
    assert all(0 <= r["AP"] <= r["AP50"] + 1e-6 < 101 for r in rows)


# --------------------------------------------------------------------------------------------------
# data.py: views and tags (from test_mct_optional_views, _tags_from_captions)

def test_optional_views(tmp_path, tok):
    """Records without caption, tags or paraphrase are samples as all others."""
    _, pairs = photos(tmp_path)
    need = data.needs(mct.VIEWS["pretrain"])
    records = data.open_source("pairs", str(pairs), "train", str(tmp_path), need=need)
    assert records.notes["no_caption_left"] == 1

    # record 0 has no caption, 1 has a paraphrase and a tag twice, 5 has no tags
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[0].pop("caption"), rows[5].pop("tags")
    rows[1] |= {"paraphrase": ["red square left"], "tags": ["red", "red", "a"]}
    write(pairs, "".join(json.dumps(r) + "\n" for r in rows))
    records = data.open_source("pairs", str(pairs), "train", str(tmp_path), need=need)
    stats = data.stats(records, views=mct.VIEWS["pretrain"], tags=2)
    assert stats["num_labels"] == 2 and stats["tag_width"] == 3 and "red" in stats["tags"]

    views = data.Views(records, mct.VIEWS["pretrain"], data.get_tokenizer(tok), 32, 6,
                       tag_names=stats["tags"])
    first, second, sixth = views[0], views[1], views[5]
    assert (first["text_valid"], second["text_valid"]) == (0, 1)
    assert (second["text_key_is_copy"], sixth["text_key_is_copy"]) == (0, 1)
    assert first["text_mask"].sum() == 2
    assert not torch.equal(second["text"], second["text_key"])
    assert torch.equal(sixth["text"], sixth["text_key"]) and (sixth["tags"] == -1).all()
    tags = second["tags"].tolist()
    known = sorted(t for t in tags if t >= 0)
    assert known == [stats["tags"].index("red")] or len(set(tags)) == 3
    assert torch.equal(views.tag_rows()[1], second["tags"])

    # the key views and the tags are training's alone
    shown = data.Views(records, mct.VIEWS["pretrain"], data.get_tokenizer(tok), 32, 6, train=False)
    assert set(shown.keys) == {"image", "text"}


def test_tags_from_captions(tmp_path, tok):
    """A word list makes tags of captions, whatever tags the records had."""
    _, pairs = photos(tmp_path)
    records = data.open_source("pairs", str(pairs), "train", str(tmp_path))
    nouns = write(tmp_path / "nouns.txt", "Square\n\nred\ncircle\n")
    made = data.caption_tags(records, nouns)
    assert made[0]["tags"] == ["red", "square"] and made[1]["tags"] == ["square"]
    # photo 0 has an empty caption: left out
    assert (len(made), made.notes["with_tags"], records[0]["tags"]) == (11, 11, ["red"])
    assert data.tag_list(made) == ["square", "red"]
    for bad in ("missing.txt", write(tmp_path / "empty.txt", "\n")):
        with pytest.raises(data.DataError, match=Path(bad).name):
            data.caption_tags(records, tmp_path / bad)


# --------------------------------------------------------------------------------------------------
# eval.py: average precision (from test_mct_whole_picture_..., _voc_ap_..., _ap_of_the_...)

def test_whole_picture_is_the_baseline_of_detection(tmp_path):
    """Of two classes, one whose only object fills its picture is found (AP 100), one whose object
    is small is not (AP 0)."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in (1, 2)]
    for i in (1, 2):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{i}.png")
    notes = [{"id": i, "image_id": i, "category_id": i, "iscrowd": 0, "bbox": box,
              "area": box[2] * box[3], "segmentation": []}
             for i, box in ((1, [0, 0, 40, 30]), (2, [4, 4, 9, 9]))]
    categories = [{"id": 1, "name": "wide"}, {"id": 2, "name": "small"}]
    file = write(tmp_path / "instances.json",
                 {"images": images, "annotations": notes, "categories": categories})

    # a detector that finds nothing
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)}
    model = SimpleNamespace(detect=lambda batch: [dict(nothing) for _ in batch["image"]])
    opts = evaluation.parser().parse_args(["x", "--data", str(file), "--image_root", str(tmp_path)])
    ev = mock.Mock(opts=opts, task="detection", info={}, world=1, model=model, protocol={})
    ev.open.return_value = data.open_source("detection", str(file), "train", str(tmp_path))
    ev.progress.return_value = [{"index": torch.arange(2), "image": [None, None]}]
    rows = evaluation.detection(ev)["rows"]
    table = {r["measure"]: (r["AP"], r["AP50"]) for r in rows}
    assert set(table) >= {"boxes, VOC07 11-point", "whole picture, VOC07 11-point"}
    for measure, value in table.items():
        wanted = [50.0, 50.0] if measure.startswith("whole picture") else [0.0, 0.0]
        close(torch.tensor(value), wanted)


def test_voc_ap_by_hand():
    def box(x):
        return [x, 0.0, x + 10, 10]

    objects = {0: np.array([box(0), box(20)]), 1: np.array([box(0), box(50)]), 2: np.zeros((0, 4))}
    truth = {0: np.array([0, 0]), 1: np.array([0, 1])}
    found = []
    for score, image, x in ((0.9, 0, 0), (0.8, 0, 0), (0.7, 1, 50), (0.6, 1, 1), (0.5, 2, 0)):
        iou = evaluation.box_iou(np.array([box(x)]), objects[image])[0]
        found.append((score, image, iou))

    # right, wrong (second time), left out (difficult), right (IoU 9/11), wrong; three objects:
    # recall 1/3 at 1, 2/3 at 2/3
    wanted = (4 * 1 + 3 * (2 / 3) + 4 * 0) / 11                 # recall 0..0.3, 0.4..0.6, 0.7..1
    close(evaluation.voc_ap(found, truth, 0.5), wanted)
    close(evaluation.voc_ap(found, truth, 9 / 11), (4 * 1) / 11)    # at the threshold: not over
    assert math.isnan(evaluation.voc_ap(found, {}, 0.5))
    assert evaluation.voc_ap([], truth, 0.5) == 0


def truth_found(tmp_path):
    """Records, and detections that are their first objects, as detections() gives them."""
    file, _ = photos(tmp_path)
    records, found = data.open_source("detection", str(file), "train", str(tmp_path)), {}
    for i, r in enumerate(records):
        boxes = np.array(r["boxes"])
        masks = np.stack([data.decode_mask(s, 32, 40) for s in r["segmentation"]])
        found[i] = {"boxes": boxes[:1], "labels": np.array(r["labels"][:1]), "scores": np.ones(1),
                    "iou": evaluation.box_iou(boxes[:1], boxes),
                    "mask_iou": evaluation.mask_iou(masks[:1], masks),
                    "masks": [data.encode_mask(masks[0])]}
    empty = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0), "scores": np.zeros(0)}
    return records, found, {i: empty for i in found}


def test_ap_of_the_truth_is_100(tmp_path):
    records, found, empty = truth_found(tmp_path)
    for key in ("iou", "mask_iou"):
        scores = evaluation.voc_scores(found, records, 2, key)
        assert all(abs(v - 100) < 1e-6 for v in scores.values()), scores
        assert evaluation.voc_scores(empty, records, 2, key)["AP"] == 0


@pytest.mark.needs("pycocotools")
def test_ap_of_the_truth_is_100_by_pycocotools(tmp_path):
    records, found, empty = truth_found(tmp_path)
    for kind in ("bbox", "segm"):
        scores = evaluation.coco_scores(found, records, kind)
        assert all(abs(v - 100) < 1e-6 for v in scores.values()), scores
        assert evaluation.coco_scores(empty, records, kind)["AP"] == 0


def test_mask_iou_by_hand():
    masks = np.zeros((2, 4, 6), bool)
    masks[0, :2, :3], masks[1, 1:3, 1:3] = True, True               # 6 and 4 pixels, 2 in common
    close(evaluation.mask_iou(masks, masks), [[1, 2 / 8], [2 / 8, 1]])
    assert evaluation.mask_iou(masks[:0], masks).shape == (0, 2)


# --------------------------------------------------------------------------------------------------
# eval.py: tags, chance, probes (from test_mct_miou, _random_pairs_row, _fit_linear, _probe_...)

def test_miou():
    top, truth = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]), [{0, 1, 9}, set()]
    close(evaluation.tag_overlap(top, truth, 2), 100 * (2 / 3 + 0) / 2)
    close(evaluation.tag_overlap(top, truth, 4), 100 * (2 / 5 + 0) / 2)


def test_random_pairs_row():
    """Table 7's RS row: 5 captions for each of 1,000 images."""
    row = evaluation.chance(torch.arange(1000).repeat_interleave(5))
    assert abs(row["i2t_r1"] - 0.1) < 0.01 and abs(row["t2i_r10"] - 1.0) < 0.01
    assert abs(row["i2t_medr"] - 647) <= 1 and row["t2i_medr"] == 500


def test_fit_linear():
    x = torch.randn(400, 5)
    y = (x[:, 0] > x[:, 1]).long()
    weight, bias = evaluation.fit_linear(x, y, 2, lr=1.0, epochs=20, batch=64)
    assert (F.linear(x, weight, bias).argmax(1) == y).float().mean() > 0.95
    weight, bias, lr = evaluation.fit_best(x, y, 2, [1e-6, 1.0])
    assert lr == 1.0 and (F.linear(x, weight, bias).argmax(1) == y).float().mean() > 0.95


def test_probe_fits_features_of_any_scale():
    """Features that are all positive and unlike in size: as they are SGD does not get there,
    brought to one scale it does. A unit that is dead in train does no harm."""
    torch.manual_seed(0)
    z, way = torch.randn(400, 6), torch.randn(6, 4)
    y = (z @ way).argmax(1)
    scaled = 5 + z * torch.tensor([0.01, 0.1, 1, 0.02, 0.5, 0.05])
    x = torch.cat([scaled, torch.zeros(400, 1)], 1)
    x[300:, 6] = 1e-6
    x, y = {"train": x[:300], "test": x[300:]}, {"train": y[:300], "test": y[300:]}
    train, test, lr = evaluation.fit_probe(x, y, 4)
    assert min(train, test) > 90 and lr in (3.0, 1.0, 0.3, 0.1, 0.03)
    raw_train, raw_test, lr = evaluation.fit_probe(x, y, 4, 30.0)
    assert raw_train < 75 and lr == 30
    for blind in (torch.zeros(400, 3), torch.full((400, 3), 7.0)):
        halves = {"train": blind[:300], "test": blind[300:]}
        train, test, _ = evaluation.fit_probe(halves, y, 4)
        assert train < 50 and test < 50
