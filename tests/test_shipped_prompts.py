"""The prompt sets in assets/, and which config trains and evaluates on which."""

import re
import unicodedata
from pathlib import Path

import pytest
from open_clip.tokenizer import SimpleTokenizer

from diffalign.config import TrainConfig
from diffalign.config.prompts import load
from diffalign.emoji_world import claims

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
HUB = [p for p in CONFIGS if not p.stem.startswith("emoji_")]
SETS = {p.stem: p for p in (ROOT / "assets" / "prompts").glob("*.txt")}
configs = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
hub = pytest.mark.parametrize("path", HUB, ids=lambda p: p.stem)


def texts(path):
    return [p.text for p in load(path)]


def same(text):
    """What is left of a prompt that is compared: letters and digits, without case or accents."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join(re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c))))


def prompts(path):
    """The training and the evaluation prompts of a config."""
    config = TrainConfig.from_file(path)
    assert config.eval.prompts
    return texts(ROOT / config.data.prompts), texts(ROOT / config.eval.prompts)


@configs
def test_no_evaluation_prompt_is_trained_on(path):
    train, evaluated = ({same(t) for t in side} for side in prompts(path))
    assert train
    assert evaluated
    assert not train & evaluated


@hub
def test_models_of_the_hub_get_prompts_of_their_own(path):
    config = TrainConfig.from_file(path)
    for file in (config.data.prompts, config.eval.prompts):
        assert Path(str(file)).parent == Path("assets/prompts")


@pytest.mark.parametrize("name", ["general_train", "general_held_out", "signs_train"])
def test_their_prompts_are_none_of_emoji_world(name):
    for text in texts(SETS[name]):
        with pytest.raises(ValueError, match="not one EmojiWorld can check"):
            claims.parse(text)


@hub
def test_comments_count_the_prompts(path):
    train, evaluated = prompts(path)
    comments = " ".join(re.findall(r"# ?(.*)$", path.read_text("utf-8"), re.M))
    said = r"(\d+) (?:prompts|animals) of our own|our own (\d+) prompts"
    assert [int(a or b) for a, b in re.findall(said, comments)] == [len(train)]
    said = r"(\d+) (?:prompts that|prompts whose texts|animals that) are not trained on"
    assert [int(n) for n in re.findall(said, comments)] == [len(evaluated)]


def test_readme_counts_the_prompts():
    row = re.search(r"^\| prompts \| (.*) \|$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert row
    pairs = [len(texts(SETS[f"{n}_{s}"])) for n in ("general", "animals", "signs")
             for s in ("train", "held_out")]  # fmt: skip
    assert [int(n) for n in re.findall(r"\d+", row[1])] == pairs


@pytest.mark.parametrize("name", SETS)
def test_prompt_sets_are_clean(name):
    found, tokenizer = texts(SETS[name]), SimpleTokenizer()
    assert len({same(t) for t in found}) == len(found)
    for text in found:
        assert text == unicodedata.normalize("NFC", " ".join(text.split()))
        assert len(tokenizer.encode(text)) + 2 <= 77, text
        assert text.count('"') == (2 if name.startswith("signs") else 0), text


def test_signs_are_held_out_by_their_text_and_by_their_place():
    def parts(name):
        pairs = [re.fullmatch(r'(.*) that reads "(.+)"', t) for t in texts(SETS[name])]
        return [{same(p[i]) for p in pairs if p} for i in (1, 2)], len(pairs)

    (places, words), n = parts("signs_train")
    (new_places, new_words), m = parts("signs_held_out")
    assert len(words) == n
    assert len(new_words) == m
    assert not words & new_words
    assert not places & new_places
