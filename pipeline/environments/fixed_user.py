"""Replay a dataset's own user turns, whatever the policy says (REFUEL setting two, HH).

Expects `info["user_turns"]`: the user messages that follow the opening one, in order.
"""

from pipeline.environments.base import Dialogue, End, Environment
from pipeline.records import Message


class FixedUser:
    """An environment that answers with the recorded user turns."""

    async def reply(self, dialogue: Dialogue) -> list[Message] | End:
        """Return the next recorded user turn; `user_turns_done` when there is none left."""
        turns = dialogue.info.get("user_turns", [])
        said = len(dialogue.turns) - 1
        if said >= len(turns):
            return End("user_turns_done")
        return [Message(role="user", content=turns[said])]


def build(config: object, user: object) -> Environment:
    """Make the environment; it needs neither settings nor a user model."""
    return FixedUser()
