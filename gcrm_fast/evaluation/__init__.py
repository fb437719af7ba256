"""How good rewards and Q-values are: measures, votes, result folders, plots, the inspect page."""
