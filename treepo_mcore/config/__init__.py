"""Typed configuration: YAML plus ``key=value`` overrides; an unknown key is an error that names the nearest one.

Every section is a pydantic model, so a field's comment and type are its documentation
(`docs/configuration.md` is written from them). Lengths are in tokens, times in seconds.
"""

from treepo_mcore.config.actor import ActorConfig, OptimizerConfig
from treepo_mcore.config.base import ConfigError, IntRange, Section, did_you_mean
from treepo_mcore.config.files import (
    apply_override,
    differences,
    dump_config,
    load_config,
    parse_config,
    parse_section,
)
from treepo_mcore.config.learn import OF_TREEPO, AdvantageConfig, Aggregation, FilterConfig, LossConfig
from treepo_mcore.config.rewards import RewardConfig
from treepo_mcore.config.rollout import (
    BranchingConfig,
    ContrastConfig,
    EarlyStopConfig,
    FallbackConfig,
    PruningConfig,
    RolloutConfig,
    StoppingConfig,
    TreeConfig,
)
from treepo_mcore.config.run import (
    NEWEST_CHECKPOINT,
    CommConfig,
    DataConfig,
    HeldOutConfig,
    Holder,
    MemoryConfig,
    ModelConfig,
    PromptsConfig,
    RunConfig,
    TrainerConfig,
    TrainingSetConfig,
)
from treepo_mcore.config.whole import Config, check_grid

__all__ = [
    "NEWEST_CHECKPOINT",
    "OF_TREEPO",
    "ActorConfig",
    "AdvantageConfig",
    "Aggregation",
    "BranchingConfig",
    "CommConfig",
    "Config",
    "ConfigError",
    "ContrastConfig",
    "DataConfig",
    "EarlyStopConfig",
    "FallbackConfig",
    "FilterConfig",
    "HeldOutConfig",
    "Holder",
    "IntRange",
    "LossConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "PruningConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "Section",
    "StoppingConfig",
    "TrainerConfig",
    "TrainingSetConfig",
    "TreeConfig",
    "apply_override",
    "check_grid",
    "did_you_mean",
    "differences",
    "dump_config",
    "load_config",
    "parse_config",
    "parse_section",
]
