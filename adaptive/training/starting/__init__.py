"""How a run begins: the settings and weights that it takes over from elsewhere, and what must not stay random."""
