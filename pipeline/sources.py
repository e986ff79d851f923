"""What trainers read: pairs or groups, ours or published by others, with the turns that train."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from pipeline import published, turns
from pipeline.columns import NO_ONE, PAIR_SIDES, of_side, side_columns
from pipeline.errors import DataError
from pipeline.repos import Repo, open_repo

BATCH_ROWS = 512


@dataclass(frozen=True)
class Source:
    """A repo that log-probs can be taken of. `sides`: those of pairs, or NO_ONE for groups.

    `turns` says which policy turns train (turns.TURNS). A published dataset is read as pairs of
    ours, without the rows that our filters leave out.
    """

    repo: Repo
    sides: tuple[str, ...]
    turns: str = "mask"
    published: bool = False

    def splits(self) -> list[str]:
        """Return the names of the splits."""
        return self.repo.splits()

    def num_rows(self, split: str) -> int:
        """Count the rows of a split; those of a published dataset include what is left out."""
        return self.repo.num_rows(split)

    def batches(
        self,
        split: str,
        columns: Sequence[str] | None = None,
        batch_rows: int = BATCH_ROWS,
        dropped: list[dict[str, Any]] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Stream a split in order, in flat memory; rows left out are appended to `dropped`."""
        if self.published:
            left_out: list[dict[str, Any]] = []
            rows = self.repo.batches(split, published.READ, batch_rows)
            batches = published.our_pairs(rows, left_out)
        else:
            left_out = []
            names = None if columns is None else [*columns, *turns.read_columns(self.turns)]
            batches = self.repo.batches(split, names and list(dict.fromkeys(names)), batch_rows)
        for batch in batches:
            found = turns.retrained(batch, self.turns)
            yield found if columns is None else found.select(list(columns))
        if dropped is not None:
            dropped += [{"split": split, **row} for row in left_out]


def open_source(name: str, which: str = "mask") -> Source:
    """Open pairs or groups; `which` are the turns that train (turns.TURNS).

    Raises DataError, with the command that makes it, where the repo is neither or doesn't hold
    these turns.
    """
    repo = open_repo(name)
    columns = repo.columns()
    if published.is_published(columns):
        repo.require(published.READ)
        return with_turns(Source(repo, PAIR_SIDES, published=True), which)
    sides = (NO_ONE,) if "token" in columns else PAIR_SIDES
    repo.require(["prompt_id", *side_columns(sides)])
    return with_turns(Source(repo, sides), which)


def open_pairs(name: str, which: str = "mask") -> Source:
    """Open pairs with rewards, ours or published. DataError where it is something else."""
    source = open_source(name, which)
    if source.sides != PAIR_SIDES:
        raise DataError(f"{name} holds groups; this trains on pairs: tokenize_masks --format pairs")
    source.repo.require([of_side(side, "reward") for side in PAIR_SIDES])
    if "train" not in source.splits():
        raise DataError(f"{name} has no split `train`; it has: {', '.join(source.splits())}")
    return source


def with_turns(source: Source, which: str) -> Source:
    """Let other turns train; where that changes no mask, they are those of the repo's own masks.

    Raises DataError, with the command that makes pairs that do, where the rows don't hold them.
    """
    if which == "mask":
        return source
    if source.sides != PAIR_SIDES:
        raise DataError(f"{source.repo.name} holds groups: their own masks say what trains")
    wanted = replace(source, turns=which)
    if not source.published:
        source.repo.require(turns.read_columns(which))
    try:
        same = [_same_masks(source, wanted, split) for split in source.splits()]
    except DataError as error:
        remedy = f". {_remedy(source)}" if which == "all" else ""
        raise DataError(f"{source.repo.name}: {error}{remedy}") from None
    return source if all(same) else wanted


def _same_masks(source: Source, wanted: Source, split: str) -> bool:
    names = [of_side(side, "mask") for side in PAIR_SIDES]
    same = True
    # To the end, even where the first masks differ: every row must hold its turns.
    for left, right in zip(source.batches(split, names), wanted.batches(split, names), strict=True):
        same &= left.equals(right)
    return same


def _remedy(source: Source) -> str:
    if source.published:
        return "Published pairs hold one trained turn each: use --turns forked"
    parents = (source.repo.manifest or {}).get("inputs") or [{"name": "RANKED_REPO"}]
    output = source.repo.name.rstrip("/").split("@")[0]
    return (
        "Make pairs that hold all of their turns: python stages/tokenize_masks.py "
        f"--input_repo {parents[0]['name']} --output_repo {output}_all --mask all"
    )
