"""GenEval's score of a picture, by the benchmark's own rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .composition import Composition, Detection, Detector, holds


class GenEval(Composition):
    """Whether a picture is correct by GenEval's rules. The metadata of its prompt is a row of the
    benchmark's evaluation_metadata.jsonl: ``tag``, ``include`` and, in some rows, ``exclude``.

    Of every class, the best M = ``max_per_class`` detections above the threshold are seen
    (``threshold``, but ``counting_threshold`` where the tag is "counting"). These must hold:

        include   at least ``count`` objects are seen; only the best ``count`` go on
        color     all of these have the color
        position  the target clause holds, and each of these is in the relation to each object of
                  the target, as ``composition`` defines it; not looked at if the color fails
        exclude   fewer than ``count`` objects of the class are seen

    ``mode`` "binary" is 1 if all hold, else 0: the benchmark's score. "continuous" (ours) is the
    share of conditions that hold, where each count, color, position and excluded class is one, and
    a color or position without enough objects does not hold; it is 1 where "binary" is. In contrast
    to ``composition``, objects beyond the wanted number cost nothing unless excluded.

    The benchmark's "overall" is the mean over tags of the mean over pictures, see ``summary``; its
    prompts have four pictures each. ``detector`` and ``clip`` are as in ``composition``.

    The rules are the benchmark's, the eyes are not: it detects with a Mask2Former trained on COCO
    at thresholds 0.3 and 0.9 and without suppressing overlaps, and shows CLIP ViT-L/14 the object
    alone, cut out by its mask, to name the color. Here a zero-shot detector finds the boxes, of
    which overlapping ones of a class are dropped, ``counting_threshold`` defaults to ``threshold``
    since such detectors are less confident, and CLIP sees the whole box. So compare models under
    this score, but not with published ones; how far it agrees with them was not measured.

    Not differentiable. Raises ValueError as ``composition`` does. Source: Ghosh et al. 2023 (arXiv
    2310.11513), evaluation/evaluate_images.py at 16f1681 of github.com/djghosh13/geneval (MIT).
    """

    name = "geneval"
    modes = ("binary", "continuous")
    gradient_hint = "the composition reward with soft=true asks for the same with a gradient"

    def __init__(
        self,
        detector: str | Detector = "IDEA-Research/grounding-dino-tiny",
        mode: str = "binary",
        threshold: float = 0.3,
        counting_threshold: float | None = None,
        max_per_class: int = 16,
        clip: str | None = None,
    ):
        super().__init__(detector, mode, threshold, counting_threshold, max_per_class, clip)

    def _score(self, image: Tensor, known: dict, detections: list[Detection]) -> float:
        seen = self._seen(known, detections)
        held: list[bool] = []
        groups: list[list[Detection]] = []  # the objects of each clause; none if it failed
        for clause in known["include"]:
            best = seen[clause["class"]][: clause["count"]]
            own = [len(best) == clause["count"]]
            if "color" in clause:
                asked = clause["color"]
                own.append(own[0] and all(self._color(image, one, asked) == asked for one in best))
            if "position" in clause:
                relation, target = clause["position"]
                pairs = [(a.box, b.box) for a in best for b in groups[target]]
                own.append(all(own) and bool(pairs) and all(holds(relation, *p) for p in pairs))
            groups.append(best if all(own) else [])
            held += own
        held += [len(seen[c["class"]]) < c["count"] for c in known.get("exclude", [])]
        return float(all(held)) if self.mode == "binary" else sum(held) / len(held)


def summary(values: Tensor, metadata: Sequence[dict]) -> dict[str, float]:
    """The mean of the values (n,) for each tag, and "overall", the mean of these means."""
    tags = [known["tag"] for known in metadata]
    means = {
        tag: values[torch.tensor([each == tag for each in tags])].mean().item()
        for tag in dict.fromkeys(tags)
    }
    return means | {"overall": sum(means.values()) / len(means)}
