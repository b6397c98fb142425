from collections import Counter
from math import lcm

import pytest

from diffalign.prompts import Prompt, PromptSampler, load


def write(tmp_path, data, name="p.txt"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_txt(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfa cat\r\n\r\n# no\n  a \xc3\xa9 dog \n\xe2\x80\xa8x\ry")
    assert [p.text for p in load(path)] == ["a cat", "a é dog", "x", "y"]
    assert load(path)[0].metadata == {}


def test_jsonl(tmp_path):
    text = '{"prompt": "a\u2028b", "n": 2}\n\n{"prompt": "# kept"}'
    assert load(write(tmp_path, text, "p.jsonl")) == [
        Prompt("a\u2028b", {"n": 2}),
        Prompt("# kept"),
    ]


@pytest.mark.parametrize(
    ("data", "name", "words"),
    [
        (b"ok\nna\xefve\n", "p.txt", ["p.txt:2", "0xef at offset 5 is not UTF-8", "iconv"]),
        (b"", "p.txt", ["p.txt has no prompts"]),
        (b"# only\n\n", "p.txt", ["p.txt has no prompts"]),
        (b"", "p.jsonl", ["p.jsonl has no prompts"]),
        (b"a\nb\0c\n", "p.txt", ["p.txt:2", "NUL"]),
        (b"{}", "p.json", [".txt or .jsonl, not '.json'"]),
        (b'{"prompt": "a"}\n{"prompt"\n', "p.jsonl", ["p.jsonl:2", "invalid JSON"]),
        (b'{"text": "a", "n": 1}\n', "p.jsonl", ["p.jsonl:1", 'no "prompt"', "text, n"]),
        (b'{"prompt": 3}\n', "p.jsonl", ['"prompt" is 3, not a string']),
        (b'{"prompt": " "}\n', "p.jsonl", ['"prompt" is empty']),
        (b'{"prompt": "a\\u0000"}\n', "p.jsonl", ["p.jsonl:1", "NUL"]),
        (b'["a"]\n', "p.jsonl", ["p.jsonl:1", "not an object"]),
    ],
)
def test_refused(tmp_path, data, name, words):
    path = write(tmp_path, data, name)
    with pytest.raises(ValueError, match=r".") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "a", "train.txt")
    with pytest.raises(ValueError, match=r"trian\.txt does not exist; did you mean 'train\.txt'"):
        load(tmp_path / "trian.txt")
    with pytest.raises(ValueError, match="there is no such file in"):
        load(tmp_path / "nowhere" / "trian.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match="cannot read"):
        load(tmp_path / "folder.txt")


@pytest.mark.parametrize(
    ("n", "groups"), [(1, 1), (8, 8), (9, 8), (10, 4), (7, 3), (5, 4), (25, 8), (11, 10), (13, 7)]
)
@pytest.mark.parametrize("seed", range(5))
def test_sampler_uses_all_equally_without_repeats(n, groups, seed):
    sampler = PromptSampler(n, groups, seed)
    epochs = 3 * lcm(n, groups) // groups
    used: Counter[int] = Counter()
    for k in range(epochs):
        ids = sampler.epoch(k)
        assert len(ids) == len(set(ids)) == groups
        used.update(ids)
        if used:  # at no time is a prompt more than one pass ahead, but for the displaced ones
            assert max(used.values()) - min(used[i] for i in range(n)) <= 2
    assert set(used.values()) == {epochs * groups // n}
    assert set(used) == set(range(n))


def test_sampler_is_a_function_of_seed_and_epoch():
    a, b = PromptSampler(11, 4, 3), PromptSampler(11, 4, 3)
    forward = [a.epoch(k) for k in range(30)]
    assert [b.epoch(k) for k in reversed(range(30))] == forward[::-1]
    assert forward != [PromptSampler(11, 4, 4).epoch(k) for k in range(30)]
    assert len({tuple(ids) for ids in forward}) > 25
    assert all(isinstance(i, int) for i in forward[0])


@pytest.mark.parametrize("groups", [0, 6])
def test_sampler_refuses_more_groups_than_prompts(groups):
    with pytest.raises(ValueError, match=rf"data.groups={groups} .* file of 5"):
        PromptSampler(5, groups)
