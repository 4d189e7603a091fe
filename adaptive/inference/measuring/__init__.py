"""Measuring of networks against one another: what is timed, in which order, and what may be read out of it."""
