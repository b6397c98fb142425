"""What the `vlm` reward asks in each mode, and how its answers are read.

The texts of "unified" and "unified_axes" are those that UnifiedReward (arXiv 2503.05236) was
trained to answer, word for word as its repository CodeGoat24/UnifiedReward asks them: other words
would give other scores. The rest is ours.
"""

from __future__ import annotations

TEMPLATES = {
    "score": (
        'The image was generated from the text "{prompt}". Rate how well it shows what the text '
        "asks for (objects, their number, colours, positions, any written words) and how well it "
        "is made, from {minimum} (nothing fits) to {maximum} (flawless). Reason briefly, then end "
        "with <score>NUMBER</score>."
    ),
    "yes": 'Does the image show exactly this: "{prompt}"? Answer with one word, Yes or No.',
    "levels": (
        "How would you rate the quality of this image? Answer with one word: excellent, good, "
        "fair, poor or bad."
    ),
    "unified": (
        "You are given a text caption and a generated image based on that caption. Your task is to "
        "evaluate this image based on two key criteria:\n1. Alignment with the Caption: Assess how "
        "well this image aligns with the provided caption. Consider the accuracy of depicted "
        "objects, their relationships, and attributes as described in the caption.\n2. Overall "
        "Image Quality: Examine the visual quality of this image, including clarity, detail "
        "preservation, color accuracy, and overall aesthetic appeal.\nExtract key elements from "
        "the provided text caption, evaluate their presence in the generated image using the "
        "format: 'element (type): value' (where value=0 means not generated, and value=1 means "
        "generated), and assign a score from 1 to 5 after 'Final Score:'.\nYour task is provided "
        "as follows:\nText Caption: [{prompt}]"
    ),
    "unified_axes": (
        "You are presented with a generated image and its associated text caption. Your task is to "
        "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to "
        "5):\n- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, "
        "object distortions, etc.).\n- Style Score: How aesthetically appealing the image looks, "
        "regardless of caption accuracy.\n\nOutput your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]"
    ),
    "pairwise": (
        'Both images were generated from the text "{prompt}". Which shows better what the text '
        "asks for (objects, their number, colours, positions, any written words) and is better "
        "made? Reason briefly, then end with <answer>1</answer>, <answer>2</answer> or, only if "
        "neither is better, <answer>tie</answer>."
    ),
}
NUMBER = r"([-+]?\d+(?:\.\d+)?)"
PATTERNS = {
    "score": rf"<score>\s*{NUMBER}\s*</score>",
    "unified": rf"Final Score:[\s*\[]*{NUMBER}",
    "unified_axes": rf"AXIS Score(?: \(1-5\))?:[\s*\[]*{NUMBER}",
    "pairwise": r"<answer>\s*(1|2|tie)\s*</answer>",
}
CRITIQUE = (
    'The image was generated from the text "{prompt}". List what in it does not match the text or '
    "is badly made, most important first, in a few short sentences. If nothing is wrong, say so."
)
REFINE = (
    'The image was generated from the text "{prompt}". A critic said of it: "{critique}" Rewrite '
    "the text so that a text-to-image model avoids these faults. Keep everything the text asks "
    "for, add nothing that changes its meaning. End with <prompt>NEW TEXT</prompt>."
)
RANGES = {"unified": (1, 5), "unified_axes": (1, 5)}  # the others' is (0, 10)
AXES = ("Alignment", "Coherence", "Style")
WORDS = {  # whose probabilities are read, and the value of each
    "yes": {"Yes": 1.0, "No": 0.0},
    "levels": {"excellent": 1.0, "good": 0.75, "fair": 0.5, "poor": 0.25, "bad": 0.0},
}
WIN = {"1": 1.0, "2": 0.0, "tie": 0.5}
