"""REFUEL's generate.py at its best: a process for each turn and party, all turns to the end.

Ten loads of the policy and eight of the user model: a first rollout of all turns, then a second one
from turn h on. What is left out costs it time and computes nothing: uploads, checkpoints, retries.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTY = Path(__file__).with_name("_seed_party.py")


@dataclass
class SeedWay:
    """The models, and what both parties are told."""

    policy: Path
    user: Path
    settings: Path
    """A JSON file: `engine`, the arguments of vllm.LLM, and `sampling`, of SamplingParams."""
    turns: int
    work: Path
    env: dict[str, str]
    script: Path = PARTY
    loads: int = field(default=0, init=False)

    def play(self, openings: Sequence[list[Any]], branch_turns: Sequence[int]) -> tuple[list, list]:
        """Return both rollouts of each opening, as lists of messages."""
        first = self._alternate(openings)
        prefixes = [
            messages[: 2 * turn + 1] for messages, turn in zip(first, branch_turns, strict=True)
        ]
        return first, self._alternate(prefixes)

    def _alternate(self, openings: Sequence[list[Any]]) -> list[list[Any]]:
        """Let policy and user take turns until every dialogue has as many messages as it needs."""
        dialogues = [list(messages) for messages in openings]
        for turn in range(self.turns):
            self.speak("policy", dialogues)
            if turn < self.turns - 1:
                self.speak("user", dialogues)
        return dialogues

    def speak(self, party: str, dialogues: list[list[Any]]) -> None:
        """Add a message to each dialogue that isn't whole, in a process of its own."""
        unfinished = [i for i, messages in enumerate(dialogues) if len(messages) < 2 * self.turns]
        if not unfinished:
            return
        path = self.work / "dialogues.json"
        path.write_text(json.dumps([dialogues[i] for i in unfinished]))
        model = self.policy if party == "policy" else self.user
        command = [
            sys.executable,
            str(self.script),
            str(model),
            party,
            str(path),
            str(self.settings),
        ]
        log = self.work / "seed_way.log"
        with log.open("ab") as file:
            self.loads += 1
            subprocess.run(command, stdout=file, stderr=file, env=self.env, check=True)
        for i, messages in zip(unfinished, json.loads(path.read_text()), strict=True):
            dialogues[i] = messages
