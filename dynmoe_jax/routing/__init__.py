"""Routing of tokens to experts: pure functions of tokens and router logits.

One file for each router; importing the room registers it.  Knows no transport, no mesh and no
weights of experts.
"""

from dynmoe_jax.routing import controllers, losses, regularizers, transforms
from dynmoe_jax.routing.block_ffn import BlockFFN
from dynmoe_jax.routing.dense import Dense
from dynmoe_jax.routing.expert_choice import ExpertChoice
from dynmoe_jax.routing.expert_threshold import ExpertThreshold
from dynmoe_jax.routing.hashing import Hash
from dynmoe_jax.routing.moe_plus_plus import MoEPlusPlus
from dynmoe_jax.routing.noisy_top_k import NoisyTopK
from dynmoe_jax.routing.null_experts import NullExperts
from dynmoe_jax.routing.record import ExpertSlots, Routing, SoftSlots
from dynmoe_jax.routing.relu import ReLU
from dynmoe_jax.routing.router import Bounds, Parameter, Router, RouterInput
from dynmoe_jax.routing.seq_top_k import SeqTopK
from dynmoe_jax.routing.shared_null import SharedNull
from dynmoe_jax.routing.sigmoid_bias import SigmoidBias
from dynmoe_jax.routing.soft import Soft, Sphero
from dynmoe_jax.routing.top_any import TopAny
from dynmoe_jax.routing.top_k import TopK
from dynmoe_jax.routing.top_p import TopP, top_p_slots
from dynmoe_jax.routing.zero_computation import ZeroComputation

__all__ = [
    "BlockFFN",
    "Bounds",
    "Dense",
    "ExpertChoice",
    "ExpertSlots",
    "ExpertThreshold",
    "Hash",
    "MoEPlusPlus",
    "NoisyTopK",
    "NullExperts",
    "Parameter",
    "ReLU",
    "Router",
    "RouterInput",
    "Routing",
    "SeqTopK",
    "SharedNull",
    "SigmoidBias",
    "Soft",
    "SoftSlots",
    "Sphero",
    "TopAny",
    "TopK",
    "TopP",
    "ZeroComputation",
    "controllers",
    "losses",
    "regularizers",
    "top_p_slots",
    "transforms",
]
