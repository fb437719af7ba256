"""How good rewards and Q-values are: measures, votes, tables, plots."""
