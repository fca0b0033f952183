"""Tests of eval.py, data.py and tools/weights.py that stood in tests/test_cookie.py."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import data
import eval as ev
import train
from models import cookie
from tools import weights


def close(a, b, tol=1e-9):
    a = torch.as_tensor(a)
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=tol, atol=tol)


# --------------------------------------------------------------------------------------------------
# eval.py: graded sentence pairs, hashing, attention pictures      (-> tests/test_metrics.py)

# pearsonr and spearmanr of scipy 1.17.1 for the 100 cases below, four cases a line
SCIPY = """
0.322094636 0.353479853 0.925079824 0.785221494 0.681184801 0.828571429 0.886698052 0.665964421
0.456455110 0.376676987 0.822122594 0.702562927 0.298538457 0.280566802 0.760873991 0.538424127
0.538803978 0.578431373 0.681300544 0.486719206 0.306299855 0.269838057 0.751912777 0.613419266
0.538456171 0.507018717 0.880253473 0.675294985 0.688261877 0.533333333 0.898524159 0.791013233
0.488123932 0.435897436 0.718338282 0.447831271 0.632816532 0.569230769 0.986356533 0.974679434
0.736543295 0.685314685 0.867668615 0.660535354 0.686828720 0.663636364 0.828285816 0.391631653
0.353629918 0.381562882 0.843299440 0.674822913 0.328385220 0.275000000 0.798912827 0.638767412
0.371098838 0.284848485 0.599719579 0.257839062 0.522712287 0.515173068 0.949947489 1.000000000
0.136268191 0.214285714 0.765948221 0.587139369 0.481732687 0.466151866 0.746791022 0.569050552
0.580326576 0.602608696 0.959531517 0.784729917 0.456738707 0.398522167 0.903070140 0.736405674
0.420690921 0.368035191 0.653505603 0.367519297 0.321677502 0.248484848 0.965068263 0.820782682
0.172871172 0.120689655 0.788195733 0.493816403 0.116611701 0.285714286 0.800089748 0.591239727
0.590797837 0.593828646 0.946028070 0.554545455 0.547322345 0.545912911 0.824842042 0.734147455
0.709772095 0.681203008 0.825383706 0.522271439 0.059886937 -0.018181818 0.858948869 0.757589671
0.624816078 0.524674472 0.978720238 0.974679434 0.247970613 0.221575985 0.873404338 0.777638805
0.475670400 0.427442123 0.615439686 0.281227975 0.474011583 0.501012146 0.793424030 0.615051593
0.557996148 0.530080214 0.778805123 0.564834334 0.389983262 0.571428571 0.941420201 0.675925926
0.586720337 0.528592375 0.991739594 0.900000000 0.043764093 0.212121212 0.747729727 0.416456335
0.660449719 0.678571429 0.620935254 0.054800776 0.409626659 0.407843137 0.820123311 0.598128317
0.530339652 0.463247863 0.705671889 0.268374455 0.391974515 0.378571429 0.922216181 0.652012863
0.517882964 0.515789474 0.685834811 0.436524002 0.579286473 0.608391608 0.760330269 0.615302831
0.360631297 0.429870130 0.781290228 0.482896341 0.222953246 0.400000000 0.914412212 0.707528736
0.465437802 0.440065681 0.908900628 0.636847175 0.590777599 0.602941176 0.946234836 0.896784797
0.557009589 0.508866995 0.749822067 0.526708018 0.360114567 0.356567093 0.674125041 0.370579457
0.390137474 0.325128205 0.775610954 0.579524680 0.156869511 0.128461538 0.757496474 0.562134958
"""


def test_sts_metrics_equal_scipys():
    want = iter(map(float, SCIPY.split()))
    for i in range(100):
        g = random.Random(i)
        n = g.randint(3, 40)
        x = [g.uniform(-1, 1) for _ in range(n)]
        y = [a * g.uniform(0, 1) + g.uniform(-1, 1) for a in x]
        if i % 2:
            x, y = [round(3 * a) for a in x], [round(3 * a) for a in y]         # ties
            x[0], x[1], y[0], y[1] = 9, -9, 8, -7                               # never constant
        assert ev.pearson(x, y) == pytest.approx(next(want), abs=1e-8)
        assert ev.spearman(x, y) == pytest.approx(next(want), abs=1e-8)
    assert math.isnan(ev.pearson([1, 1, 1], [1, 2, 3]))


def test_sts_all_mean_wmean():
    """A crafted case where the three differ: two subsets, each perfect, at different levels."""
    score, gold = [1, 2, 3, 0.1, 0.2], [0, 1, 2, 4, 5]
    out = ev.graded(score, gold, ["a"] * 3 + ["b"] * 2)
    assert out["mean"] == out["wmean"] == 100 and out["spearman"] < 0
    close(out["P+S / 2"], (out["pearson"] + out["spearman"]) / 2)
    out = ev.graded([1, 2, 3, 2, 1], [1, 2, 3, 1, 2], ["a"] * 3 + ["b"] * 2)
    close(out["mean"], 0.0)
    close(out["wmean"], 100 * (3 - 2) / 5)


def test_bag_of_words():
    close(ev.bag_of_words("A red dog.", "a red, red cat"), (1 + 2) / math.sqrt(3 * 6))
    assert ev.bag_of_words("", "x") == 0


@pytest.mark.parametrize("r", [3, 7, 50])
def test_map_at(r):
    g = torch.Generator().manual_seed(r)
    query, database = (torch.randint(0, 2, (n, 6), generator=g) * 2.0 - 1 for n in (5, 11))
    # 0 or 1, some rows without label
    ql, dl = (torch.randint(0, 4, (n, 3), generator=g) // 2 for n in (5, 11))
    within = whole = 0
    for q, labels in zip(query, ql):
        # ties: the database's order
        order = sorted(range(11), key=lambda j: (int((q != database[j]).sum()), j))
        hits, total = [], 0
        for place, j in enumerate(order[:r], 1):
            if (labels & dl[j]).any():
                hits.append(place)
                total += len(hits) / place
        within += total / max(1, len(hits)) / 5
        whole += total / max(1, sum(bool((labels & d).any()) for d in dl)) / 5
    for mine, theirs in zip(ev.map_at(query, database, ql, dl, r, chunk=2), (within, whole)):
        close(mine, 100 * theirs)


def test_by_rank():
    """By rank, not by value."""
    picture = data.Image.new("RGB", (4, 4), (200, 200, 200))
    out = np.asarray(ev.by_rank(picture, torch.tensor([[0.9, 0.1], [0.2, 0.3]])))
    assert out[0, 0, 0] == 200 and out[0, 3, 0] == 40
    assert out[3, 0, 0] < out[3, 3, 0] < 200


# --------------------------------------------------------------------------------------------------
# eval.py and train.py as a user calls them      (-> tests/test_metrics.py or an own file)

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A few pictures in the official formats, vocabulary and clips; no built-in world is drawn."""
    root, g = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    (root / "features").mkdir()
    rows, lists, videos, clips, graded = [], [], [], [], []

    def sentence():
        return " ".join(g.choice(list("abcdefgh"), 4))

    for i in range(12):
        pixels = g.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        data.Image.fromarray(pixels).save(root / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": [sentence(), sentence()]})
        lists.append(f"some/where/{i}.png {1 - i % 2} {i % 2} {int(i % 3 == 0)}")
        frames = g.normal(size=(3 + i * 4, 18)).astype(np.float32)              # 3 to 47 frames
        np.save(root / "features" / f"v{i}.npy", frames)
        videos.append({"video_id": f"v{i}", "split": "train" if i < 8 else "test"})
        clips += [{"video_id": f"v{i}", "caption": sentence()} for _ in range(2)]
        graded.append(f"news\tx\t1\t{i}\t{i % 6}\t{sentence()}\t{' '.join('abcdefgh'[:1 + i % 6])}")
    (root / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "clips.json").write_text(json.dumps({"videos": videos, "sentences": clips}))
    (root / "sts-test.csv").write_text("\n".join(graded) + "\n")

    # one picture without a label in database and test list
    (root / "lists").mkdir()
    for name, part in (("train", lists), ("database", [*lists[4:], "11.png 0 0 0"]),
                       ("test", [*lists[:4], "10.png 0 0 0"])):
        (root / "lists" / f"{name}.txt").write_text("\n".join(part) + "\n")
    return root


SMALL = ("--batch_size 4 --steps 2 --image_size 32 --width 16 --embed_dim 16 --te_heads 2 "
         "--heads 2 --text_layers 1 --log_every 1".split())


def run(world, out, *flags):
    return train.main(["--model", "cookie", "--vocab", str(world / "vocab.txt"), "--out", str(out),
                       *SMALL, *map(str, flags)])


@pytest.fixture(scope="module")
def two_runs(world, tmp_path_factory):
    """Directories of two different COOKIE models, trained for two steps a stage."""
    root = tmp_path_factory.mktemp("runs")
    pairs = ("--data", world / "pairs.jsonl", "--evals", "none")
    run(world, root / "a", *pairs)
    run(world, root / "b", *pairs, "--ws_layers", 0, "--tav_layers", 0, "--pooling", "gpo",
        "--seed", 1)
    return str(root / "a"), str(root / "b")


def test_ensemble_is_the_mean_similarity(world, two_runs):
    a, b = two_runs
    alone = ev.main([a, "--task", "retrieval"])["retrieval"]
    there = ev.find_run(b) / "config.json"
    info = json.loads(there.read_text())
    # whatever b learnt from: one gallery
    loop = {**info["loop"], "data": "another.json"}
    there.write_text(json.dumps({**info, "loop": loop}))
    both = ev.main([a, "--task", "retrieval", "--ensemble", a, b])["retrieval"]
    assert "mean similarity of 2 runs" in [r["scores"] for r in both["rows"]]
    assert len(both["protocol"]["ensemble"]) == 2

    sims = []
    for path in (a, b):
        model, of_run = ev.load_run(path)
        opts = vars(ev.parser().parse_args([path])) | {"data": str(world / "pairs.jsonl")}
        one = ev.Eval(model, of_run, "retrieval", ev.argparse.Namespace(**opts), 0, 1)
        records = one.open()
        with torch.no_grad():
            image = torch.cat([model.encode_image(b) for b in one.batches(records, "image")])
            text = torch.cat([model.encode_text(b) for b in one.batches(records, "text")])
        sims.append(image @ text.T)
    owner = torch.arange(12).repeat_interleave(2)
    assert both["metrics"] == ev.recall(sum(sims) / 2, owner)
    assert not torch.equal(sims[0].argsort(), sims[1].argsort())
    assert both["metrics"] != ev.recall(sims[0], owner)
    assert alone["protocol"]["protocol"].startswith("in domain, pre-trained only")
    with pytest.raises(SystemExit, match="at least one other"):
        ev.main([a, "--task", "retrieval", "--ensemble", a])


def test_attention_pictures(world, two_runs, tmp_path):
    a, b = two_runs
    shown = ev.main([a, "--task", "attention", "--beside", b, "--data",
                     str(world / "pairs.jsonl")])["attention"]
    picture = data.Image.open(shown["protocol"]["file"])
    assert len(shown["rows"]) == 2 and picture.width == 3 * 266 + 10
    assert len(shown["rows"][1]["top words"].split(", ")) <= 5
    ev.main([a, "--task", "attention", "--image", str(world / "3.png"), "--text", "a b c",
             "--out", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").exists()


def test_speed_of_two_dual_encoders(world, two_runs):
    a, b = two_runs
    timed = ev.main([a, "--task", "speed", "--sizes", "2,4,8", "--beside", b])["speed"]
    assert len(timed["rows"]) == 6 and len(timed["metrics"]) == 2
    assert all(float(r["seconds"]) > 0 for r in timed["rows"])


def test_sts_of_a_run(world, two_runs):
    a, _ = two_runs
    with pytest.raises(SystemExit, match="name files with --data"):
        ev.main([a, "--task", "sts"])
    graded = ev.main([a, "--task", "sts", "--data", str(world / "sts-test.csv")])["sts"]
    assert [r["scores"] for r in graded["rows"]] == ["bag of words", "model"]
    assert graded["rows"][0]["pairs"] == 12
    assert "pre-trained only" in graded["protocol"]["protocol"]
    assert graded["protocol"]["vector"] == "mean of layer 2 of the WS-TE over all tokens"


def test_speed_of_a_model_that_scores_pairs(world, tmp_path):
    """Any model with match(): here CODIS' own, of which both ways are timed."""
    train.main(["--model", "codis", "--data", str(world / "pairs.jsonl"),
                "--vocab", str(world / "vocab.txt"), "--out", str(tmp_path / "c"),
                "--steps", "0", "--batch_size", "4", "--evals", "none", "--image_size", "24",
                "--vision_layers", "1", "--queue_size", "8", "--codewords", "8"])
    rows = ev.main([str(tmp_path / "c"), "--task", "speed", "--sizes", "2,6"])["speed"]["rows"]
    assert [r["way"] for r in rows] == ["dual encoder"] * 2 + ["match, every pair"] * 2

    # all 3 x 6 pairs, in order
    model, info = ev.load_run(tmp_path / "c")
    opts = ev.argparse.Namespace(**vars(ev.parser().parse_args([""])) | {"pairs": 5})
    one = ev.Eval(model, info, "retrieval", opts, 0, 1)
    records = one.open().subset(range(3))
    images, texts = (list(one.batches(records, what)) for what in ("image", "text"))
    row, column = torch.arange(18) // 6, torch.arange(18) % 6
    pairs = {"image": torch.cat([b["image"] for b in images])[row]}
    for key in ("text", "text_mask"):
        pairs[key] = torch.cat([b[key] for b in texts])[column]
    with torch.no_grad():
        close(ev.score_pairs(one, images, texts), model.match(pairs), 1e-4)


def test_speed_beside_a_one_stream_model_of_regions(world, tmp_path):
    """Figure 4's other side: a model without encoders, which looks at stored regions (here
    ImageBERT), beside a dual encoder."""
    records = data.open_source("pairs", str(world / "pairs.jsonl"), "test")
    boxes = {"boxes": [[0, 0, 16, 32], [16, 0, 32, 32]], "labels": [0, 1]}
    regions = str(tmp_path / "r.safetensors")
    data.collect_regions(regions, records, 12,
                         lambda r: data.box_regions({**r, **boxes}, Path(r["image"]).name),
                         {"detector": data.STAND_IN, "root": str(world),
                          "label_names": '["a", "b"]'}, quiet=True)
    run(world, tmp_path / "a", "--data", world / "pairs.jsonl", "--evals", "none", "--steps", 0)
    train.main(["--model", "imagebert", "--data", str(world / "pairs.jsonl"),
                "--vocab", str(world / "vocab.txt"), "--regions", regions,
                "--out", str(tmp_path / "b"), "--steps", "0", "--batch_size", "4",
                "--evals", "none", "--width", "16", "--layers", "1", "--heads", "2"])
    result = ev.main([str(tmp_path / "a"), "--task", "speed", "--sizes", "2,4",
                      "--beside", str(tmp_path / "b"), "--regions", regions])["speed"]
    rows = [(r["way"], r["pictures"], r["captions"]) for r in result["rows"]]
    assert rows == [("dual encoder", 2, 4), ("dual encoder", 4, 8),
                    ("match, every pair", 2, 4), ("match, every pair", 4, 8)]
    assert result["protocol"]["not_counted"] == "reading files, making regions"


def test_growth(world, tmp_path, monkeypatch):
    """Of seconds that grow with n and with n^2, after a first call that is not counted."""
    run(world, tmp_path / "a", "--data", world / "pairs.jsonl", "--evals", "none", "--steps", 0)
    for power in (1, 2):
        seconds = iter([0.5 * n ** power for n in (2, 4, 12)])
        monkeypatch.setattr(ev, "timed", lambda fn, device, repeats: next(seconds))
        result = ev.main([str(tmp_path / "a"), "--task", "speed", "--sizes", "2,12,4"])["speed"]
        assert [r["growth"] for r in result["rows"]] == [None] + [f"{power:.2f}"] * 2
        assert [r["pictures"] for r in result["rows"]] == [2, 4, 12]
        assert [r["captions"] for r in result["rows"]] == [4, 8, 24]
        close(list(result["metrics"].values())[0], float(power), 1e-6)


def test_evaluation_of_clips(world, tmp_path):
    clips = ("--data", world / "clips.json")
    result = run(world, tmp_path / "gpo", "--task", "vtm", "--pooling", "gpo", *clips)["vtm"]
    assert result["protocol"]["lists"] == "full" and "clips" in result["rows"][0]

    np.save(world / "features" / "v8.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(SystemExit, match="5 features a frame"):
        ev.main([str(tmp_path / "gpo")])


def test_evaluation_of_hash_codes(world, tmp_path):
    lists = world / "lists"
    result = run(world, tmp_path / "h", "--task", "hashing", "--bits", 8, "--image_root", world,
                 "--data", lists)["hashing"]
    assert result["protocol"]["left_out_without_label"] == [1, 1]
    random_codes, model = result["rows"]
    assert random_codes["codes"] == "random codes"
    assert model["queries"] == 4 and model["database"] == 8
    assert 0 < result["metrics"]["map"] <= 100

    given = [str(tmp_path / "h"), "--data", str(lists / "test.txt")]
    again = ev.main([*given, "--database", str(lists / "database.txt"),
                     "--image_root", str(world)])["hashing"]
    assert again["metrics"] == result["metrics"]
    with pytest.raises(SystemExit, match="--database"):
        ev.main(given)


# --------------------------------------------------------------------------------------------------
# data.py: frames and questions      (-> tests/test_data.py)

def test_frames_view(world):
    records = data.open_source("clips", str(world / "clips.json"), None)
    tokenizer = data.get_tokenizer(str(world / "vocab.txt"))
    views = data.Views(records, cookie.VIEWS["vtm"], tokenizer, 32, 11, train=False)
    short, long = views[0], views[11]
    assert short["frames"].shape == long["frames"].shape == (data.FRAMES, 18)
    assert short["frames_mask"].tolist() == [1] * 3 + [0] * (data.FRAMES - 3)
    assert long["frames_mask"].sum() == data.FRAMES
    x = np.load(world / "features" / "v11.npy")             # 47 frames: first and last are kept
    close(long["frames"][0], x[0])
    close(long["frames"][-1], x[-1])


def test_questions_as_captions(tmp_path):
    for name in ("COCO_train2014_000000000009.jpg", "2354786.jpg"):
        data.Image.new("RGB", (8, 8)).save(tmp_path / name)
    vqa = {"data_subtype": "train2014",
           "questions": [{"image_id": 9, "question": "what?", "question_id": 1},
                         {"image_id": 9, "question": "who?", "question_id": 2}]}
    gqa = {"05515938": {"imageId": "2354786", "question": "is it a dog?", "answer": "no"},
           "05515939": {"imageId": "2354786", "question": "where?", "answer": "here"}}
    (tmp_path / "v.json").write_text(json.dumps(vqa))
    (tmp_path / "g.json").write_text(json.dumps(gqa))
    files = f"{tmp_path}/v.json,{tmp_path}/g.json"
    records = data.open_source("pairs", files, "train", str(tmp_path))
    assert [r["caption"] for r in records] == [["what?", "who?"], ["is it a dog?", "where?"]]
    assert len({r["image_id"] for r in records}) == 2

    del gqa["05515939"]["question"]
    (tmp_path / "g.json").write_text(json.dumps(gqa))
    with pytest.raises(SystemExit, match="question 05515939: no key 'question'"):
        data.open_source("pairs", f"{tmp_path}/g.json", "train", str(tmp_path))


# --------------------------------------------------------------------------------------------------
# tools/weights.py: files for COOKIE's two towers      (-> tests/test_weights.py)

def make_model(task="ccl", **over):
    sizes = dict(image_size=48, backbone="tiny", width=24, text_layers=2, heads=3, mlp_ratio=2,
                 embed_dim=32, te_heads=4, positions=14, vocab_size=57, frame_width=18, bits=16)
    return cookie.Cookie(cookie.Config(**{**sizes, **over}), task, 5)


def foreign_state(model, side):
    """A random foreign state dict that fits a tower."""
    mine, state = model.state_dict(), {}
    for names in cookie.foreign_names(model, side):
        for ours, theirs in names.items():
            if mine[ours].is_floating_point():
                state.update(zip(theirs, torch.randn_like(mine[ours]).chunk(len(theirs))))
    return state


def load(model, **paths):
    return weights.load_towers(cookie, model, paths)


@pytest.mark.parametrize("folder", [False, True])
def test_resnet_and_bert_files(folder, tmp_path):
    """A ResNet of WSL's names (no counters), a BERT as file or as the folder the hub gives."""
    model = make_model()
    resnet, bert = foreign_state(model, "vision"), foreign_state(model, "text")
    parallel = {f"module.{name}": tensor for name, tensor in resnet.items()}
    parallel["module.fc.weight"] = torch.zeros(3)
    torch.save({"state_dict": parallel}, tmp_path / "v.pth")

    old = {("bert." + name).replace("LayerNorm.weight", "LayerNorm.gamma"): tensor.contiguous()
           for name, tensor in bert.items()}
    more = {"cls.predictions.bias": torch.zeros(2), "bert.pooler.dense.weight": torch.zeros(2),
            "bert.embeddings.position_ids": torch.zeros(2)}
    place = tmp_path / "hub" if folder else tmp_path / "t.safetensors"
    if folder:
        place.mkdir()
        about = {"model_type": "bert", "num_attention_heads": 3, "hidden_act": "gelu"}
        (place / "config.json").write_text(json.dumps(about))
    save_file({**old, **more}, place / "model.safetensors" if folder else place)

    vision, text, _ = load(model, vision=tmp_path / "v.pth", text=place)
    assert f"matched {len(resnet)} of {len(resnet) + 1} tensors" in vision
    assert "missing 0; unexpected 1: fc.weight" in vision
    assert f"matched {len(bert)} of {len(bert) + 2} tensors" in text
    assert "unexpected 2: cls.predictions.bias, pooler.dense.weight" in text
    assert ("number of heads is unchecked" in text) != folder

    state = model.state_dict()
    for side, foreign in (("vision", resnet), ("text", bert)):
        needed, _ = cookie.foreign_names(model, side)
        for ours, theirs in needed.items():
            close(state[ours], torch.cat([foreign[name] for name in theirs]))


def test_files_that_do_not_fit_a_tower_are_refused(tmp_path):
    model = make_model()
    bert = {name: tensor.contiguous() for name, tensor in foreign_state(model, "text").items()}
    word, file = "embeddings.word_embeddings.weight", tmp_path / "t.safetensors"
    without = {name: tensor for name, tensor in bert.items() if name != word}
    for wrong, message in (
            ({**bert, "encoder.layer.9.x": torch.zeros(2)}, "no place for encoder.layer.9.x"),
            (without, "not filled: text.embeddings.words.weight"),
            ({**bert, word: torch.zeros(9, 24)},
             r"word_embeddings.weight is \(9, 24\) there, .* \(57, 24\)")):
        save_file(wrong, file)
        with pytest.raises(SystemExit, match=message):
            load(model, text=file)

    # a shape does not show the activation
    save_file(bert, file)
    with pytest.raises(SystemExit, match="gelu, this model has relu"):
        load(make_model(act="relu"), text=file)
    for side, task in (("vision", "vtm"), ("text", "hashing")):
        with pytest.raises(SystemExit, match=f"for {task} has no {side} tower"):
            load(make_model(task), **{side: file})

    resnet = foreign_state(model, "vision")
    del resnet["layer2.0.bn1.running_var"]
    save_file(resnet, tmp_path / "v.safetensors")
    with pytest.raises(SystemExit, match="not filled: vision.layer2.0.bn1.running_var"):
        load(model, vision=tmp_path / "v.safetensors")
    file.write_bytes(b"nothing")
    with pytest.raises(SystemExit, match="cannot be read as weights"):
        load(model, text=file)


@pytest.mark.parametrize("field, there, here", [
    ("layer_norm_eps", 1e-5, 1e-12),
    ("position_embedding_type", "relative_key", "absolute"),
    ("num_attention_heads", 4, 3), ("hidden_act", "relu", "gelu")])
def test_a_folder_whose_config_differs_is_refused(field, there, here, tmp_path):
    """What no tensor's shape shows of a BERT is compared with its config.json, before anything
    changes; the same values are taken."""
    model = make_model()
    bert = {name: tensor.contiguous() for name, tensor in foreign_state(model, "text").items()}
    save_file(bert, tmp_path / "model.safetensors")
    same = {"model_type": "bert", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute",
            "num_attention_heads": 3, "hidden_act": "gelu"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    (tmp_path / "config.json").write_text(json.dumps({**same, field: there}))
    with pytest.raises(SystemExit, match=f"have {field} {there}, this model has {here}"):
        load(model, text=tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    (tmp_path / "config.json").write_text(json.dumps(same))
    load(model, text=tmp_path)
    word = "embeddings.word_embeddings.weight"
    close(model.text.embeddings.words.weight, bert[word])
