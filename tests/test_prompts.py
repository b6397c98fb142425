from collections import Counter
from math import lcm

import pytest

from diffalign.config.prompts import Prompt, PromptSampler, collect, load
from diffalign.config.text import expand_user


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
        (b"{}", "p.json", [".txt or .jsonl, not '.json'", "one prompt a line"]),
        (b"a", "p", [".txt or .jsonl, not ''"]),
        (b"a\nb\x1b[0m\n", "p.txt", ["p.txt:2", "the control character U+001B"]),
        ("пёс\n".encode("utf-16le"), "p.txt", ["p.txt:1", "UTF-16"]),
        ("a dog\na cat".encode("utf-16le"), "p.txt", ["looks like UTF-16", "iconv -f utf-16le"]),
        ("a dog\na cat".encode("utf-16be"), "p.txt", ["looks like UTF-16", "iconv -f utf-16be"]),
        ("一只猫".encode("utf-16le"), "p.txt", ["p.txt:1", "not UTF-8"]),
        ("a dog".encode("utf-16")[:-1], "p.txt", ["p.txt begins as UTF-16", "save it as UTF-8"]),
        (b'{"prompt": "ok"}\n{"prompt": "\\ud800"}\n', "p.jsonl", ["p.jsonl:2", "surrogate"]),
        (b'{"prompt": "a", "k": [{"\\udfff": 1}]}\n', "p.jsonl", ["p.jsonl:1", "surrogate"]),
        (b'{"prompt": "a", "k": NaN}\n', "p.jsonl", ["p.jsonl:1", "NaN is not a JSON number"]),
        (b'[{"prompt": "a"},\n{"prompt": "b"}]', "p.jsonl", ["p.jsonl:1", "no list around"]),
        (b'{"prompt": "a", "k": ' + b"[" * 10**5, "p.jsonl", ["p.jsonl:1", "nested"]),
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
    with pytest.raises(ValueError, match="there is none in"):
        load(tmp_path / "nowhere" / "trian.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt is a folder; give a"):
        load(tmp_path / "folder.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "null.txt").symlink_to("/dev/zero")
    for name in ("loop.txt", "null.txt"):
        with pytest.raises(ValueError, match=rf"{name} is no regular file"):
            load(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(tmp_path, encoding):
    path = write(tmp_path, "пёс, 猫\r\n🐶\n".encode(encoding), "P.TXT")
    assert [p.text for p in load(path)] == ["пёс, 猫", "🐶"]


@pytest.mark.parametrize("mark", ["le", "be"])
def test_a_mark_of_the_other_byte_order(tmp_path, mark):
    for bits in ("16", "32"):
        path = write(tmp_path, "\ufeffa\nb".encode(f"utf-{bits}{mark}"))
        assert [p.text for p in load(path)] == ["a", "b"]


def test_files_that_were_joined_and_a_home_folder(tmp_path, monkeypatch):
    write(tmp_path, b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [p.text for p in load("~/p.txt")] == ["a", "b"]
    assert expand_user(["--prompts", "~/p.txt", "--out=~/g.png", "a ~ b", "~", "--x=~"]) == [
        *("--prompts", f"{tmp_path}/p.txt", f"--out={tmp_path}/g.png", "a ~ b", "~", "--x=~")
    ]


def test_texts_and_files_in_any_mixture(tmp_path, monkeypatch):
    one, two = write(tmp_path, "a\nb"), write(tmp_path, '{"prompt": "c", "n": 1}', "q.JSONL")
    everything = [str(one), "d. e", two, Prompt("f"), {"prompt": "g", "n": 2}, ""]
    texts = ["a", "b", "d. e", "c", "f", "g", ""]
    assert [p.text for p in collect(everything)] == texts
    assert [p.metadata for p in collect(everything)][3:6] == [{"n": 1}, {}, {"n": 2}]
    assert collect(str(one)) == collect(one) == collect([one]) == [Prompt("a"), Prompt("b")]
    assert collect(Prompt("a")) == [Prompt("a")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()  # what is in this folder does not change what a word means
    for words in ("cat", "a sign.", "a photo.jpg", "3.5 cats"):
        assert collect([words]) == [Prompt(words)]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a red apple", ["prompts='a red apple' is one text", "write ['a red apple']"]),
        ({"prompt": "a"}, ["is a mapping"]),
        ([1, 2], ["prompts[0]: 1 is not a text"]),
        (["a", None], ["prompts[1]: None is not a text"]),
        (7, ["7 is not a text"]),
        ([], ["prompts is empty"]),
        (["a", "caf\udce9"], ["prompts[1]", "bytes that are not UTF-8"]),
        (["\ud800"], ["half of a surrogate pair"]),
        (["a\0"], ["NUL"]),
        (["a\x07"], ["U+0007"]),
        ([{"text": "a"}], ['no "prompt" among the keys text']),
        (["p.text"], ["p.text does not exist; did you mean 'p.txt'?"]),
        (["p.jsonl.gz"], ["p.jsonl.gz does not exist"]),
        (["q.json"], ["not '.json'"]),
        (["more/q"], ["not ''"]),
        (["/dev/null"], ["no regular file"]),
        (["more/"], ["more is a folder"]),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a")
    write(tmp_path, "{}", "q.json")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", "a", "q")
    with pytest.raises(ValueError, match=r".") as caught:
        collect(given)
    for word in words:
        assert word in str(caught.value)


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
