"""Every shipped model of EmojiWorld is the one that was measured, and measures what docs say."""

import pytest
import torch

from diffalign.emoji_world.scenes import ASSETS
from diffalign.emoji_world.workshop import figures

DOCUMENTED = figures.documented()


def test_every_shipped_model_has_figures():
    shipped = {p.name for p in ASSETS.glob("emoji-*")} - {"emoji-world"}
    assert shipped <= set(figures.PROBES) == set(DOCUMENTED)


@pytest.mark.parametrize("model", figures.PROBES)
def test_the_weights_are_those_that_were_measured(model):
    assert figures.digest(model) == DOCUMENTED[model]["sha256"], (
        f"measure {model} again: python -m diffalign.emoji_world.workshop.figures {model}"
    )


@pytest.mark.parametrize("model", figures.PROBES)
def test_a_model_measures_what_is_documented(model):
    """With a part of the pictures: no figure more than three standard errors below."""
    torch.manual_seed(0)
    found, written = figures.PROBES[model](True), DOCUMENTED[model]["figures"]
    assert set(found) == set(written)
    for name, figure in found.items():
        bound = 3 * (figure.error**2 + written[name].error ** 2) ** 0.5
        assert figure.value >= written[name].value - bound, (name, str(figure), str(written[name]))


def test_docs_have_the_table_of_figures():
    text = (ASSETS.parent / "docs" / "emoji_world.md").read_text("utf-8")
    for line in figures.table().splitlines():
        assert line in text, line
