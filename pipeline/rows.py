"""Nouns to rows of Arrow tables, and back."""

import json
from dataclasses import fields
from typing import Any

import numpy as np

from pipeline.records import (
    MESSAGE,
    RANKED,
    ROLLOUTS,
    FloatArray,
    GroupExample,
    Member,
    Message,
    PairExample,
    RewardPart,
    Rollout,
    Segment,
    Span,
    TrainingSequence,
    Turn,
)


def message_row(message: Message) -> dict[str, Any]:
    """Give a message every column of the Arrow struct."""
    return {name: message.get(name) for name in MESSAGE.names}


def clean_message(row: dict[str, Any]) -> Message:
    """Drop the null fields that Arrow filled in."""
    return Message(**{k: v for k, v in row.items() if v is not None})  # type: ignore[typeddict-item]


def _shallow(item: Any) -> dict[str, Any]:
    # dataclasses.asdict copies each int of each list; ids are long.
    return {f.name: getattr(item, f.name) for f in fields(item)}


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    """Turn a rollout into a row of ROLLOUTS, or of RANKED once it has rewards."""
    row = _shallow(rollout)
    row["messages"] = [message_row(message) for message in rollout.messages]
    row["turns"] = None if rollout.turns is None else [_shallow(turn) for turn in rollout.turns]
    row["info"] = json.dumps(rollout.info, ensure_ascii=False, sort_keys=True)
    if rollout.rewards is None:
        return {name: row[name] for name in ROLLOUTS.names}
    row["reward_parts"] = [_shallow(part) for part in rollout.reward_parts or []]
    return {name: row[name] for name in RANKED.names}


def rollout_from_row(row: dict[str, Any]) -> Rollout:
    """Turn a row of ROLLOUTS or RANKED back into a rollout."""
    values = {name: row.get(name) for name in RANKED.names}
    values["messages"] = [clean_message(message) for message in row["messages"]]
    turns = row.get("turns")
    values["turns"] = None if turns is None else [Turn(**turn) for turn in turns]
    values["info"] = json.loads(row.get("info") or "{}")
    parts = row.get("reward_parts")
    values["reward_parts"] = None if parts is None else [RewardPart(**part) for part in parts]
    return Rollout(**values)  # type: ignore[arg-type]


def _sequence_row(sequence: TrainingSequence) -> dict[str, Any]:
    return {
        "token": sequence.ids,
        "mask": sequence.mask,
        "segments": [_shallow(segment) for segment in sequence.segments],
        "spans": [_shallow(span) for span in sequence.spans],
    }


def _sequence_from_row(row: dict[str, Any], side: str) -> TrainingSequence:
    return TrainingSequence(
        ids=np.asarray(row[f"{side}token"], dtype=np.int32),
        mask=np.asarray(row[f"{side}mask"], dtype=np.uint8),
        segments=[Segment(**segment) for segment in row[f"{side}segments"]],
        spans=[Span(**span) for span in row[f"{side}spans"]],
    )


def _floats(values: Any) -> FloatArray | None:
    return None if values is None else np.asarray(values, dtype=np.float32)


def pair_row(pair: PairExample) -> dict[str, Any]:
    """Turn a pair into a row of PAIRS (without old and reference log-probs)."""
    row: dict[str, Any] = {
        "prompt_id": pair.prompt_id,
        "branch_turn": pair.branch_turn,
        "score_turn": pair.score_turn,
        "prefix_length": pair.prefix_length,
    }
    for side, member in (("chosen", pair.chosen), ("reject", pair.reject)):
        row[side] = [message_row(message) for message in member.messages]
        row[f"{side}_sample"] = member.sample
        row[f"{side}_reward"] = member.reward
        row[f"{side}_sample_logprob"] = member.sample_logprob
        row |= {f"{side}_{k}": v for k, v in _sequence_row(member.sequence).items()}
    return row


def _member_from_row(row: dict[str, Any], side: str) -> Member:
    return Member(
        sample=row[f"{side}_sample"],
        messages=[clean_message(message) for message in row.get(side) or []],
        sequence=_sequence_from_row(row, f"{side}_"),
        reward=row[f"{side}_reward"],
        sample_logprob=_floats(row.get(f"{side}_sample_logprob")),
        old_logprob=_floats(row.get(f"{side}_old_logprob")),
        ref_logprob=_floats(row.get(f"{side}_ref_logprob")),
    )


def pair_from_row(row: dict[str, Any]) -> PairExample:
    """Turn a row of PAIRS (with or without log-prob columns) back into a pair."""
    return PairExample(
        prompt_id=row["prompt_id"],
        branch_turn=row["branch_turn"],
        score_turn=row["score_turn"],
        chosen=_member_from_row(row, "chosen"),
        reject=_member_from_row(row, "reject"),
        prefix_length=row["prefix_length"],
    )


def group_row(example: GroupExample) -> dict[str, Any]:
    """Turn an example into a row of GROUPS (without old and reference log-probs)."""
    return {
        "prompt_id": example.prompt_id,
        "sample": example.sample,
        **_sequence_row(example.sequence),
        "reward": example.reward,
        "sample_logprob": example.sample_logprob,
        "advantage": example.advantage,
    }


def group_from_row(row: dict[str, Any]) -> GroupExample:
    """Turn a row of GROUPS back into an example."""
    return GroupExample(
        prompt_id=row["prompt_id"],
        sample=row["sample"],
        sequence=_sequence_from_row(row, ""),
        reward=row["reward"],
        advantage=_floats(row.get("advantage")),
        sample_logprob=_floats(row.get("sample_logprob")),
        old_logprob=_floats(row.get("old_logprob")),
        ref_logprob=_floats(row.get("ref_logprob")),
    )
