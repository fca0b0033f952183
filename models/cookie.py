"""COOKIE: two separate encoders that end in one shared transformer, trained by three contrasts.

Wen, Xia, Huang, Li, Xu, Shao, "COOKIE: Contrastive Cross-Modal Knowledge Sharing Pre-training for
Vision-Language Representation", ICCV 2021.

A picture and a sentence never meet inside the network, so a gallery is embedded once and searched
by a dot product. What brings them together is the weight-sharing transformer (WS-TE): the same
layers end both paths. Contrast across modalities (CCL) aligns the two; contrast within images
(VCL) and within sentences (TCL) keeps what each encoder knew of its own.

    image --> ResNet --> FC + p --> TAV-TE --> + s_V --+            +--> pooling --> I
              (grid)     Eq. 1      Eq. 3              +--> WS-TE --+    Eq. 4
    text ---> BERT ----> FC + s_T ---------------------+    Eq. 4   +--> pooling --> T
              (words)    Eq. 2

    CCL: I <-> T  Eq. 5-7       VCL: I_1 -> I_2  Eq. 8, 9       TCL: T_1 -> T_2  Eq. 10, 11

Shapes: B images, n patches, T text tokens, F frames, D = 1024 joint width, D_V and D_T widths of
CNN and BERT, N global batch, C labels, K bits.

Equations
    Eq. 1  -> patch_features()      Eq. 2  -> word_features()      Eq. 3  -> visual_features()
    Eq. 4  -> pool(), GPO           Eq. 5  -> info_nce()           Eq. 6, 7 -> cross_modal()
    Eq. 8  -> data.py's view "simclr" twice, Cookie.image_views()  Eq. 9  -> visual_contrast()
    Eq. 10 -> augment_tokens(), Cookie.text_views()                Eq. 11 -> textual_contrast()
    Eq. 12 -> Cookie.loss_pretrain()

Deviations from the paper
     1. Eq. 5 prints k^- without index: it runs over the other samples of the *global* batch.
        Other captions of one image are no negatives; a row without negatives has loss 0, and a
        global batch of one sample is refused.
     2. tau is not given: 0.05 (SimCSE's). Neither are the rates of Eq. 10: a fifth of the words;
        of these half are masked, a tenth substituted, the rest deleted. As in VSE-infinity's code
        whole words are drawn, and all wordpieces of a word share its fate. [CLS] and [SEP] stay,
        and at least one word; a substitute is no special token (there: any of the vocabulary). Nor
        are the strengths of Eq. 8: SimCLR's, with crops of 0.2 to 1 of the area (MoCo v2's). Nor
        is AdamW's weight decay: 0.01, BERT's, on matrices only.
     3. "ResNeXt101" cites the weakly supervised weights; 32x8d is our guess of the width.
        `--init_vision` takes torchvision's names.
     4. Embeddings have unit norm. Pooling is the mean, or GPO as VSE-infinity has it
        (`pooling="gpo"`, one for each modality). Transformers are post-norm with ReLU ("the
        standard definition"); their dropout is BERT's.
     5. Stage 2 encodes each modality in one call: raw input, view 1 and view 2 stacked. Batch norm
        sees them together. `ccl_on="view1"` drops the raw ones. With `chunk`, batch norm's
        statistics are those of a chunk.
     6. Each process has its own batch norm statistics; the first process's are saved.
     7. Hinge margin, warm-up, learning rates and epochs of fine-tuning stood in an appendix that
        we lack: see RECIPE. Two parts of VSE-infinity's recipe are left out: the CNN frozen for an
        epoch, and the dropping of regions and words. The hinge is a mean over rows (a sum there).
     8. Hashing adds CSQ's three-layer hash head and its quantization weight 0.05; its pairwise
        loss is left out (weight 0 in its commands). The last checkpoint is evaluated (there: the
        best on the test list). CSQ first squeezes each picture to 255 x 255 pixels; training crops
        it, evaluation takes the middle 224 x 224. Ours keep their proportions: training crops the
        picture as it is, evaluation takes its middle square. COCO's 80 centers of 64 bits are
        random rows in CSQ's files; ours are Hadamard's, as its paper has it where labels <= 2 bits.
     9. Table 5b's "FC layers" are the WS-TE's feed-forward blocks without attention (`ws="fc"`).
    10. `backbone="tiny"` (a ResNet of three basic blocks, 16 pixels a patch) exists for the CPU.

Run: python models/cookie.py      (2 s: shapes, parameters and every loss on a random batch)
"""

import contextlib
import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

# what a number of Config may be: its type, this in words, and as a test
Size = Annotated[int, "from 1 to 10**6", lambda n: 1 <= n <= 10**6]
Few = Annotated[int, "from 1 to 1000", lambda n: 1 <= n <= 1000]
FewOrNone = Annotated[int, "from 0 to 1000", lambda n: 0 <= n <= 1000]
Tokens = Annotated[int, "from 3 to 10**4", lambda n: 3 <= n <= 10**4]
Count = Annotated[int, "from 0 to 10**15", lambda n: 0 <= n <= 10**15]
Share = Annotated[float, "from 0 to 1", lambda x: 0 <= x <= 1]
Rate = Annotated[float, "from 0 to below 1", lambda x: 0 <= x < 1]
Amount = Annotated[float, "0 or more", lambda x: 0 <= x < math.inf]
Positive = Annotated[float, "above 0", lambda x: 0 < x < math.inf]


@dataclass
class Config:
    image_size: Size = 512          # pixels a side
    backbone: Literal["resnet50", "resnet101", "resnext101_32x8d",  # the image encoder
                      "tiny"] = "resnext101_32x8d"
    width: Size = 768               # D_T of the text encoder
    text_layers: Few = 12           # its layers
    heads: Few = 12                 # its attention heads
    mlp_ratio: Few = 4              # hidden width of its feed-forward blocks over D_T
    act: Literal["gelu", "relu"] = "gelu"                   # its activation
    dropout: Rate = 0.1             # in text encoder, TAV-TE and WS-TE
    embed_dim: Size = 1024          # D, of the joint space and its transformers
    te_heads: Few = 8               # attention heads of TAV-TE and WS-TE
    te_ratio: Few = 1               # their intermediate size over D
    tav_layers: FewOrNone = 1       # layers of the TAV-TE; 0 = none (Table 5b)
    ws_layers: FewOrNone = 2        # layers of the WS-TE; 0 = none (Tables 5b, 5c)
    ws: Literal["te", "fc"] = "te"                          # "fc": feed-forward only (Table 5b)
    ws_shared: bool = True          # the same WS-TE for images and texts (Table 5b)
    pooling: Literal["mean", "gpo"] = "mean"                # of tokens
    embed: Literal["joint", "bert"] = "joint"               # bert: BERT alone, no image (Table 4a)
    temp: Positive = 0.05           # tau of Eq. 5
    vcl: bool = True                # visual contrast in stage 2 (Table 5a)
    tcl: bool = True                # textual contrast in stage 2 (Table 5a)
    ccl_on: Literal["raw", "view1"] = "raw"                 # inputs of CCL in stage 2
    tcl_prob: Share = 0.2           # share of words that a text view changes
    tcl_mask: Share = 0.5           # of these: share masked
    tcl_substitute: Share = 0.1     # share substituted by a random word; the rest is deleted
    margin: Amount = 0.2            # of the hinge loss (retrieval)
    warmup_epochs: Amount = 1.0     # epochs of the mean hinge, before the hardest negative alone
    frame_width: int = 2048         # [data] features of a frame (vtm)
    vtm_te: bool = False            # let frames and words pass the WS-TE (vtm)
    bits: Few = 64                  # K, length of a hash code (hashing)
    quantization: Amount = 0.05     # weight of CSQ's quantization loss
    hash_dropout: Rate = 0.5        # in the hash head
    vision_lr: Amount = 0.0         # the CNN's share of lr; 0 = 0.1 for a ResNeXt, else 1
    text_lr: Amount = 1.0           # BERT's share of lr
    chunk: Count = 0                # rows encoded at a time, without --compile; 0 = all
    max_text: Tokens = 50           # m, tokens of a caption, [CLS] and [SEP] included
    positions: Tokens = 512         # position embeddings of the text encoder, as BERT
    vocab_size: int = 30522         # [data] words of the vocabulary
    pad_id: int = 0                 # [data] [PAD]
    cls_id: int = 101               # [data] [CLS]
    sep_id: int = 102               # [data] [SEP]
    mask_id: int = 103              # [data] [MASK]
    first_word: int = 999           # [data] lowest id of an ordinary word
    checkpointing: bool = False     # recompute transformer layers in backward to save memory

    def check(self, task):
        """SystemExit, one line, for a value that its type or another value forbids."""
        check_fields(self)

        # heads share the width
        if self.width % self.heads:
            raise SystemExit(f"--heads {self.heads}: does not divide --width {self.width}")
        if self.embed_dim % self.te_heads:
            raise SystemExit(f"--te_heads {self.te_heads}: does not divide "
                             f"--embed_dim {self.embed_dim}")

        # at least one patch, a position for each word, and no word changed twice
        stride = 2 ** (1 + len(NETS[self.backbone][1]))
        if self.image_size < stride:
            raise SystemExit(f"--image_size {self.image_size}: --backbone {self.backbone} has a "
                             f"stride of {stride}")
        if self.max_text > self.positions:
            raise SystemExit(f"--max_text {self.max_text}: more than --positions {self.positions}")
        if self.tcl_mask + self.tcl_substitute > 1:
            raise SystemExit(f"--tcl_substitute {self.tcl_substitute}: with --tcl_mask "
                             f"{self.tcl_mask} more than all")


PRESETS = {
    "base": dict(),
    "tiny": dict(image_size=64, backbone="tiny", width=128, text_layers=2, heads=4, act="relu",
                 dropout=0.0, embed_dim=128, te_heads=4, te_ratio=2, max_text=22, vision_lr=1.0,
                 text_lr=1.0, hash_dropout=0.0,
                 pretrain=[
                     dict(batch_size=64, steps=1000, lr=1e-3, warmup_steps=50, weight_decay=0.02,
                          schedule="cosine", min_lr=1e-4),
                     dict(batch_size=32, steps=250, lr=2e-4, weight_decay=0.02, schedule="step",
                          crop_scale=(0.6, 1.0)),
                 ],
                 retrieval=dict(image_view="plain", batch_size=64, steps=300, lr=2e-4,
                                vision_lr=1.0, text_lr=1.0, warmup_epochs=0.04),
                 vtm=dict(batch_size=40, steps=300, lr=5e-4, text_lr=0.2),
                 hashing=dict(image_size=64, backbone="tiny", batch_size=64, steps=400, lr=1e-3,
                              vision_lr=1.0, hash_dropout=0.0, image_view="plain")),
}

# Section 4.1 gives pre-training, all but the decay [B], BERT's; of Config, temp is SimCSE's and
# tcl_* are VSE-infinity's. Fine-tuning stood in an appendix that our copy lacks:
# [V] = VSE++ / VSE-infinity (GPO), also margin and warmup_epochs of Config;
# [C] = CSQ, also quantization and hash_dropout.
# Data (section 4.1): Conceptual Captions, SBU, COCO, Flickr30K, and the questions of VQA v2 and GQA
# as captions. An epoch goes over pairs: the paper counts 5.9 million of them, and VSE-infinity's
# epoch is over captions, too; CSQ's is over images. Ablations (section 4.3): ITM with ResNeXt-101,
# image retrieval with ResNet-50, text with ResNet-101.
RECIPE = {
    "pretrain": [
        dict(task="ccl", optimizer="adamw", lr=2e-5, schedule="step", milestones="0.5", gamma=0.1,
             epochs=30, epoch_of="captions", batch_size=576,
             weight_decay=0.01),                                    # decay [B]
        dict(optimizer="adamw", lr=2e-5, schedule="step", milestones="0.5", gamma=0.1,
             epochs=10, epoch_of="captions", batch_size=288,
             weight_decay=0.01),                                    # decay [B]
    ],
    "retrieval": dict(optimizer="adamw", lr=5e-4, schedule="step", milestones="0.6", gamma=0.1,
                      epochs=25, epoch_of="captions", batch_size=128, clip=2.0, weight_decay=1e-4,
                      vision_lr=0.01, text_lr=0.1, crop_scale=(0.6, 1.0)),              # [V]
    "vtm": dict(optimizer="adamw", lr=5e-4, schedule="step", milestones="0.6", gamma=0.1,
                epochs=25, epoch_of="captions", batch_size=128, clip=2.0, weight_decay=1e-4,
                text_lr=0.1),                                       # [V]
    # lr falls every 10 of 90 epochs, [C]
    "hashing": dict(image_size=224, backbone="resnet50", optimizer="adam", lr=1e-3, vision_lr=0.05,
                    schedule="step", gamma=0.7, epochs=90, epoch_of="images", batch_size=64,
                    crop_scale=(0.08, 1.0),
                    milestones="0.1111,0.2222,0.3333,0.4444,0.5556,0.6667,0.7778,0.8889"),
}

# Every table and figure with results, as data for tools/tables.py; models/README.md says what its
# words mean. Figures 1 and 2 are drawings. Not here: other people's rows; Table 1 and 2's rows with
# a star (`eval.py RUN --task retrieval --ensemble RUN2`); Table 5d's rows with VQA and GQA, whose
# numbers cannot be told apart in our copy. Fine-tuning repeats what pre-training said of sizes.
# Table 5 measures ITM with ResNeXt-101, IR with ResNet-50, TM with ResNet-101 (section 4.3).
FILES = ("--data coco.json,flickr30k.json,cc3m.tsv,sbu.tsv,v2_questions.json,gqa_questions.json "
         "--image_root images --chunk 24")
BERT = "--vocab vocab.txt --init_text bert-base-uncased"
X101, R101, R50 = (f"{BERT} --init_vision {name}.pth"
                   for name in ("ig_resnext101_32x8", "resnet101", "resnet50"))
COCO = "--data dataset_coco.json --image_root coco-images"
FLICKR = "--data dataset_flickr30k.json --image_root flickr30k-images"
LISTS = "--data LISTS --image_root coco-images"     # a folder: train.txt, database.txt, test.txt
QUICK = dict(pretrain="")

# How Table 5 measures: Rsum of COCO (1K: the mean of five folds), MAP, mean of both correlations.
ITM = dict(evaluation="retrieval", columns=("rsum",), tiny=QUICK,
           base=dict(pretrain=FILES, retrieval=COCO, start=X101, eval=COCO,
                     columns=("rsum, folds",)))
IR = dict(evaluation="hashing", columns=("map",), tiny=dict(QUICK, hashing="--bits 64"),
          base=dict(pretrain=FILES + " --backbone resnet50", start=R50,
                    hashing="--bits 64 " + LISTS, eval=LISTS))
TM = dict(evaluation="sts", columns=("P+S / 2",), tiny=QUICK,
          base=dict(pretrain=FILES + " --backbone resnet101", start=R101,
                    eval="--data stsbenchmark"))
LOSSES = {"CCL": "--vcl false --tcl false", "CCL + VCL": "--tcl false",
          "CCL + TCL": "--vcl false", "CCL + VCL + TCL": ""}
SHARING = {"baseline": "--ws_layers 0 --tav_layers 0", "FC, shared": "--ws fc --tav_layers 0",
           "WS-TE, not shared": "--ws_shared false --tav_layers 0",
           "WS-TE, shared": "--tav_layers 0", "WS-TE, not shared, TAV-TE": "--ws_shared false",
           "WS-TE, shared, TAV-TE": ""}
DEPTHS = {"0": "--ws_layers 0 --tav_layers 0", "1": "--ws_layers 1", "2": "", "4": "--ws_layers 4",
          "8": "--ws_layers 8"}
CORPORA = {"MSCOCO": "--data coco.json", "Flickr30K": "--data flickr30k.json",
           "CC": "--data cc3m.tsv", "CC+SBU": "--data cc3m.tsv,sbu.tsv"}
# each needs its weights, --init_vision
BACKBONES = {"ResNet50": ("--backbone resnet50", R50), "ResNet101": ("--backbone resnet101", R101),
             "ResNeXt101": ("--backbone resnext101_32x8d", X101)}
ALL, BEST = "CCL + VCL + TCL", "WS-TE, shared, TAV-TE"


def then(rows, task=None, again=False):
    """{row: flags of pre-training} -> rows that go on with a task; `again`: with the same flags."""
    out = {}
    for name, flags in rows.items():
        out[name] = f"pretrain {flags}".strip()
        if task:
            out[name] += f" -> {task} {flags if again else ''}".rstrip()
    return out


def backbones(task=None):
    """Table 5e's rows: each backbone with its own weights, with pre-training and (w/o) without."""
    out = {}
    for name, (flag, weights) in BACKBONES.items():
        out[name] = f"pretrain {flag} {weights}" + (f" -> {task} {flag}" if task else "")
        if task:
            out[f"{name}, w/o"] = f"{task} {flag} {weights}"
    return out


HASHES = dict(
    claim="Pre-training makes hash codes better (CSQ is the same without it).",
    rows={f"{who}, {bits}": f"{way} --bits {bits}"
          for who, way in (("CSQ", "hashing"), ("COOKIE", "pretrain -> hashing"))
          for bits in (16, 32, 64)},
    better=[("COOKIE, 16", "CSQ, 16"), ("COOKIE, 32", "CSQ, 32"), ("COOKIE, 64", "CSQ, 64")],
    evaluation="hashing", columns=("map",))
STRONGER = {
    "COOKIE R101": "pretrain --backbone resnet101 --init_vision resnet101.pth -> "
                   "retrieval --backbone resnet101",
    "COOKIE X101": "pretrain --init_vision ig_resnext101_32x8.pth -> retrieval"}
TABLES = {
    "Table 1": dict(
        claim="Pre-trained, two encoders reach models that look at every pair; the stronger "
              "backbone is better.",
        rows=STRONGER, better=[("COOKIE X101", "COOKIE R101")],
        evaluation="retrieval", columns=("i2t_r1", "t2i_r1"),
        base=dict(pretrain=FILES, start=BERT, retrieval=COCO, eval=COCO)),
    "Table 2": dict(
        claim="The same on Flickr30K.",
        rows=STRONGER, better=[("COOKIE X101", "COOKIE R101")],
        evaluation="retrieval", columns=("i2t_r1", "t2i_r1"),
        base=dict(pretrain=FILES, start=BERT, retrieval=FLICKR, eval=FLICKR)),
    "Table 3": dict(
        claim="The text encoder helps video retrieval; GPO pools better than the mean.",
        rows={"COOKIE (mean)": "pretrain -> vtm",
              "COOKIE (gpo)": "pretrain -> vtm --pooling gpo"},
        better=[("COOKIE (gpo)", "COOKIE (mean)")], evaluation="vtm", columns=("rsum",),
        tiny=QUICK,
        base=dict(pretrain=FILES + " --backbone resnet101", start=R101,
                  vtm="--data videodatainfo.json,FEATURES")),
    "Table 4a": dict(
        claim="Pictures teach the text encoder what sentences mean.",
        rows={"BERT": "pretrain --steps 0 --embed bert --ws_layers 0",
              "COOKIE": "pretrain --backbone resnet101 --init_vision resnet101.pth"},
        better=[("COOKIE", "BERT")], evaluation="sts", columns=("P+S / 2",),
        base=dict(pretrain=FILES, start=BERT,
                  eval=("--data STS12-en-test", "--data STS13-en-test", "--data STS14-en-test",
                        "--data STS15-en-test", "--data STS16-en-test", "--data stsbenchmark"))),
    "Table 4b: MSCOCO": dict(
        HASHES, base=dict(pretrain=FILES + " --backbone resnet50", start=R50, hashing=LISTS,
                          eval=LISTS)),
    "Table 4b: NUS-WIDE": dict(
        HASHES, base=dict(pretrain=FILES + " --backbone resnet50", start=R50,
                          hashing="--data NUS_LISTS --image_root nus-images",
                          eval="--data NUS_LISTS --image_root nus-images")),
    "Table 5a: ITM": dict(
        ITM, claim="Pre-training helps; both contrasts within a modality help matching.",
        rows={"none": "retrieval", **then(LOSSES, "retrieval")}, reference="CCL",
        better=[("CCL", "none"), ("CCL + VCL", "CCL"), ("CCL + TCL", "CCL"), (ALL, "CCL")]),
    "Table 5a: IR": dict(
        IR, claim="Image retrieval relies on cross-modal and visual contrast.",
        rows={"none": "hashing", **then(LOSSES, "hashing")}, reference="CCL",
        better=[("CCL", "none"), ("CCL + VCL", "CCL"), (ALL, "CCL")]),
    "Table 5a: TM": dict(
        TM, claim="Text matching relies on cross-modal and textual contrast.",
        rows=then(LOSSES), reference="CCL", better=[("CCL + TCL", "CCL"), (ALL, "CCL")]),
    "Table 5b": dict(
        ITM, claim="A transformer that both modalities share aligns them, best after a TAV-TE.",
        rows=then(SHARING, "retrieval", again=True), reference="baseline",
        better=[("WS-TE, shared", "baseline"), ("WS-TE, shared", "WS-TE, not shared"),
                ("WS-TE, shared", "FC, shared"), (BEST, "WS-TE, shared"),
                (BEST, "WS-TE, not shared, TAV-TE")]),
    "Table 5c: pre-trained": dict(
        ITM, claim="With pre-training two shared layers are best (none: without the TAV-TE, as "
                   "5b's baseline).",
        rows=then(DEPTHS, "retrieval", again=True), reference="2",
        better=[("2", "0"), ("2", "1"), ("2", "4"), ("2", "8")]),
    "Table 5c: without": dict(
        ITM, claim="Without pre-training one shared layer is best.",
        rows={name: f"retrieval {flags}".strip() for name, flags in
              {**DEPTHS, "2": "--ws_layers 2"}.items()},
        reference="1", better=[("1", "0"), ("1", "2"), ("1", "4"), ("1", "8")]),
    "Table 5d: ITM": dict(
        claim="More pairs help image-text matching.", evaluation="retrieval",
        rows=then(CORPORA, "retrieval"), better=[("CC+SBU", "CC"), ("CC", "Flickr30K")],
        columns=("rsum, folds",), base=ITM["base"]),
    "Table 5d: IR": dict(
        claim="More pairs help image retrieval little.", evaluation="hashing",
        rows=then(CORPORA, "hashing"), columns=("map",), base=IR["base"]),
    "Table 5d: TM": dict(
        claim="More pairs help text matching little.", evaluation="sts",
        rows=then(CORPORA), columns=("P+S / 2",), base=TM["base"]),
    "Table 5e: ITM": dict(
        claim="The stronger the backbone, the stronger is matching; pre-training helps each.",
        rows=backbones("retrieval"), evaluation="retrieval", columns=("rsum, folds",),
        better=[("ResNet101", "ResNet50"), ("ResNeXt101", "ResNet101"),
                ("ResNet50", "ResNet50, w/o"), ("ResNet101", "ResNet101, w/o"),
                ("ResNeXt101", "ResNeXt101, w/o")],
        base=dict(pretrain=FILES, retrieval=COCO, eval=COCO)),
    "Table 5e: IR": dict(
        claim="The same of image retrieval.", rows=backbones("hashing"), evaluation="hashing",
        columns=("map",),
        better=[("ResNet101", "ResNet50"), ("ResNeXt101", "ResNet101"),
                ("ResNet50", "ResNet50, w/o"), ("ResNet101", "ResNet101, w/o"),
                ("ResNeXt101", "ResNeXt101, w/o")],
        base=dict(pretrain=FILES, hashing="--bits 64 " + LISTS, eval=LISTS)),
    "Table 5e: TM": dict(
        claim="Text matching gains nothing from better pictures.", rows=backbones(),
        evaluation="sts", columns=("P+S / 2",),
        base=dict(pretrain=FILES, eval="--data stsbenchmark")),
    "Figure 3": dict(
        claim="With the WS-TE, pictures and sentences attend to the same things.",
        rows={"without": "pretrain --ws_layers 0 --tav_layers 0", "with": "pretrain"},
        evaluation="attention",
        base=dict(pretrain=FILES, start=X101, eval="--image a.jpg --text 'a man'")),
    "Figure 4": dict(
        claim="Two encoders take a small part of the time of a model that reads every pair.",
        rows={"COOKIE": "pretrain"}, evaluation="speed",
        base=dict(pretrain=FILES, start=X101, eval=COCO + " --beside RUN --sizes 500,1000")),
}

TASKS = ("pretrain", "retrieval", "vtm", "hashing")
EVALS = {"ccl": ("retrieval",), "pretrain": ("retrieval",), "retrieval": ("retrieval",),
         "vtm": ("vtm",), "hashing": ("hashing",)}
INITS = ("vision", "text")
VIEWS = {
    "ccl": dict(source="pairs", image="resize", norm="imagenet", text="caption"),       # stage 1
    "pretrain": dict(source="pairs", image="resize", view1="simclr", view2="simclr",
                     norm="imagenet", text="caption"),
    "retrieval": dict(source="pairs", image="flip", norm="imagenet", text="caption"),
    "vtm": dict(source="clips", frames="frames", text="caption"),
    "hashing": dict(source="hashing", image="flip", image_eval="center", norm="imagenet",
                    labels="labels"),
}
BACKBONE = ("vision.", "text.", "tav.", "ws.", "ws_text.")  # `--init` must fill all these keys


def setup(cfg, task, stats):
    if task == "vtm":
        cfg.frame_width = stats["frame_width"]


# Copied from tools/__init__.py::check_fields
def check_fields(settings):
    """SystemExit, one line, for a field of a dataclass whose value its type does not allow."""
    for field in fields(settings):
        value, kind = getattr(settings, field.name), field.type
        several = get_origin(kind) is tuple
        if several:
            kind = get_args(kind)[0]

        # what the type says: one of some words, a number in a range, or no more than the type
        told, legal = f"not a {getattr(kind, '__name__', kind)}", lambda _: True
        if get_origin(kind) is Literal:
            words = get_args(kind)
            told, legal = f"not one of {', '.join(filter(None, words))}", words.count
        elif get_origin(kind) is Annotated:
            kind, told, legal = get_args(kind)

        # a whole number may stand for a float; JSON makes a list of a tuple
        types = {float: (int, float), int: int, str: str, bool: bool}.get(kind, object)
        alike = isinstance(value, (tuple, list)) == several
        for one in value if several and alike else [value]:
            if not alike or not isinstance(one, types) or not legal(one):
                raise SystemExit(f"--{field.name} {one}: {told}")


# --------------------------------------------------------------------------------------------------
# The image encoder. Names as in torchvision, whose weights it takes.

NETS = {  # name: block, blocks per stage, their planes, groups, width per group
    "resnet50": (Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512), 1, 64),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), (64, 128, 256, 512), 32, 8),
    "tiny": (BasicBlock, (1, 1, 1), (32, 64, 128), 1, 64),
}


class ResNet(nn.Module):
    """torchvision's ResNet up to its pooling: (B, 3, H, W) -> (B, D_V, H/stride, W/stride)."""

    def __init__(self, name):
        super().__init__()
        block, depths, planes, groups, group_width = NETS[name]

        # stem: a quarter of the resolution
        channels = planes[0]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

        # layer1, layer2, ...: each but the first halves the resolution
        self.stages = [f"layer{n}" for n in range(1, 1 + len(depths))]
        for name, depth, plane in zip(self.stages, depths, planes):
            stride = 1 if name == "layer1" else 2
            shape = dict(groups=groups, base_width=group_width)
            self.add_module(name, make_stage(block, channels, plane, depth, stride, **shape))
            channels = plane * block.expansion

        # what comes out: D_V channels, one patch for `stride` pixels a side
        self.width = channels
        self.stride = 2 ** (1 + len(depths))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

        # a pixel's channels side by side: the layout that convolutions are fastest in
        self.to(memory_format=torch.channels_last)

    def forward(self, image):
        x = self.maxpool(self.relu(self.bn1(self.conv1(image))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return x


def make_stage(block, channels, plane, depth, stride, **shape):
    """`depth` blocks of a ResNet, of which the first changes resolution and channels."""
    out = plane * block.expansion
    shortcut = None
    if stride > 1 or channels != out:
        shortcut = nn.Sequential(conv1x1(channels, out, stride), nn.BatchNorm2d(out))

    blocks = [block(channels, plane, stride, shortcut, **shape)]
    for _ in range(depth - 1):
        blocks.append(block(out, plane, **shape))
    return nn.Sequential(*blocks)


def resize_grid(pos, height, width):
    """Position embeddings (1, h*h, D), interpolated bicubically to height x width patches."""
    if pos.shape[1] == height * width:
        return pos
    side = math.isqrt(pos.shape[1])
    grid = pos.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)           # (1, D, h, h)
    grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
    return grid.flatten(2).mT.to(pos.dtype)                                     # (1, H*W, D)


# --------------------------------------------------------------------------------------------------
# Blocks and transformers: BERT, TAV-TE and WS-TE are built of one layer

# Copied from models/codis.py::activation
def activation(name):
    return {"gelu": nn.GELU, "relu": nn.ReLU}[name]()


# Copied from models/mct.py::Attention
class Attention(nn.Module):
    """Multi-head self-attention of tokens x (B, S, D)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)                      # one product for all three
        self.out = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """mask: bool, True = may look, broadcast to (B, heads, S, S) -> (B, S, D)."""
        query, key, value = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out(x.transpose(1, 2).flatten(2))

    def split(self, x):
        # (B, S, D) -> (B, heads, S, D/heads)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


# Copied from models/mct.py::Block
class Block(nn.Module):
    """BERT's layer: self-attention, then feed-forward; the sum behind each is normalised."""

    def __init__(self, width, heads, mlp_ratio=4, act="gelu", dropout=0.0):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, 1e-12)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), activation(act),
                                 nn.Linear(mlp_ratio * width, width))
        self.mlp_norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x, mask=None):
        x = self.attention_norm(x + self.drop(self.attention(x, mask)))
        return self.mlp_norm(x + self.drop(self.mlp(x)))


class FeedForward(nn.Module):
    """Block without its attention (Table 5b's FC layers): each token on its own."""

    def __init__(self, width, mlp_ratio=4, act="gelu", dropout=0.0):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), activation(act),
                                 nn.Linear(mlp_ratio * width, width))
        self.mlp_norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x, mask=None):
        return self.mlp_norm(x + self.drop(self.mlp(x)))


# Copied from models/codis.py::run_block
def run_block(block, *inputs, save_memory):
    """block(*inputs); with `save_memory`, backward computes it again instead of keeping it."""
    if save_memory and block.training:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class Encoder(nn.Module):
    """TAV-TE or WS-TE: (B, S, D), mask (B, S) or None -> (B, S, D). No layers: the identity."""

    def __init__(self, cfg, layers, attend=True):
        super().__init__()
        width, ratio, dropout = cfg.embed_dim, cfg.te_ratio, cfg.dropout
        self.checkpointing = cfg.checkpointing
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            if attend:
                self.blocks.append(Block(width, cfg.te_heads, ratio, "relu", dropout))
            else:
                self.blocks.append(FeedForward(width, ratio, "relu", dropout))

    def forward(self, x, mask=None):
        if mask is not None:
            mask = mask[:, None, None].bool()                           # (B, 1, 1, S)
        for block in self.blocks:
            x = run_block(block, x, mask, save_memory=self.checkpointing)
        return x


# Copied from models/codis.py::Embeddings
class Embeddings(nn.Module):
    """BERT's input: ids (B, T) -> (B, T, D), word + position + segment embedding, normalised."""

    def __init__(self, cfg):
        super().__init__()
        self.words = nn.Embedding(cfg.vocab_size, cfg.width, padding_idx=cfg.pad_id)
        self.positions = nn.Embedding(cfg.positions, cfg.width)
        self.segments = nn.Embedding(2, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, 1e-12)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, text):
        x = self.words(text) + self.positions.weight[:text.shape[1]] + self.segments.weight[0]
        return self.drop(self.norm(x))


class Bert(nn.Module):
    """BERT without pooler: ids and mask (B, T) -> (B, T, D_T) of the last layer."""

    def __init__(self, cfg):
        super().__init__()
        self.checkpointing = cfg.checkpointing
        self.embeddings = Embeddings(cfg)
        self.blocks = nn.ModuleList()
        for _ in range(cfg.text_layers):
            self.blocks.append(Block(cfg.width, cfg.heads, cfg.mlp_ratio, cfg.act, cfg.dropout))

    def forward(self, text, text_mask):
        x = self.embeddings(text)
        mask = text_mask[:, None, None].bool()                          # (B, 1, 1, T)
        for block in self.blocks:
            x = run_block(block, x, mask, save_memory=self.checkpointing)
        return x


class GPO(nn.Module):
    """Generalized pooling operator (VSE-infinity): a learnt weight for the largest, the second
    largest, ... value of each dimension.

    The weights of a set of l tokens depend on l alone: sinusoid positions (l, 32) -> BiGRU, mean
    of both directions -> one score a position -> softmax(score / 0.1). Run forward, a short set is
    the beginning of the longest one. Run backward, each set starts at its own end, so its positions
    are reversed first. This needs no packed sequences, and no length is copied to the CPU.
    """

    def __init__(self, width=32, temp=0.1):
        super().__init__()
        self.width, self.temp = width, temp
        self.ahead = nn.GRU(width, width, batch_first=True)
        self.back = nn.GRU(width, width, batch_first=True)
        self.score = nn.Linear(width, 1, bias=False)

    def positions(self, length):
        """(length, width): sin and cos, interleaved, of p / 10000^(2i / width)."""
        like = self.score.weight
        p = torch.arange(length, device=like.device, dtype=like.dtype)
        i2 = torch.arange(0, self.width, 2, device=like.device, dtype=like.dtype)
        angle = p[:, None] * torch.exp(i2 * (-math.log(10000.0) / self.width))
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    def weights(self, mask):
        """mask: bool (B, S), tokens first -> (B, S): sum to 1 over a row's tokens, 0 behind."""
        pe = self.positions(mask.shape[1])                              # (S, 32)
        ahead = self.ahead(pe[None])[0]                                 # (1, S, 32)

        # backward: from each set's last position to its first, then in the old order again
        position = torch.arange(mask.shape[1], device=mask.device)
        order = (mask.sum(1, keepdim=True) - 1 - position).clamp(min=0)  # (B, S): l-1, ..., 0, 0
        back = self.back(pe[order])[0]                                  # (B, S, 32)
        back = back.gather(1, order[..., None].expand_as(back))

        score = self.score((ahead + back) / 2).squeeze(-1)              # (B, S)
        return (score / self.temp).masked_fill(~mask, -torch.inf).softmax(-1)

    def forward(self, x, mask=None):
        """x: (B, S, D); mask: (B, S), 1 = token, or None where all are -> (B, D)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.score.weight.dtype)

            # sets without padding share one row of weights
            if mask is None:
                weights = self.weights(x.new_ones(1, x.shape[1], dtype=torch.bool))
                return (x.sort(1, descending=True)[0] * weights[..., None]).sum(1)

            # values of each dimension from large to small, padding last
            mask = mask.bool()
            x = x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min)
            x = x.sort(1, descending=True)[0]

            # the first l of a row are real
            position = torch.arange(x.shape[1], device=x.device)
            valid = position < mask.sum(1, keepdim=True)                # (B, S)
            x = x.masked_fill(~valid[..., None], 0.0)
            return (x * self.weights(valid)[..., None]).sum(1)


# --------------------------------------------------------------------------------------------------
# Processes and memory

# Copied from models/codis.py::world
def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# Copied from models/codis.py::rank
def rank():
    return dist.get_rank() if world() > 1 else 0


# Copied from models/codis.py::gather
@torch.no_grad()
def gather(x):
    """(B, ...) of every process -> (N, ...), in the order of ranks, without gradient.

    All processes must have the same B.
    """
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


class GatherGrad(torch.autograd.Function):
    """gather() with gradient: a process's rows receive the sum of all processes' gradients.

    With a loss that is the mean over a process's own B rows, and DDP's mean over processes, the
    gradient is then that of the mean over all N rows, as one process would compute it.
    """

    @staticmethod
    def forward(ctx, x):
        return gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        b = len(grad) // world()
        return grad[rank() * b:rank() * b + b]


def gather_grad(x):
    return x if world() == 1 else GatherGrad.apply(x)


@contextlib.contextmanager
def frozen_statistics(norms):
    """In this context batch norm works as in training, but leaves its running statistics alone.

    Done by momentum 0: with track_running_stats=False a layer saves other tensors for backward than
    in its first run, which checkpoint() refuses.
    """
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None

    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked = count


def in_chunks(fn, chunk, norms, *inputs):
    """fn(*inputs), `chunk` rows at a time, to save memory: backward runs each chunk again.

    inputs, output: (B, ...); fn must treat each row alone, except in batch norm. norms: fn's batch
    norm layers, whose running statistics must see each chunk only once.
    """
    if not chunk or chunk >= len(inputs[0]) or not torch.is_grad_enabled():
        return fn(*inputs)

    def contexts():
        return contextlib.nullcontext(), frozen_statistics(norms)       # forward, its second run

    outputs = []
    for part in zip(*(x.split(chunk) for x in inputs)):
        outputs.append(checkpoint(fn, *part, use_reentrant=False, context_fn=contexts))
    return torch.cat(outputs)


# --------------------------------------------------------------------------------------------------
# The paper's equations

def patch_features(v, weight, bias, pos):
    """Eq. (1): v^_i = v_i W_V + b_V + p_i.

    v: (B, n, D_V); weight: (D, D_V); bias: (D,); pos: (1, n, D) -> (B, n, D).
    """
    return F.linear(v, weight, bias) + pos


def word_features(t, weight, bias, s):
    """Eq. (2): f_i = t_i W_T + b_T + s_T.

    t: (B, T, D_T); weight: (D, D_T); bias, s: (D,) -> (B, T, D).
    """
    return F.linear(t, weight, bias) + s


def visual_features(v_hat, te_tav, s):
    """Eq. (3): F_V = TE_TAV(v^) + s_V.

    v_hat: (B, n, D); te_tav: (B, n, D) -> (B, n, D); s: (D,) -> (B, n, D).
    """
    return te_tav(v_hat) + s


def full(x):
    """At least float32: autocast's halves become float32, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pool(x, mask=None, gpo=None):
    """Eq. (4): I or T = Pooling(TE_WS(F)), brought to unit norm.

    x: (B, S, D); mask: (B, S), 1 = token, or None where all are; gpo: a GPO, or None for the mean
    -> (B, D) float32.
    """
    x = full(x)
    if gpo is not None:
        x = gpo(x, mask)
    elif mask is None:
        x = x.mean(1)
    else:
        mask = mask.to(x.dtype)[..., None]                              # (B, S, 1)
        x = (x * mask).sum(1) / mask.sum(1)
    return F.normalize(x, dim=-1)


class Pairs(NamedTuple):
    """How this process's B rows relate to the N keys of all processes."""
    own: torch.Tensor       # (B,): the column of each row's own key, its positive
    same: torch.Tensor      # bool (B, N): keys of the row's image, its own key included


def find_pairs(ids, key_ids, own):
    """Image ids of rows (B,) and keys (N,), columns (B,) of the rows' own keys -> Pairs."""
    return Pairs(own, ids[:, None] == key_ids)


def similarity(q, k):
    """q . k' in float32 (float64 stays), also under autocast. (B, d), (N, d) -> (B, N)."""
    with torch.autocast(q.device.type, enabled=False):
        return full(q) @ full(k).T


def info_nce(q, k, pairs, temp):
    """Eq. (5), the mean over rows i:
    -log [ exp(q_i.k_i+ / tau) / (exp(q_i.k_i+ / tau) + sum_j exp(q_i.k_j- / tau)) ].

    q: (B, d), k: (N, d), unit norm; k_i+ is the row's own key, k_j- are keys of other images
    -> 0-d. A row without negatives has loss 0.
    """
    logits = similarity(q, k) / temp                                    # (B, N)

    # other captions of the row's image are neither positive nor negative
    ignored = pairs.same.scatter(1, pairs.own[:, None], False)
    logits = logits.masked_fill(ignored, -torch.inf)

    return F.cross_entropy(logits, pairs.own)


def cross_modal(image, text, all_image, all_text, pairs, temp):
    """Eq. (6), (7): L_i2t = L_InfoNCE(I, T), L_t2i = L_InfoNCE(T, I).

    image, text: (B, d) of this process; all_image, all_text: (N, d) of all -> two 0-d.
    """
    i2t = info_nce(image, all_text, pairs, temp)
    t2i = info_nce(text, all_image, pairs, temp)
    return i2t, t2i


def visual_contrast(view1, all_view2, pairs, temp):
    """Eq. (9): L_i = L_InfoNCE(I_1, I_2), this one direction. (B, d), (N, d) -> 0-d."""
    return info_nce(view1, all_view2, pairs, temp)


def textual_contrast(view1, all_view2, pairs, temp):
    """Eq. (11): L_t = L_InfoNCE(T_1, T_2), this one direction. (B, d), (N, d) -> 0-d."""
    return info_nce(view1, all_view2, pairs, temp)


def maskable(text, text_mask, cfg):
    """Which tokens are words: no padding, neither [CLS] nor [SEP]. (B, T) both -> bool (B, T)."""
    return text_mask.bool() & (text != cfg.cls_id) & (text != cfg.sep_id)


@torch.no_grad()
def augment_tokens(text, text_mask, cfg, continues=None):
    """Eq. (10), aug_t: each word is changed with probability `tcl_prob`.

    Of the changed ones a share `tcl_mask` is masked, `tcl_substitute` substituted by random tokens,
    the rest deleted: all tokens of a word alike. What remains moves to the front. A row keeps at
    least one of its words.

    text, text_mask: (B, T) int64; continues: bool (vocab_size,), the ids that continue the word
    before them, or None where each token is a word -> ids and mask of the view, (B, T) both.
    """
    words = maskable(text, text_mask, cfg)

    # where the word of each token begins, (B, T)
    position = torch.arange(text.shape[1], device=text.device)
    start = position.expand_as(text)
    if continues is not None:
        start = start.masked_fill(continues[text], 0).cummax(1).values

    # draw which words change, and how: the numbers of a word are those of its first token
    noise = torch.rand(text.shape, device=text.device).gather(1, start)
    dice = torch.rand(text.shape, device=text.device).gather(1, start)
    changed = words & (noise < cfg.tcl_prob)
    masked = changed & (dice < cfg.tcl_mask)
    deleted = changed & (dice >= cfg.tcl_mask + cfg.tcl_substitute)
    substituted = changed & ~masked & ~deleted

    # a row that would lose every word keeps the one with the largest noise
    bare = words.any(1, keepdim=True) & ~(words & ~deleted).any(1, keepdim=True)        # (B, 1)
    last = noise.masked_fill(~words, -1.0).argmax(1, keepdim=True)                      # (B, 1)
    deleted = deleted & ~(bare & (start == start.gather(1, last)))

    # mask and substitute
    random = torch.randint(cfg.first_word, cfg.vocab_size, text.shape, device=text.device)
    text = torch.where(substituted, random, text)
    text = text.masked_fill(masked, cfg.mask_id)

    # delete: what stays comes first, in its old order, then padding
    keep = text_mask.bool() & ~deleted
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    keep = keep.gather(1, order)
    text = text.gather(1, order).masked_fill(~keep, cfg.pad_id)
    return text, keep.to(text_mask.dtype)


# --------------------------------------------------------------------------------------------------
# Fine-tuning's losses: VSE++ and CSQ

def hinge_triplet(q, k, pairs, margin, hard):
    """VSE++'s hinge, one direction: [margin - q.k+ + q.k-]_+, the mean over rows.

    q: (B, d); k: (N, d); hard: 0-d in [0, 1], 1 = of the hardest negative, 0 = the mean over
    negatives -> 0-d. Where all vectors are equal each direction is exactly `margin`, so a
    collapsed model shows 2 margin in all.
    """
    sim = similarity(q, k)                                              # (B, N)
    positive = sim.gather(1, pairs.own[:, None])                        # (B, 1)
    negative = ~pairs.same
    cost = (margin - positive + sim).clamp(min=0) * negative

    hardest = cost.amax(1)
    mean = cost.sum(1) / negative.sum(1).clamp(min=1)
    return (hard * hardest + (1 - hard) * mean).mean()


def hash_centers(labels, bits, seed=0):
    """CSQ's hash centers (labels, bits), +1 or -1, far apart, and a vector (bits,) for ties.

    Where bits is a power of two and labels <= 2 bits: rows of [H; -H], H the Hadamard matrix, any
    two bits/2 or bits apart. Otherwise balanced random rows, see random_centers().
    """
    g = torch.Generator().manual_seed(seed)
    tie = torch.randint(0, 2, (bits,), generator=g) * 2.0 - 1

    power_of_two = bits & (bits - 1) == 0
    if not power_of_two or labels > 2 * bits:
        return random_centers(labels, bits, g), tie

    # Sylvester's construction: H -> [H H; H -H]
    h = torch.ones(1, 1)
    while len(h) < bits:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return torch.cat([h, -h])[:labels], tie


def random_centers(labels, bits, generator):
    """Rows of as many +1 as -1, each at least d bits from all before it -> (labels, bits).

    d begins at bits/2 and falls by 2 whenever 2,000 draws find no such row.
    """
    rows, distance = torch.empty(0, bits), bits // 2
    while len(rows) < labels:
        # 2,000 rows in which a random half of the bits is +1
        order = torch.rand(2000, bits, generator=generator).argsort(1)
        drawn = (order < bits // 2) * 2.0 - 1

        # Hamming distances to the rows there are: (bits - product) / 2
        far = ((bits - drawn @ rows.T) / 2 >= distance).all(1)
        if far.any():
            rows = torch.cat([rows, drawn[far][:1]])
        else:
            distance -= 2
    return rows


def target_centers(labels, centers, tie):
    """The center of each image: sign of the sum of its labels' centers, ties by `tie`.

    labels: (B, C) 0 or 1; centers: (C, K); tie: (K,) -> (B, K).
    """
    total = labels @ centers
    return torch.where(total == 0, tie, total.sign())


def csq_losses(a, target, weight):
    """CSQ: L_C = BCE((y + 1) / 2, (c + 1) / 2), L_Q = (|y| - 1)^2, y = tanh(a), means over bits.

    a: (B, K) before tanh; target: c, (B, K) of +1 and -1; weight: (B,), 1, or 0 for an image
    without labels -> L_C, L_Q, 0-d. (y + 1) / 2 is sigmoid(2 a), so the logarithms are safe.
    """
    a = full(a)
    target = (target.to(a.dtype) + 1) / 2
    central = F.binary_cross_entropy_with_logits(2 * a, target, reduction="none").mean(1)     # (B,)
    quantization = (a.tanh().abs() - 1).square().mean(1)                                      # (B,)

    # mean over the images that have labels
    share = weight.to(a.dtype) / weight.sum().clamp(min=1)
    return (share * central).sum(), (share * quantization).sum()


# --------------------------------------------------------------------------------------------------
# The model

class Cookie(nn.Module):
    """All tasks of the paper.

    A batch is a dict: image (B, 3, H, W), text and text_mask (B, T), image_id (B,), and view1,
    view2 (B, 3, H, W), frames (B, F, frame_width) and frames_mask (B, F), or labels (B, C).

    Tasks: "ccl" (stage 1), "pretrain" (stage 2) and "retrieval" are the whole model, "vtm" (clips)
    is BERT beside frame features, "hashing" the CNN alone.
    """

    def __init__(self, cfg, task="pretrain", num_labels=0):
        super().__init__()
        cfg.check(task)
        self.cfg, self.task = cfg, task

        # the towers; what this task offers to evaluation
        joint = cfg.embed == "joint" and task != "hashing"
        if task == "hashing" or (joint and task != "vtm"):
            self.vision = ResNet(cfg.backbone)
        if task == "hashing":
            self.offers = {"hash_codes"}
        else:
            self.text = Bert(cfg)
            self.offers = {"encode_text", "sentence_vector"}

        # the joint space
        self.gpo_image = self.gpo_text = None
        if joint and task == "vtm":
            self.build_joint(cfg.frame_width, with_transformers=cfg.vtm_te)
            self.offers |= {"encode_clip"}
        elif joint:
            self.build_joint(self.vision.width)
            patches = (cfg.image_size // self.vision.stride) ** 2
            self.image_pos = nn.Parameter(torch.zeros(1, patches, cfg.embed_dim))
            self.offers |= {"encode_image", "token_scores"}
        self.init_weights()

        # what single tasks add
        if task == "hashing":
            self.build_hashing(num_labels)
        if task == "pretrain":
            self.register_buffer("continues", torch.zeros(cfg.vocab_size, dtype=torch.bool))
        if task == "retrieval":
            self.register_buffer("hard", torch.tensor(float(cfg.warmup_epochs == 0)))
        self.norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d)]

    def build_joint(self, image_width, with_transformers=True):
        """FC layers, TAV-TE, WS-TE and pooling."""
        cfg = self.cfg
        self.text_fc = nn.Linear(cfg.width, cfg.embed_dim)
        self.image_fc = nn.Linear(image_width, cfg.embed_dim)

        if with_transformers:
            self.s_image = nn.Parameter(torch.zeros(cfg.embed_dim))
            self.s_text = nn.Parameter(torch.zeros(cfg.embed_dim))
            self.tav = Encoder(cfg, cfg.tav_layers)
            self.ws = Encoder(cfg, cfg.ws_layers, attend=cfg.ws == "te")
            if not cfg.ws_shared:
                self.ws_text = Encoder(cfg, cfg.ws_layers, attend=cfg.ws == "te")

        if cfg.pooling == "gpo":
            self.gpo_image = GPO()
            self.gpo_text = GPO()

    def build_hashing(self, num_labels):
        """CSQ's hash head, which keeps PyTorch's initial weights, and its centers."""
        width, dropout, bits = self.vision.width, self.cfg.hash_dropout, self.cfg.bits
        self.hash_layer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout),
                                        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, bits))
        with torch.device("cpu"):               # the same draws wherever the model is built
            centers, tie = hash_centers(num_labels, bits)
        self.register_buffer("centers", centers)
        self.register_buffer("tie", tie)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name in ("image_pos", "s_image", "s_text"):
            if hasattr(self, name):
                nn.init.trunc_normal_(getattr(self, name), std=0.02)

    def adapt(self, state):
        """Another run's weights as far as this task takes them, positions on this one's grid."""
        # the other run's vocabulary and how far its hinge had come are not this run's
        state = {name: t for name, t in state.items() if name not in ("continues", "hard")}
        if "image_pos" not in state:
            return state

        # clips: from a run on pictures take BERT, with vtm_te all but the FC of CNN features
        if self.task == "vtm" and self.cfg.vtm_te:
            return {name: t for name, t in state.items() if not name.startswith("image_fc.")}
        if self.task == "vtm":
            return {name: t for name, t in state.items() if name.startswith("text.")}

        if not hasattr(self, "image_pos"):
            return state
        side = math.isqrt(self.image_pos.shape[1])
        return {**state, "image_pos": resize_grid(state["image_pos"], side, side)}

    # -- encoders

    def image_tokens(self, image):
        """Eq. (1), (3) and TE_WS of Eq. (4): (B, 3, H, W) -> (B, n, D)."""
        grid = self.vision(image)                                               # (B, D_V, h, w)
        v = grid.flatten(2).mT                                                  # (B, n, D_V)
        pos = resize_grid(self.image_pos, *grid.shape[2:])
        v_hat = patch_features(v, self.image_fc.weight, self.image_fc.bias, pos)
        return self.ws(visual_features(v_hat, self.tav, self.s_image))

    def frame_tokens(self, frames, mask):
        """The frames of clips (section 4.2): (B, F, frame_width), (B, F) -> (B, F, D)."""
        x = self.image_fc(frames)
        if not self.cfg.vtm_te:
            return x
        return self.ws(self.tav(x, mask) + self.s_image, mask)

    def text_tokens(self, text, text_mask):
        """Eq. (2) and TE_WS of Eq. (4): (B, T), (B, T) -> (B, T, D)."""
        t = self.text(text, text_mask)                                          # (B, T, D_T)
        if self.cfg.embed == "bert":
            return t
        if not hasattr(self, "ws"):                                             # clips
            return self.text_fc(t)
        x = word_features(t, self.text_fc.weight, self.text_fc.bias, self.s_text)
        ws = self.ws if self.cfg.ws_shared else self.ws_text
        return ws(x, text_mask)

    def embed_image(self, image):
        return pool(self.image_tokens(image), gpo=self.gpo_image)

    def embed_frames(self, frames, mask):
        return pool(self.frame_tokens(frames, mask), mask, self.gpo_image)

    def embed_text(self, text, text_mask):
        return pool(self.text_tokens(text, text_mask), text_mask, self.gpo_text)

    def encode(self, embed, *inputs):
        """embed(*inputs), with `chunk` in parts."""
        return in_chunks(embed, self.cfg.chunk, self.norms, *inputs)

    # -- pre-training

    def prepare(self, samples):
        """Before the first step: which ids continue a word, by the vocabulary ("##ing").

        samples: data.py's Views. Without this call each token is a word of its own.
        """
        if self.task == "pretrain":
            pieces = [word.startswith("##") for word in samples.tokenizer.words]
            self.continues.copy_(torch.tensor(pieces))

    def forward(self, batch):
        if self.cfg.embed == "bert" and self.task != "hashing":
            raise SystemExit("--embed bert has nothing to train: --steps 0")
        return getattr(self, "loss_" + self.task)(batch)

    def total(self, losses):
        logs = {name: loss.detach() for name, loss in losses.items()}
        return {"loss": sum(losses.values()), "logs": logs}

    def everyone(self, ids, **keys):
        """Keys (B, D) of this process -> {name: keys (N, D) of all processes}, and their Pairs.

        Gradients flow back to the process that a key came from. One exchange serves all keys; None
        is left out.
        """
        if len(ids) * world() == 1:
            raise SystemExit(f"{self.task}: a batch of 1 has no negatives, so nothing to learn "
                             "from: raise --batch_size or lower --accum")
        keys = {name: key for name, key in keys.items() if key is not None}
        gathered = gather_grad(torch.stack(list(keys.values()), dim=1))         # (N, keys, D)
        all_keys = dict(zip(keys, gathered.unbind(1)))

        # this process's rows stand behind those of lower rank
        own = rank() * len(ids) + torch.arange(len(ids), device=ids.device)
        return all_keys, find_pairs(ids, gather(ids), own)

    def loss_ccl(self, batch):
        """Stage 1: L_i2t + L_t2i, Eq. (6), (7)."""
        image = self.encode(self.embed_image, batch["image"])
        text = self.encode(self.embed_text, batch["text"], batch["text_mask"])
        return self.total(self.contrast(image, text, batch["image_id"]))

    def contrast(self, image, text, ids):
        """Cross-modal contrast of images (or clips) and texts, (B, D) both -> {name: 0-d}."""
        keys, pairs = self.everyone(ids, image=image, text=text)
        i2t, t2i = cross_modal(image, text, keys["image"], keys["text"], pairs, self.cfg.temp)
        return {"i2t": i2t, "t2i": t2i}

    def loss_pretrain(self, batch):
        """Stage 2, Eq. (12): L = L_i2t + L_t2i + L_i + L_t."""
        cfg, temp = self.cfg, self.cfg.temp

        # I, I_1, I_2 and T, T_1, T_2, (B, D) each
        image, image_1, image_2 = self.image_views(batch)
        text, text_1, text_2 = self.text_views(batch)
        if cfg.ccl_on == "view1":
            image, text = image_1, text_1

        # what this process's rows are compared with: the keys of all processes
        keys, pairs = self.everyone(batch["image_id"], image=image, text=text, image_2=image_2,
                                    text_2=text_2)

        # CCL: image and text, both ways
        i2t, t2i = cross_modal(image, text, keys["image"], keys["text"], pairs, temp)
        losses = {"i2t": i2t, "t2i": t2i}

        # VCL and TCL: view 1 finds its view 2
        if cfg.vcl:
            losses["i"] = visual_contrast(image_1, keys["image_2"], pairs, temp)
        if cfg.tcl:
            losses["t"] = textual_contrast(text_1, keys["text_2"], pairs, temp)
        return self.total(losses)

    def image_views(self, batch):
        """Eq. (8): the embeddings (B, D) of the picture and of its two views, in one call of the
        encoder -> list of three; None is what no loss uses."""
        names = self.view_names(self.cfg.vcl)
        images = [batch["image"] if name == "raw" else batch[name] for name in names]
        emb = self.encode(self.embed_image, torch.cat(images))                  # (views B, D)
        emb = dict(zip(names, emb.chunk(len(names))))
        return [emb.get(name) for name in ("raw", "view1", "view2")]

    def text_views(self, batch):
        """Eq. (10): the same of the sentence; each view is drawn anew."""
        names = self.view_names(self.cfg.tcl)
        texts, masks = [], []
        for name in names:
            text, mask = batch["text"], batch["text_mask"]
            if name != "raw":
                text, mask = self.text_view(batch)
            texts.append(text)
            masks.append(mask)

        emb = self.encode(self.embed_text, torch.cat(texts), torch.cat(masks))  # (views B, D)
        emb = dict(zip(names, emb.chunk(len(names))))
        return [emb.get(name) for name in ("raw", "view1", "view2")]

    def view_names(self, views):
        """Which inputs of a modality are encoded: those that CCL uses and, with `views`, both."""
        names = ["view1", "view2"] if views else []
        return names if self.cfg.ccl_on in names else [self.cfg.ccl_on, *names]

    def text_view(self, batch):
        return augment_tokens(batch["text"], batch["text_mask"], self.cfg, self.continues)

    def param_groups(self, loop):
        """CNN and BERT at their share of the learning rate; weight decay on matrices only."""
        vision_lr = self.cfg.vision_lr
        if vision_lr == 0:
            vision_lr = 0.1 if self.cfg.backbone.startswith("resnext") else 1.0     # section 4.1
        shares = {"vision": vision_lr, "text": self.cfg.text_lr}

        groups = {}
        for name, p in self.named_parameters():
            lr = loop.lr * shares.get(name.split(".")[0], 1.0)
            decay = loop.weight_decay if p.ndim >= 2 else 0.0
            groups.setdefault((lr, decay), []).append(p)
        return [{"params": params, "lr": lr, "weight_decay": decay}
                for (lr, decay), params in groups.items()]

    # -- fine-tuning

    def loss_retrieval(self, batch):
        """The hinge of VSE++ both ways (section 4.2)."""
        image = self.encode(self.embed_image, batch["image"])
        text = self.encode(self.embed_text, batch["text"], batch["text_mask"])
        keys, pairs = self.everyone(batch["image_id"], image=image, text=text)

        margin = self.cfg.margin
        i2t = hinge_triplet(image, keys["text"], pairs, margin, self.hard)
        t2i = hinge_triplet(text, keys["image"], pairs, margin, self.hard)
        return self.total({"i2t": i2t, "t2i": t2i})

    def after_step(self, step, total_steps, epoch_steps=None):
        """The hinge turns from the mean to the hardest negative when its warm-up ends."""
        if self.task == "retrieval":
            warmup = self.cfg.warmup_epochs * (epoch_steps or total_steps)
            self.hard.fill_(float(step >= warmup))

    def loss_vtm(self, batch):
        """InfoNCE between clips and sentences (section 4.2)."""
        clip = self.encode(self.embed_frames, batch["frames"], batch["frames_mask"])
        text = self.encode(self.embed_text, batch["text"], batch["text_mask"])
        return self.total(self.contrast(clip, text, batch["image_id"]))

    def loss_hashing(self, batch):
        """CSQ on the CNN alone (section 4.2): L = L_C + quantization L_Q."""
        labels = batch["labels"]                                                # (B, C)
        logits = self.encode(self.hash_logits, batch["image"])                  # (B, K)
        target = target_centers(labels, self.centers, self.tie)
        central, quantization = csq_losses(logits, target, weight=labels.any(1))

        logs = {"central": central.detach(), "quantization": quantization.detach()}
        return {"loss": central + self.cfg.quantization * quantization, "logs": logs}

    def hash_logits(self, image):
        """(B, 3, H, W) -> (B, K), before tanh."""
        return self.hash_layer(self.vision(image).mean((2, 3)))

    # -- what evaluation asks for

    def encode_image(self, batch):
        """-> (B, D) unit norm."""
        return self.embed_image(batch["image"])

    def encode_clip(self, batch):
        """-> (B, D) unit norm, of the frames of clips."""
        return self.embed_frames(batch["frames"], batch["frames_mask"])

    def encode_text(self, batch):
        """-> (B, D) unit norm."""
        return self.embed_text(batch["text"], batch["text_mask"])

    def sentence_vector(self):
        """What encode_text() computes, in words, for the protocol of an evaluation."""
        cfg = self.cfg
        pooling = "mean" if self.gpo_text is None else "gpo"
        bert = f"the last of BERT's {cfg.text_layers} layers"
        if cfg.embed == "bert":
            return f"{pooling} of {bert} over all tokens"

        # clips, and runs without WS-TE, end with the FC layer
        if not hasattr(self, "ws") or cfg.ws_layers == 0:
            return f"{pooling} of the FC layer behind {bert} over all tokens"

        kind = "WS-TE" if cfg.ws == "te" else "FC layers"
        shared = "" if cfg.ws_shared else " of texts alone (not shared)"
        return f"{pooling} of layer {cfg.ws_layers} of the {kind}{shared} over all tokens"

    def token_scores(self, batch):
        """Figure 3: cosine of the final vector with each token behind the WS-TE
        -> {"image": (B, h, w), "text": (B, T)}."""
        text_mask = batch["text_mask"]
        areas = self.image_tokens(batch["image"])                               # (B, n, D)
        words = self.text_tokens(batch["text"], text_mask)                      # (B, T, D)
        image_scores = token_cosines(areas, pool(areas, gpo=self.gpo_image))
        text_scores = token_cosines(words, pool(words, text_mask, self.gpo_text))

        # the patches' grid: a strided convolution rounds up
        height, width = batch["image"].shape[2:]
        h, w = math.ceil(height / self.vision.stride), math.ceil(width / self.vision.stride)
        return {"image": image_scores.unflatten(1, (h, w)), "text": text_scores}

    def hash_codes(self, batch):
        """-> (B, K) of +1 and -1; a logit of 0 becomes +1."""
        return torch.where(self.hash_logits(batch["image"]) >= 0, 1.0, -1.0)


def token_cosines(tokens, emb):
    """(B, S, D), unit vectors (B, D) -> (B, S)."""
    return (F.normalize(full(tokens), dim=-1) @ emb[..., None]).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# Foreign weights: torchvision's ResNet (also WSL's) -> `vision`, Hugging Face's BERT -> `text`

# our names -> theirs; queries, keys and values are one matrix here
BERT_EMBEDDINGS = {"words": "word_embeddings", "positions": "position_embeddings",
                   "segments": "token_type_embeddings", "norm": "LayerNorm"}
BERT_BLOCK = {
    "attention.qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "attention.out": ["attention.output.dense"], "attention_norm": ["attention.output.LayerNorm"],
    "mlp.0": ["intermediate.dense"], "mlp.2": ["output.dense"], "mlp_norm": ["output.LayerNorm"],
}


def bert_names(name):
    """The names that Hugging Face's BERT has for a tensor of Bert."""
    part, kind = name.rsplit(".", 1)                                            # weight or bias
    if part.startswith("embeddings."):
        return [f"embeddings.{BERT_EMBEDDINGS[part.split('.')[1]]}.{kind}"]
    _, layer, part = part.split(".", 2)
    return [f"encoder.layer.{layer}.{theirs}.{kind}" for theirs in BERT_BLOCK[part]]


def foreign_names(model, side):
    """What a file of foreign weights must fill, and what it may fill: two dicts
    {our name: [foreign names]}, the rows of which in this order are ours."""
    if not hasattr(model, side):
        raise SystemExit(f"--init_{side}: a model for {model.task} has no {side} tower")
    if side == "text" and model.cfg.act != "gelu":
        raise SystemExit(f"--init_text: BERT has gelu, this model has {model.cfg.act}: --act gelu")

    needed, optional = {}, {}
    for name in getattr(model, side).state_dict():
        counter = name.endswith("num_batches_tracked")                          # WSL lacks it
        names = optional if counter else needed
        names[f"{side}.{name}"] = [name] if side == "vision" else bert_names(name)
    return needed, optional


def load_pretrained(model, **states):
    """Fills towers from foreign state dicts, names with or without "bert.":

        load_pretrained(model, vision=torchvision.models.resnet50(...).state_dict(),
                        text=transformers.BertModel.from_pretrained(...).state_dict())

    A KeyError names a tensor that a tower needs and a file lacks, before anything changes. What has
    no place here (pooler, classifier) is left out.
    """
    filled = {}
    for side, state in states.items():
        state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
        needed, optional = foreign_names(model, side)

        for ours, theirs in needed.items():
            filled[ours] = torch.cat([state[name] for name in theirs])
        for ours, (name,) in optional.items():
            if name in state:
                filled[ours] = state[name]

    # only now, when all towers are complete
    model.load_state_dict(filled, strict=False)


Model = Cookie


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {name: value for name, value in PRESETS["tiny"].items() if name not in TASKS}
    cfg = Config(**sizes, vocab_size=200, cls_id=2, sep_id=3, mask_id=4, first_word=5,
                 frame_width=240)

    # a batch of everything that some task wants
    image = torch.randn(4, 3, cfg.image_size, cfg.image_size)
    text = torch.randint(cfg.first_word, cfg.vocab_size, (4, cfg.max_text))
    batch = {"image": image, "view1": image.flip(3), "view2": image + 0.1, "text": text,
             "text_mask": torch.ones_like(text), "image_id": torch.arange(4),
             "frames": torch.randn(4, 9, cfg.frame_width),
             "frames_mask": torch.ones(4, 9, dtype=torch.long), "labels": torch.eye(4)}

    for task in ("ccl", *TASKS):
        model = Cookie(cfg, task, num_labels=4).train()
        out = model(batch)
        out["loss"].backward()
        size = sum(p.numel() for p in model.parameters())
        losses = {name: round(loss.item(), 3) for name, loss in out["logs"].items()}
        print(task, f"{size:,} parameters", losses)
