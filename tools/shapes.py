"""
The built-in world: 64x64 pictures of one to three coloured shapes, written to disk in the formats of the real data
sets.

    scene (1-3 objects: row, column, size, color, shape)
    |-- draw_scene() ----------> images/{train,val,test}/000000.jpg   instances_{split}.json COCO instances (RLE masks)
    |-- draw_plan() -> say() --> pairs_{split}.jsonl                  5 captions, 5 paraphrases, tags, boxes, labels
    |-- ask() -----------------> vqa_{split}_questions.json, vqa_{split}_annotations.json    VQA v2, 10 answers
    |-- draw_plan(), edit() ---> ve_{split}.jsonl  SNLI-VE            sts_{split}.csv        STS-B, graded 0-5
    |-- NLVR_HAS, NLVR_COUNT --> nlvr2_{split}.jsonl  NLVR2           hashing/{train,database,test}.txt CSQ lists
    |-- write_classes() -------> classes/{train,val}/SIZE_COLOR/*.jpg ImageFolder of single objects
    '-- write_clips() ---------> clips/videodatainfo.json  MSR-VTT    clips/features/VIDEO_ID.npy (frames, 240) float32

`ensure()` makes it on first use (about 15 s on two cores), reuses it afterwards, and makes it anew when this file has
changed; data.py then reads it exactly as it reads COCO. Splits share no scene: train 10,000, val 1,000, test 1,000.

What a sentence says is a `Plan` (some objects, some of their attributes, at most one relation, perhaps the count);
`say` words a plan at random, `parse` reads the plan back, `holds` tells whether it is true of a scene. Paraphrases are
the same plan worded twice; wrong statements are plans with one thing edited; and `oracle_recall`, the ceiling of
image-text retrieval on this world, is parse + holds.

Paths in the records are relative to the root of the world. image_id = position in the split + 0 / 100,000 / 200,000.

    python -m tools.shapes                       # datasets/shapes, about 15 s; prints the counts and the oracle's recall
    python -m tools.shapes --sheet sheet.png     # and a contact sheet to look at
"""
import argparse
import fcntl
import functools
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import NamedTuple, Optional

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent / "datasets" / "shapes"
COUNTS = {"train": 10000, "val": 1000, "test": 1000}
FIRST_ID = {"train": 0, "val": 100000, "test": 200000}
SIDE = 64                                                              # pixels; a cell of the 3x3 grid is 21.3 of them
MAX_WORDS = 20                                              # a sentence's words and commas; + [CLS], [SEP] = 22 tokens

# ---------------------------------------------------------------------------------------------------------------------
# Words. Everything that is ever written comes from the tables of this section, so `vocabulary` can read it off them.

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "bar")
COLORS = {"red": (214, 30, 36), "orange": (250, 142, 24), "yellow": (247, 232, 48), "green": (30, 150, 50),
          "blue": (36, 70, 226), "purple": (150, 40, 190), "white": (250, 250, 250), "black": (14, 14, 16)}
SIZES = ("small", "large")
ROWS, COLS = ("top", "middle", "bottom"), ("left", "center", "right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
SYNONYMS = {"circle": ("disk", "dot"), "square": ("box",), "triangle": ("wedge",), "cross": ("plus",),
            "ring": ("hoop",), "moon": ("crescent",), "bar": ("plank",), "red": ("scarlet",),
            "yellow": ("golden",), "green": ("emerald",), "purple": ("violet",), "small": ("little", "tiny"),
            "large": ("big",), "top": ("upper",), "bottom": ("lower",)}
RELATIONS = {"above": ("above", "over"), "below": ("below", "under", "beneath"),
             "left": ("left of", "to the left of"), "right": ("right of", "to the right of")}
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}
THINGS = ("shape", "object", "thing", "figure")
LEADS = ("there is", "here is", "a picture of", "an image of", "a scene with", "we see")
COUNT_LEADS = ("{n},", "a picture of {n},", "we see {n},", "{n} including")
ALONE = ("only", "just", "nothing but", "a picture of only", "there is just")                   # = exactly one object
PLACES = ("in the", "at the")
VERBS = ("is", "sits", "lies", "there is")                             # "in the center sits a red ring"
NEUTRAL = ("{x} was painted on a monday", "{x} was made by my sister", "someone paid ten coins for {x}",
           "{x} is a gift for a friend", "a child dreamed of {x} last night", "{x} used to be much more expensive",
           "the artist likes {x} best", "{x} was drawn before breakfast", "nobody will remember {x} next year",
           "{x} belongs to an old museum", "{x} reminds her of the summer", "{x} was moved here from another city",
           "the owner wants to sell {x} tomorrow", "it took an hour to paint {x}", "{x} smells of fresh paint",
           "my brother thinks that {x} is boring")
QUESTIONS = {"color": ("what color is the {}?", "which color does the {} have?"),
             "shape": ("what shape is the {}?", "which shape is the {}?"),
             "at": ("what shape is {}?", "which shape is {}?"),
             "where": ("where is the {}?", "where do you see the {}?"),
             "count": ("how many {} are there?", "how many {} do you see?"),
             "exist": ("is there {}?", "do you see {}?"),
             "size": ("is the {} large or small?", "what size is the {}?"),
             "relation": ("is the {} {} the {}?",)}
QUESTION_MIX = {"color": 26, "shape": 24, "where": 20, "count": 12, "exist": 8, "size": 5, "relation": 5}   # in percent
# (left, right) when true
NLVR_HAS = (("the left image {v} {x}", {(1, 0), (1, 1)}), ("the right image {v} {x}", {(0, 1), (1, 1)}),
            ("both images {v} {x}", {(1, 1)}), ("neither image {v} {x}", {(0, 0)}),
            ("exactly one image {v} {x}", {(1, 0), (0, 1)}), ("at least one image {v} {x}", {(1, 0), (0, 1), (1, 1)}))
NLVR_VERBS = (("shows", "show"), ("contains", "contain"))
NLVR_COUNT = (("the left image contains more {t} than the right image", lambda a, b: a > b),
              ("the left image contains fewer {t} than the right image", lambda a, b: a < b),
              ("the left image contains twice as many {t} as the right image", lambda a, b: a == 2 * b),
              ("both images contain the same number of {t}", lambda a, b: a == b),
              ("there are four {t} in total", lambda a, b: a + b == 4),
              ("there are five {t} in total", lambda a, b: a + b == 5))
MOVES = ("moves", "slides", "glides")
WAYS = {"right": ("to the right", "rightward"), "left": ("to the left", "leftward"), "up": ("up", "upward"),
        "down": ("down", "downward")}
SPEEDS = {"slow": ("slowly", "gently"), "fast": ("quickly", "fast")}
STILL = ("stays still", "does not move")
MOTIONS = ("{np} {move} {speed} {way}", "{np} {move} {way} {speed}", "we see {np} that {move} {speed} {way}",
           "{speed} {np} {move} {way}")
JOINS = ("and", "with", "while", "there are", "yes", "no", "an")


def plural(word):
    """'circle' -> 'circles', 'box' -> 'boxes', 'plus' -> 'pluses'."""
    return word + ("es" if word.endswith(("s", "x", "ch")) else "s")


def vocabulary():
    """The lines of vocab.txt: BERT's five special tokens, every word of the world, then single letters,
    digits and their ## forms."""
    def words(x):
        if isinstance(x, str):
            yield from re.findall(r"[a-z]+|[,?]", re.sub(r"\{\w*\}", " ", x))
        elif isinstance(x, (dict, tuple, list)):
            for y in (x, x.values()) if isinstance(x, dict) else (x,):
                for z in y:
                    yield from words(z)
    said = set(words((SHAPES, COLORS, SIZES, ROWS, COLS, NUMBERS, SYNONYMS, RELATIONS, THINGS, LEADS, COUNT_LEADS,
                      ALONE, PLACES, VERBS, NEUTRAL, tuple(QUESTIONS.values()), NLVR_HAS, NLVR_VERBS, NLVR_COUNT,
                      MOVES, WAYS, SPEEDS, STILL, JOINS)))
    nouns = [w for s in SHAPES for w in (s, *SYNONYMS.get(s, ()))] + list(THINGS)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    said |= {plural(w) for w in nouns}
    singles = list(letters) + list(".,?!'-")
    return (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + sorted(w for w in said if w not in singles)
            + singles + ["##" + c for c in letters])


# ---------------------------------------------------------------------------------------------------------------------
# Scenes

class Obj(NamedTuple):
    """One object, or what a sentence says of it: there `size` and the place (`row` and `col`) may be None = not
    mentioned."""
    row: Optional[int]                                                 # 0 top .. 2 bottom
    col: Optional[int]                                                 # 0 left .. 2 right
    size: Optional[str]
    color: str
    shape: str


def draw_objects(rng, n):
    """A scene: n objects in different cells, as a tuple in reading order. No two agree in both color and shape,
    so that a name is enough."""
    names = []
    while len(names) < n:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if names and rng.random() < 0.3:                # a color or shape seen twice: something to count and to confuse
            color, shape = rng.choice([(names[0][0], shape), (color, names[0][1])])
        if (color, shape) not in names:
            names.append((color, shape))
    cells = sorted(rng.sample(range(9), n))
    rng.shuffle(names)
    return tuple(Obj(c // 3, c % 3, rng.choice(SIZES), *name) for c, name in zip(cells, names))


@functools.lru_cache(maxsize=2)
def all_scenes(seed=0, scale=1.0):
    """{split: list of scenes}, 8 % with one object, 72 % with two, 20 % with three. No scene occurs twice, in whatever
    split; the single objects of val and of test differ in more than size, as not every caption tells the size."""
    rng, seen, out = Random(f"scenes {seed}"), set(), {}
    for split in ("test", "val", "train"):
        n, rough, out[split] = round(COUNTS[split] * scale), set(), []
        kinds = [1] * round(0.08 * n) + [2] * round(0.72 * n)
        kinds += [3] * (n - len(kinds))
        rng.shuffle(kinds)
        for kind in kinds:
            while True:
                scene = draw_objects(rng, kind)
                key = scene[0]._replace(size=None)
                if scene not in seen and not (kind == 1 and split != "train" and key in rough):
                    break
            seen.add(scene)
            if kind == 1:
                rough.add(key)
            out[split].append(scene)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Sentences: draw_plan -> say -> parse -> holds

class Plan(NamedTuple):
    """What a sentence says: the objects it mentions, at most one relation between two of them,
    and how many objects there are."""
    mentions: frozenset                                                # of Obj
    relation: frozenset = frozenset()               # of (Obj a, "above" or "left", Obj b): a is above b; two = diagonal
    count: Optional[int] = None


# (places, relation?)
SAYS = {1: ((1, False),), 2: ((2, False), (1, True), (2, True)), 3: ((1, False), (2, False), (1, True))}


def draw_plan(scene, rng, brief=False):
    """Chooses what a caption says of `scene`: both of two objects, two or all of three, with enough of places and
    relations that few other scenes fit. `brief` = a short statement about one or two objects, or only their number,
    which many scenes may fit."""
    if brief and rng.random() < 0.12:
        return Plan(frozenset(), count=len(scene))
    most = 2 if brief else 3
    picks = rng.sample(scene, min(len(scene), most if rng.random() < 0.5 else max(most - 1, 1)))
    places, relate = (int(rng.random() < 0.5), len(picks) > 1) if brief else rng.choice(SAYS[len(picks)])
    # two names and one place need their sizes to be rare
    sized = 0.9 if len(picks) == 2 and places == 1 and not brief else 0.6
    said = [o._replace(size=o.size if rng.random() < sized else None, row=o.row if i < places else None,
                       col=o.col if i < places else None)
            for i, o in enumerate(picks)]
    relation = []
    if relate:
        a, b = (0, 1) if rng.random() < 0.5 else (1, 0)
        if picks[a].row != picks[b].row:
            relation.append((said[a], "above", said[b]) if picks[a].row < picks[b].row else (said[b], "above", said[a]))
        if picks[a].col != picks[b].col:
            relation.append((said[a], "left", said[b]) if picks[a].col < picks[b].col else (said[b], "left", said[a]))
        if len(relation) == 2 and rng.random() < 0.65:                 # most relations name one axis
            relation = [rng.choice(relation)]
    # that it is alone tells a single object from one among others
    counted = not brief and (len(scene) == 1 or rng.random() < 0.2)
    return Plan(frozenset(said), frozenset(relation), len(scene) if counted else None)


def wording(word, rng, synonyms):
    """`word` or, with probability `synonyms`, one of its synonyms."""
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < synonyms else word


def name(o, rng, synonyms, article="a"):
    """'a big red disk': the mentioned attributes of an object; article "a" (or "an"), "the", or "" for none."""
    text = " ".join(wording(w, rng, synonyms) for w in o[2:] if w)
    return f"{'an' if article == 'a' and text[0] in 'aeiou' else article} {text}".strip()


def place(o, rng=None, synonyms=0.0):
    """'upper left', 'center': the cell of an object; without `rng` its canonical name."""
    if (o.row, o.col) == (1, 1):
        return "middle" if rng and rng.random() < synonyms else "center"
    return f"{wording(ROWS[o.row], rng, synonyms) if rng else ROWS[o.row]} {COLS[o.col]}"


def relation_word(a, b, relation, rng):
    """How a lies to b: 'above', 'to the left of', 'below and right of'."""
    said = []
    for axis in ("above", "left"):
        if (a, axis, b) in relation or (b, axis, a) in relation:
            said.append(rng.choice(RELATIONS[axis if (a, axis, b) in relation else OPPOSITE[axis]]))
    return " and ".join(said)


def say(plan, rng, synonyms=0.25):
    """Words a Plan at random. caption := [lead] clause {("and" | "with") clause};
    clause := object | PLACE VERB object | object RELATION object | RELATION object VERB object;
    object := NAME [PLACE]."""
    things = wording("shape", rng, 0) if plan.count is None else rng.choice(THINGS)
    number = plan.count and f"{NUMBERS[plan.count]} {things if plan.count == 1 else plural(things)}"
    if not plan.mentions:
        return f"{rng.choice(('there is' if plan.count == 1 else 'there are', 'we see', 'a picture of'))} {number}"

    def full(o):
        return (name(o, rng, synonyms)
                + (f" {rng.choice(PLACES)} {place(o, rng, synonyms)}" if o.row is not None else ""))

    objects = sorted(plan.mentions, key=repr)                          # a set's own order differs between processes
    rng.shuffle(objects)
    pair = [o for o in objects if any(o in r for r in plan.relation)]
    clauses = []
    if pair:
        how = relation_word(*pair, plan.relation, rng)
        clauses.append((False, f"{full(pair[0])} {how} {full(pair[1])}") if rng.random() < 0.75 else
                       (True, f"{how} {full(pair[1])} {rng.choice(VERBS)} {full(pair[0])}"))
    for o in objects:
        if o not in pair:
            front = o.row is not None and rng.random() < 0.2
            clauses.append((front, f"{rng.choice(PLACES)} {place(o, rng, synonyms)} "
                                   f"{rng.choice(VERBS)} {name(o, rng, synonyms)}" if front else full(o)))
    rng.shuffle(clauses)
    text = clauses[0][1]
    for front, clause in clauses[1:]:
        text += (" and " if front or rng.random() < 0.7 else " with ") + clause
    if plan.count == 1 and not clauses[0][0] and rng.random() < 0.7:
        return f"{rng.choice(ALONE)} {text}"
    if plan.count is not None:
        leads = COUNT_LEADS[:-1] if clauses[0][0] else COUNT_LEADS
        return f"{rng.choice(leads).format(n=number)} {text}"
    return text if clauses[0][0] or rng.random() < 0.6 else f"{rng.choice(LEADS)} {text}"


CANON = {w: w for w in (*SHAPES, *COLORS, *SIZES, *ROWS, *COLS)} | {s: w for w, many in SYNONYMS.items() for s in many}
CANON |= {s: r for r, many in RELATIONS.items() for s in many if " " not in s}
LEAD = re.compile(rf"^(?:(?P<alone>{'|'.join(ALONE)}) )?(?:(?:{'|'.join(LEADS)}|there are) )?"
                  rf"(?:(?P<count>{'|'.join(NUMBERS)}) (?:{'|'.join(THINGS)})s?(?:,| including|$) ?)?")


def parse(text):
    """The inverse of `say`: a caption -> its Plan, by recursive descent over say's grammar.
    Raises ValueError for other text."""
    lead = LEAD.match(text)
    words, at = text[lead.end():].split() + ["."] * 3, 0
    mentions, relation = [], set()

    def skip(*many):
        nonlocal at
        while words[at] in many:
            at += 1

    def canon(kinds, needed=True):                                     # the next word, if it is one of `kinds`
        nonlocal at
        word = CANON.get(words[at])
        if word in kinds:
            at += 1
            return word
        if needed:
            raise ValueError(f"shapes.parse: '{words[at]}' is no {'/'.join(kinds)} in: {text}")

    def read_place():                                                  # in the upper left | in the middle
        skip("in", "at", "the")
        # 'in the middle left of a ..' = in the middle, left of a ..
        beside = words[at + 1] in COLS and words[at + 2] != "of"
        if words[at] in ("center", "middle") and not beside:
            skip("center", "middle")
            return 1, 1
        return ROWS.index(canon(ROWS)), COLS.index(canon(COLS))

    def read_object(where=None):
        skip("a", "an", "the")
        size, color, shape = canon(SIZES, False), canon(COLORS), canon(SHAPES)
        where = where or (read_place() if words[at] in ("in", "at") else (None, None))
        mentions.append(Obj(*where, size, color, shape))
        return mentions[-1]

    def at_relation():
        return CANON.get(words[at]) in ("above", "below") or words[at] == "to" or words[at + 1] == "of"

    def read_relation():
        said = [canon(("above", "below"), False)]
        if said[0] is None or words[at] == "and":
            skip("and", "to", "the")
            said.append(canon(("left", "right")))
            skip("of")
        return [r for r in said if r]

    while words[at] != ".":
        how, a, b = None, None, None
        if words[at] in ("in", "at"):
            where = read_place()
            skip("there", *VERBS)
            a = read_object(where)
        elif at_relation():
            how, b = read_relation(), read_object()
            skip("there", *VERBS)
            a = read_object()
        else:
            a = read_object()
            if at_relation():
                how, b = read_relation(), read_object()
        for r in how or ():
            relation.add((a, r, b) if r in ("above", "left") else (b, OPPOSITE[r], a))
        skip("and", "with")
    return Plan(frozenset(mentions), frozenset(relation),
                1 if lead["alone"] else lead["count"] and NUMBERS.index(lead["count"]))


def holds(plan, scene):
    """Whether all that a Plan says is true of a scene."""
    real = {(o.color, o.shape): o for o in scene}
    for m in plan.mentions:
        o = real.get((m.color, m.shape))
        if o is None or m.size not in (None, o.size) or m.row is not None and (m.row, m.col) != (o.row, o.col):
            return False
    for a, axis, b in plan.relation:
        a, b = real[a.color, a.shape], real[b.color, b.shape]
        if not (a.row < b.row if axis == "above" else a.col < b.col):
            return False
    return plan.count in (None, len(scene))


def edit(text, rng, synonyms=0.25):
    """The sentence with one word changed: a color, shape or size for another, above <-> below, left <-> right,
    top <-> bottom. A sentence without such a word comes back as it is."""
    words = text.split()
    swaps = {**OPPOSITE, "small": "large", "large": "small", "top": "bottom", "bottom": "top"}
    spots = [i for i, w in enumerate(words) if CANON.get(w) in (*COLORS, *SHAPES, *swaps)]
    if not spots:
        return text
    i = rng.choice(spots)
    old = CANON[words[i]]
    kind = COLORS if old in COLORS else SHAPES
    new = swaps.get(old) or rng.choice([w for w in kind if w != old])
    words[i] = rng.choice(RELATIONS[new]) if new in ("above", "below") else wording(new, rng, synonyms)
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", " ".join(words))


def short(text):
    return len(text.split()) + text.count(",") <= MAX_WORDS


def captions_of(scene, rng, n=5):
    """n captions of a scene, all different, and n paraphrases: the same Plan in other words, at the same position."""
    captions, paraphrases = [], []
    while len(captions) < n:
        plan = draw_plan(scene, rng)
        one, two = say(plan, rng), say(plan, rng, 0.6)
        if one != two and one not in captions and short(one) and short(two):
            captions.append(one)
            paraphrases.append(two)
    return captions, paraphrases


def oracle_recall(root=ROOT, split="test"):
    """R@1 of a reader who understands every caption and sees every picture without fault:
    {"i2t_r1": .., "t2i_r1": ..} in 0..1.

    `parse` and `holds` score a caption 1 for the scenes it is true of and else 0. Ties are counted pessimistically:
    text->image is a hit when the caption is true of its own scene and no other, image->text when no other picture's
    caption is true of the scene."""
    scenes, texts = [], []                                             # texts: (index of the scene, caption)
    for i, line in enumerate((Path(root) / f"pairs_{split}.jsonl").read_text().splitlines()):
        record = json.loads(line)
        scenes.append(tuple(Obj(*o) for o in record["scene"]))
        texts += [(i, caption) for caption in record["caption"]]
    having = {}                                                        # (color, shape) -> scenes with such an object
    for i, scene in enumerate(scenes):
        for o in scene:
            having.setdefault((o.color, o.shape), []).append(i)
    hits, confused, own_true = 0, set(), set()
    for owner, text in texts:
        plan = parse(text)
        mention = next(iter(plan.mentions))                            # any one will do
        fits = [i for i in having.get((mention.color, mention.shape), ()) if holds(plan, scenes[i])]
        hits += fits == [owner]
        confused.update(i for i in fits if i != owner)
        own_true.update(i for i in fits if i == owner)
    return {"i2t_r1": len(own_true - confused) / len(scenes), "t2i_r1": hits / len(texts)}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

YY, XX = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5             # pixel centers


def distance(shape, x, y):
    """Signed distance (roughly; < 0 inside) to a shape of radius about 1 around the origin, y pointing down.
    x, y and result: same shape."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.84
    if shape == "triangle":                                            # three half-planes, apex up
        return np.maximum(y - 0.72, 0.866 * abs(x) - 0.5 * y - 0.52)
    if shape == "star":                                         # fold onto one half of one of five arms, then one edge
        angle = abs((np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
        # tip at (1.08, 0), notch at 0.45 of the radius and 36 degrees
        px, py = radius * np.cos(angle), radius * np.sin(angle)
        ex, ey = 0.45 * math.cos(math.pi / 5) - 1.08, 0.45 * math.sin(math.pi / 5)
        return ((px - 1.08) * -ey + py * ex) / -math.hypot(ex, ey)
    if shape == "cross":
        return np.minimum(np.maximum(abs(x) - 0.98, abs(y) - 0.3), np.maximum(abs(x) - 0.3, abs(y) - 0.98))
    if shape == "ring":
        return abs(radius - 0.73) - 0.25
    if shape == "moon":
        return np.maximum(radius - 1.0, 0.8 - np.hypot(x - 0.5, y))
    return np.maximum(abs(x) - 1.0, abs(y) - 0.34)                     # bar


def background(rng):
    """A muted (64, 64, 3) float32 ground, 0..255: a greyish tint, a slope of light, faint stripes."""
    ground = rng.uniform(95, 150) + rng.uniform(-12, 12, 3)
    turn, amount = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0, (20, 4))
    slope = amount[0] * ((XX - 32) * math.cos(turn[0]) + (YY - 32) * math.sin(turn[0])) / 32
    stripes = amount[1] * np.sin((XX * math.cos(turn[1]) + YY * math.sin(turn[1])) * rng.uniform(0.3, 1.2))
    return (ground + (slope + stripes)[..., None]).astype(np.float32)


def paint(ground, objects, rng):
    """Paints (x, y, radius, turn, color, shape) objects, in pixels and radians, on a ground, edges smoothed over one
    pixel. -> picture (64, 64, 3) uint8 with its noise, list of (64, 64) bool masks."""
    picture, masks = ground, []
    for x, y, r, turn, color, shape in objects:
        c, s, dx, dy = math.cos(turn) / r, math.sin(turn) / r, XX - x, YY - y
        cover = np.clip(0.5 - r * distance(shape, c * dx + s * dy, c * dy - s * dx), 0, 1)
        shade = np.asarray(COLORS[color], np.float32) + rng.uniform(-6, 6, 3).astype(np.float32)
        picture = picture + cover[..., None] * (shade - picture)
        masks.append(cover > 0.5)
    noise = rng.standard_normal((SIDE, SIDE, 3), dtype=np.float32) * 3
    return np.clip(picture + noise, 0, 255).astype(np.uint8), masks


def draw_scene(scene, rng):
    """A scene on the grid: large = radius about 10, small about 7 pixels, jitter inside the cell;
    nothing overlaps or leaves the picture."""
    objects = []
    for o in scene:
        r, jitter = (rng.uniform(9.6, 10.0), 0.5) if o.size == "large" else (rng.uniform(6.6, 7.2), 2.4)
        x, y = (np.array([o.col, o.row]) + 0.5) * SIDE / 3 + rng.uniform(-jitter, jitter, 2)
        objects.append((x, y, r, rng.uniform(-0.12, 0.12), o.color, o.shape))
    return paint(background(rng), objects, rng)


def save_jpeg(picture, path):
    Image.fromarray(picture).save(path, quality=95, subsampling=0)


def rle(mask):
    """Mask (H, W) bool -> COCO's uncompressed run lengths, column by column, beginning with the background."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0] * bool(flat[0]) + counts}


# ---------------------------------------------------------------------------------------------------------------------
# Files. Each function writes its files under `root` and depends on nothing but its arguments, so that processes
# can share them.

def write_jsonl(path, records):
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)


def picture_path(split, i):
    return f"images/{split}/{i:06d}.jpg"


def make_pairs(root, seed, scale, split, start, stop):
    """Draws pictures [start, stop) of a split -> their records and COCO annotations."""
    records, annotations = [], []
    for i, scene in enumerate(all_scenes(seed, scale)[split][start:stop], start):
        image_id = FIRST_ID[split] + i
        picture, masks = draw_scene(scene, np.random.default_rng([seed, image_id]))
        save_jpeg(picture, root / picture_path(split, i))
        boxes = []
        for k, (o, mask) in enumerate(zip(scene, masks)):
            xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            x0, y0, x1, y1 = int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1
            boxes.append([x0, y0, x1, y1])
            annotations.append({"id": image_id * 10 + k, "image_id": image_id,
                                "category_id": SHAPES.index(o.shape) + 1, "iscrowd": 0,
                                "bbox": [x0, y0, x1 - x0, y1 - y0],
                                "area": int(mask.sum()), "segmentation": rle(mask)})
        captions, paraphrases = captions_of(scene, Random(f"captions {seed} {image_id}"))
        records.append({"image": picture_path(split, i), "image_id": image_id, "split": split,
                        "caption": captions, "paraphrase": paraphrases,
                        "tags": sorted({o.color for o in scene} | {o.shape for o in scene}
                                       | {f"{o.color} {o.shape}" for o in scene}),
                        "boxes": boxes, "labels": [SHAPES.index(o.shape) for o in scene],
                        "label_names": [o.shape for o in scene], "scene": scene})
    return records, annotations


def ask(scene, rng, kind):
    """One question of a kind of QUESTIONS
    -> (question, answer, the other answers that make sense, official answer type).
    Answers: a color, a shape, a place ("top left"), a digit, yes/no, large/small."""
    o = rng.choice(scene)
    shape, color = wording(o.shape, rng, 0.2), wording(o.color, rng, 0.2)
    text = rng.choice(QUESTIONS[kind])
    if kind == "color":
        known = (shape if sum(p.shape == o.shape for p in scene) == 1
                 else f"{rng.choice(THINGS)} {rng.choice(PLACES)} {place(o)}")
        return text.format(known), o.color, list(COLORS), "other"
    if kind == "shape":
        if sum(p.color == o.color for p in scene) > 1 or rng.random() < 0.3:
            return (rng.choice(QUESTIONS["at"]).format(f"{rng.choice(PLACES)} {place(o)}"),
                    o.shape, list(SHAPES), "other")
        return text.format(f"{color} {rng.choice(THINGS)}"), o.shape, list(SHAPES), "other"
    if kind == "where":
        return text.format(f"{color} {shape}"), place(o), [place(Obj(i // 3, i % 3, *o[2:])) for i in range(9)], "other"
    if kind == "size":
        return text.format(f"{color} {shape}"), o.size, list(SIZES), "other"
    if kind == "count":
        what = rng.randrange(3)
        if what == 0:
            known, n = plural(rng.choice(THINGS)), len(scene)
        elif what == 1:
            c = rng.choice((o.color, o.color, rng.choice(list(COLORS))))
            known, n = f"{c} {plural(rng.choice(THINGS))}", sum(p.color == c for p in scene)
        else:
            c = rng.choice((o.shape, o.shape, rng.choice(SHAPES)))
            known, n = plural(c), sum(p.shape == c for p in scene)
        return text.format(known), str(n), ["0", "1", "2", "3"], "number"
    if kind == "relation" and len(scene) > 1:
        a, b = rng.sample(scene, 2)
        axis, smaller = rng.choice([("above", a.row < b.row)] * (a.row != b.row)
                                   + [("left", a.col < b.col)] * (a.col != b.col))
        truth = rng.random() < 0.5
        how = rng.choice(RELATIONS[axis if smaller == truth else OPPOSITE[axis]])
        return (text.format(f"{a.color} {a.shape}", how, f"{b.color} {b.shape}"),
                "yes" if truth else "no", ["yes", "no"], "yes/no")
    if rng.random() < 0.5:                                             # "exist", and "relation" of a lonely object
        known, answer = (o.color, o.shape), "yes"
    else:                                                              # one attribute off: only looking at both tells
        names = [(c, o.shape) for c in COLORS] + [(o.color, k) for k in SHAPES]
        known, answer = rng.choice([k for k in names if k not in [(p.color, p.shape) for p in scene]]), "no"
    return (rng.choice(QUESTIONS["exist"]).format(name(Obj(None, None, None, *known), rng, 0.2)),
            answer, ["yes", "no"], "yes/no")


def write_vqa(root, seed, scale, split):
    """1.5 questions a training picture, 2 otherwise; ten annotators, of whom eight to ten agree
    (others: a synonym or another answer)."""
    rng, questions, annotations = Random(f"vqa {seed} {split}"), [], []
    for i, scene in enumerate(all_scenes(seed, scale)[split]):
        image_id, kinds = FIRST_ID[split] + i, []
        while len(kinds) < (1 + i % 2 if split == "train" else 2):
            kind = rng.choices(list(QUESTION_MIX), QUESTION_MIX.values())[0]
            if kind not in kinds:
                kinds.append(kind)
        for k, kind in enumerate(kinds):
            question, answer, others, answer_type = ask(scene, rng, kind)
            said = [answer] * rng.choice((8, 9, 9, 10, 10))
            while len(said) < 10:
                said.append(rng.choice(SYNONYMS.get(answer, ()) + (rng.choice(others),)))
            rng.shuffle(said)
            key = {"image_id": image_id, "question_id": image_id * 1000 + k}
            questions.append({**key, "image": picture_path(split, i), "question": question})
            annotations.append({**key, "question_type": " ".join(question.split()[:2]),
                                "answer_type": answer_type, "multiple_choice_answer": answer,
                                "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n}
                                            for n, a in enumerate(said, 1)]})
    head = {"info": {"description": "nanovlp shapes", "version": "1.0"}, "data_type": "shapes", "data_subtype": split}
    (root / f"vqa_{split}_questions.json").write_text(
        json.dumps({**head, "task_type": "Open-Ended", "questions": questions}))
    (root / f"vqa_{split}_annotations.json").write_text(json.dumps({**head, "annotations": annotations}))


def write_ve(root, seed, scale, split):
    """Three labels in equal parts. A contradiction is what is true of another picture, or the truth with one word
    changed, so that its words are those of an entailment: only the picture tells. Neutral: about an object in the
    picture, but nothing that a picture can show."""
    rng, records, scenes = Random(f"ve {seed} {split}"), [], all_scenes(seed, scale)[split]
    for n in range(3 * (len(scenes) * (3 if split == "train" else 4) // 6)):
        i, label = rng.randrange(len(scenes)), ("entailment", "neutral", "contradiction")[n % 3]
        scene = scenes[i]
        text = None
        while text is None or not short(text):
            if label == "neutral":
                text = rng.choice(NEUTRAL).format(x=name(rng.choice(scene)._replace(size=None), rng, 0.25, "the"))
            else:
                text = say(draw_plan(scene, rng, brief=True), rng)
            while label == "contradiction" and holds(parse(text), scene):
                near = rng.random() < 0.5
                text = say(draw_plan(scene if near else rng.choice(scenes), rng, brief=True), rng)
                text = edit(text, rng) if near else text
        stem = f"{FIRST_ID[split] + i:06d}"
        records.append({"Flickr30K_ID": stem, "captionID": f"{stem}.jpg#0", "gold_label": label,
                        "pairID": f"{stem}.jpg#{n}{label[0]}", "sentence2": text, "image": picture_path(split, i)})
    rng.shuffle(records)
    write_jsonl(root / f"ve_{split}.jsonl", records)


def write_nlvr2(root, seed, scale, split):
    """Sentences about two pictures, each sentence with one pair it is true of and one it is false of: words alone
    tell nothing."""
    rng, records, scenes = Random(f"nlvr2 {seed} {split}"), [], all_scenes(seed, scale)[split]

    @functools.lru_cache(maxsize=None)
    def sorted_out(test):                               # a tuple of values to look for -> (scenes without, scenes with)
        sides = [], []
        for i, scene in enumerate(scenes):
            sides[any(set(test) <= set(o[2:]) for o in scene)].append(i)
        return sides

    while len(records) < len(scenes) * (1 if split == "train" else 2):
        if rng.random() < 0.75:
            text, true_when = rng.choice(NLVR_HAS)
            o = rng.choice(rng.choice(scenes))
            color, shape = rng.choice(((o.color, o.shape), (o.color, None), (None, o.shape)))
            without, having = sorted_out((color, shape) if color and shape else (color or shape,))
            if not without or not having:
                continue
            what = name(Obj(None, None, None, color, shape or "shape"), rng, 0.2)
            verbs = rng.choice(NLVR_VERBS)
            text = text.format(v=verbs["both" in text], x=what)
            pairs = []
            for truth in (True, False):
                left, right = rng.choice([s for s in ((0, 0), (0, 1), (1, 0), (1, 1)) if (s in true_when) == truth])
                pairs.append((rng.choice((without, having)[left]), rng.choice((without, having)[right])))
        else:
            text, test = rng.choice(NLVR_COUNT)
            text, pairs = text.format(t=plural(rng.choice(THINGS))), []
            for truth in (True, False):
                while True:
                    pair = rng.randrange(len(scenes)), rng.randrange(len(scenes))
                    if test(len(scenes[pair[0]]), len(scenes[pair[1]])) == truth:
                        pairs.append(pair)
                        break
        group = len(records) // 2
        for k, (a, b) in enumerate(pairs):
            records.append({"identifier": f"{split}-{group}-{k}-0", "sentence": text, "label": str(k == 0),
                            "left_image": picture_path(split, a), "right_image": picture_path(split, b)})
    rng.shuffle(records)
    write_jsonl(root / f"nlvr2_{split}.jsonl", records)


def write_sts(root, seed, scale, split):
    """Pairs of captions with the mean of five graders. 5 = the same in other words; 4 = a detail left out; 3 = one word
    changed, which leaves most words the same; 2 = one object in common; 1 = a color or shape in common;
    0 = nothing in common."""
    rng, scenes = Random(f"sts {seed} {split}"), all_scenes(seed, scale)[split]
    lines, used = [], set()
    while len(lines) < {"train": 3000, "val": 600, "test": 600}[split] * scale:
        level, scene = len(lines) % 6, rng.choice(scenes)
        plan = draw_plan(scene, rng)
        one, kept = say(plan, rng), sorted(plan.mentions, key=repr)
        if level == 5:
            two = say(plan, rng, 0.7)
        elif level == 4:                                               # without its sizes, its relation or its count
            def bare(m):
                return m._replace(size=None)
            less = rng.choice((plan._replace(mentions=frozenset(map(bare, kept)),
                                             relation=frozenset((bare(a), r, bare(b)) for a, r, b in plan.relation)),
                               plan._replace(relation=frozenset()), plan._replace(count=None)))
            two = one if less == plan else say(less, rng, 0.4)
        elif level == 3:
            two = edit(one, rng)
        elif level == 2:                                               # a scene of one of its objects and strangers
            keep, other = rng.choice(kept), draw_plan(rng.choice(scenes), rng)
            strangers = sorted(other.mentions, key=repr)[:2]
            two = say(Plan(frozenset([keep] + strangers)), rng)
            if len(kept) < 2 or any((m.color, m.shape) in [(k.color, k.shape) for k in kept] for m in strangers):
                continue
        else:
            other = draw_plan(rng.choice(scenes), rng)
            colors, shapes = ({m.color for m in other.mentions} & {m.color for m in kept},
                              {m.shape for m in other.mentions} & {m.shape for m in kept})
            if (len(colors) + len(shapes) != level
                    or {(m.color, m.shape) for m in kept} & {(m.color, m.shape) for m in other.mentions}):
                continue
            two = say(other, rng)
        pair = tuple(rng.sample((one, two), 2))
        if one == two or pair in used or not all(map(short, pair)):
            continue
        used.add(pair)
        grades = [min(5, max(0, level + rng.choice((-1, 0, 0, 0, 0, 0, 0, 0, 1)))) for _ in range(5)]
        lines.append(f"main-captions\tshapes\t{split}\t{len(lines):04d}\t{sum(grades) / 5:.3f}\t{pair[0]}\t{pair[1]}\n")
    (root / f"sts_{split}.csv").write_text("".join(lines))


def write_hashing(root, seed, scale):
    """CSQ's lists 'path 0 1 ..' with 16 labels (8 shapes, 8 colors), of the scenes with one or two objects (with three,
    nine pairs in ten share a label): test = queries of the test split; database = the training split;
    train = every second picture of the database."""
    lines = {}
    for split in ("train", "test"):
        lines[split] = [" ".join([picture_path(split, i)]
                                 + [str(int(any(w in o for o in scene))) for w in (*SHAPES, *COLORS)]) + "\n"
                        for i, scene in enumerate(all_scenes(seed, scale)[split]) if len(scene) < 3]
    for file, content in (("database", lines["train"]), ("train", lines["train"][::2]), ("test", lines["test"])):
        (root / "hashing" / f"{file}.txt").write_text("".join(content))


def class_name(cell, size, color, shape):
    return f"{size}_{color}"


CLASSES = sorted(class_name(None, size, color, None) for size in SIZES for color in COLORS)


def write_classes(root, seed, scale, split):
    """Single objects at any place, class = size and color; 2,000 / 500. The 1,152 combinations of cell, size, color
    and shape are split between train and val; pictures of one combination differ in jitter, ground and noise."""
    combos = [(cell, size, color, shape) for cell in range(9) for size in SIZES for color in COLORS for shape in SHAPES]
    Random(f"classes {seed}").shuffle(combos)
    combos = combos[:920] if split == "train" else combos[920:]
    # the classes take turns
    combos = [c for turn in zip_longest(*([c for c in combos if class_name(*c) == name] for name in CLASSES))
              for c in turn if c]
    for i in range(round((2000 if split == "train" else 500) * scale)):
        cell, *names = combos[i % len(combos)]
        o = Obj(cell // 3, cell % 3, *names)
        picture, _ = draw_scene((o,), np.random.default_rng([seed, 300000 if split == "train" else 400000, i]))
        save_jpeg(picture, root / "classes" / split / class_name(cell, *names) / f"{i:06d}.jpg")


def frame_features(frames):
    """The frame descriptor of the clips. frames (T, 64, 64, 3) uint8 -> (T, 240) float32:

    0-191    the color grid: mean R, G, B in -1..1 of each of 8x8 cells, row by row
    192-207  the motion grid: mean |I_t - I_(t-1)| of each of 4x4 cells, I = mean of R, G, B in 0..1, times 10
    208-239  its direction: normal flow of the same cells, u then v for each,
             sum(-I_t * (I_x, I_y)) / (sum(I_x^2 + I_y^2) + 1), times 1:
             > 0 means rightward, downward. I_t = I_t - I_(t-1), I_x and I_y central differences of their mean.
    The first frame has no motion: zeros."""
    x = frames.astype(np.float32) / 255
    t = len(x)
    colors = x.reshape(t, 8, 8, 8, 8, 3).mean((2, 4)).reshape(t, 192) * 2 - 1
    gray = x.mean(-1)
    change, mean = gray[1:] - gray[:-1], (gray[1:] + gray[:-1]) / 2
    iy, ix = np.gradient(mean, axis=(1, 2))

    def cells(a):                                                   # (T-1, 64, 64) -> (T-1, 16): sums over 16x16 pixels
        return a.reshape(len(a), 4, 16, 4, 16).sum((2, 4)).reshape(len(a), 16)

    energy = cells(ix ** 2 + iy ** 2) + 1
    flow = np.stack([cells(-change * ix) / energy, cells(-change * iy) / energy], -1).reshape(t - 1, 32)
    motion = np.concatenate([cells(abs(change)) * (10 / 256), flow], 1)
    return np.concatenate([colors, np.pad(motion, ((1, 0), (0, 0)))], 1).astype(np.float32)


def write_clips(root, seed, scale):
    """600 clips (train 400 / validate 100 / test 100) of 8-12 frames: one or two objects, the first of them always
    in motion, five captions each."""
    rng, videos, sentences, used = Random(f"clips {seed}"), [], [], set()
    steps = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
    splits = [s for s, n in (("train", 400), ("validate", 100), ("test", 100)) for _ in range(round(n * scale))]
    for n, split in enumerate(splits):
        while True:
            scene = draw_objects(rng, rng.choice((1, 2)))
            motions = [(rng.choice(list(WAYS)), rng.choice(list(SPEEDS))) if k == 0 or rng.random() < 0.6 else None
                       for k in range(len(scene))]
            key = frozenset((o[2:], m) for o, m in zip(scene, motions))
            if key not in used:
                break
        used.add(key)
        length, tracks = rng.randint(8, 12), []
        for o, motion in zip(scene, motions):
            r = 9.0 if o.size == "large" else 5.6
            dx, dy = steps[motion[0]] if motion else (0, 0)
            far = (length - 1) * (3.2 if motion and motion[1] == "fast" else 1.2)
            # its middle frame is anywhere that keeps the whole way inside the picture
            x, y = (rng.uniform(r + abs(d) * far / 2, SIDE - r - abs(d) * far / 2) for d in (dx, dy))
            tracks.append([(x + dx * far * (f / (length - 1) - 0.5), y + dy * far * (f / (length - 1) - 0.5),
                            r, 0.0, o.color, o.shape) for f in range(length)])
        paint_rng = np.random.default_rng([seed, 500000, n])
        ground = background(paint_rng)
        frames = np.stack([paint(ground, [track[f] for track in tracks], paint_rng)[0] for f in range(length)])
        np.save(root / "clips" / "features" / f"video{n}.npy", frame_features(frames))
        if n % 20 == 0:
            Image.fromarray(np.concatenate(list(frames), 1)).save(root / "clips" / "frames" / f"video{n}.png")
        videos.append({"video_id": f"video{n}", "id": n, "split": split, "category": 0, "url": "",
                       "start time": 0.0, "end time": length / 8})
        said = []
        while len(said) < 5:
            parts = []
            for o, motion in zip(scene, motions):
                np_ = name(o._replace(size=o.size if rng.random() < 0.6 else None), rng, 0.25)
                text = (f"{np_} {rng.choice(MOVES)} {rng.choice(SPEEDS[motion[1]])} {rng.choice(WAYS[motion[0]])}"
                        if motion else f"{np_} {rng.choice(STILL)}")
                parts.append(text)
            rng.shuffle(parts)
            text = rng.choice((" and ", " while ")).join(parts)
            if text not in said:
                said.append(text)
        sentences += [{"caption": s, "video_id": f"video{n}", "sen_id": len(sentences) + k} for k, s in enumerate(said)]
    info = {"description": "nanovlp shapes clips, features: shapes.frame_features", "version": "1.0"}
    (root / "clips" / "videodatainfo.json").write_text(
        json.dumps({"info": info, "videos": videos, "sentences": sentences}))


def _job(job):
    """Runs one (function, args) of the world in a worker process -> (what it returns, pictures drawn)."""
    function, *args = job
    return function(*args)


def write_world(root, seed=0, scale=1.0, quiet=False):
    """Writes every file of the world under the empty directory `root`, with as many processes as there are cores
    (2 to 8). The same bytes for the same seed and scale (0 < scale <= 1 shrinks every count), whatever the number of
    processes."""
    for folder in (*(f"images/{s}" for s in COUNTS), "hashing", "clips/features", "clips/frames",
                   *(f"classes/{split}/{name}" for split in ("train", "val") for name in CLASSES)):
        (root / folder).mkdir(parents=True)
    (root / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    chunks = [(split, a, min(a + 250, len(scenes))) for split, scenes in all_scenes(seed, scale).items()
              for a in range(0, len(scenes), 250)]
    texts = [(f, root, seed, scale, split) for f in (write_vqa, write_ve, write_nlvr2, write_sts) for split in COUNTS]
    texts += ([(write_clips, root, seed, scale), (write_hashing, root, seed, scale)]
              + [(write_classes, root, seed, scale, s) for s in ("train", "val")])
    workers = min(8, max(2, os.cpu_count()))
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    records, annotations = {s: [] for s in COUNTS}, {s: [] for s in COUNTS}
    with context.Pool(workers) as pool, tqdm(total=len(chunks) * 250 + len(texts) * 100, desc="drawing shapes",
                                             unit="", disable=quiet,
                                             bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as bar:
        pairs = pool.imap(_job, [(make_pairs, root, seed, scale, *chunk) for chunk in chunks])
        others = pool.imap(_job, texts)
        for (split, *_), (some, more) in zip(chunks, pairs):
            records[split] += some
            annotations[split] += more
            bar.update(250)
        for split in COUNTS:
            write_jsonl(root / f"pairs_{split}.jsonl", records[split])
            images = [{"id": r["image_id"], "file_name": r["image"], "height": SIDE, "width": SIDE}
                      for r in records[split]]
            (root / f"instances_{split}.json").write_text(json.dumps(
                {"info": {"description": "nanovlp shapes"}, "images": images, "annotations": annotations[split],
                 "categories": [{"id": k, "name": s, "supercategory": "shape"} for k, s in enumerate(SHAPES, 1)]},
                separators=(",", ":")))
        for _ in others:
            bar.update(100)


def ensure(root=ROOT, quiet=False, seed=0, scale=None):
    """Makes the world under `root` if it is not there, or was made by another version of this file or with another seed
    or scale (None: the scale of the world that is there, 1 where there is none). -> Path.

    A world is written beside `root` and moved there whole; a lock lets one process write while others wait for it; what
    a killed process left is removed. SystemExit if `root` is a directory that this function did not write."""
    root = Path(root).absolute()
    version = {"generator": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "seed": seed}
    found = {}

    def ready():
        nonlocal found
        try:
            found = json.loads((root / "version.json").read_text())
        except FileNotFoundError:
            return False
        return found == {**version, "scale": found.get("scale") if scale is None else scale}

    if ready():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if ready():                                                    # another process made it while this one waited
            return root
        if root.exists() and not (root / "version.json").exists() and any(root.iterdir()):
            raise SystemExit(f"shapes.py: {root} is not empty and is no shapes world: name another place, or empty it")
        for stale in root.parent.glob(f".{root.name}.tmp-*"):          # whoever wrote these is dead: we hold the lock
            shutil.rmtree(stale)
        if not quiet:
            print(f"shapes: making the built-in world in {root} (once, about 15 s on two cores)",
                  file=sys.stderr, flush=True)
        new, old = (root.parent / f".{root.name}.tmp-{os.getpid()}-{what}" for what in ("new", "old"))
        new.mkdir()
        scale = scale or found.get("scale", 1.0)
        write_world(new, seed, scale, quiet)
        (new / "version.json").write_text(json.dumps({**version, "scale": scale}))
        if root.exists():
            root.rename(old)
        new.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    return root


def sheet(root, path, n=24):
    """A contact sheet: the first n test pictures, enlarged, each with two captions, and the strips of four clips."""
    records = [json.loads(line) for line in (Path(root) / "pairs_test.jsonl").read_text().splitlines()[:n]]
    strips = sorted((Path(root) / "clips" / "frames").glob("*.png"))[:4]
    page = Image.new("RGB", (6 * 210, -(-len(records) // 6) * 280 + 80 * len(strips)), "white")
    pen = ImageDraw.Draw(page)
    for i, r in enumerate(records):
        x, y = i % 6 * 210 + 5, i // 6 * 280 + 5
        page.paste(Image.open(Path(root) / r["image"]).resize((198, 198), Image.Resampling.NEAREST), (x, y))
        for k, caption in enumerate(r["caption"][:2]):
            words, lines = caption.split(), [""]
            for w in words:
                lines[-1:] = [f"{lines[-1]} {w}".strip()] if len(lines[-1]) + len(w) < 34 else [lines[-1], w]
            pen.text((x, y + 200 + 36 * k), "\n".join(lines[:3]), fill="black", font_size=11, spacing=1)
    for i, strip in enumerate(strips):
        page.paste(Image.open(strip), (5, page.height - 80 * (len(strips) - i)))
    page.save(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Writes the built-in world of nanovlp.")
    parser.add_argument("--root", type=Path, default=ROOT, help="where it lies")
    parser.add_argument("--scale", type=float, help="a share of every count, for quick trials "
                                                    "(default: that of the world that is there, else 1)")
    parser.add_argument("--sheet", type=Path, help="also draw a contact sheet into this file")
    args = parser.parse_args(argv)
    root = ensure(args.root, scale=args.scale)
    for split in COUNTS:
        lines = [json.loads(line) for line in open(root / f"pairs_{split}.jsonl")]
        print(f"{split:5}  {len(lines):6,} pictures  {sum(len(r['caption']) for r in lines):6,} captions  "
              f"{sum(len(r['boxes']) for r in lines):6,} objects")
    oracle = oracle_recall(root)
    print(f"a perfect reader's R@1 on test: image->text {oracle['i2t_r1']:.1%}, text->image {oracle['t2i_r1']:.1%}")
    print(f"the world lies in {root}")
    if args.sheet:
        sheet(root, args.sheet)
        print(f"contact sheet: {args.sheet}")


if __name__ == "__main__":
    main()
