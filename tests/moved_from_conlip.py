"""Tests of eval.py and tools/weights.py that stood in test_conlip.py, for the lead to distribute:
galleries -> the tests of eval.py; foreign files -> test_weights.py."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
import train
from models import conlip
from tools import weights


# --------------------------------------------------------------------------------------------------
# eval.py --task gallery

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 24 little pictures, two captions each, 16 train, 8 val, and a vocabulary."""
    root = tmp_path_factory.mktemp("photos")
    words = "a red green blue grey square circle on top of the dark light one two three".split()
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (root / "vocab.txt").write_text("\n".join(tokens) + "\n")

    generator = torch.Generator().manual_seed(0)
    with open(root / "pairs.jsonl", "w") as f:
        for i in range(24):
            color = torch.randint(0, 255, (3,), generator=generator).tolist()
            Image.new("RGB", (40, 32), tuple(color)).save(root / f"{i}.png")
            drawn = torch.randint(0, len(words), (2, 5), generator=generator).tolist()
            captions = [" ".join(words[j] for j in row) for row in drawn]
            split = "train" if i < 16 else "val"
            print(json.dumps({"image": f"{i}.png", "split": split, "caption": captions}), file=f)
    return root


def untrained(name, photos, out):
    """`--steps 0` writes the run of an untrained model -> its directory."""
    train.main(["--model", name, "--data", str(photos / "pairs.jsonl"), "--image_root", str(photos),
                "--vocab", str(photos / "vocab.txt"), "--batch_size", "8", "--workers", "0",
                "--steps", "0", "--evals", "none", "--eval_split", "val", "--out", str(out)])
    return str(out)


def gallery(run, *flags):
    return evaluation.main([run, "--task", "gallery", "--split", "val", *flags])["gallery"]


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return untrained("conlip", photos, tmp_path_factory.mktemp("runs") / "run")


def test_gallery_finds_what_belongs_together(run, photos):
    record = json.loads((photos / "pairs.jsonl").read_text().splitlines()[17])
    shown = gallery(run, "--text", record["caption"][1], "--image", str(photos / "20.png"))
    rank = shown["metrics"]["rank of the true image"]
    assert 1 <= rank <= 8 and 1 <= shown["metrics"]["rank of the true text"] <= 16
    assert len(shown["rows"]) == 10 and Image.open(f"{run}/gallery.png").width > 900

    # the five nearest pictures, with the true one among them where its rank allows
    true = [row["rank"] for row in shown["rows"][:5] if row["true"] == "yes"]
    assert true == ([rank] if rank <= 5 else [])


def test_gallery_of_a_query_that_is_not_in_the_data(run):
    shown = gallery(run, "--text", "no caption of theirs")
    assert shown["metrics"]["rank of the true image"] is None
    assert {row["true"] for row in shown["rows"]} == {"unknown"}


@pytest.mark.parametrize("flags, message", [([], "ask with a text"),
                                            (["--image", "nowhere.png"], "nowhere.png")])
def test_gallery_without_a_readable_query_is_one_line(run, flags, message):
    with pytest.raises(SystemExit, match=message):
        gallery(run, *flags)


@pytest.mark.parametrize("name", ["codis", "cookie", "mct"])
def test_gallery_of_the_other_two_tower_models(name, photos, tmp_path):
    run = untrained(name, photos, tmp_path / "run")
    shown = gallery(run, "--text", "a red square", "--image", str(photos / "20.png"))
    assert len(shown["rows"]) == 10 and 1 <= shown["metrics"]["rank of the true text"] <= 16
    assert list(tmp_path.rglob("gallery.png"))


# --------------------------------------------------------------------------------------------------
# tools/weights.py: Hugging Face's files for two towers

def make_model(**over):
    """A fine-tuning model of two towers, without a zero or a one left in its weights."""
    sizes = dict(image_size=48, patch=16, width=24, vision_layers=2, text_layers=1, heads=3,
                 mlp_ratio=2, dropout=0.0, max_text=11, positions=14, vocab_size=57, pad_id=0,
                 cls_id=2, sep_id=3, mask_id=4, first_word=6, queue_size=21)
    model = conlip.ConLIP(conlip.Config(**{**sizes, **over}), "retrieval").train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def attention(name, tensor, old, new):
    """The three matrices that ours joins, under their own names."""
    parts = zip(("query", "key", "value"), tensor.chunk(3))
    return {name.replace(old, f"{new}.{part}"): rows.clone() for part, rows in parts}


def hugging_face(model):
    """The towers under the names of ViTModel and BertForPreTraining, with those' other tensors."""
    vit = {"pooler.dense.weight": torch.zeros(2, 2)}
    names = {"blocks.": "encoder.layer.", "attention_norm.": "layernorm_before.",
             "mlp_norm.": "layernorm_after.", "attention.out.": "attention.output.dense.",
             "patch_embed.": "embeddings.patch_embeddings.projection.",
             "mlp.0.": "intermediate.dense.", "mlp.2.": "output.dense.",
             "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    for name, tensor in model.vision.state_dict().items():
        name = "layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        vit |= (attention(name, tensor, "attention.qkv", "attention.attention")
                if ".qkv." in name else {name: tensor.clone()})

    bert = {"cls.predictions.bias": torch.zeros(2), "bert.pooler.dense.bias": torch.zeros(2),
            "cls.seq_relationship.bias": torch.zeros(2),
            "bert.embeddings.position_ids": torch.arange(2)}
    names = {"blocks.": "encoder.layer.", "words.": "word_embeddings.",
             "positions.": "position_embeddings.", "segments.": "token_type_embeddings.",
             "embeddings.norm.": "embeddings.LayerNorm.",
             "attention.out.": "attention.output.dense.",
             "attention_norm.": "attention.output.LayerNorm.", "mlp.0.": "intermediate.dense.",
             "mlp.2.": "output.dense.", "mlp_norm.": "output.LayerNorm.",
             "LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for name, tensor in model.text.state_dict().items():
        name = "bert." + name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        bert |= (attention(name, tensor, "attention.qkv", "attention.self")
                 if ".qkv." in name else {name: tensor.clone()})
    return vit, bert


def test_hugging_faces_files_fill_both_towers(tmp_path):
    source, model = make_model(), make_model()
    vit, bert = hugging_face(source)
    save_file(vit, tmp_path / "vit.safetensors")
    torch.save(bert, tmp_path / "bert.bin")
    paths = {"vision": tmp_path / "vit.safetensors", "text": tmp_path / "bert.bin"}
    vision, text = weights.load_towers(conlip, model, paths)[:2]

    # queries, keys and values are one tensor
    assert "matched 30 of 31 tensors, which fill 30 here; missing 0" in vision
    assert "unexpected 1: pooler.dense.weight" in vision
    ours = len(model.text.state_dict())
    assert f"which fill {ours} here; missing 0; unexpected 3: " in text
    for side in ("vision", "text"):
        for name, tensor in getattr(source, side).state_dict().items():
            assert torch.equal(getattr(model, side).state_dict()[name], tensor), name
            assert torch.equal(getattr(model, side + "_m").state_dict()[name], tensor), name

    # another image size
    bigger = make_model(image_size=96)
    lines = weights.load_towers(conlip, bigger, {"vision": paths["vision"]})
    assert "pos_embed interpolated from 3x3 to 6x6" in lines[0]
    torch.testing.assert_close(bigger.vision.pos_embed[:, 0], source.vision.pos_embed[:, 0])


KEY = "encoder.layer.1.attention.attention.key.bias"
WORDS = "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("side, change, config, message", [
    ("vision", {}, {"num_attention_heads": 3}, None),
    ("text", {}, {"model_type": "bert", "num_attention_heads": 3}, None),
    ("vision", {}, {"num_attention_heads": 4}, "num_attention_heads 4, this model has 3"),
    ("text", {}, {"model_type": "roberta"}, "model_type roberta"),
    ("vision", {"layernorm.bias": None}, {},
     "1 of this tower's 30 tensors are not filled: vision.norm.bias"),
    ("vision", {KEY: None}, {}, "not filled: vision.blocks.1.attention.qkv.bias"),
    ("vision", {"layernorm.bias": torch.zeros(5)}, {}, r"norm.bias is \(5,\) there"),
    ("text", {"bert.embeddings.LayerNorm.gamma": None}, {},
     "not filled: text.embeddings.norm.weight"),
    ("text", {"bert.encoder.layer.1.x": torch.zeros(1)}, {}, "no place for encoder.layer.1.x"),
    ("text", {WORDS: torch.zeros(58, 24)}, {}, "another vocabulary"),
])
def test_a_folder_as_the_hub_has_it_fits_or_is_one_line(side, change, config, message, tmp_path):
    vit, bert = hugging_face(make_model())
    state = {**(vit if side == "vision" else bert), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))

    model = make_model()
    if message is None:
        assert "missing 0" in weights.load_towers(conlip, model, {side: tmp_path})[0]
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(SystemExit, match=message) as error:
        weights.load_towers(conlip, model, {side: tmp_path})
    assert str(error.value).startswith(f"--init_{side} {tmp_path}: ")
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tower_without_counterpart_is_one_line(tmp_path):
    path = tmp_path / "vit.safetensors"
    save_file(hugging_face(make_model())[0], path)
    with pytest.raises(SystemExit, match="vision: .*need --stem patch --act gelu") as error:
        weights.load_towers(conlip, make_model(stem="conv"), {"vision": path})
    assert "\n" not in str(error.value)


@pytest.mark.needs("transformers", "timm")
@torch.no_grad()
def test_export_round_trip(tmp_path, capsys):
    """A run's towers, written out, in transformers and timm: the same features."""
    import timm
    from transformers import BertModel, ViTModel
    model = make_model().eval()
    (tmp_path / "run").mkdir()
    weights.save_model(model, tmp_path / "run" / "model.safetensors")
    config = {name: getattr(model.cfg, name) for name in model.cfg.__dataclass_fields__}
    info = {"model": "conlip", "task": "retrieval", "config": config}
    (tmp_path / "run" / "config.json").write_text(json.dumps(info))
    weights.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])

    ids, mask = torch.randint(6, 57, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    bert = BertModel.from_pretrained(tmp_path / "out" / "text", add_pooling_layer=False).eval()
    torch.testing.assert_close(bert(ids, mask).last_hidden_state, model.text(ids, mask),
                               atol=1e-5, rtol=1e-5)

    image = torch.randn(2, 3, 48, 48)
    vit = ViTModel.from_pretrained(tmp_path / "out" / "vision", add_pooling_layer=False).eval()
    net = timm.create_model("vit_base_patch16_224", img_size=48, patch_size=16, embed_dim=24,
                            depth=2, num_heads=3, mlp_ratio=2, num_classes=0,
                            checkpoint_path=str(tmp_path / "out" / "vision.safetensors")).eval()
    for theirs in (vit(image).last_hidden_state, net.forward_features(image)):
        difference = (theirs - model.vision(image)).abs().max()
        assert difference < 1e-4, difference
