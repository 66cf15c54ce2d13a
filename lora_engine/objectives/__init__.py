"""What training minimises: one file an objective, each a pure function of log-probabilities."""

from lora_engine.objectives.base import Loss, Mean, Objective, Reads, TargetScores, Teacher
from lora_engine.objectives.cpo import CPO
from lora_engine.objectives.distill import Distill
from lora_engine.objectives.domain import Domain
from lora_engine.objectives.dpo import DPO
from lora_engine.objectives.grpo import GRPO
from lora_engine.objectives.kto import KTO
from lora_engine.objectives.orpo import ORPO
from lora_engine.objectives.ppo import PPO
from lora_engine.objectives.reward import Reward
from lora_engine.objectives.sft import SFT
from lora_engine.objectives.simpo import SimPO

__all__ = [
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "PPO",
    "SFT",
    "Distill",
    "Domain",
    "Loss",
    "Mean",
    "Objective",
    "Reads",
    "Reward",
    "SimPO",
    "TargetScores",
    "Teacher",
]
