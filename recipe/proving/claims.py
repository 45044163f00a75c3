"""Every claim in its order, each judged once; a run that breaks fails its own claim."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from recipe.proving import gradients, processes, texts, trained
from recipe.proving.evidence import Evidence
from recipe.proving.finding import Finding
from recipe.settings import Stopped, UserError


class Claim(NamedTuple):
    """Its name, and what judges it."""

    name: str
    judge: Callable[[Evidence], Finding]


CLAIMS = (
    Claim(gradients.ACCUMULATION, gradients.accumulation),
    Claim(gradients.FLATTENED, gradients.flattened),
    Claim(gradients.OPENINGS, gradients.openings),
    Claim(gradients.CHUNKED, gradients.chunked),
    Claim(gradients.CHECKPOINTING, gradients.checkpointing),
    Claim(gradients.EVERY_TENSOR, gradients.every_tensor),
    Claim(trained.BASE, trained.base),
    Claim(texts.MASK, texts.mask),
    Claim(trained.RELOADED, trained.reloaded),
    Claim(trained.RESUMED, trained.resumed),
    Claim(trained.SAME_SEED, trained.same_seed),
    Claim(texts.PROMPT, texts.prompt_ids),
    Claim(processes.PROCESSES, processes.processes),
)


def judged(evidence: Evidence) -> Iterator[Finding]:
    """The findings as they come.

    Raises:
        UserError: the config cannot be run as it is.
        Stopped: by a signal, which a run of the proof heard.
    """
    for claim in CLAIMS:
        try:
            yield claim.judge(evidence)
        except UserError as error:
            if claim is CLAIMS[0]:
                raise
            # It could be run as it is: what refuses now is wrong itself.
            yield Finding(claim.name, None, None, False, f"refused: {str(error)[:160]}")
        except Stopped as stopped:  # it says how to continue a run that is about to go away
            raise Stopped("stopped", signal_number=stopped.signal_number) from stopped
        except Exception as error:  # whatever a broken run raises, the others are still judged
            said = " ".join(str(error).split())[:160]
            note = f"ended with {type(error).__name__}: {said}".removesuffix(": ")
            yield Finding(claim.name, None, None, False, note)
