"""Random ranked rollouts with every defect that selection knows, for tests against an oracle."""

from dataclasses import replace

import numpy as np

from pipeline.records import NO_SCORE, Message, Rollout, ToolCall, Turn

ROLES = ("user", "assistant", "system", "tool", "wizard")


def some(rng: np.random.Generator, chance: float) -> bool:
    return bool(rng.random() < chance)


def ids(rng: np.random.Generator, low: int, high: int) -> list[int]:
    return rng.integers(0, 9, int(rng.integers(low, high))).tolist()


def turns_of(rng: np.random.Generator, trunk: list[Turn], count: int, append: bool) -> list[Turn]:
    """Continue a trunk to `count` turns; contexts are rewritten unless they append."""
    turns = list(trunk)
    length = turns[-1].keep + sizes(turns[-1]) if turns else 0
    while len(turns) < count:
        keep = length if append or some(rng, 0.6) else int(rng.integers(0, length + 1))
        if some(rng, 0.005):
            keep = length + 1  # doesn't add up
        response = ids(rng, 0 if some(rng, 0.1) else 1, 5)
        logprobs: list[float] | None = rng.normal(size=len(response)).astype("f4").tolist()
        if some(rng, 0.03):
            logprobs = None
        elif some(rng, 0.005):
            logprobs = [*(logprobs or []), 0.0]
        finish = "length" if some(rng, 0.05) else "stop"
        turns.append(Turn(keep, ids(rng, 1, 4), response, logprobs, finish))
        length = keep + sizes(turns[-1])
    return turns


def answered(turn: Turn, asked: Turn) -> Turn:
    """Return a turn that saw what another one saw."""
    return replace(turn, keep=asked.keep, prompt_ids=asked.prompt_ids)


def sizes(turn: Turn) -> int:
    return len(turn.prompt_ids) + len(turn.response_ids)


def said(rng: np.random.Generator, turns: int) -> list[Message]:
    """Return messages: an opening of a dataset, then `turns` answers, tools among them."""
    opening: list[Message] = []
    if some(rng, 0.2):
        opening.append(Message(role="system", content="s"))
    if some(rng, 0.2):
        opening += [Message(role="user", content="?"), Message(role="assistant", content="!")]
    for t in range(turns):
        opening.append(Message(role="user" if some(rng, 0.8) else "tool", content=f"q{t}"))
        call = ToolCall(id="1", name="f", arguments="{}")
        calls = [call] * int(rng.integers(0, 3))
        answer = Message(role="assistant", content=f"a{t} {rng.integers(99)}", tool_calls=calls)
        opening.append(answer)
    if some(rng, 0.02):
        opening.pop(int(rng.integers(len(opening))))
    if some(rng, 0.02):
        place = int(rng.integers(len(opening)))
        opening[place] = Message(role=str(rng.choice(ROLES)), content="x")
    if some(rng, 0.01):
        return []
    return opening


def rewards_of(rng: np.random.Generator, turns: int) -> list[float | None] | None:
    if some(rng, 0.02):
        return None
    rewards: list[float | None] = (rng.integers(0, 6, turns) / 4).tolist()
    for t in range(turns):
        if some(rng, 0.06):
            rewards[t] = [NO_SCORE, None, float("nan"), float("inf")][int(rng.integers(4))]
    return rewards[: turns - 1] if some(rng, 0.02) else rewards


def prompt_of(rng: np.random.Generator, name: str, fork: bool, text: float = 0.0) -> list[Rollout]:
    """Return the rollouts of one prompt; some share a trunk, as siblings do."""
    append = some(rng, 0.6)
    trunk = turns_of(rng, [], int(rng.integers(0, 3)), append)
    asked = turns_of(rng, trunk, len(trunk) + 1, append)[-1]
    rollouts = []
    for sample in rng.permutation(int(rng.integers(1, 9 if some(rng, 0.3) else 3))).tolist():
        head = trunk if some(rng, 0.95) else []
        count = len(trunk) + int(rng.integers(0 if some(rng, 0.1) else 1, 4))
        turns = turns_of(rng, head[:count], min(count, len(trunk) + 1), append)
        if len(turns) > len(trunk) and some(rng, 0.95):
            turns[-1] = answered(turns[-1], asked)
        turns = turns_of(rng, turns, count, append)
        if rollouts and some(rng, 0.05):
            turns = rollouts[0].turns or []
        score = len(turns) - 1 - int(rng.integers(0, 2) if some(rng, 0.4) else 0)
        rewards = rewards_of(rng, len(turns))
        errors = [str(rng.choice(["too_long", "late"])) for _ in turns]
        rollouts.append(
            Rollout(
                prompt_id=name,
                sample=sample,
                messages=said(rng, len(turns)),
                turns=None if some(rng, text) else turns,
                branch_turn=len(trunk) if fork else None,
                score_turn=score,
                status="failed" if some(rng, 0.03) else "complete",
                end_reason=str(rng.choice(["turns", "server_lost"])),
                rewards=rewards,
                reward_errors=None if rewards is None else errors,
                reward_parts=[],
                reward_model="rule",
            )
        )
    return rollouts


def prompts(seed: int, count: int, fork: bool, text: float = 0.0) -> list[list[Rollout]]:
    rng = np.random.default_rng(seed)
    return [prompt_of(rng, f"p{i:04d}", fork, text) for i in range(count)]
