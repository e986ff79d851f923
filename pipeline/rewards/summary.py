"""What a ranked repo's manifest and card tell: reward by turn, reasons, gaps within a prompt."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline.cards import Tally
from pipeline.comparison import Z95
from pipeline.records import NO_SCORE, Rollout


@dataclass
class Summary:
    """Counts over a stream of ranked rollouts in which the rollouts of a prompt are neighbours.

    `gap`: the best minus the worst score of a prompt's rollouts at their score turns; a tie is a
    gap of 0, and gives no pair.
    """

    rows: int = 0
    turns: dict[int, Tally] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    gap: Tally = field(default_factory=Tally)
    ties: int = 0
    _prompt: str | None = None
    _scores: list[float] = field(default_factory=list)

    def add(self, rollout: Rollout) -> None:
        """Take one ranked rollout."""
        self.rows += 1
        if rollout.prompt_id != self._prompt:
            self.close_prompt()
            self._prompt = rollout.prompt_id
        rewards = rollout.rewards or []
        for turn, value in enumerate(rewards):
            if value is not None:
                self.turns.setdefault(turn, Tally()).add(value)
        self.errors.update(error for error in rollout.reward_errors or [] if error)
        score = rewards[rollout.score_turn] if 0 <= rollout.score_turn < len(rewards) else None
        if score is not None and score != NO_SCORE:
            self._scores.append(score)

    def close_prompt(self) -> None:
        """Count the gap of the prompt whose rollouts have all been seen."""
        if len(self._scores) > 1:
            gap = max(self._scores) - min(self._scores)
            self.gap.add(gap)
            self.ties += gap == 0
        self._scores = []

    def counts(self) -> dict[str, int]:
        """Return the scores given, and those that there are none of by reason."""
        scores = sum(tally.scores for tally in self.turns.values())
        return {
            "scores": scores,
            **{f"no_score_{reason}": n for reason, n in self.errors.most_common()},
        }

    def extra(self) -> dict[str, Any]:
        """Return the manifest's part: by turn, and within a prompt."""
        return {
            "reward_by_turn": [
                {"turn": turn, "n": tally.scores, "mean": tally.mean, "sd": _none(tally.deviation)}
                for turn, tally in sorted(self.turns.items())
                if tally.scores
            ],
            "reward_errors": dict(self.errors),
            "within_prompt": {
                "prompts": self.gap.scores,
                "mean_gap": self.gap.mean if self.gap.scores else None,
                "ties": self.ties,
            },
        }

    def table(self) -> dict[str, Any]:
        """Return the card's table of how far the rollouts of a prompt are apart."""
        rows = [["prompts with two scores or more", self.gap.scores], ["ties", self.ties]]
        if self.gap.scores:
            rows.append(["mean gap between the best and the worst", self.gap.mean])
        return {"title": "Within a prompt", "columns": ["at the score turn", ""], "rows": rows}

    def picture_rows(self, name: str) -> list[dict[str, Any]]:
        """Return what pictures.score_by_turn draws."""
        return [
            {
                "policy": name,
                "turn": turn,
                "score": tally.mean,
                "score_half_width": (_none(tally.deviation) or 0.0) * Z95 / tally.scores**0.5,
            }
            for turn, tally in sorted(self.turns.items())
            if tally.scores
        ]


def _none(value: float) -> float | None:
    return None if value != value else value
