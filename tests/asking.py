"""One question to a model that was loaded as a user loads it."""

from typing import Any

from recipe.answerer import Answerer
from recipe.data.prompts import Prompt
from recipe.decoding.task import Answer
from recipe.settings import generation_settings


def ask_one(answerer: Answerer, question: str, **given: Any) -> Answer:
    encoded = answerer.encode([Prompt(0, question)])
    ((answer,),) = answerer.decoder(generation_settings(given)).answers(encoded, batch_size=1)
    return answer
