"""The seed's order with loads that cost nothing: all policy turns, then all user turns, ...

At its best: it plays only the turns that the plan needs, sends ids, and keeps both servers. Turns,
replies, seeds and contexts are the product's own, so that the requests are the very same.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from pipeline.chat_files import load_chat
from pipeline.engines.base import EngineOptions, Sampling
from pipeline.engines.rounds import Rounds
from pipeline.engines.vllm import open_engine
from pipeline.environments.base import Dialogue, End
from pipeline.environments.simulated_user import SimulatedUser, User
from pipeline.plans import Plan
from pipeline.records import Prompt
from pipeline.rollout import Table, TemplateContext, play

DATE = "2026-01-01"


class Barriers:
    """Dialogues in step: no turn begins before the one before it has ended everywhere."""

    def __init__(self, table: Table, in_flight: int) -> None:
        """Play at this table, with so many requests at a time."""
        self.table = table
        self._places = asyncio.Semaphore(in_flight)

    async def play(self, openings: Sequence[tuple[Prompt, Plan]]) -> list[Dialogue]:
        """Play both rollouts of each prompt, the second from its branch turn; return all."""
        first = [
            (Dialogue(self.table.run_seed, prompt.prompt_id, 0, list(prompt.messages)), plan)
            for prompt, plan in openings
        ]
        second = await self._alternate(first)
        await self._alternate(second)
        return [dialogue for dialogue, _ in [*first, *second]]

    async def _alternate(self, dialogues: Sequence[tuple[Dialogue, Plan]]) -> list[Any]:
        """Play all dialogues to their score turns; return copies made at their branch turns."""
        copies = []
        for turn in range(1 + max(plan.score_turn for _, plan in dialogues)):
            due = [each for each in dialogues if len(each[0].turns) == turn <= each[1].score_turn]
            copies += [(each.fork(1), plan) for each, plan in due if plan.branch_turn == turn]
            await self._all(self._policy, [dialogue for dialogue, _ in due])
            await self._all(self._user, [each for each, plan in due if turn < plan.score_turn])
        return copies

    async def _all(
        self, say: Callable[[Dialogue], Coroutine[Any, Any, None]], dialogues: Sequence[Dialogue]
    ) -> None:
        async def in_its_place(dialogue: Dialogue) -> None:
            async with self._places:
                await say(dialogue)

        await asyncio.gather(*map(in_its_place, dialogues))

    async def _policy(self, dialogue: Dialogue) -> None:
        end = await play(dialogue, self.table, len(dialogue.turns) + 1)
        assert end is None, end

    async def _user(self, dialogue: Dialogue) -> None:
        reply = await self.table.environment.reply(dialogue)
        assert not isinstance(reply, End), reply
        dialogue.messages += reply


def play_with_barriers(
    openings: Sequence[tuple[Prompt, Plan]],
    models: tuple[Path, Path],
    urls: tuple[str, str],
    max_tokens: tuple[int, int],
    in_flight: int,
) -> list[Dialogue]:
    """Play the prompts through the servers of policy and user."""

    async def run() -> list[Dialogue]:
        chats = [load_chat(str(model), DATE) for model in models]
        policy, asking = [
            await asyncio.to_thread(
                open_engine, str(model), chat.tokenizer, EngineOptions(Rounds(), urls=(url,))
            )
            for model, chat, url in zip(models, chats, urls, strict=True)
        ]
        sampling, asking_sampling = (Sampling(0.8, most) for most in max_tokens)
        table = Table(
            run_seed=0,
            engine=policy,
            chat=chats[0],
            sampling=sampling,
            context=TemplateContext(chats[0]),
            environment=SimulatedUser(User(asking, chats[1], asking_sampling)),
            rounds=Rounds(),
            finished=lambda rollout: None,
        )
        try:
            return await Barriers(table, in_flight).play(openings)
        finally:
            await policy.close()
            await asking.close()

    return asyncio.run(run())
