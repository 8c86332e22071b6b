"""The synthetic world: a mechanistic septic patient in which the truth is known."""

from worldmodel.synthetic.generate import Truth, generate
from worldmodel.synthetic.view import History, Policy, View
from worldmodel.synthetic.world import Config, Params, State, Transition, reset, step

__all__ = [
    "Config",
    "History",
    "Params",
    "Policy",
    "State",
    "Transition",
    "Truth",
    "View",
    "generate",
    "reset",
    "step",
]
