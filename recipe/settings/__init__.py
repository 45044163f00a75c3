"""YAML and overrides → frozen settings, or every problem at once.

Imports no library that it validates against: a mistake is told in a fraction of a second.
"""

from recipe.settings.dump import dump
from recipe.settings.generation import GenerationSettings, generation_keys, generation_settings
from recipe.settings.lab import load_lab
from recipe.settings.load import find_config, load_settings
from recipe.settings.option import Absent, Option
from recipe.settings.outputs import file_objection, folder_objection
from recipe.settings.problem import Problem, RunFailed, Stopped, UserError
from recipe.settings.row_range import row_range
from recipe.settings.schema import (
    DataSettings,
    HubSettings,
    JudgingSettings,
    ModelSettings,
    Settings,
    StudySettings,
    is_repo_id,
    plain,
)
from recipe.settings.sections import SECTIONS, options
from recipe.settings.strategies import STRATEGIES, TOGETHER

__all__ = [
    "SECTIONS",
    "STRATEGIES",
    "TOGETHER",
    "Absent",
    "DataSettings",
    "GenerationSettings",
    "HubSettings",
    "JudgingSettings",
    "ModelSettings",
    "Option",
    "Problem",
    "RunFailed",
    "Settings",
    "Stopped",
    "StudySettings",
    "UserError",
    "dump",
    "file_objection",
    "find_config",
    "folder_objection",
    "generation_keys",
    "generation_settings",
    "is_repo_id",
    "load_lab",
    "load_settings",
    "options",
    "plain",
    "row_range",
]
