"""Text embeddings of a run: every distinct text goes through the encoders once.

They lie in memory, or, where they are more than that should hold, in files that are mapped into
it, of which the system keeps what is in use and which the processes of a machine share.
"""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .cond import Cond, joined
from .configs import text_options
from .sharding import Team

BATCH = 64  # texts through the encoders at a time
HELD = 2**28  # bytes of embeddings that a process holds before it writes them to a file


class Saved(Mapping[str, Tensor]):
    """The embeddings of one text in an open safetensors file, under names with a `prefix`."""

    def __init__(self, file: Any, prefix: str, names: tuple[str, ...]):
        self.file, self.prefix, self.names = file, prefix, names

    def __getitem__(self, key: str) -> Tensor:
        return self.file.get_tensor(self.prefix + key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Texts:
    """What a `Policy` knows of its texts."""

    negative: ClassVar[str] = ""  # the negative prompt where none is given
    uses_cfg: bool  # whether `guided_by` is "cfg"
    max_sequence_length: int | None = None  # tokens per prompt; None = the pipeline's default
    zero_negative = False  # an empty negative prompt is zeros instead of the embedding of ""
    pipe: Any
    device: torch.device
    _prompts: dict[str, Mapping[str, Tensor]]

    @abstractmethod
    def embed(self, prompts: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """Text embeddings (n, ...) by name, as `call` wants them; a list of n (L_i, ...) where each
        text keeps its own number of tokens, and then their "length" (n,) too."""

    @abstractmethod
    def text_shapes(self, tokens: Callable[[str, int], int]) -> dict[str, tuple[int, ...]]:
        """The shape of what `embed` makes of one prompt, by name, at most.

        tokens: of a text, by the name of its tokenizer and by how many the pipeline takes at most.
        """

    @classmethod
    def as_negative(cls, text: str) -> str:
        """What `embed` is given for a negative prompt, where that is encoded in another way."""
        return text

    @property
    def text_length(self) -> int:
        """Tokens of a prompt at most, beside those of CLIPs."""
        return self.max_sequence_length or text_options(self.pipe)["max_sequence_length"]

    def encode(self, prompts: Sequence[str], negative: str = "") -> Cond:
        """Conditioning of `prompts`; every distinct text goes through the encoders once per run.

        Raises RuntimeError for a new text once the encoders are freed.
        """
        zeros = self.zero_negative and not negative
        negative = self.as_negative(negative or self.negative)
        texts = [*prompts, *([negative] if self.uses_cfg and not zeros else [])]
        missing = [p for p in dict.fromkeys(texts) if p not in self._prompts]
        if missing and not self.has_text_encoders:
            raise RuntimeError(
                f"the prompt {missing[0]!r} was not encoded before the text encoders were freed; "
                "set model.free_text_encoders=false to encode prompts at any time"
            )
        for start in range(0, len(missing), BATCH):
            chunk = missing[start : start + BATCH]
            self._prompts |= dict(zip(chunk, self._embedded(chunk), strict=True))

        def rows(texts: Sequence[str]) -> dict[str, Tensor]:
            found = joined([{k: v[None] for k, v in self._prompts[p].items()} for p in texts])
            return {k: v.to(self.device) for k, v in found.items()}

        positive = rows(prompts)
        if not self.uses_cfg:
            return Cond(positive, {})
        if zeros:
            return Cond(positive, {k: torch.zeros_like(v) for k, v in positive.items()})
        one = rows([negative])  # shown for all
        return Cond(positive, {k: v.expand(len(prompts), *v.shape[1:]) for k, v in one.items()})

    @torch.no_grad()
    def _embedded(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """The embeddings of each text, on the CPU."""
        found = self.embed(texts)
        return [{k: v[i].cpu() for k, v in found.items()} for i in range(len(texts))]

    def encode_all(self, texts: Sequence[str], team: Team | None = None) -> None:
        """Encode texts ahead, and the empty one. Many go to files in the folder for temporary files
        (TMPDIR), which the system removes when the last process that reads them ends. The processes
        of a `team` that are on one machine share the work and the files.

        Raises ValueError where the disk has not enough room.
        """
        asked = {*texts, "", self.as_negative(self.negative)}
        todo = sorted(t for t in asked if t not in self._prompts)
        team = None if team is None or len(team.peers) == 1 else team
        rank, n = (0, 1) if team is None else (team.rank, len(team.peers))
        folder = None if team is None else team.folder()
        mine, part, held = range(rank, len(todo), n), 0, dict[int, dict[str, Tensor]]()
        for start in range(0, len(mine), BATCH):
            ids = mine[start : start + BATCH]
            held |= dict(zip(ids, self._embedded([todo[i] for i in ids]), strict=True))
            if _size(held) >= HELD:
                folder = folder or Path(tempfile.mkdtemp(prefix="diffalign-"))
                _write(held, folder / f"{rank}-{part}", len(mine) - start)
                part, held = part + 1, {}
        if folder is None:
            self._prompts |= {todo[i]: row for i, row in held.items()}
            return
        if held:
            _write(held, folder / f"{rank}-{part}", len(held))
        if team is not None:
            team.wait()
        for file in sorted(folder.iterdir()):
            self._prompts |= {todo[i]: row for i, row in _read(file)}
        if team is not None:
            team.wait()
        if rank == 0:  # what is open stays readable
            shutil.rmtree(folder)

    def knows(self, prompts: Sequence[str]) -> bool:
        """Whether `encode` can do without text encoders for these prompts."""
        return all(p in self._prompts for p in prompts)

    @property
    def has_text_encoders(self) -> bool:
        return any(v is not None for k, v in self.pipe.components.items() if "text_encoder" in k)

    def free_text_encoders(self) -> None:
        """Drop the text encoders from memory; texts encoded so far stay known."""
        names = [k for k in self.pipe.components if "text_encoder" in k]
        self.pipe.register_modules(**dict.fromkeys(names))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _size(held: Mapping[int, Mapping[str, Tensor]]) -> int:
    return sum(v.nbytes for row in held.values() for v in row.values())


def _write(held: Mapping[int, Mapping[str, Tensor]], path: Path, left: int) -> None:
    """Write the embeddings of some texts. left: how many there are of all that are still to be."""
    from safetensors.torch import save_file

    needed, free = _size(held) * left // len(held), shutil.disk_usage(path.parent).free
    if needed > free:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise ValueError(
            f"the embeddings of {left} texts take {needed / 2**30:.1f} GiB, and "
            f"{path.parent.parent} has {free / 2**30:.1f}; let TMPDIR name a folder with more "
            "room, or use fewer prompts, or a smaller model.max_sequence_length"
        )
    rows = {f"{i} {k}": v.contiguous() for i, row in held.items() for k, v in row.items()}
    save_file(rows, path)


def _read(path: Path) -> Iterator[tuple[int, Saved]]:
    """The embeddings in a file of `_write`, by the number of their text."""
    from safetensors import safe_open

    file, names = safe_open(path, "pt"), dict[int, list[str]]()
    for key in file.keys():  # noqa: SIM118 - a file is no mapping
        number, _, name = key.partition(" ")
        names.setdefault(int(number), []).append(name)
    kinds: dict[tuple[str, ...], tuple[str, ...]] = {}  # one for all texts
    for number, found in names.items():
        kind = tuple(found)
        yield number, Saved(file, f"{number} ", kinds.setdefault(kind, kind))
