"""Early-exit networks: backbone, exits, Gradient Equilibrium (GE), collaboration between exits (ISC), cost."""
