"""Objects, counts, colours and positions that a prompt asks for, checked with a detector."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Reward
from .clip import Clip
from .loading import pretrained
from .preprocess import quantize_pixels, resize
from .soft_composition import Evidence, soft_scores

# axis, and sign of the offset along it
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEXTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
GROUNDING_DINO = ("grounding-dino", "mm-grounding-dino")
OWL = ("owlvit", "owlv2")
MARGIN = 0.1  # share of the sum of the two objects' sizes
NMS_IOU = 0.5  # if two boxes of a class overlap more, only the better one is kept
SOFTNESS = 0.03  # of the soft form's threshold
BATCH = 8  # images that a detector sees at once


@dataclass(frozen=True)
class Detection:
    """A detected object: ``box`` is x0, y0, x1, y1 in pixels; ``color`` is None if unknown."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


Detector = Callable[[Tensor, list[list[str]]], list[list[Detection]]]


class Composition(Reward):
    """GenEval's checks that an image shows what its prompt asks for, by an object detector.

    Every prompt's metadata holds GenEval's ``include`` and, optionally, ``exclude`` and ``tag``:

        {"tag": "position", "include": [{"class": "cat", "count": 1},
         {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}],
         "exclude": [{"class": "dog", "count": 2}]}

    A position names a relation and the number of an earlier clause, its target. If m objects of a
    clause are found and n are wanted, mode "partial" is the mean over all clauses of

        count     1 - |n - m| / n
        color     (objects of the color) / n       } if m = n;
        position  1 if the relation holds, else 0  } else a single 0 for both

    A relation holds if the target clause is fully satisfied and every pair of an object and a
    target object passes: the component of d, the offset of their centers, in the direction of the
    relation must exceed 0.1 s + |d| / 2, where s is the sum of their sizes along that axis. The
    range is (-M, 1] with M = ``max_per_class``, because surplus objects make a count negative;
    ``exclude`` has no effect. Mode "strict" is 1 if all these values are 1 and no excluded class is
    found ``count`` times or more, else 0. (The benchmark also passes surplus objects that no clause
    excludes.)

    ``detector`` is a folder or hub id of a transformers Grounding DINO, OWL-ViT or OWLv2, or a
    ``Detector``, or its ``module:function``. A ``Detector`` takes the images (n, 3, H, W) and the
    class names for each image, and returns a list of detections for each image. The best M
    detections of a class above ``threshold`` count (above ``counting_threshold`` if the tag is
    "counting"). GenEval uses 0.3, 0.9 and M = 16 with its Mask2Former; zero-shot detectors are less
    confident, so ``counting_threshold`` defaults to ``threshold``. The CLIP model ``clip`` names
    the color of a box if the detector does not, with GenEval's texts; GenEval used
    openai/clip-vit-large-patch14.

    ``soft: true`` is the differentiable form of "partial", without thresholds. With s_j the
    probability that place j shows the class, which adds up to a mass of M for an object, the soft
    number is N = sum_j s_j / M, and the values of a clause are

        count     1 - |N - n| / n
        color     min(1, sum_j s_j P_j(color) / (M n))
        position  min(1, N / n) min(1, N of the target) times the mean over pairs of places,
                  weighted by both probabilities, of sigmoid((o - 0.1 s - |d| / 2) / 0.1), where o
                  is the component of d in the direction; lengths in units of the picture's side

    of whose mean are taken away 0.5 times the soft number of other objects, for each object asked
    for, and 0.1 times that of doubts, sum_j h_j (1 - h_j) / M with h_j the probability of any
    object. ``detector`` then is a ``SoftDetector``, or its ``module:function``, or one of the
    models above, of which a box counts by sigmoid((p - threshold) / 0.03) in place of p >
    threshold, whose ``others`` are unknown, and which names no colors.

    Not differentiable unless ``soft``. Raises ValueError for bad options, for a prompt without such
    metadata, and if a color is asked for but neither detector nor ``clip`` names colors. Source:
    GenEval (arXiv 2310.11513); "partial" follows Flow-GRPO (arXiv 2505.05470), which gives a wrong
    relation half of its credit; the soft form is ours, after AlignProp's remark (2310.03739) that
    the number of objects can be a reward.
    """

    name = "composition"
    modes = ("partial", "strict")  # the first is the default
    gradient_hint = "use rewards.{name}.soft=true, which counts by the detector's probabilities"

    def __init__(
        self,
        detector: str | Detector = "IDEA-Research/grounding-dino-tiny",
        mode: str = "partial",
        threshold: float = 0.3,
        counting_threshold: float | None = None,
        max_per_class: int = 16,
        clip: str | None = None,
        soft: bool = False,
    ):
        limits = [threshold, threshold if counting_threshold is None else counting_threshold]
        options = {"threshold": limits[0], "counting_threshold": limits[1]}
        self.check_options(detector, mode, max_per_class, clip, soft, **options)
        super().__init__()
        self.differentiable = soft
        self.detect: Any = _function(detector) or ZeroShot(str(detector), min(limits))
        self.mode, self.max_per_class = mode, max_per_class
        self.threshold, self.counting_threshold = limits
        self.clip = Clip(clip) if clip else None
        self.freeze()

    @classmethod
    def has_gradient(cls, soft=False, **options):
        return soft

    @classmethod
    def check_options(
        cls, detector: Any = "", mode=None, max_per_class=16, clip=None, soft=False, **options
    ):
        mode = cls.modes[0] if mode is None else mode
        if mode not in cls.modes:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(cls.modes)}")
        if soft and (mode != "partial" or clip):
            raise ValueError(f"soft=true needs mode=partial and no clip; got {mode!r}, {clip!r}")
        for name, limit in options.items():
            unset = limit is None and name == "counting_threshold"
            if not unset and not (isinstance(limit, (int, float)) and 0 <= limit < 1):
                raise ValueError(f"{name}={limit!r} is not a number in [0, 1)")
        if type(max_per_class) is not int or max_per_class < 1:
            raise ValueError(f"max_per_class={max_per_class!r} is not 1 or more")
        if clip:
            Clip.check_options(model=clip)
        path = str(detector)
        local = path.startswith((".", "/", "~", "assets/")) or path.count(os.sep) > 1
        if _function(detector) is None and local and not Path(path).exists():
            raise ValueError(
                f"detector={path!r} does not exist under {Path.cwd()}; give an existing folder, a "
                "hub id such as IDEA-Research/grounding-dino-tiny, or module:function"
            )

    @classmethod
    def check_prompts(cls, prompts, metadata):
        for prompt, known in zip(prompts, metadata, strict=True):
            try:
                _check_clauses(known)
            except ValueError as error:
                raise ValueError(
                    f"prompt {prompt!r}: {error}; the {cls.name} reward needs in every prompt's "
                    'metadata, as GenEval has it, "include": [{"class": "dog", "count": 1}, ...]'
                ) from error

    def forward(self, images, prompts, metadata=None):
        metadata = metadata or [{}] * len(prompts)
        self.check_prompts(prompts, metadata)
        clauses = [[*m["include"], *m.get("exclude", [])] for m in metadata]
        classes = [list(dict.fromkeys(clause["class"] for clause in c)) for c in clauses]
        if self.differentiable:
            soft = getattr(self.detect, "evidence", self.detect)(images, classes)
            return soft_scores(soft, classes, metadata, MARGIN).float()
        images = images.detach()
        found = self.detect(images, classes)
        scores = [self._score(*item) for item in zip(images, metadata, found, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _seen(self, known: dict, detections: list[Detection]) -> dict[str, list[Detection]]:
        """What counts of the detections of each class, the best first."""
        counting = known.get("tag") == "counting"
        limit = self.counting_threshold if counting else self.threshold
        seen: defaultdict[str, list[Detection]] = defaultdict(list)
        for one in sorted(detections, key=lambda d: -d.score):
            if one.score > limit and len(seen[one.label]) < self.max_per_class:
                seen[one.label].append(one)
        return seen

    def _score(self, image: Tensor, known: dict, detections: list[Detection]) -> float:
        seen = self._seen(known, detections)
        values: list[float] = []
        matched: list[list[Detection]] = []  # per clause; empty if any check failed
        for clause in known["include"]:
            things, n = seen[clause["class"]], clause["count"]
            own = [1 - abs(n - len(things)) / n]
            if len(things) != n:
                own += [0.0] if "color" in clause or "position" in clause else []
            else:
                if "color" in clause:
                    asked = clause["color"]
                    own.append(sum(self._color(image, t, asked) == asked for t in things) / n)
                if "position" in clause:
                    relation, target = clause["position"]
                    pairs = [(a.box, b.box) for a in things for b in matched[target]]
                    own.append(float(bool(pairs) and all(holds(relation, *p) for p in pairs)))
            matched.append(things if all(value == 1 for value in own) else [])
            values += own
        if self.mode == "partial":
            return sum(values) / len(values)
        excluded = any(len(seen[c["class"]]) >= c["count"] for c in known.get("exclude", []))
        return float(not excluded and all(value == 1 for value in values))

    def _color(self, image: Tensor, thing: Detection, asked: str) -> str:
        """The name of a detection's color in its image (3, H, W)."""
        if thing.color is not None:
            return thing.color
        if self.clip is None:
            raise ValueError(
                f"a {asked} {thing.label} is asked for and the detector names no colours; set "
                "`clip`, such as clip: openai/clip-vit-large-patch14"
            )
        rows = _inside(thing.box[1], thing.box[3], image.shape[1])
        columns = _inside(thing.box[0], thing.box[2], image.shape[2])
        size = self.clip.tower.size
        crop = resize(image[None, :, rows, columns], size, size)
        names = list(dict.fromkeys([*COLORS, asked]))
        texts = [text.format(name, thing.label) for name in names for text in COLOR_TEXTS]
        features = self.clip.text_features(texts).unflatten(0, (len(names), -1)).mean(1)
        likeness = F.normalize(features, dim=-1) @ self.clip.image_features(crop)[0]
        return names[int(likeness.argmax())]


def holds(relation: str, a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether box ``a`` is ``relation`` box ``b``, as ``Composition`` defines it."""
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    axis, sign = RELATIONS[relation]
    sizes = a[axis + 2] - a[axis] + b[axis + 2] - b[axis]
    return sign * offset[axis] - MARGIN * sizes > math.hypot(*offset) / 2


def _inside(low: float, high: float, side: int) -> slice:
    """The pixels of ``side``, at least one, that an interval covers."""
    start = min(max(math.floor(low), 0), side - 1)
    return slice(start, max(start + 1, min(math.ceil(high), side)))


def _function(detector: Any) -> Any:
    """The function of a detector given as callable or ``module:function``; None for a model."""
    if callable(detector):
        return detector
    if ":" not in str(detector) or Path(str(detector)).exists():
        return None
    from . import _resolve

    if not callable(target := _resolve(str(detector))):
        raise ValueError(f"detector={detector!r} is not callable")
    return target


def _check_clauses(known: dict) -> None:
    include, exclude = known.get("include"), known.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        raise ValueError(f"include is {include!r} and exclude {exclude!r}")
    for i, clause in enumerate([*include, *exclude]):
        if not isinstance(clause, dict):
            raise ValueError(f"clause {clause!r} is not an object")
        keys = ("class", "count", *(("color", "position") if i < len(include) else ()))
        for key in set(clause) - set(keys):
            raise ValueError(f"clause {clause} has {key!r}; known: {', '.join(keys)}")
        name, count, color = clause.get("class"), clause.get("count"), clause.get("color", "")
        if not isinstance(name, str) or not name.strip() or "." in name:
            raise ValueError(f"clause {clause} has no class, a text without full stops")
        if type(count) is not int or count < 1 or not isinstance(color, str):
            raise ValueError(f"clause {clause}: count must be 1 or more, color a text")
        earlier = [[relation, target] for relation in RELATIONS for target in range(i)]
        if "position" in clause and clause["position"] not in earlier:
            raise ValueError(
                f"clause {clause}: the position is not one of {', '.join(RELATIONS)} and the "
                'number (from 0) of an earlier clause, such as ["left of", 0]'
            )


class ZeroShot(nn.Module):
    """A transformers zero-shot detector, Grounding DINO, OWL-ViT or OWLv2, as a ``Detector``.

    Only the requested classes compete for a box. A box gets the class whose words have the highest
    probability, and this probability is its score. Boxes below ``threshold`` are left out, and so
    are boxes that overlap a better one of their class by an IoU of more than 0.5.
    """

    def __init__(self, name: str, threshold: float):
        super().__init__()
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        option = f"detector={name!r}"
        self.model: Any = pretrained(
            AutoModelForZeroShotObjectDetection.from_pretrained, option, name
        )
        self.kind = self.model.config.model_type
        if self.kind not in (known := GROUNDING_DINO + OWL):
            raise ValueError(f"detector={name!r} is a {self.kind}; use one of {', '.join(known)}")
        self.processor: Any = pretrained(AutoProcessor.from_pretrained, option, name)
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, images: Tensor, classes: list[list[str]]) -> list[list[Detection]]:
        return self._grouped(self._alike, images, classes)

    def evidence(self, images: Tensor, classes: list[list[str]]) -> list[Evidence]:
        """The same as probabilities, with gradient to the images; a place is a box."""
        return self._grouped(self._possible, images, classes)

    def _grouped(self, see: Callable, images: Tensor, classes: list[list[str]]) -> list[Any]:
        """What `see` finds in images of the same classes at once, in the order of the images."""
        found: list[Any] = [None] * len(classes)
        for names in {tuple(c): c for c in classes}.values():
            rows = [i for i, c in enumerate(classes) if c == names]
            for start in range(0, len(rows), BATCH):
                some = rows[start : start + BATCH]
                for i, one in zip(some, see(images[some], names), strict=True):
                    found[i] = one
        return found

    def _alike(self, images: Tensor, names: list[str]) -> list[list[Detection]]:
        """Detections of the same classes in each of (n, 3, H, W) images."""
        output = self._output(images, names)
        sizes = [tuple(images.shape[-2:])] * len(images)
        decode = self.processor.image_processor.post_process_object_detection
        return [_detections(names, **found) for found in decode(output, self.threshold, sizes)]

    def _possible(self, images: Tensor, names: list[str]) -> list[Evidence]:
        output, found = self._output(images, names, learn=True), []
        for p, each in zip(output.logits.sigmoid(), output.pred_boxes, strict=True):
            x, y, w, h = each.unbind(-1)
            boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
            score, label = p.max(-1)
            kept = _best(boxes.detach(), score.detach(), label)
            shares = torch.zeros_like(p)
            shares[kept, label[kept]] = ((score[kept] - self.threshold) / SOFTNESS).sigmoid()
            found.append(Evidence(shares.T, shares.new_zeros(len(p)), boxes, {}, 1.0))
        return found

    def _output(self, images: Tensor, names: list[str], learn: bool = False) -> Any:
        """The model's output, with logits (n, boxes, len(names))."""
        words = names if self.kind in GROUNDING_DINO else [f"a photo of a {n}" for n in names]
        pixels = (quantize_pixels(images.detach().float()) * 255).round().to(torch.uint8)
        inputs = self.processor(
            images=list(pixels), text=[words] * len(images), return_tensors="pt"
        ).to(images.device)
        if learn:  # the processor's numbers, with the gradient of our resizing
            own = images
            if self.kind == "owlv2":  # pads to a square
                side = max(own.shape[-2:])
                own = F.pad(own, (0, side - own.shape[-1], 0, side - own.shape[-2]), value=0.5)
            own = resize(own, *inputs["pixel_values"].shape[-2:])
            std = own.new_tensor(self.processor.image_processor.image_std)[:, None, None]
            inputs["pixel_values"] = inputs["pixel_values"] + (own - own.detach()) / std
        output = self.model(**inputs)
        if self.kind in GROUNDING_DINO:  # one logit per token; full stops separate the classes
            ids, tokenizer = inputs["input_ids"][0], self.processor.tokenizer
            stop = ids == tokenizer.convert_tokens_to_ids(".")
            part = stop.cumsum(0).masked_fill(stop | (ids == tokenizer.cls_token_id), -1)
            logits, parts = output.logits[..., : len(ids)], range(len(names))
            best = [logits[..., part == k].amax(-1) for k in parts]
            output.logits = torch.stack(best, -1)
        if not output.logits.isfinite().all():
            raise ValueError("the detector's logits are not finite")
        return output


def _best(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """The boxes (m, 4) that overlap no better one of their class too much."""
    from torchvision.ops import batched_nms

    return batched_nms(boxes, scores, labels, NMS_IOU)


def _detections(names: list[str], boxes: Tensor, scores: Tensor, labels: Tensor):
    best = _best(boxes, scores, labels)
    rows = zip(labels[best].tolist(), scores[best].tolist(), boxes[best].tolist(), strict=True)
    return [Detection(names[k], score, tuple(box)) for k, score, box in rows]
