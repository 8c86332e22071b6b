"""A local page to look into one patient: history, counterfactual futures, policies, dialogues."""
