"""Care that the 25 actions do not contain: ventilation, sedation and oxygen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from worldmodel.synthetic.body import Latent, PhysiologyParams
from worldmodel.synthetic.noise import Noise
from worldmodel.synthetic.patients import Traits
from worldmodel.synthetic.physiology import pf_ratio


@struct.dataclass
class SupportParams:
    """How clinicians ventilate: chances per step, logits."""

    intubate: float = -6.2  # logit per step at no distress
    intubate_lung: float = 5.0  # logit per unit of lung injury
    intubate_brain: float = 3.5
    intubate_shock: float = 1.5
    admission: float = 2.4  # logit added at admission: intubated before the ICU
    extubate: float = 1.35  # logit per step at no distress
    extubate_distress: float = -6.0  # logit per unit of lung + brain + perfusion distress
    target_pao2: float = 88.0  # mmHg that the oxygen fraction is set for
    fio2_ventilated_low: float = 40.0  # %, usual floor on a ventilator
    fio2_noise: float = 0.12  # log


@struct.dataclass
class Support:
    """Respiratory support of one patient."""

    ventilated: jax.Array  # [] bool
    fio2: jax.Array  # [] %


def update(
    previous: Support | None,
    latent: Latent,
    traits: Traits,
    noise: Noise,
    params: SupportParams,
    physiology: PhysiologyParams,
) -> Support:
    """Support in the next step; `previous` is None at admission."""
    start = (
        params.intubate
        + params.intubate_lung * latent.lung
        + params.intubate_brain * latent.brain
        + params.intubate_shock * latent.hypoperfusion
    )
    if previous is None:
        chance = jax.nn.sigmoid(start + params.admission)
    else:
        distress = latent.lung + 0.6 * latent.brain + 0.6 * latent.hypoperfusion
        stop = jax.nn.sigmoid(params.extubate + params.extubate_distress * distress)
        chance = jnp.where(previous.ventilated, 1.0 - stop, jax.nn.sigmoid(start))
    ventilated = noise.event["ventilation"] < chance
    wanted = 100.0 * params.target_pao2 / pf_ratio(latent.lung, traits, physiology)
    wanted *= jnp.exp(params.fio2_noise * noise.process["oxygen"])
    floor = jnp.where(ventilated, params.fio2_ventilated_low, 21.0)
    fio2 = jnp.clip(wanted, floor, jnp.where(ventilated, 100.0, 70.0))
    return Support(ventilated=ventilated, fio2=fio2)
