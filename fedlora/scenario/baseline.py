"""The section `baseline`: what a scenario that was made of another is there to be compared with."""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fedlora.scenario.section import Section

Kind = Literal["pooled", "pooled_private", "alone"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ASIDE = (
    "name",
    "seed",
    "engine",
    "trackers",
    "baseline",
    "metrics",
    "diagnostics",
)  # of a scenario, what is not its configuration


class Baseline(Section):
    """The scenario that `fedlora simulate --baseline` made this one of; not written by hand.

    Attributes:
        kind: Which baseline it is: `pooled`, `pooled_private` or `alone`.
        of: Hash of the scenario that it is a baseline of. Example: `0123abcd`.
    """

    kind: Kind
    of: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


def configuration(scenario: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits for a resolved scenario that differ when any setting does but its `ASIDE`.

    Args:
        scenario: as `Scenario.model_dump` gives it, or as a run's `scenario.yaml` holds it.
    """
    plain = json.loads(json.dumps({k: v for k, v in scenario.items() if k not in ASIDE}, default=str))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]
