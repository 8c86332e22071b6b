"""An agent that proposes treatments, has them simulated, refines and prescribes."""
