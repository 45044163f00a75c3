"""Short ways to write rows in tests."""

from recipe.data.formats import Message
from recipe.data.rows import Row


def one_turn(index: int, instruction: str, context: str, output: str) -> Row:
    """What an Alpaca record becomes."""
    return Row(index, (Message("user", instruction, context), Message("assistant", output)))


def talk(index: int, *texts: str, system: str | None = None) -> Row:
    """User and assistant in turns."""
    turns = [
        Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)
    ]
    first = [] if system is None else [Message("system", system)]
    return Row(index, (*first, *turns))
