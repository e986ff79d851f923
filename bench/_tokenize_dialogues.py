"""What bench/tokenize.py reads: REFUEL's pairs as ranked repos, with sampled ids and as text.

The language is that of bench/rank.py with a larger lexicon, and a tokenizer of a realistic size.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from _rank_dialogues import Language, train_tokenizer

from pipeline import store
from pipeline.chat import Chat
from pipeline.errors import RowError
from pipeline.records import NO_SCORE, RANKED, Rollout, Turn
from pipeline.rows import rollout_row
from pipeline.seeds import generator_for

LEXICON = 40_000
TRAINED_ON = 1500
"""Texts of 400 words that the tokenizer learns its merges from."""
NO_SCORES, CUT = 0.002, 0.02
"""Shares of turns without a score, and of turns that were cut by the length limit."""
SEED_COLUMNS = ("trajectory", "trajectory_sampled_h_from_sampled_len")


class Speech(Language):
    """A language whose rare words take several ids, as those of natural text do."""

    def __init__(self, vocabulary: int, turns: int, dialogue_ids: int, seed: int) -> None:
        """Make up words and train the tokenizer on some of their text."""
        self.turns, self.dialogue_ids, self.seed = turns, dialogue_ids, seed
        draw = np.random.default_rng([seed, 2])
        words = list(dict.fromkeys(self._word(draw) for _ in range(LEXICON)))
        # The words that are used most are short, as in any language.
        order = np.argsort([len(word) for word in words] + draw.normal(0, 3, len(words)))
        self.words = [words[i] for i in order]
        weights = 1 / np.arange(10, len(self.words) + 10)
        self.below = np.cumsum(weights) / weights.sum()
        texts = [self.text(draw, 400) for _ in range(TRAINED_ON)]
        headers = ["user\n\n", "assistant\n\n"] * 200
        self.tokenizer = train_tokenizer([*texts, *headers], vocabulary)

    def text(self, draw: np.random.Generator, words: int) -> str:
        """Say so many words in sentences; some are numbers, some sentences end a paragraph."""
        # The sum's last digits may leave `below` short of 1.
        places = np.searchsorted(self.below[:-1], draw.random(words))
        said = [self.words[place] for place in places.tolist()]
        for i in np.flatnonzero(draw.random(words) < 0.03).tolist():
            said[i] = str(draw.integers(1000))
        begins = 0
        while begins < words:
            ends = min(begins + int(draw.integers(4, 20)), words) - 1
            said[begins] = said[begins].capitalize()
            said[ends] += (".", ".", ".", "?", "!", ".\n\n")[int(draw.integers(6))]
            begins = ends + 1
        return " ".join(said).replace("\n\n ", "\n\n").strip()


@dataclass(frozen=True)
class Ranker:
    """The manifest's configuration of a repo that no stage made."""

    seed: int = 0


def ranked(language: Language, pairs: int) -> list[Rollout]:
    """Make pairs of full dialogues as text, with a score for nearly every turn."""
    return [
        replace(rollout, rewards=rewards, reward_errors=[None] * len(rewards), reward_model="-")
        for i in range(pairs)
        for rollout in language.pair(f"prompt-{i:05d}")
        for rewards in [_rewards(language, rollout)]
    ]


def _rewards(language: Language, rollout: Rollout) -> list[float | None]:
    draw = generator_for(language.seed, rollout.prompt_id, rollout.sample, 0, "reward")
    scores = np.where(
        draw.random(language.turns) < NO_SCORES, NO_SCORE, draw.normal(0.1, 0.03, language.turns)
    )
    return list(scores.tolist())


def sampled(rollouts: Sequence[Rollout], tokenizer: Any, seed: int) -> list[Rollout]:
    """Give rollouts the ids that a policy would have sampled; some turns were cut."""
    chat = Chat(tokenizer, "2026-01-01")
    encoded = chat.encode_dialogues([(rollout.messages, None) for rollout in rollouts])
    found = []
    for rollout, one in zip(rollouts, encoded, strict=True):
        assert not isinstance(one, RowError), one
        draw = generator_for(seed, rollout.prompt_id, rollout.sample, 0, "sampled")
        found.append(replace(rollout, turns=list(_turns(*one, draw))))
    return found


def _turns(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], draw: np.random.Generator
) -> Iterator[Turn]:
    """Cut a page into turns; after a cut one the end of turn is what the template adds."""
    seen = 0
    for start, end in spans:
        cut = bool(draw.random() < CUT)
        said = ids[start : end - cut]
        logprobs = np.log(draw.uniform(0.2, 1.0, len(said))).astype(np.float32)
        reason = "length" if cut else "stop"
        yield Turn(seen, list(ids[seen:start]), list(said), logprobs.tolist(), reason)
        seen = end - cut


def write(folder: Path, rollouts: Sequence[Rollout]) -> pa.Table:
    """Write a ranked repo; return its table."""
    table = pa.Table.from_pylist([rollout_row(rollout) for rollout in rollouts], schema=RANKED)
    write_batches(folder, iter(table.to_batches()), len(rollouts))
    return table


def write_batches(folder: Path, batches: Iterator[pa.RecordBatch], rows: int) -> None:
    """Write a ranked repo of batches that come one by one."""
    run = store.begin("rank", "ranked", Ranker(), str(folder), seed=0)
    run.write({"train": batches}, counts={"rows_in": rows})


def repeated(table: pa.Table, rows: int) -> Iterator[pa.RecordBatch]:
    """Repeat a table under new prompt ids until there are so many rows; few are in memory."""
    made, again = 0, 0
    while made < rows:
        for batch in table.to_batches(512):
            some = batch.slice(0, rows - made)
            names = [f"{again:04d}-{name}" for name in some.column("prompt_id").to_pylist()]
            yield some.set_column(0, "prompt_id", pa.array(names))
            made += some.num_rows
        again += 1


def seed_rows(rollouts: Sequence[Rollout]) -> pa.Table:
    """Lay pairs out as REFUEL's rank.py leaves them; `prompt_id` is ours, to compare rows by."""
    rows = []
    for first, second in zip(rollouts[::2], rollouts[1::2], strict=True):
        row = {
            "prompt_id": first.prompt_id,
            "sampled_len_from_5": first.score_turn,
            "sampled_h_from_sampled_len": first.branch_turn,
        }
        for column, rollout in zip(SEED_COLUMNS, (first, second), strict=True):
            row[column] = json.loads(json.dumps(rollout.messages))
            row[f"{column}_reward"] = rollout.rewards
        rows.append(row)
    return pa.Table.from_pylist(rows)
