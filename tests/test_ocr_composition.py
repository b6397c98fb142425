"""The rewards that read text and count objects, with real engines, models and scenes."""

import random
import re
import socket
from typing import Any

import numpy as np
import pytest
import torch
from helpers_clip import tiny_clip
from PIL import Image, ImageDraw, ImageFont

import rewards.composition
from diffalign.emoji_world import detector as emoji
from diffalign.emoji_world.scenes import KINDS, alterations, caption, render, sample_scene
from rewards import build, check
from rewards.composition import Composition, Detection, ZeroShot, holds
from rewards.ocr import OCR, edit_score, levenshtein, quoted_text


def pixels(pictures):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255 for p in pictures])


def sign(text, size=256, ink: Any = "black", paper: Any = "white"):
    """A picture of ``text``, which may have several lines, that fills most of its width."""
    widest = max(ImageFont.load_default(100).getlength(line) for line in text.split("\n"))
    font = ImageFont.load_default(int(min(85 * size / widest, size / 2)))
    picture = Image.new("RGB", (size, size), paper)
    where = (size / 2, size / 2)
    ImageDraw.Draw(picture).multiline_text(where, text, ink, font, anchor="mm", align="center")
    return picture


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr")
    with pytest.MonkeyPatch.context() as patch:

        def no_network(*_):
            raise AssertionError("the engine connects")

        patch.setattr(socket.socket, "connect", no_network)
        reward = OCR()
        reward.read(pixels([sign("warm up")]))  # loads the models
    return reward


def test_levenshtein():
    for a, b, distance in (
        ("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)
    ):  # fmt: skip
        assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    ("target", "text", "score"),
    [
        ("Open", "o p e n", 1),
        ("OPEN", "we are openNOW", 1),
        ("OPEN", "OPN", 3 / 4),
        ("OPEN", "0PEM", 2 / 4),
        ("OPEN", "", 0),
        ("OPEN", "closed for the winter", 0),
        ("a b", "ab", 1),
    ],
)
def test_edit_score(target, text, score):
    assert edit_score(target, text) == pytest.approx(score, abs=1e-12)


def test_quoted_text():
    assert quoted_text('a sign that says "Open now" by a "door"') == "Open now"
    assert quoted_text("a sign that says “Open”") == "Open"
    assert quoted_text("it's \"a'b\"") == "a'b"
    for prompt in ("a sign", 'an "open quote', 'a ""', 'a "  " sign', "it's 'OPEN'"):
        with pytest.raises(ValueError, match="no text in double quotes") as caught:
            OCR.check_prompts(['a "fine" prompt', prompt])
        assert repr(prompt) in str(caught.value)
    OCR.check_prompts(['a "fine" prompt', "“another”"], [{}, {}])


def test_ocr_reads_text(ocr):
    pictures = [
        sign("OPEN"),
        sign("OPEN", size=64),
        sign("fresh\nbread", size=192, ink=(220, 30, 30), paper=(240, 220, 120)),
        sign("diff align", ink=(30, 60, 220), paper=(250, 150, 150)),
        sign("Stop 42", ink="white", paper=(10, 70, 20), size=1024),
    ]
    texts = ["OPEN", "open", "Fresh Bread", "diff align", "STOP 42"]
    prompts = [f'a sign that says "{text}"' for text in texts]
    scores = [ocr(pixels([p]), [prompt]) for p, prompt in zip(pictures, prompts, strict=True)]
    assert torch.equal(torch.cat(scores), torch.ones(5))
    assert scores[0].dtype == torch.float32
    assert ocr(pixels(pictures[:1]), prompts[2:3]).item() < 0.5
    near = ocr(pixels([sign("OPEN")]), ['a sign that says "OPENED"'])
    assert near.item() == pytest.approx(1 - 2 / 6)
    blank = pixels([Image.new("RGB", (64, 64), "gray")])
    assert ocr(blank, ['"OPEN"']).item() == 0


def test_ocr_batch_equals_one_by_one(ocr):
    images = pixels([sign("closed"), sign("42 km")])
    prompts = ['"close"', '"43 miles"']
    together = ocr(images, prompts)
    alone = torch.cat([ocr(images[i : i + 1], prompts[i : i + 1]) for i in range(2)])
    assert torch.equal(together, alone)
    assert 0 < together[1] < together[0] == 1


def test_ocr_gives_the_engine_bgr_bytes(ocr, monkeypatch):
    seen = []

    class Engine:
        def __call__(self, array):
            seen.append(array)
            return type("Output", (), {"txts": ("OP", "en")})

    monkeypatch.setattr(ocr, "engine", Engine())
    images = torch.tensor([1.4, 0.5, -0.2]).view(1, 3, 1, 1).expand(1, 3, 4, 6)
    assert ocr(images, ['"open up"']).item() == pytest.approx(4 / 6)
    assert (seen[0].shape, seen[0].dtype) == ((341, 512, 3), np.uint8)  # enlarged
    assert seen[0][0, 0].tolist() == [0, 128, 255]
    assert seen[0].flags["C_CONTIGUOUS"]

    def broken(array):
        raise RuntimeError("engine failed")

    monkeypatch.setattr(ocr, "engine", broken)
    with pytest.raises(RuntimeError, match="engine failed"):
        ocr(images, ['"open"'])
    with pytest.raises(ValueError, match="'a dog' has no text in double quotes"):
        ocr(images, ["a dog"])


def test_ocr_min_confidence(ocr):
    image = pixels([sign("OPEN", size=64)])
    assert OCR(min_confidence=0.0).read(image) == ["OPEN"]
    assert OCR(min_confidence=1.0).read(image) == [""]
    values: list[Any] = [-0.1, 1.5, True, "high", None]
    for value in values:
        with pytest.raises(ValueError, match="min_confidence="):
            OCR.check_options(min_confidence=value)


SIDE = 20


def thing(label, x, y, color=None, score=0.8, width=SIDE, height=SIDE):
    return Detection(label, score, (x, y, x + width, y + height), color)


def score(include, things, exclude=(), tag="", **options):
    """The reward of one image in which the detector finds ``things``."""
    images, asked = torch.full((1, 3, 80, 100), 0.5), []

    def detector(images, classes):
        asked.extend(classes)
        return [things]

    known = {"tag": tag, "include": include, "exclude": list(exclude)}
    value = Composition(detector, **options)(images, ["a prompt"], [known])
    classes = {clause["class"] for clause in [*include, *exclude]}
    assert set(asked[0]) == classes
    assert len(asked[0]) == len(classes)
    assert (value.shape, value.dtype) == ((1,), torch.float32)
    return pytest.approx(value.item(), abs=1e-6)


def dogs(n, **more):
    return [thing("dog", 4 * i, 10, **more) for i in range(n)]


def test_counts():
    two = [{"class": "dog", "count": 2}]
    for found, expected in ((0, 0), (1, 0.5), (2, 1), (3, 0.5), (4, 0), (6, -1)):
        assert score(two, dogs(found)) == expected
        assert score(two, dogs(found), mode="strict") == float(found == 2)
    assert score(two, [*dogs(2), thing("wolf", 0, 0)]) == 1
    one = [{"class": "dog", "count": 1}]
    assert score(one, dogs(40)) == 1 - 15  # no more than 16 of a class
    assert score(one, dogs(40), max_per_class=3) == -1
    both = [*one, {"class": "cat", "count": 2}]
    assert score(both, [*dogs(1), thing("cat", 50, 10)]) == (1 + 0.5) / 2


def test_thresholds():
    one = [{"class": "dog", "count": 1}]
    sure, unsure, unlikely = (dogs(1, score=s) for s in (0.95, 0.5, 0.2))
    found = [*unlikely, *sure, *unsure]
    assert score(one, found) == 0
    assert score(one, found, threshold=0.6) == 1
    assert score(one, found, threshold=0.1) == -1
    assert score(one, found, tag="counting") == 0
    assert score(one, found, tag="counting", counting_threshold=0.9) == 1
    assert score(one, found, tag="colors", counting_threshold=0.9) == 0
    assert score(one, unsure, threshold=0.5) == 0  # above it, not at it


def test_best_scores_are_kept():
    red = [{"class": "dog", "count": 1, "color": "red"}]
    found = [*dogs(1, color="blue", score=0.5), *dogs(1, color="red", score=0.9)]
    assert score(red, found, max_per_class=1) == 1
    assert score(red, found[::-1], max_per_class=1) == 1


def test_colors():
    red = [{"class": "dog", "count": 2, "color": "red"}]
    for colors, expected in ((("red", "red"), 1), (("red", "blue"), 0.75), (("blue",) * 2, 0.5)):
        found = [thing("dog", 30 * i, 10, c) for i, c in enumerate(colors)]
        assert score(red, found) == expected
        assert score(red, found, mode="strict") == float(expected == 1)
    assert score(red, dogs(1, color="red")) == (0.5 + 0) / 2  # a wrong count: colours are not read
    with pytest.raises(ValueError, match=r"a red dog is asked for.*`clip`"):
        score(red, dogs(2))


def test_positions():
    include = [{"class": "cat", "count": 1}]
    dog = {"class": "dog", "count": 1, "position": ["left of", 0]}
    cat, left, right = thing("cat", 50, 30), thing("dog", 10, 30), thing("dog", 75, 30)
    assert score([*include, dog], [cat, left]) == 1
    assert score([*include, dog], [cat, left], mode="strict") == 1
    assert score([*include, dog], [cat, right]) == 2 / 3  # half of the dog's credit was the bug
    assert score([*include, dog], [cat, right], mode="strict") == 0
    assert score([*include, dog], [cat]) == (1 + 0 + 0) / 3
    assert score([*include, dog], [left]) == (0 + 1 + 0) / 3  # nothing to be left of
    assert score([*include, dog], [cat, left, left]) == (1 + 0 + 0) / 3
    red_cat = [{"class": "cat", "count": 1, "color": "red"}]
    blue = thing("cat", 50, 30, "blue")
    assert score([*red_cat, dog], [blue, left]) == (1 + 0 + 1 + 0) / 4  # the target is wrong
    two = {"class": "dog", "count": 2, "position": ["left of", 0]}
    assert score([*include, two], [cat, left, right]) == 2 / 3  # each has to be
    assert score([*include, two], [cat, left, left]) == 1
    red_dog = {**dog, "color": "red"}
    assert score([*include, red_dog], [cat, thing("dog", 10, 30, "blue")]) == (1 + 1 + 0 + 1) / 4
    assert score([*include, red_dog], [cat]) == (1 + 0 + 0) / 3  # one 0 for both


def test_relations_have_margins():
    box = (40.0, 40.0, 60.0, 60.0)
    moves = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
    for relation, (dx, dy) in moves.items():

        def moved(along, across, dx=dx, dy=dy):
            x, y = 40 + along * dx + across * dy, 40 + along * dy + across * dx
            return (x, y, x + 20, y + 20)

        # sizes add up to 40, a margin of 4: along - 4 > |offset| / 2
        for along, across, expected in (
            (8.1, 0, True), (7.9, 0, False), (0, 0, False), (-30, 0, False), (30, 10, True),
            (30, 40, True), (30, 42, True), (30, 43, False), (10, 30, False),
        ):  # fmt: skip
            assert holds(relation, moved(along, across), box) is expected, (relation, along, across)
        others = [r for r in moves if r != relation and holds(r, moved(30, 0), box)]
        assert others == []
    diagonal = (10.0, 10.0, 30.0, 30.0)
    assert holds("left of", diagonal, box)
    assert holds("above", diagonal, box)
    wide = (0.0, 40.0, 80.0, 60.0)
    assert not holds("left of", wide, (25.0, 40.0, 95.0, 60.0))


def test_exclude():
    one = [{"class": "dog", "count": 1}]
    no_cats = [{"class": "cat", "count": 1}]
    found = [*dogs(1), thing("cat", 50, 10)]
    assert score(one, found, no_cats) == 1
    assert score(one, found, no_cats, mode="strict") == 0
    assert score(one, found, [{"class": "cat", "count": 2}], mode="strict") == 1
    assert score(one, dogs(1), no_cats, mode="strict") == 1


def test_bad_metadata_is_refused():
    dog = {"class": "dog", "count": 1}
    cat = {"class": "cat", "count": 1}
    for known, message in (
        ({}, "include is None"),
        ({"include": []}, r"include is \[\]"),
        ({"include": [dog], "exclude": dog}, "exclude {'class"),
        ({"include": ["dog"]}, "'dog' is not an object"),
        ({"include": [{"class": "dog"}]}, "count must be 1 or more"),
        ({"include": [{"class": "dog", "count": 0}]}, "count must be 1 or more"),
        ({"include": [{"class": "dog", "count": True}]}, "count must be 1 or more"),
        ({"include": [{"count": 1}]}, "no class"),
        ({"include": [{"class": "a. b", "count": 1}]}, "without full stops"),
        ({"include": [dog | {"colour": "red"}]}, "has 'colour'; known: class, count, color"),
        ({"include": [dog | {"color": 3}]}, "color a text"),
        ({"include": [dog], "exclude": [dog | {"color": "red"}]}, "known: class, count$"),
        ({"include": [dog | {"position": ["left of", 0]}, cat]}, "of an earlier clause"),
        ({"include": [cat, dog | {"position": ["beside", 0]}]}, "not one of left of, right of"),
        ({"include": [cat, dog | {"position": ["above", -1]}]}, "of an earlier clause"),
        ({"include": [cat, dog | {"position": "above"}]}, "of an earlier clause"),
    ):
        with pytest.raises(ValueError, match=r"prompt 'bad': .*composition reward needs") as caught:
            Composition.check_prompts(["good", "bad"], [{"include": [dog]}, known])
        assert re.search(message, str(caught.value.__cause__)), caught.value
    reward = Composition(lambda images, classes: [[]])
    with pytest.raises(ValueError, match="prompt 'a dog': include is None"):
        reward(torch.rand(1, 3, 8, 8), ["a dog"])


def test_options_are_checked():
    kind = "rewards.composition:Composition"
    for options, message in (
        ({"mode": "half"}, "mode='half' is not one of partial, strict"),
        ({"threshold": 1.0}, r"threshold=1.0 is not a number in \[0, 1\)"),
        ({"threshold": None}, "threshold=None"),
        ({"counting_threshold": "high"}, "counting_threshold='high'"),
        ({"max_per_class": 0}, "max_per_class=0"),
        ({"detector": "./none"}, r"detector='./none' does not exist"),
        ({"detector": "math:no_such"}, "has no 'no_such'"),
        ({"detector": "math:pi"}, "detector='math:pi' is not callable"),
        ({"clip": "assets/none"}, "assets/none does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            check({"c": {"type": kind, **options}})
    check({"c": {"type": kind, "counting_threshold": None, "detector": "nobody/no-such-model"}})


def test_clip_names_the_color(clip_folder, monkeypatch):
    """A stand-in for CLIP's two embeddings: colour words, and the mean pixel of the crop."""
    words = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "black": (0, 0, 0)}
    reward = Composition(
        lambda images, classes: [[thing("dog", 10, 20, width=30)]], clip=clip_folder
    )
    assert reward.clip is not None
    asked, crops = [], []

    def texts(prompts):
        asked.extend(prompts)
        return torch.tensor(
            [next((c for w, c in words.items() if f" {w}" in p), (0, 0, 0)) for p in prompts]
        ).float()

    def features(images):
        crops.append(images)
        return images.mean((2, 3))

    monkeypatch.setattr(reward.clip, "text_features", texts)
    monkeypatch.setattr(reward.clip, "image_features", features)
    images = torch.zeros(1, 3, 80, 100)
    images[:, 0] = 1  # red, but for the blue dog
    images[:, :, 20:40, 10:40] = torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1)
    for color, expected in (("blue", 1), ("red", 0.5), ("gray", 0.5)):
        known = {"include": [{"class": "dog", "count": 1, "color": color}]}
        assert reward(images, ["p"], [known]).item() == expected
    assert crops[0].shape == (1, 3, 32, 32)
    assert torch.allclose(crops[0].mean((0, 2, 3)), torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)
    own = ["a photo of a red dog", "a photo of a red-colored dog", "a photo of a red object"]
    assert asked[:3] == own
    assert len(asked) == 30 + 30 + 33
    outside = Composition(lambda images, classes: [[thing("dog", 99.5, -50)]], clip=clip_folder)
    assert 0.5 <= outside(images, ["p"], [known]).item() <= 1  # one pixel at least is left


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


def words_of_bert():
    """A vocabulary with BERT's ids of the special tokens, which Grounding DINO has in its code."""
    words = [f"[unused{i}]" for i in range(1100)]
    known = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: "."}
    for i, word in known.items() | dict(enumerate(["dog", "cat", "teddy", "bear"], 300)).items():
        words[i] = word
    return {word: i for i, word in enumerate(words)}


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory):
    import transformers as hf

    folder = str(tmp_path_factory.mktemp("dino"))
    config = hf.GroundingDinoConfig(
        backbone_config={
            "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [1] * 4,
            "num_heads": [1] * 4, "window_size": 4, "out_indices": [2, 3, 4],
        },
        text_config=hf.BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=20,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        hf.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = hf.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    tokenizer = hf.BertTokenizer(vocab=words_of_bert())
    hf.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["OwlViT", "Owlv2"])
def owl(request, tmp_path_factory):
    import transformers as hf

    folder, kind = str(tmp_path_factory.mktemp(request.param)), request.param
    tokenizer = hf.CLIPTokenizer.from_pretrained(tiny_clip(folder))
    tokenizer.model_max_length = 16
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = getattr(hf, f"{kind}Config")(
        text_config=text,
        vision_config=tower | {"image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = getattr(hf, f"{kind}ForObjectDetection")(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default saturates boxes and scores
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
    images = getattr(hf, f"{kind}ImageProcessor")(size={"height": 64, "width": 64})
    getattr(hf, f"{kind}Processor")(images, tokenizer).save_pretrained(folder)
    return folder


CLASSES = [["dog", "teddy bear"], ["cat"], ["dog", "teddy bear"]]


def valid(found, classes, height, width):
    assert len(found) == len(classes)
    for detections, names in zip(found, classes, strict=True):
        assert detections
        for one in detections:
            x0, y0, x1, y1 = one.box
            assert one.label in names
            assert 0 <= one.score <= 1
            assert one.color is None
            assert -width < x0 < x1 < 2 * width
            assert -height < y0 < y1 < 2 * height


def same(first, second):
    assert [[d.label for d in f] for f in first] == [[d.label for d in s] for s in second]
    for a, b in ((a, b) for f, s in zip(first, second, strict=True) for a, b in zip(f, s)):  # noqa: B905
        assert a.score == pytest.approx(b.score, abs=1e-4)
        assert a.box == pytest.approx(b.box, abs=1e-2)


def photos():
    return torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(1))


def test_grounding_dino(grounding_dino, monkeypatch):
    model, images = ZeroShot(grounding_dino, threshold=0.0), photos()
    found = model(images, CLASSES)
    valid(found, CLASSES, 40, 60)
    monkeypatch.setattr(rewards.composition, "BATCH", 1)
    same(found, model(images, CLASSES))
    monkeypatch.setattr(rewards.composition, "NMS_IOU", 1.0)
    (found,) = model(images[:1], CLASSES[:1])
    assert len(found) == 20
    bytes_ = [(images[0] * 255 + 0.5).floor().to(torch.uint8)]
    inputs = model.processor(images=bytes_, text=[CLASSES[0]], return_tensors="pt")
    tokens = model.processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["[CLS]", "dog", ".", "teddy", "bear", ".", "[SEP]"]
    with torch.no_grad():
        output = model.model(**inputs)
    # transformers' own decoding: its boxes; its score is over all tokens, full stops too
    own = model.processor.post_process_grounded_object_detection(
        output, threshold=0.0, text_threshold=0.0, target_sizes=[(40, 60)]
    )[0]
    p = output.logits[0].sigmoid()
    dog, bear = p[:, 1], p[:, 3:5].amax(-1)
    expected = sorted(
        ((max(d, b), "dog" if d > b else "teddy bear", box)
         for d, b, box in zip(dog.tolist(), bear.tolist(), own["boxes"].tolist(), strict=True)),
        reverse=True,
    )  # fmt: skip
    same([found], [[Detection(name, s, tuple(box)) for s, name, box in expected]])
    assert {one.label for one in found} == {"dog", "teddy bear"}


def test_owl(owl, monkeypatch):
    model, images = ZeroShot(owl, threshold=0.0), photos()
    found = model(images, CLASSES)
    valid(found, CLASSES, 60, 60)
    monkeypatch.setattr(rewards.composition, "BATCH", 1)
    same(found, model(images, CLASSES))
    monkeypatch.setattr(rewards.composition, "NMS_IOU", 1.0)
    (found,) = model(images[:1], CLASSES[:1])
    assert len(found) == 16
    bytes_ = [(images[0] * 255 + 0.5).floor().to(torch.uint8)]
    texts = [["a photo of a dog", "a photo of a teddy bear"]]
    inputs = model.processor(images=bytes_, text=texts, return_tensors="pt")
    with torch.no_grad():
        output = model.model(**inputs)
    own = model.processor.post_process_grounded_object_detection(
        output, threshold=0.0, target_sizes=[(40, 60)], text_labels=[CLASSES[0]]
    )[0]
    rows = zip(own["text_labels"], own["scores"].tolist(), own["boxes"].tolist(), strict=True)
    expected = sorted((Detection(n, s, tuple(b)) for n, s, b in rows), key=lambda d: -d.score)
    same([found], [expected])


def test_overlapping_boxes_count_once():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [30, 0, 40, 10], [0, 0, 10, 10]]).float()
    scores, labels = torch.tensor([0.6, 0.9, 0.5, 0.4]), torch.tensor([0, 0, 0, 1])
    found = rewards.composition._detections(["dog", "cat"], boxes, scores, labels)
    assert [d.label for d in found] == ["dog", "dog", "cat"]
    assert [round(d.score, 1) for d in found] == [0.9, 0.5, 0.4]
    assert found[0].box == (1, 0, 11, 10)


def test_detectors_in_the_reward(grounding_dino, clip_folder):
    spec = {"type": "rewards.composition:Composition", "detector": grounding_dino}
    known = [{"include": [{"class": name, "count": 1}]} for name in ("dog", "cat", "dog")]
    total = build({"c": {**spec, "threshold": 0.0, "clip": clip_folder}})
    images = photos()
    value = total(images, ["p"] * 3, known)
    assert value.isfinite().all()
    assert value.min() >= -15
    assert not any(p.requires_grad for p in total.parameters())
    colored = [{"include": [{"class": "dog", "count": 1, "color": "red"}]}] * 3
    single = build({"c": {**spec, "threshold": 0.0, "max_per_class": 1, "clip": clip_folder}})
    assert set(single(images, ["p"] * 3, colored).tolist()) <= {0.5, 1.0}
    with pytest.raises(ValueError, match=r"is a clip; use one of|Unrecognized configuration"):
        ZeroShot(clip_folder, 0.3)


EMOJI = "diffalign.emoji_world.detector:detect"


def test_emoji_world_scenes():
    rng = random.Random(5)
    scenes = [sample_scene(rng, KINDS[i % len(KINDS)], reserved=None) for i in range(48)]
    prompts = [caption(scene) for scene in scenes]
    images = pixels([render(scene) for scene in scenes])
    reward = Composition(EMOJI)
    right = reward(images, prompts, [emoji.metadata(p) for p in prompts])
    others = prompts[4:] + prompts[:4]
    wrong = reward(images, others, [emoji.metadata(p) for p in others])
    print(f"\nEmojiWorld: own prompts {right.mean():.3f}, others' {wrong.mean():.3f}")
    assert right.mean() >= 0.9
    assert wrong.mean() < 0.2
    larger = torch.nn.functional.interpolate(images, (128, 192), mode="nearest")
    assert torch.equal(reward(larger, prompts, [emoji.metadata(p) for p in prompts]), right)
    strict = Composition(EMOJI, mode="strict")
    assert strict(images, prompts, [emoji.metadata(p) for p in prompts]).mean() >= 0.85


def test_emoji_world_alterations():
    rng, means = random.Random(6), {}
    reward = Composition(EMOJI)
    for i in range(24):
        scene = sample_scene(rng, KINDS[i % len(KINDS)], reserved=None)
        known = emoji.metadata(caption(scene))
        for what, altered in alterations(scene, rng).items():
            if what != "background":
                images = pixels([render(scene), render(altered)])
                means.setdefault(what, []).append(reward(images, ["p"] * 2, [known] * 2))
    for what, values in means.items():
        own, other = torch.stack(values).mean(0).tolist()
        print(f"\n{what}: {own:.3f}, altered {other:.3f} ({len(values)} scenes)", end="")
        assert own >= 0.85, what
        assert other < own - 0.2, what


def test_emoji_world_metadata():
    assert emoji.metadata("a red dog left of a cat on a pink background") == {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
    }
    assert emoji.metadata("three bunches of grapes")["include"] == [{"class": "grapes", "count": 3}]
    with pytest.raises(ValueError, match="not one EmojiWorld can check"):
        emoji.metadata("a photo of democracy")
    with pytest.raises(
        ValueError, match="'dgo' is not an object of EmojiWorld; did you mean 'dog'"
    ):
        emoji.detect(torch.rand(1, 3, 64, 64), [["dgo"]])
