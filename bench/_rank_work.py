"""What each way to score must read at the least: ids, and the ids that they attend to."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from _workload import Shape

from pipeline.records import Rollout


@dataclass(frozen=True, slots=True)
class Work:
    """`attended`: pairs of an id and one that it attends to, itself or one before it."""

    ids: int
    attended: int

    def flops(self, shape: Shape) -> float:
        """Return the backbone's `2 P_layers ids + 4 layers heads head_dim attended`."""
        products = 2 * shape.layer_parameters * self.ids
        return products + 4 * shape.layers * shape.heads * shape.head_dim * self.attended


@dataclass(frozen=True, slots=True)
class Page:
    """A rollout's ids, how many of them each policy turn's prefix has, and the needed turn."""

    ids: list[int]
    ends: list[int]
    needed: int


def total(works: Iterable[Work]) -> Work:
    """Add up."""
    found = list(works)
    return Work(sum(work.ids for work in found), sum(work.attended for work in found))


def read(lengths: Iterable[int]) -> Work:
    """Return the work of reading so many ids, each time from the first one."""
    return total(Work(length, length * (length + 1) // 2) for length in lengths)


def read_pair(left: int, right: int, common: int) -> Work:
    """Return the work of reading two pages whose first `common` ids are read once."""
    return Work(left + right - common, read([left, right]).attended - read([common]).attended)


def pages(rollouts: Sequence[Rollout], tokenizer: Any) -> list[Page]:
    """Encode the prefixes of every rollout."""
    found = []
    for rollout in rollouts:
        prefixes = [
            tokenizer.apply_chat_template(rollout.messages[: i + 1], return_dict=False)
            for i in range(1, len(rollout.messages), 2)
        ]
        ids = prefixes[-1]
        assert all(ids[: len(prefix)] == prefix for prefix in prefixes), "counted as one page"
        found.append(Page(ids, [len(prefix) for prefix in prefixes], rollout.score_turn))
    return found


def common_ids(left: Page, right: Page) -> int:
    """Return how many ids two pages begin with alike."""
    alike = takewhile(lambda both: both[0] == both[1], zip(left.ids, right.ids, strict=False))
    return sum(1 for _ in alike)


def works_of(found: Sequence[Page]) -> dict[str, Work]:
    """Return the work of each way; the pages of a prompt are neighbours."""
    all_shared, needed_shared = [], []
    for left, right in zip(found[::2], found[1::2], strict=True):
        common = common_ids(left, right)
        all_shared.append(read_pair(len(left.ids), len(right.ids), common))
        needed = [page.ends[page.needed] for page in (left, right)]
        needed_shared.append(read_pair(*needed, min(common, *needed)))
    return {
        "seed": read(end for page in found for end in page.ends),
        "all": read(len(page.ids) for page in found),
        "all, shared": total(all_shared),
        "needed": read(page.ends[page.needed] for page in found),
        "needed, shared": total(needed_shared),
    }
