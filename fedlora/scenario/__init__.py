"""A scenario: one YAML file that says everything about a run, read once and frozen.

`load` reports every problem at once, each as one line with the file, the line, what is wrong and
what to write instead. Beneath this package functions take plain values, never the scenario's file.
"""

from fedlora.scenario.clients import Tier
from fedlora.scenario.compression import Masked, Rounded, TopK
from fedlora.scenario.data import (
    COLUMNS_OF,
    DATASETS,
    Data,
    Dirichlet,
    Encoding,
    Files,
    Hub,
    Iid,
    LabelShares,
    Natural,
    Partition,
    Pathological,
    Sampled,
    Score,
    Shards,
    Size,
    Template,
)
from fedlora.scenario.files import (
    SHIPPED,
    SWEEPS,
    find,
    given,
    load,
    looks_like_scenario,
    parse,
    shipped,
    written,
)
from fedlora.scenario.keys import KeyPath, Source
from fedlora.scenario.privacy import Privacy, SecureAggregation
from fedlora.scenario.reading import edited, read, values
from fedlora.scenario.section import Float, Int, PlugIn, PositiveFloat, PositiveInt, Section
from fedlora.scenario.sections import Engine, Scenario, Strategy
from fedlora.scenario.world import Diurnal, Markov, Trace

__all__ = [
    "COLUMNS_OF",
    "DATASETS",
    "SHIPPED",
    "SWEEPS",
    "Data",
    "Dirichlet",
    "Diurnal",
    "Encoding",
    "Engine",
    "Files",
    "Float",
    "Hub",
    "Iid",
    "Int",
    "KeyPath",
    "LabelShares",
    "Markov",
    "Masked",
    "Natural",
    "Partition",
    "Pathological",
    "PlugIn",
    "PositiveFloat",
    "PositiveInt",
    "Privacy",
    "Rounded",
    "Sampled",
    "Scenario",
    "Score",
    "Section",
    "SecureAggregation",
    "Shards",
    "Size",
    "Source",
    "Strategy",
    "Template",
    "Tier",
    "TopK",
    "Trace",
    "edited",
    "find",
    "given",
    "load",
    "looks_like_scenario",
    "parse",
    "read",
    "shipped",
    "values",
    "written",
]
