"""What a weight is worth: one row per criterion (section 4 of the design's ALGORITHM, sections 3 and on of METHODS)."""

from capcli.pruning.criteria.first_order import FIRST_ORDER
from capcli.pruning.criteria.fisher import FISHER
from capcli.pruning.criteria.kwon import KWON
from capcli.pruning.criteria.layerwise import MULTIFLOW, SDS, WANDA
from capcli.pruning.criteria.magnitude import MAGNITUDE
from capcli.pruning.criteria.movement import MOVEMENT, SMP, SOFT_MOVEMENT
from capcli.pruning.criteria.obert import OBERT
from capcli.pruning.criteria.seat import Criterion
from capcli.pruning.criteria.sensitivity import PINS, PLATON
from capcli.pruning.criteria.sparsegpt import SPARSEGPT

CRITERIA: dict[str, Criterion] = {
    "magnitude": MAGNITUDE,
    "movement": MOVEMENT,
    "soft-movement": SOFT_MOVEMENT,
    "smp": SMP,
    "first-order": FIRST_ORDER,
    "fisher": FISHER,
    "obert": OBERT,
    "kwon": KWON,
    "platon": PLATON,
    "pins": PINS,
    "wanda": WANDA,
    "multiflow": MULTIFLOW,
    "sparsegpt": SPARSEGPT,
    "sds": SDS,
}
