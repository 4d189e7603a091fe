"""The hold-out: training images that become a split of their own, chosen by class, twins kept together."""
