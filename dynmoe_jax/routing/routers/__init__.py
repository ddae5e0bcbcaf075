"""Routers, one file each; importing the room registers them."""

from dynmoe_jax.routing.routers.block_ffn import BlockFFN
from dynmoe_jax.routing.routers.dense import Dense
from dynmoe_jax.routing.routers.expert_choice import ExpertChoice
from dynmoe_jax.routing.routers.expert_threshold import ExpertThreshold
from dynmoe_jax.routing.routers.gumbel import Gumbel
from dynmoe_jax.routing.routers.hashing import Hash
from dynmoe_jax.routing.routers.moe_plus_plus import MoEPlusPlus
from dynmoe_jax.routing.routers.noisy_top_k import NoisyTopK
from dynmoe_jax.routing.routers.null_experts import NullExperts
from dynmoe_jax.routing.routers.relu import ReLU
from dynmoe_jax.routing.routers.seq_top_k import SeqTopK
from dynmoe_jax.routing.routers.shared_null import SharedNull
from dynmoe_jax.routing.routers.sigmoid_bias import SigmoidBias
from dynmoe_jax.routing.routers.soft import Soft, Sphero
from dynmoe_jax.routing.routers.threshold import Threshold
from dynmoe_jax.routing.routers.top_any import TopAny
from dynmoe_jax.routing.routers.top_k import TopK
from dynmoe_jax.routing.routers.top_p import TopP, top_p_slots
from dynmoe_jax.routing.routers.zero_computation import ZeroComputation

__all__ = [
    "BlockFFN",
    "Dense",
    "ExpertChoice",
    "ExpertThreshold",
    "Gumbel",
    "Hash",
    "MoEPlusPlus",
    "NoisyTopK",
    "NullExperts",
    "ReLU",
    "SeqTopK",
    "SharedNull",
    "SigmoidBias",
    "Soft",
    "Sphero",
    "Threshold",
    "TopAny",
    "TopK",
    "TopP",
    "ZeroComputation",
    "top_p_slots",
]
