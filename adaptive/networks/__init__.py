"""Networks that can stop early: backbone, exits, collaboration, equilibrium, cost."""
